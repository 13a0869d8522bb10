"""Save and load a trained DM-RE2I model, and generate images with this model: a vector from EEG guides a DDPM.

Tensor shapes: B trials, C channels, T time points, D feature width, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.untrusted import check_list, check_text
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.diffusion import SamplerName, Sampling, choose_sampling
from finetune.dm_re2i.backbones import load_unet
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.guide import FOLDERS, EEGGuide
from finetune.dm_re2i.guided import GuidedUNet
from finetune.dm_re2i.portable.pipeline import sample_images
from finetune.dm_re2i.portable.write import write_portable_files
from finetune.eeg import scale_eeg
from finetune.foreign_models import check_noise_schedule, load_with_library
from finetune.generators import SCHEMA, Source, read_part, read_spec
from finetune.images import check_finite, to_pixels
from finetune.portable.eeg import count_true_channels
from pretrain.model.weights import read_tensors

KIND = "eg_ddpm"


@torch.no_grad()
def compute_features(
    evrnet: EEGClassifier, x_BCT: Tensor, batch: int = 128, pulse: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Compute features and class scores of trials with EVRNet.

    Parameters
    ----------
    evrnet : EEGClassifier
        The network in evaluation mode.
    x_BCT : Tensor, shape (B, C, T)
        Scaled trials, padded by repeating channels. The network uses only the first `n_channels` rows; the other rows
        are copies of these rows.
    batch : int
        Number of trials in one forward pass.
    pulse : callable
        Function that is called before each forward pass. If the run was asked to stop (e.g. by SIGTERM), this function
        raises an error, which ends the evaluation.

    Returns
    -------
    e_BD, logits_BK : Tensor
        Features and class scores.
    """
    assert not evrnet.training
    rows = evrnet.config.n_channels
    features, logits = [], []
    for part in x_BCT.split(batch):
        pulse()
        e_BD, logits_BK = evrnet(part[:, None, :rows])
        features.append(e_BD)
        logits.append(logits_BK)
    return torch.cat(features), torch.cat(logits)


@dataclass(frozen=True)
class ClassMeans:
    """Mean EEG feature of each category over the train trials, for the control ``class`` of ``dreamscale generate``."""

    mean_KD: Tensor
    """Mean features; zeros for a category without train trials."""
    count_K: Tensor
    """Number of train trials of each category."""

    FILE: ClassVar[str] = "class_means.safetensors"

    @classmethod
    def compute(cls, e_BD: Tensor, labels_B: Tensor, n_classes: int) -> ClassMeans:
        """Compute the means from the features and the categories of all train trials."""
        count_K = torch.bincount(labels_B, minlength=n_classes)
        sums_KD = torch.zeros(n_classes, e_BD.shape[1], dtype=torch.float64)
        sums_KD.index_add_(0, labels_B, e_BD.double())
        return cls((sums_KD / count_K.clamp_min(1)[:, None]).float(), count_K)

    def save(self, folder: Path) -> None:
        """Write the categories' mean features to the package of a model."""
        save_file({"mean": self.mean_KD, "count": self.count_K}, folder / self.FILE)

    @classmethod
    def load(cls, folder: Path, dim: int) -> ClassMeans:
        """Read the categories' mean features from a model's package.

        Raises
        ------
        RequestError
            If the file is missing or damaged, or the width of the features is not `dim`.
        """
        path = folder / cls.FILE
        try:
            values = read_tensors(path)
            means = cls(values["mean"].float(), values["count"].long())
            if means.mean_KD.shape != (len(means.count_K), dim) or not means.mean_KD.isfinite().all():
                raise ValueError("the mean features are not finite, or their shape is not that of the model")
        except (KeyError, ValueError) as error:
            raise RequestError(
                f"{path}: cannot be read ({one_line(error)[:200]}); train the model again to use the control 'class'"
            ) from None
        return means

    def find_missing(self, labels: Sequence[int]) -> list[int]:
        """Return the labels without train trials, and thus without a mean feature; each label only once."""
        return sorted({label for label in labels if label >= len(self.count_K) or not self.count_K[label]})


def save_model(
    folder: Path,
    guide: EEGGuide,
    unet: GuidedUNet,
    noising: Any,
    means: ClassMeans,
    spec: PreprocessSpec,
    extra: dict[str, Any],
    card: dict[str, Any],
) -> None:
    """Write all files of a DM-RE2I model to its package folder, which appears only when it is complete.

    Parameters
    ----------
    folder : Path
        The package folder to write, ``<run>/model``.
    guide : EEGGuide
        Network that computes the vectors from EEG.
    unet : GuidedUNet
        The trained U-Net.
    noising : DDPMScheduler
        The noise scheduler that was used in training.
    means : ClassMeans
        Mean features of the categories.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    extra : dict
        Information on the origin of the model, to be stored in dreamscale.json.
    card : dict
        Values for the model card (see `write_portable_files`).
    """
    with atomic_directory(folder) as root:
        guide.save(root)
        unet.save_pretrained(root / "unet")
        noising.save_pretrained(root / "scheduler")
        means.save(root)
        write_json(root / "preprocess.json", spec.to_dict())
        write_portable_files(root, guide, unet, spec, sampler=extra["sampler"], card=card)
        write_json(root / "dreamscale.json", {"kind": KIND, "schema": SCHEMA, "guide": guide.kind, **extra})


class DMRE2IGenerator:
    """Generate images from EEG trials with EVRNet and EG-DDPM.

    Parameters
    ----------
    folder : str or Path
        Package folder of the model, ``<run>/model``.
    values : dict
        Content of dreamscale.json, whose kind and schema `finetune.generators.load_generator` has checked.
    device : str
        Device of the computation: cpu or cuda.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    part : dict
        Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset of the image.
    kind : str
        Kind of the model: ``eg_ddpm``.

    Raises
    ------
    RequestError
        If a file of the package is missing or damaged.
    """

    kind = KIND

    def __init__(self, folder: str | Path, values: dict[str, Any], device: str = "cpu") -> None:
        from diffusers import DDPMScheduler

        folder = Path(folder)
        self.folder, self.device = folder, torch.device(device)
        where = str(folder / "dreamscale.json")
        self.part = read_part(values, where)
        self.labels = [check_text(label, where, "a label") for label in check_list(values.get("labels") or [], where)]
        self.sampler: SamplerName = "ddpm" if values.get("sampler") == "ddpm" else "ddim"
        self.spec = read_spec(folder)
        kind = values.get("guide", "feature")
        if kind not in [*FOLDERS]:
            raise RequestError(f"{where}: '{show(kind)}' is not a guide that this version knows; train the model again")
        self.guide = EEGGuide.load(folder, kind).to(self.device)
        self.unet = load_unet(folder / "unet")
        self.unet.to(device=self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - the library's decorator hides the signature
        check_noise_schedule(folder / "scheduler" / "scheduler_config.json")
        load = DDPMScheduler.from_pretrained
        self.noising = load_with_library(
            lambda: load(str(folder / "scheduler"), local_files_only=True), folder / "scheduler", "a noise schedule"
        )

    @property
    def image_size(self) -> int:
        """Width and height of the generated images in pixels."""
        return int(self.unet.config.sample_size)

    def choose_sampling(
        self, *, sampler: SamplerName | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampling:
        """Fill in the sampling settings that are None (see `finetune.generators.Generator`).

        The default sampler is the value `ddpm.sampler` of the config with which the model was trained. Guidance needs
        a model that was trained with dropped conditions.
        """
        chosen = sampler or self.sampler
        if chosen not in ("ddpm", "ddim"):
            raise RequestError(
                f"{self.folder}: the sampler {chosen} does not fit the cosine noise schedule of this model; use the "
                "sampler ddim or ddpm"
            )
        try:
            return choose_sampling(
                self.noising.config,
                sampler=chosen,
                steps=steps,
                guidance_scale=guidance_scale,
                dropped=self.unet.null is not None,
                has_null=self.unet.null is not None,
            )
        except ValueError as error:
            raise RequestError(f"{self.folder}: {error}") from None

    def use_bf16(self) -> None:
        """Raise `RequestError`, because this kind of model computes in fp32 only."""
        raise RequestError(f"{self.folder}: only Stable Diffusion can compute in bf16; use precision fp32")

    def find_obstacle(self, source: Source, metas: Sequence[dict[str, Any]]) -> str:
        """Return why the model cannot generate images from a source (see `finetune.generators.Source`).

        The source ``no_eeg`` needs a null vector, and ``class`` needs train trials of every category in `metas`.
        """
        if source == "no_eeg" and self.unet.null is None:
            return (
                f"{self.folder}: this model was trained with drop 0, so it cannot generate without EEG; use the "
                "control 'shuffle', or a model that was trained with ddpm.drop above 0"
            )
        if source == "class":
            means = ClassMeans.load(self.folder, self.unet.config.condition_dim)
            if missing := means.find_missing([int(meta["label"]) for meta in metas]):
                names = [self.labels[label] if label < len(self.labels) else str(label) for label in missing]
                return (
                    f"{self.folder}: the category '{names[0]}' had no train trial, so the control 'class' cannot "
                    f"generate it ({len(missing)} such categories); use a split whose categories all occur in train"
                )
        return ""

    @torch.no_grad()
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
        """Generate one image for each trial (see `finetune.generators.Generator`).

        For the source ``class``, the condition is the mean feature of the category over the train trials. For the
        source ``no_eeg``, the condition is the learned null vector.

        Raises
        ------
        RequestError
            If a trial has more channels than the network was made for, or the settings do not fit the model.
        """
        assert len(eeg_B128T) == len(seeds)
        chosen = self.choose_sampling(sampler=sampler, steps=steps, guidance_scale=guidance_scale)
        if obstacle := self.find_obstacle(source, metas or []):
            raise RequestError(obstacle)
        rows = self.guide.n_channels
        if rows < eeg_B128T.shape[1] and (most := max(count_true_channels(eeg_CT) for eeg_CT in eeg_B128T)) > rows:
            raise RequestError(
                f"{self.folder}: this model takes up to {rows} channels, but a trial has {most}; train a model with "
                f"evrnet.channels {most} or more"
            )
        if source == "class":
            assert metas is not None
            means = ClassMeans.load(self.folder, self.unet.config.condition_dim)
            e_BD = means.mean_KD[[int(meta["label"]) for meta in metas]].to(self.device)
        else:
            e_BD = self.guide.compute(scale_eeg(eeg_B128T, self.guide.scaling(self.spec), self.device))
        images = sample_images(self.unet, self.noising.config, e_BD, chosen, seeds, keep=source != "no_eeg")
        return to_pixels(check_finite(images, self.folder))
