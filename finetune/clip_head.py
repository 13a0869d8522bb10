"""Project EEG tokens into CLIP's image space.

Shapes: B trials, N EEG tokens of width D, P width of CLIP's projection.
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
    """Width of CLIP's image embeddings, P."""


class ClipHead(nn.Module):
    """Maps EEG tokens to CLIP's image space: h in DreamDiffusion's alignment loss.

    Parameters
    ----------
    config : ClipHeadConfig
        Sizes.
    """

    def __init__(self, config: ClipHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.token_mapper = nn.Conv1d(config.tokens, 1, 1)
        self.dim_mapper = nn.Linear(config.dim, config.projection)
        # All tokens start with the same weight: a plain mean, up to a factor.
        nn.init.constant_(self.token_mapper.weight, config.tokens**-0.5)
        nn.init.zeros_(self.token_mapper.bias)  # type: ignore[arg-type]

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Embed trials.

        Parameters
        ----------
        tokens_BND : Tensor, [B, N, D]
            The encoder's tokens, without the class token.

        Returns
        -------
        Tensor, [B, P]
            Embeddings, not normalised.
        """
        return self.dim_mapper(self.token_mapper(tokens_BND)[:, 0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_module(self, self.config, folder, "clip_head")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipHead:
        """Read what `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, ClipHeadConfig, folder, "clip_head")
