"""The masked autoencoder: configuration, tokenizers, transformer, masking, weights."""
