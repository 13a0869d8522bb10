"""Load image generators of all kinds. The package of a fine-tuned model names the kind of its generator."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.papers import find_papers

if TYPE_CHECKING:
    import numpy as np
    import torch


class Generator(Protocol):
    """Interface of a model that generates images from EEG."""

    kind: str

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing that the EEG trials must have."""
        ...

    @property
    def part(self) -> dict[str, float | None]:
        """Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset (see `EEGDataset`)."""
        ...

    def generate(self, eeg_B128T: torch.Tensor, *, steps: int, guidance_scale: float, seeds: list[int]) -> np.ndarray:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg_B128T : Tensor, [B, 128, T]
            EEG in microvolts, preprocessed by `spec`. Channels are repeated until there are 128.
        steps : int
            Number of denoising steps.
        guidance_scale : float
            Scale of the classifier-free guidance; 1 switches guidance off.
        seeds : list of int
            One seed for each trial. A trial's noise depends only on the trial's seed.

        Returns
        -------
        ndarray of uint8, [B, H, W, 3]
            Generated images in RGB.
        """
        ...


def read_part(values: dict[str, Any]) -> dict[str, float | None]:
    """Return which part of each trial a model reads, from its dreamscale.json.

    A model of an older version reads each trial from its onset.
    """
    stored = values.get("eeg") or {}
    return {name: None if stored.get(name) is None else float(stored[name]) for name in ("tmin", "tmax")}


def load_generator(model_dir: str | Path, device: str = "cpu") -> Generator:
    """Load a fine-tuned model of any kind.

    Parameters
    ----------
    model_dir : str or Path
        The ``model`` folder of a run, or the run directory itself.
    device : str
        Device of the computation: cpu or cuda.

    Returns
    -------
    Generator
        Model that is ready to generate images.

    Raises
    ------
    RequestError
        If the folder holds no model, or a model of an unknown kind.
    """
    folder = Path(model_dir)
    if not (folder / "dreamscale.json").is_file() and (folder / "model" / "dreamscale.json").is_file():
        folder = folder / "model"
    if not (folder / "dreamscale.json").is_file():
        raise RequestError(
            f"{model_dir}: has no dreamscale.json, so it is not a fine-tuned model; give the 'model' folder of a run"
        )
    values = read_json(folder / "dreamscale.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    kinds = {paper.kind: paper.generator for paper in find_papers()}
    if kind not in kinds:
        raise RequestError(
            f"{folder / 'dreamscale.json'}: the kind '{kind}' is unknown to this version (known: {', '.join(kinds)}); "
            f"train the model again"
        )
    module, name = kinds[kind].split(":")
    return getattr(importlib.import_module(module), name)(folder, device)
