"""The training loop that align and the papers share, on Accelerate."""
