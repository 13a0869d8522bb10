"""Resampling, filtering and windowing of signals, and the survey of their units."""
