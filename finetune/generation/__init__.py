"""Generate images from EEG trials: config, choice of the EEG, and a folder that keeps finished images after a stop."""
