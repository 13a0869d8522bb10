"""Evaluate a folder of generated images: metrics, controls and a report."""
