"""Training loop with Accelerate, which ``dreamscale align`` and the papers share."""
