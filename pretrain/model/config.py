"""The configuration of the masked autoencoder: its architecture, its objective and its computation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pretrain.model.masking import visible_tokens
from pretrain.model.tokenizer import TOKENIZERS

AttentionKind = Literal["auto", "sdpa", "plain"]
"""How attention is computed; see `ComputeConfig.attention`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of the encoder."""

    tokenizer: Literal["temporal", "montage"] = "temporal"
    """How a window is divided into tokens. temporal: each token holds a few time samples of all channels, as in
    DreamDiffusion. montage: each token holds a few time samples of one channel, and the position of this channel's
    electrode is added to the token."""
    channels: int = 128
    """Temporal tokenizer: number of channels to which the input is padded by replication. Montage tokenizer: largest
    number of channels of the input."""
    samples: int = 512
    """Number of time samples in one window."""
    patch: int = 4
    """Number of neighbouring time samples in one token."""
    dim: int = 1024
    """Width of a token."""
    depth: int = 24
    """Number of transformer blocks."""
    heads: int = 16
    """Number of attention heads; it must divide `dim`."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' perceptrons as a multiple of `dim` (DreamDiffusion: 4.0 in the paper, 1.0 in the
    code)."""
    class_token: bool = True
    """Add a learned class token to the tokens of the signal. Pretraining needs the class token. DreamDiffusion's code
    fine-tunes the encoder without a class token."""
    learned_positions: bool = False
    """Temporal tokenizer only: train the position embeddings. They are initialised with sines and cosines.
    DreamDiffusion's code trains the position embeddings in fine-tuning, but not in pretraining."""

    def __post_init__(self) -> None:
        for name in ("channels", "samples", "patch", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.encoder.{name} is {getattr(self, name)}; it must be at least 1")
        if self.samples % self.patch:
            raise ValueError(
                f"model.encoder.samples is {self.samples}; it must be a multiple of model.encoder.patch ({self.patch})"
            )
        _check_width("model.encoder.", self.dim, self.heads, self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Number of tokens along the time axis of a window (N in tensor names), without the class token."""
        return self.samples // self.patch

    @property
    def by_channel(self) -> bool:
        """True if each token holds the signal of one channel only; False if it holds the signal of all channels."""
        return TOKENIZERS[self.tokenizer].by_channel

    @property
    def about(self) -> str:
        """Sentence about the tokenizer that `dreamscale export` writes into the encoder's model card."""
        return TOKENIZERS[self.tokenizer].about

    @property
    def scale_rows(self) -> str:
        """Text for the model card that names the rows (channels) over which the scale of a window is computed."""
        return TOKENIZERS[self.tokenizer].scale_rows(self.channels)

    @property
    def program_usage(self) -> str:
        """Sentence that explains how to call the exported program, for the model card."""
        return TOKENIZERS[self.tokenizer].program_usage(self.channels, self.samples)

    def token_rows(self, channels: int | None = None) -> int:
        """Return the number of rows of tokens: 1 (temporal tokenizer), or one row for each channel (montage tokenizer).

        Parameters
        ----------
        channels : int, optional
            Number of recorded channels of the window; `self.channels` by default.

        Returns
        -------
        int
            Number of rows. Each row has `self.tokens` tokens; the class token does not belong to any row.
        """
        return TOKENIZERS[self.tokenizer].token_rows(channels or self.channels)

    def signal_rows(self, channels: int | None = None) -> int:
        """Return how many rows of a window the model reads if `channels` of the rows are recorded channels."""
        return TOKENIZERS[self.tokenizer].signal_rows(channels or self.channels, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of the decoder; the decoder is used in pretraining only."""

    dim: int = 512
    """Width of a token."""
    depth: int = 8
    """Number of transformer blocks."""
    heads: int = 16
    """Number of attention heads; it must divide `dim`."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' perceptrons as a multiple of `dim`."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.decoder.{name} is {getattr(self, name)}; it must be at least 1")
        _check_width("model.decoder.", self.dim, self.heads, self.mlp_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed, e.g. by which implementation of attention.

    These settings change the results of the model only by rounding errors.
    """

    attention: AttentionKind = "auto"
    """Implementation of attention. sdpa: PyTorch's fused attention. plain: two matrix products and a softmax. auto:
    plain for bf16 on a CPU, where plain is faster; sdpa in all other cases."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the input of each block, and compute the block again in the backward pass.
    With activation checkpointing, a training step needs far less memory, but a third more computation."""
    compile: bool = False
    """Compile each block with torch.compile; possible with zero_stage 0, 1 or 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig:
    """Architecture and objective of the masked-signal autoencoder."""

    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """Architecture of the encoder; only the encoder is kept after pretraining."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """Architecture of the decoder; the decoder is used in pretraining only."""
    mask_ratio: float = 0.75
    """Share of a window's tokens that is hidden from the encoder (DreamDiffusion: 0.75 in the paper, 0.1 in the
    code)."""
    mask_block: int = 1
    """Number of neighbouring tokens that are hidden together; 1 in DreamDiffusion's paper. Hiding single tokens can be
    too easy a task: neighbouring tokens are so similar that a model can fill a single gap by interpolation."""
    mask_each_channel: bool = False
    """Montage tokenizer only: draw a separate mask for each channel. Without separate masks, the same times are hidden
    in all channels, as in DreamDiffusion. With separate masks, the task is easier: a model can copy the hidden signal
    from a neighbouring electrode, because neighbouring electrodes record nearly the same signal."""
    normalize_targets: bool = False
    """Scale the values of each token that the decoder must predict to mean 0 and variance 1."""
    channel_dropout: float = 0.0
    """Probability with which a channel is hidden from the encoder in training; 0 in DreamDiffusion's paper. The decoder
    must still predict a hidden channel."""
    mimetic: float = 0.0
    """Strength of the mimetic initialisation: queries and keys start with equal weights, so that a token attends to its
    neighbours in time from the first step. 0 (as in DreamDiffusion's paper) switches the mimetic initialisation off.
    Without mimetic initialisation, small models on little data predict zero for hundreds of steps."""
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    """How the model is computed."""

    def __post_init__(self) -> None:
        if not self.encoder.class_token:
            raise ValueError(
                "model.encoder.class_token is false, but pretraining needs the class token; set it to true"
            )
        if not 0 <= self.channel_dropout < 1:
            raise ValueError(f"model.channel_dropout is {self.channel_dropout}; it must be from 0 to below 1")
        if self.mask_each_channel and not self.encoder.by_channel:
            raise ValueError("model.mask_each_channel needs model.encoder.tokenizer: montage")
        if self.normalize_targets and self.encoder.by_channel and self.encoder.patch < 2:
            raise ValueError(
                "with the montage tokenizer, model.normalize_targets needs a model.encoder.patch of at least 2; set a "
                "larger patch, or model.normalize_targets: false"
            )
        if self.mimetic < 0:
            raise ValueError(f"model.mimetic is {self.mimetic}; it must not be negative")
        visible = visible_tokens(self.encoder.tokens, self.mask_ratio) if 0 < self.mask_ratio < 1 else 0
        if not 0 < visible < self.encoder.tokens:
            raise ValueError(
                f"model.mask_ratio is {self.mask_ratio}; it must hide at least one of the {self.encoder.tokens} tokens "
                "and leave at least one visible"
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
