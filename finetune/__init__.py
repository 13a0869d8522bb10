"""Generate images from EEG: alignment with CLIP, Stable Diffusion, DM-RE2I, and the evaluation of images."""
