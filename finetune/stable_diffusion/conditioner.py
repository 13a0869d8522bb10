"""Compute the condition of Stable Diffusion from the tokens of the EEG encoder.

Tensor shapes: B trials, N EEG tokens of width D, L condition tokens of width W, E width of the time embedding, P width
of the pooled embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.base_models.conditions import make_sizes
from finetune.stable_diffusion.resampler import Resampler
from finetune.training.module_files import load_module, save_module


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """Sizes of the conditioner. DreamDiffusion uses N = 128, D = 1024, L = 77, W = 768, hidden = 64, E = 1280."""

    tokens: int
    """Number of EEG tokens, N."""
    dim: int
    """Width of the EEG tokens, D."""
    length: int
    """Number of condition tokens, L; equal to the number of tokens in the longest text that the base model can read."""
    width: int
    """Width of the condition tokens, W; equal to the width that the base model's cross-attention reads."""
    hidden: int = 64
    """Number of tokens between the two convolutions of the conditioner."""
    time_dim: int = 0
    """Width of the time embedding, E. If E is above 0, a vector from the EEG is also added to the time embedding, as in
    DreamDiffusion's code. If E is 0, nothing is added to the time embedding, as in DreamDiffusion's paper."""
    pooled_dim: int = 0
    """Width of the pooled embedding, P, which the U-Net of Stable Diffusion XL reads besides the condition tokens. 0
    for other base models."""
    image_size: int = 0
    """Width and height of the images in pixels, which the U-Net of Stable Diffusion XL also reads. 0 for other base
    models."""
    projector: Literal["conv", "resampler"] = "conv"
    """How the cross-attention states are computed. conv: two convolutions over the tokens and a linear map, as in
    DreamDiffusion; resampler: learned queries that read the tokens by attention (see `Resampler`)."""
    resampler_depth: int = 4
    """Only for the resampler: number of layers."""
    resampler_heads: int = 8
    """Only for the resampler: number of attention heads; a divisor of W."""


class Conditioner(nn.Module):
    """Map EEG tokens to cross-attention states and, if configured, to vectors for the other inputs of the U-Net.

    Parameters
    ----------
    config : ConditionerConfig
        Sizes of the conditioner.

    Notes
    -----
    To compute the cross-attention states with the projector conv, two convolutions change the number of tokens, N ->
    hidden -> L, and a linear map changes the width, D -> W. With the projector resampler, `Resampler` computes them. To
    compute the vector for the time embedding from the cross-attention states, two convolutions reduce the number of
    tokens, L -> L // 2 -> 1, and a linear map changes the width, W -> E. The linear map to E is initialised with zeros,
    so that training starts from the base model's own time embedding. The pooled embedding of Stable Diffusion XL is
    computed in the same way, and added to a learned null embedding, so that training starts from the null embedding.

    References
    ----------
    Bai et al., DreamDiffusion, arXiv 2306.16934, section 3.2, and its released code.
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.resampler: nn.Module | None = None
        if config.projector == "resampler":
            self.resampler = Resampler(
                tokens=config.tokens,
                dim=config.dim,
                length=config.length,
                width=config.width,
                depth=config.resampler_depth,
                heads=config.resampler_heads,
            )
        else:
            self.token_mapper = nn.Sequential(
                nn.Conv1d(config.tokens, config.hidden, 1), nn.Conv1d(config.hidden, config.length, 1)
            )
            self.dim_mapper = nn.Linear(config.dim, config.width)
        self.null_LW = nn.Parameter(torch.zeros(config.length, config.width))
        self.time_mapper: nn.Module | None = None
        self.pooled_mapper: nn.Module | None = None
        if config.time_dim:
            self.time_tokens, self.time_mapper = self._make_vector(config.time_dim)
        if config.pooled_dim:
            self.pooled_tokens, self.pooled_mapper = self._make_vector(config.pooled_dim)
            self.null_P = nn.Parameter(torch.zeros(config.pooled_dim))

    def _make_vector(self, width: int) -> tuple[nn.Module, nn.Module]:
        """Make the layers that compute one vector from the cross-attention states; the vector is zero at first."""
        half = max(1, self.config.length // 2)
        mapper = nn.Linear(self.config.width, width)
        nn.init.zeros_(mapper.weight)
        nn.init.zeros_(mapper.bias)
        return nn.Sequential(nn.Conv1d(self.config.length, half, 1), nn.Conv1d(half, 1, 1)), mapper

    def forward(self, tokens_BND: Tensor, keep_B: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Compute the condition from EEG tokens.

        Parameters
        ----------
        tokens_BND : Tensor, [B, N, D]
            Tokens of the encoder, without the class token.
        keep_B : Tensor of bool, [B], optional
            False for trials whose EEG condition is dropped, for classifier-free guidance; by default no condition is
            dropped.

        Returns
        -------
        states_BLW : Tensor, [B, L, W]
            Cross-attention states, which replace the states of a text encoder.
        time_BE : Tensor, [B, E], or None
            Vector that is added to the time embedding; None if `time_dim` is 0.
        pooled_BP : Tensor, [B, P], or None
            Pooled embedding for Stable Diffusion XL; None if `pooled_dim` is 0.
        sizes_B6 : Tensor, [B, 6], or None
            Sizes for Stable Diffusion XL (see `finetune.base_models.conditions`); None if `pooled_dim` is 0.
        """
        if self.resampler is not None:
            states_BLW = self.resampler(tokens_BND)
        else:
            states_BLW = self.dim_mapper(self.token_mapper(tokens_BND))
        time_BE = None
        if self.time_mapper is not None:
            time_BE = self.time_mapper(self.time_tokens(states_BLW)[:, 0])
        added_BP = None
        if self.pooled_mapper is not None:
            added_BP = self.pooled_mapper(self.pooled_tokens(states_BLW)[:, 0])
        if keep_B is not None:
            # Use torch.where instead of a branch, because all processes must build the same autograd graph, even if
            # only some of them have dropped conditions.
            states_BLW = torch.where(keep_B[:, None, None], states_BLW, self.null_LW.to(states_BLW.dtype))
            if time_BE is not None:
                time_BE = torch.where(keep_B[:, None], time_BE, torch.zeros_like(time_BE))
            if added_BP is not None:
                added_BP = torch.where(keep_B[:, None], added_BP, torch.zeros_like(added_BP))
        _, _, pooled_BP, sizes_B6 = self.null(len(tokens_BND))
        if added_BP is not None and pooled_BP is not None:
            pooled_BP = pooled_BP.to(added_BP.dtype) + added_BP
        return states_BLW, time_BE, pooled_BP, sizes_B6

    def null(self, batch: int) -> tuple[Tensor | None, ...]:
        """Return the condition without EEG.

        Parameters
        ----------
        batch : int
            Number of trials, B.

        Returns
        -------
        states_BLW : Tensor, [B, L, W]
            Learned null states.
        time_BE : Tensor, [B, E], or None
            Zeros that are added to the time embedding; None if `time_dim` is 0.
        pooled_BP : Tensor, [B, P], or None
            Learned null embedding for Stable Diffusion XL; None if `pooled_dim` is 0.
        sizes_B6 : Tensor, [B, 6], or None
            Sizes for Stable Diffusion XL; None if `pooled_dim` is 0.
        """
        config, states_BLW = self.config, self.null_LW.expand(batch, -1, -1)
        time_BE = states_BLW.new_zeros(batch, config.time_dim) if config.time_dim else None
        if not config.pooled_dim:
            return states_BLW, time_BE, None, None
        sizes_B6 = make_sizes(config.image_size).to(states_BLW.device).expand(batch, -1)
        return states_BLW, time_BE, self.null_P.expand(batch, -1), sizes_B6

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the conditioner to config.json and model.safetensors."""
        save_module(self, self.config, folder, "conditioner")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Conditioner:
        """Read a conditioner that `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, ConditionerConfig, folder, "conditioner")
