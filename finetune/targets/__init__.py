"""What a model learns to match: embeddings and latents of images and captions, kept beside the dataset for all runs."""
