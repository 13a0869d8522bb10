"""Named architectures of the masked autoencoder. For each preset, `configs/pretrain/` has a config of the same name."""

from __future__ import annotations

from pretrain.model.config import ComputeConfig, DecoderConfig, EncoderConfig, MaskedAutoencoderConfig

_TINY_DECODER = DecoderConfig(dim=96, depth=2, heads=4, mlp_ratio=2.0)

PRESETS: dict[str, MaskedAutoencoderConfig] = {
    # For the demo: a small model for windows of one second at 128 Hz, which trains in minutes on two CPU cores.
    "tiny": MaskedAutoencoderConfig(
        encoder=EncoderConfig(samples=128, dim=160, depth=4, heads=4, mlp_ratio=2.0),
        decoder=_TINY_DECODER,
        mask_ratio=0.5,
        mimetic=3.0,
    ),
    # The model in DreamDiffusion's released code: 151.8M parameters in the encoder, 13.4M in the decoder, one tenth of
    # the tokens hidden.
    "released": MaskedAutoencoderConfig(
        encoder=EncoderConfig(mlp_ratio=1.0), decoder=DecoderConfig(mlp_ratio=1.0), mask_ratio=0.1
    ),
    # The model in DreamDiffusion's paper ("297M"): 302.8M parameters in the encoder, three quarters of the tokens
    # hidden.
    "paper": MaskedAutoencoderConfig(),
    # The model sizes of the ablation in DreamDiffusion's paper. The paper gives only the numbers of parameters; we
    # chose width and depth.
    "18m": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=256, depth=23, heads=4)),
    "74m": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=640, depth=15, heads=10)),
    "162m": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=800, depth=21, heads=10)),
    "458m": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=1280, depth=24, heads=20, mlp_ratio=3.8125)),
    # Models larger than those in DreamDiffusion's paper.
    "1b": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=1792, depth=26, heads=28)),
    "3b": MaskedAutoencoderConfig(encoder=EncoderConfig(dim=2560, depth=38, heads=20)),
    # Montage tokenizer, for recordings of any montage. At 256 Hz a token is an eighth of a second of one channel.
    "montage": MaskedAutoencoderConfig(
        encoder=EncoderConfig(tokenizer="montage", patch=32, dim=512, depth=12, heads=8),
        decoder=DecoderConfig(dim=256, depth=4, heads=4),
        mask_block=2,
        compute=ComputeConfig(checkpointing=True),
    ),
    # Montage tokenizer in a small model, for the demo.
    "tiny_montage": MaskedAutoencoderConfig(
        encoder=EncoderConfig(tokenizer="montage", samples=128, patch=16, dim=160, depth=4, heads=4, mlp_ratio=2.0),
        decoder=_TINY_DECODER,
        mask_ratio=0.5,
        mimetic=3.0,
    ),
}
"""Architecture and objective of the model for each preset name."""
