"""Transformer blocks, and fixed position embeddings made of sines and cosines over time.

Tensor names end with the shape, such as BND in `x_BND`; the docstring of `pretrain.model` explains these letters. In
this file, N is the number of all tokens of a sequence, class token included.

References
----------
.. [1] Trockman and Kolter, "Mimetic initialization of self-attention layers", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.model.config import AttentionKind, ComputeConfig, DecoderConfig, EncoderConfig, MaskedAutoencoderConfig


def sincos_positions(length: int, dim: int) -> Tensor:
    """Return the fixed position embeddings, made of sines and cosines.

    Parameters
    ----------
    length : int
        Number of positions.
    dim : int
        Width of an embedding; it must be even.

    Returns
    -------
    Tensor, [length, dim], float32
        Position embeddings, with sines in the first half of the columns and cosines in the second half.
    """
    # Always compute on the CPU: the model may be built on the meta device, and tensors on the meta device hold no
    # numbers.
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
        self.kind: AttentionKind = "auto"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """Compute self-attention among the tokens of each sample.

        Parameters
        ----------
        x_BND : Tensor, [B, N, D]
            Tokens.
        real_BN : Tensor, [B, N], bool, optional
            False for padding tokens. No token attends to padding.

        Returns
        -------
        Tensor, [B, N, D]
            Output tokens of the attention.
        """
        B, N, D = x_BND.shape
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mask_B11N = None if real_BN is None else real_BN[:, None, None]
        bf16_on_cpu = x_BND.device.type == "cpu" and q_BHNE.dtype == torch.bfloat16
        if self.kind == "plain" or (self.kind == "auto" and bf16_on_cpu):
            score_BHNN = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHNE.transpose(-2, -1)
            if mask_B11N is not None:
                score_BHNN = score_BHNN.masked_fill(~mask_B11N, float("-inf"))
            y_BHNE = score_BHNN.softmax(dim=-1) @ v_BHNE
        else:
            y_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, attn_mask=mask_B11N)
        return self.proj(y_BHNE.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a perceptron, each with a skip connection.

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

    def forward(self, x_BND: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """Transform the tokens of each sample.

        Parameters
        ----------
        x_BND : Tensor, [B, N, D]
            Tokens.
        real_BN : Tensor, [B, N], bool, optional
            False for padding tokens.

        Returns
        -------
        Tensor, [B, N, D]
            Transformed tokens.
        """
        x_BND = x_BND + self.attn(self.norm1(x_BND), real_BN)
        return x_BND + self.fc2(F.gelu(self.fc1(self.norm2(x_BND))))


class Blocks(nn.ModuleList):
    """A stack of transformer blocks.

    Parameters
    ----------
    config : EncoderConfig or DecoderConfig
        Width, number of blocks and number of heads.
    """

    def __init__(self, config: EncoderConfig | DecoderConfig) -> None:
        super().__init__(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.checkpointing = False

    def set_compute(self, config: ComputeConfig) -> None:
        """Choose how the transformer blocks are computed.

        Parameters
        ----------
        config : ComputeConfig
            Settings of the computation.
        """
        self.checkpointing = config.checkpointing
        for block in self:
            assert isinstance(block, Block)
            block.attn.kind = config.attention
            if config.compile:
                block.compile()

    def forward(self, x_BND: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """Transform the tokens of each sample.

        Parameters
        ----------
        x_BND : Tensor, [B, N, D]
            Tokens.
        real_BN : Tensor, [B, N], bool, optional
            False for padding tokens.

        Returns
        -------
        Tensor, [B, N, D]
            Transformed tokens.
        """
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                # A transformer block draws no random numbers, so the state of the random generator need not be saved
                # for the recomputation in the backward pass.
                x_BND = checkpoint(block, x_BND, real_BN, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, real_BN)
        return x_BND


def apply_options(config: MaskedAutoencoderConfig, stacks: Iterable[Blocks]) -> None:
    """Apply the config's settings for initialisation and computation to transformer blocks.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        The model's config.
    stacks : iterable of Blocks
        The blocks of the encoder and the blocks of the decoder.
    """
    for blocks in stacks:
        if config.mimetic:
            for block in blocks:
                assert isinstance(block, Block)
                _make_mimetic(block.attn, config.mimetic)
        blocks.set_compute(config.compute)


def initialise(module: nn.Module) -> None:
    """Initialise all linear layers of a model: Xavier initialisation for weights, zero for biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)


@torch.no_grad()
def _make_mimetic(attention: Attention, gain: float) -> None:
    """Give queries and keys equal weights, so that similar tokens (neighbours) attend to each other from the start."""
    dim = attention.proj.weight.shape[0]
    query_DD = torch.randn(dim, dim, device=attention.qkv.weight.device) * (gain / dim) ** 0.5
    attention.qkv.weight[:dim] = query_DD
    attention.qkv.weight[dim : 2 * dim] = query_DD
