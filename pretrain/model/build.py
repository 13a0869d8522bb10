"""Build the model that a config describes. Only this file chooses classes by the name of the tokenizer."""

from __future__ import annotations

from torch import nn

from pretrain.model.autoencoder import MaskedAutoencoder, SignalEncoder
from pretrain.model.config import EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.montage import MontageAutoencoder, MontageEncoder

_MODELS: dict[str, tuple[type[SignalEncoder | MontageEncoder], type[MaskedAutoencoder]]] = {
    "temporal": (SignalEncoder, MaskedAutoencoder),
    "montage": (MontageEncoder, MontageAutoencoder),
}


def build_encoder(config: EncoderConfig) -> SignalEncoder | MontageEncoder:
    """Build an encoder with new weights."""
    return _MODELS[config.tokenizer][0](config)


def build_autoencoder(config: MaskedAutoencoderConfig) -> MaskedAutoencoder:
    """Build an autoencoder with new weights."""
    return _MODELS[config.encoder.tokenizer][1](config)


def count_parameters(module: nn.Module) -> int:
    """Count the trainable parameters of a module; the module may be on the meta device."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
