"""Modules for a training run: its directory, checkpoints, processes, guards and tracking."""
