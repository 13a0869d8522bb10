"""Resampling and filtering of signals, and measurements of their units and quality."""
