"""The masked-signal autoencoder of DreamDiffusion: tokens over time, mask over time, all channels together.

Letters in names: B samples, C channels, T time samples, N tokens, K visible tokens, D width, H heads, E width of a
head, P values of a token (C x patch).

References
----------
.. [1] Bai et al., "DreamDiffusion: generating high-quality images from brain EEG signals", arXiv 2306.16934.
.. [2] He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.
.. [3] Trockman and Kolter, "Mimetic initialization of self-attention layers", ICML 2023.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder."""

    channels: int = 128
    """Channels of the input, after padding by replication."""
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
        """Number of tokens of a window, without the class token."""
        return self.samples // self.patch


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
class MaskedAutoencoderConfig:
    """Shape and objective of the masked-signal autoencoder."""

    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    """The part that is kept."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """The part that is dropped after pretraining."""
    mask_ratio: float = 0.75
    """Share of a window's tokens that is hidden from the encoder (0.75 in the paper, 0.1 in the released code)."""
    normalize_targets: bool = False
    """Score every token against its own mean and standard deviation instead of its raw values."""
    mimetic: float = 0.0
    """How much a token prefers its neighbours in time at the start (queries and keys begin alike); 0 as published.
    Small models on little data otherwise predict zero for hundreds of steps before they find their neighbours."""

    def __post_init__(self) -> None:
        if self.mimetic < 0:
            raise ValueError(f"model.mimetic is {self.mimetic}; it must not be negative")
        visible = visible_tokens(self.encoder.tokens, self.mask_ratio) if 0 < self.mask_ratio < 1 else 0
        if not 0 < visible < self.encoder.tokens:
            raise ValueError(
                f"model.mask_ratio is {self.mask_ratio}; of {self.encoder.tokens} tokens it must hide at least one "
                "and leave at least one"
            )


def _check_width(prefix: str, dim: int, heads: int, mlp_ratio: float) -> None:
    if dim % 2 or dim % heads:
        raise ValueError(f"{prefix}dim is {dim}; it must be even and a multiple of {prefix}heads ({heads})")
    if int(dim * mlp_ratio) < 1:
        raise ValueError(f"{prefix}mlp_ratio is {mlp_ratio}; it must be positive")


def visible_tokens(tokens: int, mask_ratio: float) -> int:
    """Count the tokens that the encoder sees.

    Parameters
    ----------
    tokens : int
        Tokens of a window.
    mask_ratio : float
        Share hidden, between 0 and 1.

    Returns
    -------
    int
        The same for every sample, so that a batch stays rectangular.
    """
    # Rounded first: 1 - 0.9 is a hair below 0.1, and truncation would lose a token.
    return int(round(tokens * (1.0 - mask_ratio), 6))


def sincos_positions(length: int, dim: int) -> Tensor:
    """Fixed sine and cosine position code.

    Parameters
    ----------
    length : int
        Number of positions.
    dim : int
        Width, even.

    Returns
    -------
    Tensor, [length, dim], float32
        Sines in the first half of the columns, cosines in the second.
    """
    # The processor by name: a model built on the meta device still gets real numbers.
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class Attention(nn.Module):
    """Multi-head self-attention.

    Parameters
    ----------
    dim : int
        Width of a token.
    heads : int
        Number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Attend among the tokens of each sample.

        Parameters
        ----------
        x_BND : Tensor, [B, N, D]
            Tokens.

        Returns
        -------
        Tensor, [B, N, D]
            Attended tokens.
        """
        B, N, D = x_BND.shape
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        return self.proj(y_BHNE.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a perceptron, each beside a skip.

    Parameters
    ----------
    dim : int
        Width of a token.
    heads : int
        Attention heads.
    mlp_ratio : float
        Hidden width of the perceptron as a multiple of `dim`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Transform the tokens of each sample.

        Parameters
        ----------
        x_BND : Tensor, [B, N, D]
            Tokens.

        Returns
        -------
        Tensor, [B, N, D]
            Transformed tokens.
        """
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.fc2(F.gelu(self.fc1(self.norm2(x_BND))))


class SignalEncoder(nn.Module):
    """A window of EEG to tokens over time.

    Parameters
    ----------
    config : EncoderConfig
        Shape.
    """

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv1d(config.channels, config.dim, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        # A function of the shape, so no part of the weights. The class token's position is zero.
        self.register_buffer("positions_ND", sincos_positions(config.tokens, config.dim), persistent=False)
        _initialise(self)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(config.dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x_BCT: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Encode windows.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal, padded to the encoder's channels.
        keep_BK : Tensor, [B, K], int64, optional
            Tokens that may be seen, in rising order; all of them by default.

        Returns
        -------
        Tensor, [B, 1 + K, D]
            The class token, then the (visible) tokens in the order of time.
        """
        x_BCT = x_BCT.to(self.patch_embed.weight.dtype)
        x_BND = self.patch_embed(x_BCT).transpose(1, 2) + self.positions_ND.to(x_BCT.dtype)
        if keep_BK is not None:
            x_BND = x_BND.gather(1, keep_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))
        x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND)


class SignalDecoder(nn.Module):
    """Visible tokens to the signal of every token.

    Parameters
    ----------
    config : DecoderConfig
        Shape.
    encoder : EncoderConfig
        Shape of the encoder that it follows.
    """

    positions_ND: Tensor

    def __init__(self, config: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.predict = nn.Linear(config.dim, encoder.channels * encoder.patch)
        self.register_buffer("positions_ND", sincos_positions(encoder.tokens, config.dim), persistent=False)
        _initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x_BKD: Tensor, keep_BK: Tensor) -> Tensor:
        """Predict the signal.

        Parameters
        ----------
        x_BKD : Tensor, [B, 1 + K, D]
            The encoder's output: class token, then visible tokens.
        keep_BK : Tensor, [B, K], int64
            Which tokens these are.

        Returns
        -------
        Tensor, [B, N, P]
            Values of every token, visible or not, channels first.
        """
        x_BKD = self.embed(x_BKD)
        B, _, D = x_BKD.shape
        N = self.positions_ND.shape[0]
        x_BND = (
            self.mask_token.to(x_BKD.dtype)
            .expand(B, N, D)
            .scatter(1, keep_BK.unsqueeze(-1).expand(-1, -1, D), x_BKD[:, 1:])
        )
        x_BND = torch.cat([x_BKD[:, :1], x_BND + self.positions_ND.to(x_BKD.dtype)], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.predict(self.norm(x_BND)[:, 1:])


class MaskedAutoencoder(nn.Module):
    """Asymmetric masked autoencoder over windows of EEG.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Shape and objective.

    Notes
    -----
    Which tokens are hidden is the caller's to say (`pretrain.masking`), so that the masks depend on the seed and on
    the sample, never on the number of processes.
    """

    def __init__(self, config: MaskedAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SignalEncoder(config.encoder)
        self.decoder = SignalDecoder(config.decoder, config.encoder)
        if config.mimetic:
            for block in (*self.encoder.blocks, *self.decoder.blocks):
                assert isinstance(block, Block)
                _make_mimetic(block.attn, config.mimetic)

    def tokenize(self, x_BCT: Tensor) -> Tensor:
        """Cut windows into the values of their tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Signal.

        Returns
        -------
        Tensor, [B, N, P]
            Values by token, channels first, then time within the token.
        """
        B, C, T = x_BCT.shape
        patch = self.config.encoder.patch
        return x_BCT.reshape(B, C, T // patch, patch).permute(0, 2, 1, 3).reshape(B, T // patch, C * patch)

    def untokenize(self, y_BNP: Tensor) -> Tensor:
        """Join the values of tokens to windows; the inverse of `tokenize`.

        Parameters
        ----------
        y_BNP : Tensor, [B, N, P]
            Values by token.

        Returns
        -------
        Tensor, [B, C, T]
            Signal.
        """
        B, N, P = y_BNP.shape
        patch = self.config.encoder.patch
        return y_BNP.reshape(B, N, P // patch, patch).permute(0, 2, 1, 3).reshape(B, P // patch, N * patch)

    def targets(self, x_BCT: Tensor) -> Tensor:
        """What the decoder is asked for.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.

        Returns
        -------
        Tensor, [B, N, P], float32
            Values by token; each token standardised where the config says so.
        """
        target_BNP = self.tokenize(x_BCT.float())
        if self.config.normalize_targets:
            mean_BN1 = target_BNP.mean(dim=-1, keepdim=True)
            var_BN1 = target_BNP.var(dim=-1, keepdim=True)
            target_BNP = (target_BNP - mean_BN1) / (var_BN1 + 1e-6).sqrt()
        return target_BNP

    def reconstruct(self, x_BCT: Tensor, keep_BK: Tensor) -> Tensor:
        """Predict every token from the visible ones.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Visible tokens.

        Returns
        -------
        Tensor, [B, N, P]
            Predicted values by token.
        """
        return self.decoder(self.encoder(x_BCT, keep_BK), keep_BK)

    def forward(self, x_BCT: Tensor, keep_BK: Tensor) -> Tensor:
        """Loss of each sample on its hidden tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Visible tokens; the same number for every sample.

        Returns
        -------
        Tensor, [B], float32
            Mean squared error over the values of the hidden tokens.
        """
        predicted_BNP = self.reconstruct(x_BCT, keep_BK)
        error_BN = (predicted_BNP.float() - self.targets(x_BCT)).square().mean(dim=-1)
        hidden_BN = torch.ones_like(error_BN).scatter(1, keep_BK, 0.0)
        return (error_BN * hidden_BN).sum(dim=1) / (error_BN.shape[1] - keep_BK.shape[1])


def count_parameters(module: nn.Module) -> int:
    """Count the trainable values of a module.

    Parameters
    ----------
    module : nn.Module
        Any module, also on the meta device.

    Returns
    -------
    int
        Trainable values; fixed positions are none.
    """
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@torch.no_grad()
def _make_mimetic(attention: Attention, gain: float) -> None:
    """Start queries and keys alike, so that tokens of close positions attend to each other from the first step."""
    dim = attention.proj.weight.shape[0]
    query_DD = torch.randn(dim, dim, device=attention.qkv.weight.device) * (gain / dim) ** 0.5
    attention.qkv.weight[:dim] = query_DD
    attention.qkv.weight[dim : 2 * dim] = query_DD


def _initialise(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
