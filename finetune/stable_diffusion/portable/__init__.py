"""Store a fine-tuned Stable Diffusion as a pipeline of diffusers that can be loaded without this project."""
