"""What turns the EEG encoder's tokens into a diffusion model's condition, and into a place in CLIP's image space.

Shapes: B trials, N EEG tokens of width D, L condition tokens of width W, E width of the time embedding, P width of
CLIP's projection.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json, write_json


def save_module(module: nn.Module, config: Any, folder: str | Path, kind: str) -> None:
    """Write a small module as config.json and model.safetensors.

    Parameters
    ----------
    module : Module
        The module.
    config : dataclass instance
        What builds it again.
    folder : str or Path
        Where to; made if it is not there.
    kind : str
        Checked on reading.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().float().cpu().contiguous() for k, v in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "config.json", {"kind": kind, **dataclasses.asdict(config)})


def read_module_files(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_module` wrote.

    Parameters
    ----------
    folder : str or Path
        Where from.
    kind : str
        What it must be.

    Returns
    -------
    config : dict
        Fields of the config.
    weights : dict
        Name to tensor.

    Raises
    ------
    RequestError
        If a file is missing or damaged, or it is of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    values = read_json(folder / "config.json")
    if values.pop("kind", None) != kind:
        raise RequestError(f"{folder}: not a '{kind}'; give the directory that Dreamscale wrote")
    try:
        return values, load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from None


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
        values, weights = read_module_files(folder, "conditioner")
        return _built(cls, ConditionerConfig, values, weights, folder)


@dataclass(frozen=True, kw_only=True)
class ClipHeadConfig:
    """Sizes of the CLIP head."""

    tokens: int
    """EEG tokens, N."""
    dim: int
    """Their width, D."""
    projection: int
    """Width of CLIP's image embeddings, P."""


class ClipHead(nn.Module):
    """EEG tokens to CLIP's image space: the h of DreamDiffusion's alignment loss.

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
        # Equal weights of the tokens to start with: what is wanted is a mean with preferences.
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
            Not normalised.
        """
        return self.dim_mapper(self.token_mapper(tokens_BND)[:, 0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_module(self, self.config, folder, "clip_head")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipHead:
        """Read what `save_pretrained` wrote, in evaluation mode."""
        values, weights = read_module_files(folder, "clip_head")
        return _built(cls, ClipHeadConfig, values, weights, folder)


def _built(cls: Any, config: Any, values: dict[str, Any], weights: dict[str, Tensor], folder: str | Path) -> Any:
    try:
        module = cls(config(**values))
        module.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise RequestError(f"{folder}: does not fit ({str(error).splitlines()[0]}); train it again") from None
    return module.eval()
