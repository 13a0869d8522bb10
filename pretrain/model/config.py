"""Shape, objective and computation of the masked-signal autoencoder, as a config says them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pretrain.model.masking import visible_tokens
from pretrain.model.tokenizer import TOKENIZERS

AttentionKind = Literal["auto", "sdpa", "plain"]
"""How attention is computed; see `ComputeConfig.attention`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder."""

    tokenizer: Literal["temporal", "montage"] = "temporal"
    """temporal: a token is a moment of all channels together, as in DreamDiffusion; montage: a moment of one channel,
    which carries its electrode's place (`pretrain.model.montage`)."""
    channels: int = 128
    """Channels of the input, after padding by replication; for montage the most there may be."""
    samples: int = 512
    """Time samples of one window."""
    patch: int = 4
    """Neighbouring time samples that make one token."""
    dim: int = 1024
    """Width of a token."""
    depth: int = 24
    """Transformer blocks."""
    heads: int = 16
    """Attention heads; must divide `dim`."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' perceptrons as a multiple of `dim` (4.0 in the paper, 1.0 in the released code)."""
    class_token: bool = True
    """A learned token beside those of the signal. False is how DreamDiffusion's code runs the encoder when it
    fine-tunes; pretraining needs it."""
    learned_positions: bool = False
    """Temporal tokenizer only: positions in time are weights, which begin as the fixed code. The code of
    DreamDiffusion trains them when it fine-tunes, though not before."""

    def __post_init__(self) -> None:
        for name in ("channels", "samples", "patch", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.encoder.{name} is {getattr(self, name)}; it must be at least 1")
        if self.samples % self.patch:
            raise ValueError(
                f"model.encoder.samples is {self.samples}, which is no multiple of model.encoder.patch {self.patch}"
            )
        _check_width("model.encoder.", self.dim, self.heads, self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Number of tokens along a window, without the class token."""
        return self.samples // self.patch

    @property
    def by_channel(self) -> bool:
        """Whether a token belongs to a single channel."""
        return TOKENIZERS[self.tokenizer].by_channel

    @property
    def about(self) -> str:
        """One sentence about the tokens, for the model card."""
        return TOKENIZERS[self.tokenizer].about

    @property
    def scale_rows(self) -> str:
        """Rows over which the scale of a window is computed, in words for the model card."""
        return TOKENIZERS[self.tokenizer].scale_rows(self.channels)

    @property
    def program_usage(self) -> str:
        """How to call the exported program, for the model card."""
        return TOKENIZERS[self.tokenizer].program_usage(self.channels, self.samples)

    def token_rows(self, channels: int | None = None) -> int:
        """Count the rows of tokens of a window.

        Parameters
        ----------
        channels : int, optional
            True channels of the window; `self.channels` by default.

        Returns
        -------
        int
            The window has this many times `self.tokens` tokens, without the class token.
        """
        return TOKENIZERS[self.tokenizer].token_rows(channels or self.channels)

    def signal_rows(self, channels: int | None = None) -> int:
        """Count the rows of signal that the model reads of a window with this many true channels (all by default)."""
        return TOKENIZERS[self.tokenizer].signal_rows(channels or self.channels, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of the decoder, which is dropped after pretraining."""

    dim: int = 512
    """Width of a token."""
    depth: int = 8
    """Transformer blocks."""
    heads: int = 16
    """Attention heads; must divide `dim`."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' perceptrons as a multiple of `dim`."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.decoder.{name} is {getattr(self, name)}; it must be at least 1")
        _check_width("model.decoder.", self.dim, self.heads, self.mlp_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is learned beyond rounding."""

    attention: AttentionKind = "auto"
    """sdpa: PyTorch's fused attention; plain: two matrix products and a softmax; auto: plain for bf16 on a processor,
    where it is faster, else sdpa."""
    checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: a quarter more arithmetic,
    far less memory."""
    compile: bool = False
    """Compile each block in place with torch.compile; for zero_stage 0 to 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig:
    """Shape and objective of the masked-signal autoencoder."""

    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """The part that is kept."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """The part that is dropped after pretraining."""
    mask_ratio: float = 0.75
    """Share of a window's tokens that is hidden from the encoder (0.75 in the paper, 0.1 in the released code)."""
    mask_block: int = 1
    """Hidden tokens come in contiguous spans of this many; 1 as published. Neighbouring tokens are so alike that single
    gaps are filled by interpolation."""
    mask_each_channel: bool = False
    """Montage only: a mask of its own for every channel. Otherwise all channels are hidden at the same moments, as in
    DreamDiffusion; neighbouring electrodes see nearly the same."""
    normalize_targets: bool = False
    """Score every token against its own mean and standard deviation instead of its raw values."""
    channel_dropout: float = 0.0
    """Probability of each channel to be withheld from the encoder in training; 0 as published. It stays a target."""
    mimetic: float = 0.0
    """How much a token prefers its neighbours in time at the start (queries and keys begin alike); 0 as published.
    Small models on little data otherwise predict zero for hundreds of steps before they find their neighbours."""
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    """How it is computed."""

    def __post_init__(self) -> None:
        if not self.encoder.class_token:
            raise ValueError("model.encoder.class_token is false; pretraining needs the class token")
        if not 0 <= self.channel_dropout < 1:
            raise ValueError(f"model.channel_dropout is {self.channel_dropout}; it must be from 0 to below 1")
        if self.mask_each_channel and not self.encoder.by_channel:
            raise ValueError("model.mask_each_channel needs model.encoder.tokenizer: montage")
        if self.normalize_targets and self.encoder.by_channel and self.encoder.patch < 2:
            raise ValueError(
                "model.normalize_targets needs model.encoder.patch of at least 2 with the montage tokenizer"
            )
        if self.mimetic < 0:
            raise ValueError(f"model.mimetic is {self.mimetic}; it must not be negative")
        visible = visible_tokens(self.encoder.tokens, self.mask_ratio) if 0 < self.mask_ratio < 1 else 0
        if not 0 < visible < self.encoder.tokens:
            raise ValueError(
                f"model.mask_ratio is {self.mask_ratio}; of {self.encoder.tokens} tokens it must hide at least one "
                "and leave at least one"
            )
        if not 1 <= self.mask_block <= self.encoder.tokens - visible:
            raise ValueError(
                f"model.mask_block is {self.mask_block}; it must be from 1 to the {self.encoder.tokens - visible} "
                "tokens that model.mask_ratio hides"
            )


def _check_width(prefix: str, dim: int, heads: int, mlp_ratio: float) -> None:
    if dim % 2 or dim % heads:
        raise ValueError(f"{prefix}dim is {dim}; it must be even and a multiple of {prefix}heads ({heads})")
    if int(dim * mlp_ratio) < 1:
        raise ValueError(f"{prefix}mlp_ratio is {mlp_ratio}; it must be positive")
