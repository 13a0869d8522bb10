"""How good the scores of generated images could be, measured with real images, repeated trials and other seeds."""
