"""The kinds of image generators. The package of a model names its kind."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.papers import find_papers

if TYPE_CHECKING:
    import numpy as np
    import torch


class Generator(Protocol):
    """A model that turns EEG into images."""

    kind: str

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing that the EEG must have."""
        ...

    def generate(self, eeg_B128T: torch.Tensor, *, steps: int, guidance_scale: float, seeds: list[int]) -> np.ndarray:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg_B128T : Tensor, [B, 128, T]
            Microvolts, preprocessed by `spec`, padded by replication.
        steps : int
            Denoising steps.
        guidance_scale : float
            Strength of classifier-free guidance; 1 switches guidance off.
        seeds : list of int
            One seed a trial. A trial's noise depends on its own seed alone.

        Returns
        -------
        ndarray of uint8, [B, H, W, 3]
            RGB.
        """
        ...


def load_generator(model_dir: str | Path, device: str = "cpu") -> Generator:
    """Load a fine-tuned model of any kind.

    Parameters
    ----------
    model_dir : str or Path
        The ``model`` folder of a run, or the run directory itself.
    device : str
        cpu or cuda.

    Returns
    -------
    Generator
        Ready to generate.

    Raises
    ------
    RequestError
        If there is no model, or its kind is unknown.
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
