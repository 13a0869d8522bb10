"""The training loop that both papers share, on Accelerate."""
