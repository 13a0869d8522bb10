"""Encoder and EEG-image dataset to images: alignment, Stable Diffusion, DM-RE2I, evaluation."""
