"""Dataset to encoder: the masked-signal autoencoder, its training, export and probes."""
