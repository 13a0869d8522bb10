"""Load image generators of all kinds. The package of a fine-tuned model contains the name of its kind of generator."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import digest_of, read_json, sha256_file
from data_sharding.common.untrusted import MAX_JSON, check_group, check_number
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.papers import find_papers

if TYPE_CHECKING:
    import numpy as np
    import torch

    from finetune.diffusion import SamplerName, Sampling

Source = Literal["eeg", "no_eeg", "class"]
"""Condition from which an image is generated. eeg: the EEG of the trial. no_eeg: no EEG, so that the images' scores are
a lower limit. class: the true category of the trial in place of its EEG, so that the scores are an upper limit."""


SCHEMA = 1
"""Version of the layout of a fine-tuned model's folder. The folder's dreamscale.json stores this version."""


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

    @property
    def image_size(self) -> int:
        """Width and height of the generated images in pixels."""
        ...

    def choose_sampling(
        self, *, sampler: SamplerName | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampling:
        """Replace the sampling settings that are None with the defaults of this model.

        Parameters
        ----------
        sampler : str, optional
            Name of the sampler; by default, the sampler that the model chooses.
        steps : int, optional
            Number of denoising steps; by default a number that fits the sampler (see `choose_sampling` in
            `finetune.diffusion`).
        guidance_scale : float, optional
            Scale of the classifier-free guidance; 1 switches guidance off. By default, the scale is 2, or 1 if the
            model was trained without dropped conditions, or if the sampler is for a few steps.

        Returns
        -------
        Sampling
            Complete settings.

        Raises
        ------
        RequestError
            If the settings do not fit the model.
        """
        ...

    def use_bf16(self) -> None:
        """Store the weights of the denoising network in bf16, and compute with them.

        Raises
        ------
        RequestError
            If this is not possible with this kind of model.
        """
        ...

    def find_obstacle(self, source: Source, metas: Sequence[dict[str, Any]]) -> str:
        """Find out whether the model can generate images from a source of the condition: EEG, no EEG, or the category.

        Parameters
        ----------
        source : str
            Condition from which the images are to be generated (see `Source`).
        metas : sequence of dict
            Metadata of the trials.

        Returns
        -------
        str
            Reason why the model cannot generate the images; empty if the model can generate them.

        Raises
        ------
        RequestError
            If the model can read no EEG of this dataset, for example because channels are missing.
        """
        ...

    def generate(
        self,
        eeg_B128T: torch.Tensor,
        *,
        seeds: list[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        source: Source = "eeg",
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> np.ndarray:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg_B128T : Tensor, [B, 128, T]
            EEG in microvolts, preprocessed as `spec` says. Channels are repeated until each trial has 128 channels.
        seeds : list of int
            One seed for each trial. A trial's noise depends only on the trial's seed.
        steps, guidance_scale, sampler
            Sampling settings, as in `choose_sampling`.
        source : str
            Condition from which the images are generated (see `Source`).
        metas : sequence of dict, optional
            Metadata of the trials. For the source ``class``, the categories are read from the metadata. The linear
            baseline reads the names of the channels from the metadata.

        Returns
        -------
        ndarray of uint8, [B, H, W, 3]
            Generated images in RGB.

        Raises
        ------
        RequestError
            If the settings or the source do not fit the model.
        """
        ...


def read_part(values: dict[str, Any], where: str) -> dict[str, float | None]:
    """Read from a model's dreamscale.json which part of each trial (`tmin` to `tmax`) the model uses.

    A model of an older version, whose dreamscale.json has no ``eeg``, reads each trial from the onset of the image.
    """
    stored = check_group(values.get("eeg") or {}, where, "eeg")
    names = ("tmin", "tmax")
    return {n: None if stored.get(n) is None else float(check_number(stored[n], where, f"eeg.{n}")) for n in names}


def read_spec(folder: Path) -> PreprocessSpec:
    """Read the preprocessing of a model's EEG from the file preprocess.json of its package.

    Raises
    ------
    RequestError
        If the file is missing or damaged.
    """
    path = folder / "preprocess.json"
    try:
        return PreprocessSpec.from_dict(read_json(path), str(path))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{path}: not a valid description of the preprocessing ({one_line(error)}); train the model again"
        ) from None


def find_model(model_dir: str | Path) -> Path:
    """Find the folder of a fine-tuned model.

    Parameters
    ----------
    model_dir : str or Path
        The ``model`` folder of a run, or the run directory itself.

    Returns
    -------
    Path
        The folder with dreamscale.json.

    Raises
    ------
    RequestError
        If the folder holds no model.
    """
    folder = Path(model_dir)
    if not (folder / "dreamscale.json").is_file() and (folder / "model" / "dreamscale.json").is_file():
        folder = folder / "model"
    if not (folder / "dreamscale.json").is_file():
        raise RequestError(
            f"{model_dir}: has no dreamscale.json, so it is not a fine-tuned model; give the 'model' folder of a run"
        )
    return folder


def digest_model(model_dir: str | Path) -> str:
    """Compute a checksum of a fine-tuned model.

    Parameters
    ----------
    model_dir : str or Path
        The ``model`` folder of a run, or the run directory itself.

    Returns
    -------
    str
        Hexadecimal SHA-256 from `digest_folder`.

    Raises
    ------
    RequestError
        If the folder holds no model, or if a file cannot be read.
    """
    return digest_folder(find_model(model_dir))


def digest_folder(*folders: Path) -> str:
    """Compute a checksum over all safetensors files and JSON files of folders.

    Parameters
    ----------
    *folders : Path
        The folders. The paths of the folders do not change the checksum, but the order of the folders does.

    Returns
    -------
    str
        Hexadecimal SHA-256.

    Raises
    ------
    RequestError
        If a file cannot be read, or a JSON file is too large.
    """
    found = []
    try:
        for folder in folders:
            files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file())
            for path in files:
                if path.suffix == ".json" and path.stat().st_size > MAX_JSON:
                    raise RequestError(
                        f"{path}: larger than {MAX_JSON} bytes, so it cannot belong to a model; remove this file"
                    )
            found.append({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be read ({error.strerror}); copy the model again") from None
    return digest_of(found[0] if len(found) == 1 else found)


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
        If the folder holds no model, or a model of an unknown kind or of another version.
    """
    folder = find_model(model_dir)
    where = str(folder / "dreamscale.json")
    values = check_group(read_json(where), where)
    papers = {paper.kind: paper for paper in find_papers()}
    paper = next((paper for kind, paper in papers.items() if kind == values.get("kind")), None)
    if paper is None:
        raise RequestError(
            f"{where}: the kind '{show(values.get('kind'))}' is unknown to this version (known: {', '.join(papers)}); "
            f"train the model again"
        )
    if values.get("schema") != SCHEMA:
        raise RequestError(
            f"{folder}: not a '{paper.kind}' model of this version; train it again with 'dreamscale {paper.command} "
            f"CONFIG'"
        )
    module, name = paper.generator.split(":")
    return getattr(importlib.import_module(module), name)(folder, values, device)
