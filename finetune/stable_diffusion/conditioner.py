"""What turns the EEG encoder's tokens into a diffusion model's condition.

Shapes: B trials, N EEG tokens of width D, L condition tokens of width W, E width of the time embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.training.module_files import load_module, save_module


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """Sizes of the conditioner; those of DreamDiffusion are N 128, D 1024, L 77, W 768, hidden 64, E 1280."""

    tokens: int
    """EEG tokens, N."""
    dim: int
    """Their width, D."""
    length: int
    """Condition tokens, L: the base model's longest text."""
    width: int
    """Their width, W: the base model's cross-attention."""
    hidden: int = 64
    """Tokens between the two convolutions."""
    time_dim: int = 0
    """E, for a second path into the time embedding, as in the released code; 0 for none, as in the paper."""


class Conditioner(nn.Module):
    """EEG tokens to cross-attention states and, as an option, a vector for the time embedding.

    Parameters
    ----------
    config : ConditionerConfig
        Sizes.

    Notes
    -----
    Convolutions over the token axis N -> hidden -> L, then a linear map D -> W. The second path goes on from there:
    L -> L // 2 -> 1 tokens, W -> E. Its last layer starts at zero, so that training starts from the base model's own
    time embedding.

    References
    ----------
    Bai et al., DreamDiffusion, arXiv 2306.16934, section 3.2, and its released code.
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_mapper = nn.Sequential(
            nn.Conv1d(config.tokens, config.hidden, 1), nn.Conv1d(config.hidden, config.length, 1)
        )
        self.dim_mapper = nn.Linear(config.dim, config.width)
        self.null_LW = nn.Parameter(torch.zeros(config.length, config.width))
        self.time_mapper: nn.Module | None = None
        if config.time_dim:
            half = max(1, config.length // 2)
            self.time_tokens = nn.Sequential(nn.Conv1d(config.length, half, 1), nn.Conv1d(half, 1, 1))
            self.time_mapper = nn.Linear(config.width, config.time_dim)
            nn.init.zeros_(self.time_mapper.weight)
            nn.init.zeros_(self.time_mapper.bias)

    def forward(self, tokens_BND: Tensor, keep_B: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make the condition.

        Parameters
        ----------
        tokens_BND : Tensor, [B, N, D]
            The encoder's tokens, without the class token.
        keep_B : Tensor of bool, [B], optional
            False where the condition is dropped, for classifier-free guidance; all are kept by default.

        Returns
        -------
        states_BLW : Tensor, [B, L, W]
            In place of a text encoder's states.
        time_BE : Tensor, [B, E], or None
            To be added to the time embedding.
        """
        states_BLW = self.dim_mapper(self.token_mapper(tokens_BND))
        time_BE = None
        if self.time_mapper is not None:
            time_BE = self.time_mapper(self.time_tokens(states_BLW)[:, 0])
        if keep_B is not None:
            # torch.where on every rank alike: a branch would leave ranks with different graphs.
            states_BLW = torch.where(keep_B[:, None, None], states_BLW, self.null_LW.to(states_BLW.dtype))
            if time_BE is not None:
                time_BE = torch.where(keep_B[:, None], time_BE, torch.zeros_like(time_BE))
        return states_BLW, time_BE

    def null(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Condition of no EEG at all.

        Parameters
        ----------
        batch : int
            B.

        Returns
        -------
        states_BLW : Tensor, [B, L, W]
            The learned null states.
        time_BE : Tensor, [B, E], or None
            Zeros.
        """
        states_BLW = self.null_LW.expand(batch, -1, -1)
        if not self.config.time_dim:
            return states_BLW, None
        return states_BLW, states_BLW.new_zeros(batch, self.config.time_dim)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_module(self, self.config, folder, "conditioner")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Conditioner:
        """Read what `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, ConditionerConfig, folder, "conditioner")
