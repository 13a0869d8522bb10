"""Masked-signal pretraining: the training loop, its DeepSpeed engine, its configuration, validation and plots."""
