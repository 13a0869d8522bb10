"""A Perceiver-style resampler: learned queries read any number of EEG tokens by attention.

Tensor shapes: B trials, N EEG tokens of width D, L condition tokens of width W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResamplerLayer(nn.Module):
    """One layer of the resampler: the queries attend to the tokens and to each other, then a feed-forward network.

    Parameters
    ----------
    width : int
        Width W of queries and tokens.
    heads : int
        Number of attention heads; a divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_tokens = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries_BLW: Tensor, tokens_BNW: Tensor) -> Tensor:
        """Update the queries [B, L, W] from the tokens [B, N, W]."""
        own_BLW = self.norm_queries(queries_BLW)
        read = torch.cat([self.norm_tokens(tokens_BNW), own_BLW], dim=1)
        parts = (self.to_q(own_BLW), *self.to_kv(read).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        found_BLW = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries_BLW = queries_BLW + self.to_out(found_BLW)
        return queries_BLW + self.mlp(queries_BLW)


class Resampler(nn.Module):
    """Map EEG tokens to condition tokens with learned queries.

    Parameters
    ----------
    tokens, dim : int
        Number N and width D of the EEG tokens.
    length, width : int
        Number L and width W of the condition tokens.
    depth, heads : int
        Number of layers, and number of attention heads of a layer.

    References
    ----------
    Jaegle et al., Perceiver, arXiv 2103.03206; Alayrac et al., Flamingo, arXiv 2204.14198 (Perceiver resampler).
    """

    def __init__(self, *, tokens: int, dim: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} is not divisible by {heads} attention heads")
        self.enter = nn.Linear(dim, width)
        self.place_NW = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.queries_LW = nn.Parameter(torch.randn(length, width) * width**-0.5)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.leave, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Compute the condition tokens [B, L, W] from EEG tokens [B, N, D]."""
        tokens_BNW = self.enter(tokens_BND) + self.place_NW
        x_BLW = self.queries_LW.expand(len(tokens_BND), -1, -1)
        for layer in self.layers:
            x_BLW = layer(x_BLW, tokens_BNW)
        return self.norm(self.leave(x_BLW))
