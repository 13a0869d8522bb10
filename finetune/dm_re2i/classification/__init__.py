"""Baselines of EVRNet, the metrics of classifiers, and the comparison of EVRNet with its baselines."""
