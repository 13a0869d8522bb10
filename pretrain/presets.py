"""Shapes of the masked autoencoder by name; `configs/pretrain/` spells the same ones out."""

from __future__ import annotations

from pretrain.model import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig

PRESETS: dict[str, MaskedAutoencoderConfig] = {
    # The demo's: one second at 128 Hz, minutes on two processor cores.
    "tiny": MaskedAutoencoderConfig(
        encoder=EncoderConfig(samples=128, dim=160, depth=4, heads=4, mlp_ratio=2.0),
        decoder=DecoderConfig(dim=96, depth=2, heads=4, mlp_ratio=2.0),
        mask_ratio=0.5,
        mimetic=3.0,
    ),
    # DreamDiffusion's released code: 151.8M in the encoder, 13.4M in the decoder, a tenth of the tokens hidden.
    "released": MaskedAutoencoderConfig(
        encoder=EncoderConfig(mlp_ratio=1.0), decoder=DecoderConfig(mlp_ratio=1.0), mask_ratio=0.1
    ),
    # DreamDiffusion's paper ("297M"): 302.8M in the encoder, three quarters hidden.
    "paper": MaskedAutoencoderConfig(),
}
"""Name to shape and objective."""
