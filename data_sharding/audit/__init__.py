"""Checks of a dataset: duplicates, leakage between splits, verification, and its report."""
