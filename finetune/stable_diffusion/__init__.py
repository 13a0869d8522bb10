"""DreamDiffusion: Stable Diffusion fine-tuned on EEG (arXiv 2306.16934)."""
