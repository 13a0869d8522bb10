"""Project EEG tokens into the space of a frozen model's embeddings, such as CLIP's.

Tensor shapes: B trials, N EEG tokens of width D, P width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from finetune.training.module_files import load_module, save_module


@dataclass(frozen=True, kw_only=True)
class ClipHeadConfig:
    """Sizes of the CLIP head."""

    tokens: int
    """Number of EEG tokens, N."""
    dim: int
    """Width of the EEG tokens, D."""
    projection: int
    """Width of the embeddings, P."""


class ClipHead(nn.Module):
    """Map EEG tokens to the space of a frozen model's embeddings (the map `h` in DreamDiffusion's alignment loss).

    Parameters
    ----------
    config : ClipHeadConfig
        Sizes of the CLIP head.
    """

    def __init__(self, config: ClipHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.token_mapper = nn.Conv1d(config.tokens, 1, 1)
        self.dim_mapper = nn.Linear(config.dim, config.projection)
        # Give all tokens the same initial weight, so that the untrained head computes the mean over the tokens, up to a
        # constant factor.
        nn.init.constant_(self.token_mapper.weight, config.tokens**-0.5)
        nn.init.zeros_(self.token_mapper.bias)  # type: ignore[arg-type]

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Compute embeddings of trials from their EEG tokens.

        Parameters
        ----------
        tokens_BND : Tensor, [B, N, D]
            Tokens of the encoder, without the class token.

        Returns
        -------
        Tensor, [B, P]
            Embeddings that are not normalised.
        """
        return self.dim_mapper(self.token_mapper(tokens_BND)[:, 0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the CLIP head to config.json and model.safetensors."""
        save_module(self, self.config, folder, "clip_head")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipHead:
        """Read a CLIP head that `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, ClipHeadConfig, folder, "clip_head")
