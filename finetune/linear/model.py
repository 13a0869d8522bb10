"""The linear baseline: a linear map from time courses to image features, and a search among the training images.

The linear baseline generates no images. The baseline predicts the category and a coarse image, and shows the most
similar training image of the predicted category. A generator must be compared with the linear baseline, which
shows how much of a score comes from the decoding of the EEG alone.

Array shapes: B trials, C channels, T time points, F features, K categories, P image components, M training images, H
rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.untrusted import check_count, check_list, check_text
from data_sharding.dataset.samples import N_PADDED
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.diffusion import SamplerName, Sampling
from finetune.eeg import scale_eeg
from finetune.generators import SCHEMA, Source, read_part, read_spec
from pretrain.model.weights import WEIGHTS, read_tensors
from pretrain.probe.features import time_courses

KIND = "linear"
Floats = NDArray[np.float32]


def compute_time_courses(eeg_BCT: Tensor, spec: PreprocessSpec, *, bins: int) -> Floats:
    """Average the scaled EEG over time bins, and divide each trial by its standard deviation.

    Parameters
    ----------
    eeg_BCT : Tensor, shape (B, C, T)
        EEG in microvolts, with the same channels in every trial.
    spec : PreprocessSpec
        Preprocessing of the EEG, which defines the scale.
    bins : int
        Number of time bins.

    Returns
    -------
    ndarray of float32, shape (B, C x bins)
        Features.
    """
    features_BF = time_courses(scale_eeg(eeg_BCT, spec).cpu().numpy(), bins)
    scale_B1 = features_BF.std(axis=1, keepdims=True)
    return (features_BF / np.where(scale_B1 > 1e-6, scale_B1, np.inf)).astype(np.float32)


def pick_time_courses(
    eeg_BCT: Tensor, names_B: Sequence[Sequence[str]], channels: Sequence[str], spec: PreprocessSpec, *, bins: int
) -> Floats:
    """Compute the time courses of some channels, which are found by name.

    Parameters
    ----------
    eeg_BCT : Tensor, shape (B, C, T)
        EEG in microvolts.
    names_B : sequence of sequence of str
        Names of the first rows of each trial.
    channels : sequence of str
        Names of the channels that are used; every trial must have all of them, as `check_channels` checks.
    spec : PreprocessSpec
        Preprocessing of the EEG, which defines the scale.
    bins : int
        Number of time bins.

    Returns
    -------
    ndarray of float32, shape (B, channels x bins)
        Features, from `compute_time_courses`.
    """
    rows_BC = torch.as_tensor([[list(names).index(name) for name in channels] for names in names_B])
    return compute_time_courses(eeg_BCT[torch.arange(len(eeg_BCT))[:, None], rows_BC], spec, bins=bins)


def check_channels(channels: Sequence[str], metas: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Check that every trial has all channels that a model reads.

    Parameters
    ----------
    channels : sequence of str
        Names of the channels that the model reads.
    metas : iterable of mapping
        Metadata of the trials, with the names of the trials' channels.
    folder : Path
        Folder of the model, for the error message.

    Raises
    ------
    RequestError
        If a trial lacks a channel.
    """
    for meta in metas:
        missing = [name for name in channels if name not in meta["ch_names"]]
        if not missing:
            continue
        names = ", ".join(map(show, missing[:5])) + (" and others" if len(missing) > 5 else "")
        raise RequestError(
            f"{folder}: the model reads {len(channels)} channels by name, but a trial of the dataset has no channel "
            f"{names}; train the model on a dataset with the channels of these trials"
        )


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """Weights of the linear map, and the training images among which the model searches."""

    channels: tuple[str, ...]
    """Names of the channels that the model reads, in the order of the features."""
    bins: int
    """Number of time bins."""
    mean_F: Floats
    """Mean of each feature over the training trials."""
    weight_FL: Floats
    """Weights of the linear map; the L outputs are K scores of the categories and P image components."""
    bias_L: Floats
    """Outputs of the linear map for the mean features."""
    labels_M: NDArray[np.int64]
    """Category of each training image."""
    components_MP: Floats
    """Principal components of the pixels of each training image."""
    images_MHW3: NDArray[np.uint8]
    """Pixels of the training images."""

    def read_eeg(self, eeg_BCT: Tensor, names_B: Sequence[Sequence[str]], spec: PreprocessSpec) -> Floats:
        """Compute the features [B, F] of trials; `names_B` holds the channel names of the rows of each trial."""
        return pick_time_courses(eeg_BCT, names_B, self.channels, spec, bins=self.bins)

    def predict(self, features_BF: Floats) -> tuple[Floats, Floats]:
        """Return the scores of the categories [B, K] and the image components [B, P] for features [B, F]."""
        out_BL = np.asarray((features_BF - self.mean_F) @ self.weight_FL + self.bias_L, np.float32)
        n_categories = out_BL.shape[1] - self.components_MP.shape[1]
        return out_BL[:, :n_categories], out_BL[:, n_categories:]

    def look_up(self, features_BF: Floats) -> NDArray[np.int64]:
        """Choose a training image for each trial.

        Parameters
        ----------
        features_BF : ndarray, shape (B, F)
            Features from `compute_time_courses`.

        Returns
        -------
        ndarray of int, shape (B,)
            For each trial, the index of a training image: of all training images of the predicted category, the image
            whose components have the largest cosine similarity with the predicted components.
        """
        scores_BK, components_BP = self.predict(features_BF)
        # A category without training images cannot be shown, so it must not be chosen.
        scores_BK = np.where(np.isin(np.arange(scores_BK.shape[1]), self.labels_M), scores_BK, -np.inf)
        similarity_BM = (
            components_BP
            @ (self.components_MP / np.maximum(np.linalg.norm(self.components_MP, axis=1, keepdims=True), 1e-12)).T
        )
        of_category_BM = self.labels_M[None, :] == scores_BK.argmax(axis=1)[:, None]
        return np.where(of_category_BM, similarity_BM, -np.inf).argmax(axis=1)


_ARRAYS = ("mean_F", "weight_FL", "bias_L", "labels_M", "components_MP", "images_MHW3")


def save_model(folder: Path, model: LinearModel, spec: PreprocessSpec, extra: dict[str, Any]) -> None:
    """Write all files of a linear model to its package folder, which appears only when it is complete.

    Parameters
    ----------
    folder : Path
        The package folder to write, ``<run>/model``.
    model : LinearModel
        The model.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    extra : dict
        Information on the origin of the model, to be stored in dreamscale.json.
    """
    from safetensors.numpy import save_file

    with atomic_directory(folder) as root:
        save_file({name: np.ascontiguousarray(getattr(model, name)) for name in _ARRAYS}, root / "model.safetensors")
        write_json(root / "preprocess.json", spec.to_dict())
        values = {"kind": KIND, "schema": SCHEMA, "channels": list(model.channels), "bins": model.bins}
        write_json(root / "dreamscale.json", {**values, **extra})


def read_channels(value: Any, where: str) -> tuple[str, ...]:
    """Check the channel names of a package."""
    if isinstance(value, int):
        raise RequestError(
            f"{where}: the entry 'channels' is a number, as in models of older versions; train the model again with "
            "'dreamscale linear CONFIG'"
        )
    names = tuple(check_text(name, where, "channels") for name in check_list(value, where, "channels"))
    if not 1 <= len(names) == len(set(names)) <= N_PADDED:
        raise RequestError(
            f"{where}: the entry 'channels' must hold 1 to {N_PADDED} different names; copy the model again"
        )
    return names


class LinearGenerator:
    """Show a training image for each EEG trial, chosen by a linear map.

    Parameters
    ----------
    folder : str or Path
        Package folder of the model, ``<run>/model``.
    values : dict
        Content of the package's dreamscale.json.
    device : str
        Ignored, because the linear map needs no accelerator.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    part : dict
        Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset of the image.
    kind : str
        Kind of the model: ``linear``.

    Raises
    ------
    RequestError
        If a file of the package is missing or damaged.
    """

    kind = KIND

    def __init__(self, folder: str | Path, values: dict[str, Any], device: str = "cpu") -> None:
        self.folder = Path(folder)
        where = str(self.folder / "dreamscale.json")
        self.part = read_part(values, where)
        again = "train it again with 'dreamscale linear CONFIG'"
        self.spec = read_spec(self.folder)
        channels = read_channels(values.get("channels"), where)
        try:
            arrays = {name: value.numpy() for name, value in read_tensors(self.folder / WEIGHTS).items()}
            self.model = LinearModel(
                channels=channels,
                bins=check_count(values["bins"], where, "bins", least=1, most=self.spec.window),
                **{name: arrays[name] for name in _ARRAYS},
            )
            self._check(self.model)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{self.folder}: the model is damaged ({one_line(error)}); {again}") from None

    def _check(self, model: LinearModel) -> None:
        """Raise `ValueError` if the arrays of the model do not fit each other."""
        features, outputs = model.weight_FL.shape
        images, components = model.components_MP.shape
        fits = (
            model.mean_F.shape == (features,)
            and features == len(model.channels) * model.bins
            and model.bias_L.shape == (outputs,)
            and outputs > components
            and model.labels_M.shape == (images,)
            and images > 0
            and model.images_MHW3.ndim == 4
            and model.images_MHW3.shape[::3] == (images, 3)
            and model.images_MHW3.shape[1] == model.images_MHW3.shape[2] > 0
            and model.images_MHW3.dtype == np.uint8
            and model.labels_M.dtype == np.int64
            and 0 <= model.labels_M.min() <= model.labels_M.max() < outputs - components
        )
        floats = (model.mean_F, model.weight_FL, model.bias_L, model.components_MP)
        if not fits or not all(values.dtype.kind == "f" and np.isfinite(values).all() for values in floats):
            raise ValueError("the sizes of the arrays in model.safetensors do not fit each other")

    @property
    def image_size(self) -> int:
        """Width and height of the shown images in pixels."""
        return self.model.images_MHW3.shape[1]

    def choose_sampling(
        self, *, sampler: SamplerName | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampling:
        """Return sampling settings. The settings are recorded but not used, because the linear model has no sampler."""
        return Sampling(sampler=sampler or "ddim", steps=steps or 1, guidance_scale=guidance_scale or 1.0)

    def use_bf16(self) -> None:
        """Raise `RequestError`, because this kind of model computes in fp32 only."""
        raise RequestError(f"{self.folder}: only Stable Diffusion can compute in bf16; use precision fp32")

    def find_obstacle(self, source: Source, metas: Sequence[dict[str, Any]]) -> str:
        """Return why the model cannot make images from `source`; empty for EEG (see `finetune.generators.Source`).

        Raises
        ------
        RequestError
            If a trial does not have all channels of the model.
        """
        if source != "eeg":
            return (
                f"{self.folder}: the linear baseline needs EEG, so it has no control '{source}'; use 'none' or "
                "'shuffle'"
            )
        check_channels(self.model.channels, metas, self.folder)
        return ""

    def generate(
        self,
        eeg_B128T: Tensor,
        *,
        seeds: list[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        source: Source = "eeg",
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> np.ndarray:
        """Choose a training image for each trial (see `finetune.generators.Generator`).

        The linear model uses no random numbers and no sampler, so this method ignores the seeds and the sampling
        settings. `metas` is needed for the names of the channels.

        Raises
        ------
        RequestError
            If the source is not the EEG, because the linear map needs EEG, or if a trial does not have all channels of
            the model.
        """
        if obstacle := self.find_obstacle(source, metas or []):
            raise RequestError(obstacle)
        if metas is None:
            raise RequestError(
                f"{self.folder}: the linear baseline finds channels by name; give the trials' metadata, which hold the "
                "names"
            )
        names_B = [meta["ch_names"] for meta in metas]
        return self.model.images_MHW3[self.model.look_up(self.model.read_eeg(eeg_B128T, names_B, self.spec))]
