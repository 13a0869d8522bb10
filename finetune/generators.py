"""The kinds of image generators, loaded by what their package says it is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.processing.preprocess import PreprocessSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

KINDS = {
    "stable_diffusion": "finetune.stable_diffusion.model:StableDiffusionGenerator",
    "eg_ddpm": "finetune.dm_re2i.model:DMRE2IGenerator",
}
"""Kind in dreamscale.json -> class, imported when it is needed."""


class Generator(Protocol):
    """What turns EEG into images."""

    kind: str

    @property
    def spec(self) -> PreprocessSpec:
        """What the EEG must have gone through."""
        ...

    def generate(self, eeg_B128T: torch.Tensor, *, steps: int, guidance_scale: float, seeds: list[int]) -> np.ndarray:
        """Make one image a trial.

        Parameters
        ----------
        eeg_B128T : Tensor, [B, 128, T]
            Microvolts, preprocessed by `spec`, padded by replication.
        steps : int
            Denoising steps.
        guidance_scale : float
            Strength of classifier-free guidance; 1 for none.
        seeds : list of int
            One a trial; a trial's noise depends on its own seed alone.

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
        A run's ``model`` directory, or the run itself.
    device : str
        cpu or cuda.

    Returns
    -------
    Generator
        Ready to generate.

    Raises
    ------
    RequestError
        If there is no model, or of an unknown kind.
    """
    folder = Path(model_dir)
    if not (folder / "dreamscale.json").is_file() and (folder / "model" / "dreamscale.json").is_file():
        folder = folder / "model"
    if not (folder / "dreamscale.json").is_file():
        raise RequestError(
            f"{model_dir}: no dreamscale.json, so this is not a fine-tuned model; give a run's 'model' directory"
        )
    values = read_json(folder / "dreamscale.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in KINDS:
        raise RequestError(f"{folder / 'dreamscale.json'}: kind '{kind}' is none of {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)(folder, device)
