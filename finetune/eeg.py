"""Prepare EEG for the models of fine-tuning: load the encoder, scale trials, choose held-out trials, and augment.

Tensor shapes: B trials, b trials of this process, C channels (128 after padding), T time points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from data_sharding.common.progress import progress
from data_sharding.dataset.batch import Batch, collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.electrodes import Electrodes, EncoderInput, Places
from finetune.images import ImageTable
from finetune.training.step_random import StepRandom
from pretrain.encoder.encoder import EEGEncoder
from pretrain.encoder.package import read_package

if TYPE_CHECKING:
    from accelerate import Accelerator

PART = 256
"""Number of trials that are read at once."""


@dataclass(frozen=True, kw_only=True)
class EEGConfig:
    """Which part of each trial a model reads, and how many presentations of the same image are averaged."""

    tmin: float | None = None
    """Start of the EEG in seconds from the onset of the image, such as -0.2 for a part with a baseline. Empty: the
    onset. Trials whose stored EEG does not reach from tmin to tmax are left out, and a message says how many."""
    tmax: float | None = None
    """End of the EEG in seconds from the onset of the image. Empty: the end is tmin plus the length of the dataset's
    windows."""
    average_repeats: int = 0
    """Largest number of presentations of the same image to the same subject that are averaged to one val trial. 0:
    average all presentations, as papers do with test images. 1: average nothing."""

    def __post_init__(self) -> None:
        if self.tmin is not None and self.tmax is not None and self.tmax <= self.tmin:
            raise ValueError(f"eeg.tmax {self.tmax:g} must be later than eeg.tmin {self.tmin:g}")
        if self.average_repeats < 0:
            raise ValueError(
                f"eeg.average_repeats must be 0 (average all presentations) or more, got {self.average_repeats}"
            )

    @property
    def part(self) -> dict[str, float | None]:
        """Values of `tmin` and `tmax` for `open_paired`; the package of a model stores these values, too."""
        return {"tmin": self.tmin, "tmax": self.tmax}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of EEG trials, which is used only in training."""

    shift: int = 0
    """Largest shift in time to either side, in samples. After a shift, copies of the trial's first or last sample fill
    the gap."""
    noise: float = 0.0
    """Standard deviation of the white noise that is added to the scaled EEG."""
    drop_channels: float = 0.0
    """Largest probability with which a channel is set to zero; the probability is drawn for each trial, from 0 to this
    value."""

    def __post_init__(self) -> None:
        if self.shift < 0 or self.noise < 0 or not 0 <= self.drop_channels < 1:
            raise ValueError(
                "augment.shift and augment.noise must be at least 0, and augment.drop_channels at least 0 and below 1, "
                f"got {self.shift}, {self.noise} and {self.drop_channels}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageAugmentConfig(AugmentConfig):
    """Augmentation of EEG trials. Before the augmentation, a trial may be averaged with other trials of its image."""

    average: int = 1
    """Largest number of trials that are averaged to one training trial. A trial is averaged with a random number of
    other trials that have the same image and the same channels. 1 switches averaging off."""
    average_over: Literal["people", "person"] = "people"
    """Trials that are averaged with a trial. people: trials of all people who saw the image. person: only trials of the
    same person; this needs images that a person saw several times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average < 1:
            raise ValueError(f"augment.average must be at least 1, got {self.average}")


def load_encoder(
    path: str, dataset: EEGDataset, *, pretrained: bool = True, several_montages: bool = False
) -> EEGEncoder:
    """Load an encoder package for a dataset.

    Parameters
    ----------
    path : str
        Directory or hub id of the encoder package.
    dataset : EEGDataset
        Trials for which the encoder will be used.
    pretrained : bool
        True: load the trained weights. False: use the same architecture with new random weights.
    several_montages : bool
        True: the caller gives the encoder the electrode positions of each trial (see `finetune.electrodes`), so people
        may have different channels. False: if the encoder needs electrode positions, all trials must have the same.

    Returns
    -------
    EEGEncoder
        Encoder without a classification head. If the trials are shorter than the windows of the pretraining, the
        encoder is shortened (see `EEGEncoder.fit_to`).

    Raises
    ------
    RequestError
        If the path holds no encoder package, or if the encoder needs another preprocessing or longer trials, or one
        montage.
    """
    encoder = EEGEncoder.from_pretrained(path).fit_to(dataset, f"encoder {path}")
    aligned = read_package(path).extra.get("aligned") or {}
    part = {"tmin": dataset.tmin, "tmax": dataset.tmax}
    if (before := aligned.get("eeg")) and before != part:
        raise RequestError(
            f"encoder {path} was aligned with eeg.tmin {before['tmin']} and eeg.tmax {before['tmax']}, but the "
            f"config sets {part['tmin']} and {part['tmax']}; set the same values as in the alignment"
        )
    if aligned.get("people"):
        raise RequestError(
            f"encoder {path} was aligned with an input layer for each person, which only 'dreamscale align "
            "--calibrate', 'retrieve' and 'decode' read; align the encoder with 'people: none' for other commands"
        )
    if not pretrained or encoder.head is not None:
        bare = EEGEncoder(encoder.config, encoder.spec, n_chans=encoder.n_chans)
        if pretrained:
            bare.backbone.load_state_dict(encoder.backbone.state_dict())
        encoder = bare
    if several_montages and encoder.config.tokenizer == "montage" and not _has_one_montage(dataset):
        encoder.positions_C3 = None
        print(f"encoder {path}: {dataset.path} has several montages; each trial is read with its own electrodes")
    else:
        # Other models pass only EEG windows to the encoder, so the encoder itself must store the electrode positions.
        encoder.keep_electrodes(dataset)
    return encoder


def _has_one_montage(dataset: EEGDataset) -> bool:
    n, places = dataset.trials.numbers("n"), dataset.trials.codes("positions")
    return bool((n == n[0]).all() and (places == places[0]).all())


def scale_eeg(
    eeg_BCT: Tensor, scaling: PreprocessSpec | EEGEncoder, device: Any = None, places: Places | None = None
) -> Tensor:
    """Scale EEG from microvolts to the units that the models need.

    Parameters
    ----------
    eeg_BCT : Tensor, shape (B, C, T)
        EEG in microvolts, of any float type.
    scaling : PreprocessSpec or EEGEncoder
        Object that defines the scaling: the encoder if the model has an encoder, otherwise the preprocessing.
    device : torch.device, optional
        Device of the result.
    places : dict of str to Tensor, optional
        Electrode positions of the trials, if the encoder reads several montages (see `finetune.electrodes`).

    Returns
    -------
    Tensor of float32, shape (B, C, T)
        Scaled and clipped EEG.
    """
    eeg_BCT = eeg_BCT.to(device).float()
    return scaling.scale_for_model(eeg_BCT, places["count_B"].to(eeg_BCT.device) if places else None)


def choose_evenly(n: int, count: int) -> list[int]:
    """Choose trials that are evenly spread over a split.

    Parameters
    ----------
    n : int
        Number of trials of the split.
    count : int
        Largest number of trials to choose.

    Returns
    -------
    list of int
        Numbers of the chosen trials, sorted, without repetition.
    """
    return np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)).tolist()


def group_repeats(dataset: EEGDataset, average: int) -> list[list[int]]:
    """Group the presentations of the same image to the same subject, so that their EEG can be averaged.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of a split.
    average : int
        Largest number of presentations in a group; 0 for all presentations.

    Returns
    -------
    list of list of int
        For each group, the numbers of its trials, in the order of the dataset. Each trial belongs to exactly one group.
        All trials of a group have the same channels.
    """
    if average == 1:
        return [[number] for number in range(len(dataset))]
    trials = dataset.trials
    group = trials.group("corpus", "subject", "image_id", "ch_names")
    # Two trials without an image id do not show the same image, so each trial without an image id is a group of its
    # own.
    alone = np.array([not image_id for image_id in trials.values("image_id")])[trials.codes("image_id")]
    group[alone] = len(group) + np.flatnonzero(alone)
    order = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[order])) + 1
    size = average or len(group)
    parts = (part.tolist() for part in np.split(order, ends))
    return sorted(part[start : start + size] for part in parts for start in range(0, len(part), size))


def read_means(dataset: EEGDataset, groups: Sequence[Sequence[int]], device: Any = None) -> Tensor:
    """Read the mean EEG of each group of trials.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the split.
    groups : sequence of sequence of int
        Numbers of the trials in each group, from `group_repeats`.
    device : torch.device, optional
        Device of the result.

    Returns
    -------
    Tensor of float32, shape (B, 128, T)
        Mean of each group in microvolts.
    """
    if all(len(group) == 1 for group in groups):
        return collate(dataset, [number for (number,) in groups]).padded(device, torch.float32)
    means = [collate(dataset, group).padded(device, torch.float32).mean(0) for group in groups]
    return torch.stack(means)


def compute_in_parts(compute: Callable[[Any], np.ndarray], items: Sequence[Any], description: str) -> np.ndarray:
    """Call a function for parts of a sequence, e.g. groups of trials, and concatenate the arrays that it returns.

    Parameters
    ----------
    compute : callable
        Function that takes a part of `items` and returns an array with one row for each item.
    items : sequence
        All items.
    description : str
        Text next to the progress bar.

    Returns
    -------
    ndarray
        One row for each item.
    """
    parts = []
    with progress(description, len(items)) as advance:
        for start in range(0, len(items), PART):
            parts.append(compute(items[start : start + PART]))
            advance(len(parts[-1]))
    return np.concatenate(parts)


def read_trials(
    dataset: EEGDataset, groups: Sequence[Sequence[int]], scaling: PreprocessSpec | EEGEncoder, device: Any = None
) -> Tensor:
    """Read the mean EEG of groups of trials, and scale the means for the model.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the split.
    groups : sequence of sequence of int
        Numbers of the trials in each group, from `group_repeats`.
    scaling : PreprocessSpec or EEGEncoder
        Object that defines the scaling.
    device : torch.device, optional
        Device of the result.

    Returns
    -------
    Tensor of float32, shape (B, 128, T)
        Scaled means, in the order of `groups`.
    """
    parts = [groups[start : start + PART] for start in range(0, len(groups), PART)]
    return torch.cat([scale_eeg(read_means(dataset, part, device), scaling) for part in parts])


def read_encoder_input(
    dataset: EEGDataset,
    groups: Sequence[Sequence[int]],
    encoder: EEGEncoder,
    electrodes: Electrodes,
    device: Any = None,
) -> EncoderInput:
    """Read the mean EEG of groups of trials, and scale the means for an encoder that may read several montages.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the split.
    groups : sequence of sequence of int
        Numbers of the trials in each group, from `group_repeats`. All trials of a group have the same channels.
    encoder : EEGEncoder
        The encoder.
    electrodes : Electrodes
        Electrode positions of the trials of the split.
    device : torch.device, optional
        Device of the result.

    Returns
    -------
    EncoderInput
        Scaled means and electrode positions, in the order of `groups`.
    """
    parts, places = [], electrodes.of([group[0] for group in groups], device)
    for start in range(0, len(groups), PART):
        own = {name: value[start : start + PART] for name, value in places.items()}
        parts.append(scale_eeg(read_means(dataset, groups[start : start + PART], device), encoder, places=own))
    return EncoderInput(x=torch.cat(parts), places=places)


def compute_for_trials(
    dataset: EEGDataset,
    scaling: PreprocessSpec | EEGEncoder,
    compute: Callable[[Tensor], Tensor],
    accelerator: Accelerator,
    part: int = PART,
) -> Tensor:
    """Compute a small result, such as a feature, from the EEG of every trial of a split.

    The trials are read in parts, so only the EEG of one part is in memory. The processes share the work.

    Parameters
    ----------
    dataset : EEGDataset
        The split.
    scaling : PreprocessSpec or EEGEncoder
        Object that defines the scaling.
    compute : callable
        Function that takes scaled trials, [B, 128, T], on the device of the computation, and returns [B, ...].
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.
    part : int
        Number of trials that a process reads at once.

    Returns
    -------
    Tensor, shape (trials, ...)
        Result for each trial, on the CPU of every process.
    """
    size, rank, parts = accelerator.num_processes, accelerator.process_index, []
    shown = accelerator.is_main_process and len(dataset) >= 10_000
    with progress("features of the trials", len(dataset), enabled=shown) as advance:
        for start in range(0, len(dataset), part * size):
            numbers = np.arange(start + rank * part, start + (rank + 1) * part)
            # Every process must contribute equally many trials to `gather`, so the last part may contain the last trial
            # several times.
            numbers = np.minimum(numbers, len(dataset) - 1) if size > 1 else numbers[numbers < len(dataset)]
            eeg_BCT = collate(dataset, numbers.tolist()).padded(accelerator.device, torch.float32)
            found = compute(scale_eeg(eeg_BCT, scaling))
            found = accelerator.gather(found) if size > 1 else found
            parts.append(found[: len(dataset) - start].cpu())
            advance(len(parts[-1]))
    return torch.cat(parts)


def augment_eeg(x_bCT: Tensor, true_channels_b: list[int], config: AugmentConfig, random: StepRandom) -> Tensor:
    """Augment trials: shift them in time, add noise, and set channels to zero.

    Parameters
    ----------
    x_bCT : Tensor, shape (b, C, T)
        Scaled trials, padded by repeating channels.
    true_channels_b : list of int
        Number of recorded channels of each trial. Padding repeats the recorded channels. A copy of a channel gets
        exactly the same changes as the channel, so that the model cannot distinguish the copy from the channel.
    config : AugmentConfig
        Strength of the augmentation.
    random : StepRandom
        Random numbers of this training step.

    Returns
    -------
    Tensor, shape (b, C, T)
        Augmented trials; the input tensor itself if all augmentations are switched off.
    """
    b, channels, samples = x_bCT.shape
    true_bC = torch.arange(channels)[None, :] % torch.tensor(true_channels_b)[:, None]
    if config.shift:
        moved = torch.arange(samples) + random.integers(2 * config.shift + 1, b, 1) - config.shift
        x_bCT = x_bCT.gather(2, moved.clamp(0, samples - 1)[:, None].expand(-1, channels, -1))
    if config.noise:
        noise = random.normal(b, channels, samples).gather(1, true_bC[..., None].expand(-1, -1, samples))
        x_bCT = x_bCT + config.noise * noise
    if config.drop_channels:
        share_b1 = random.uniform(b, 1) * config.drop_channels
        x_bCT = x_bCT * (random.uniform(b, channels) >= share_b1).gather(1, true_bC)[..., None]
    return x_bCT


def average_trials_of_image(
    eeg_bCT: Tensor,
    batch: Batch,
    dataset: EEGDataset,
    table: ImageTable,
    config: ImageAugmentConfig,
    random: StepRandom,
) -> Tensor:
    """Replace each trial by a mean over itself and other trials of the same image.

    Parameters
    ----------
    eeg_bCT : Tensor, shape (b, C, T)
        EEG of the batch in microvolts. The tensor is changed in place.
    batch : Batch
        This process's part of the batch.
    dataset : EEGDataset
        Split from which the other trials are read.
    table : ImageTable
        Images of the split, with the list of trials of each image.
    config : ImageAugmentConfig
        Config with the largest number of trials in a mean, `average`, and with the choice of the other trials,
        `average_over`.
    random : StepRandom
        Random numbers of this training step.

    Returns
    -------
    Tensor, shape (b, C, T)
        Averaged trials in microvolts.
    """
    b = len(eeg_bCT)
    # Draw all random numbers before the loop, because every rank must draw equally many random numbers, but the number
    # of passes of the loop differs between ranks.
    extra_b = random.integers(config.average, b)
    start_b = random.uniform(b)
    for i, number in enumerate(batch.numbers):
        others = table.companions(number, within_person=config.average_over == "person")
        count = min(int(extra_b[i]), len(others))
        first = int(start_b[i] * len(others))
        for other in (others[(first + k) % len(others)] for k in range(count)):
            eeg_bCT[i] += torch.as_tensor(pad_channels(dataset[other].eeg)).float()
        eeg_bCT[i] /= 1 + count
    return eeg_bCT


def prepare_eeg(
    batch: Batch,
    dataset: EEGDataset,
    table: ImageTable,
    config: ImageAugmentConfig,
    random: StepRandom,
    scaling: PreprocessSpec | EEGEncoder,
    places: Places | None = None,
) -> Tensor:
    """Turn a training batch into augmented EEG that is scaled for the model.

    Parameters
    ----------
    batch : Batch
        This process's part of the batch.
    dataset : EEGDataset
        The split that the trials come from.
    table : ImageTable
        Images of the split.
    config : ImageAugmentConfig
        Strength of the augmentation.
    random : StepRandom
        Random numbers of this training step.
    scaling : PreprocessSpec or EEGEncoder
        Object that defines the scaling.
    places : dict of str to Tensor, optional
        Electrode positions of the trials, if the encoder reads several montages (see `finetune.electrodes`).

    Returns
    -------
    Tensor of float32, shape (b, 128, T)
        Augmented trials.
    """
    eeg_bCT = batch.padded(dtype=torch.float32)
    if config.average > 1:
        eeg_bCT = average_trials_of_image(eeg_bCT, batch, dataset, table, config, random)
    x_bCT = scale_eeg(eeg_bCT, scaling, places=places)
    return augment_eeg(x_bCT, [int(meta["n"]) for meta in batch.metas], config, random)
