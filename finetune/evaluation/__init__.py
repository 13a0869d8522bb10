"""Metrics, controls and the report for a folder of generated images."""
