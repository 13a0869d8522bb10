"""Checks of datasets: duplicates, leakage between splits, verification of files, and the report of a dataset."""
