"""The pretrained encoder for users: ``EEGEncoder.from_pretrained(path).encode(recording)``."""

from pretrain.encoder.encoder import EEGEncoder

__all__ = ["EEGEncoder"]
