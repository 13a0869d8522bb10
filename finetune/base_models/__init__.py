"""Pretrained image generators on which a model for EEG is built: where they come from, and how they are checked."""
