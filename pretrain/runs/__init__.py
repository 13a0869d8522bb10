"""A run of training: its directory, checkpoints, processes, guards and tracking."""
