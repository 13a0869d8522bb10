"""Choose the EEG from which the image of each trial is generated: EEG of other trials, or noise.

Array shapes: C channels, T time points; n presentations of the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import pad_channels
from finetune.eeg import read_means
from finetune.generation.trials import NotApplicableError, Trial, derange, trial_seed
from pretrain.evidence.trials import derange_within, find_neighbourhoods, tabulate_trials


def exchange_all(groups: list[list[int]], seed: int) -> list[list[int]]:
    """Give each trial the EEG of a random other trial, for the control ``shuffle``.

    Parameters
    ----------
    groups : list of list of int
        Groups of presentations, from `group_repeats`.
    seed : int
        Seed of the random order.

    Returns
    -------
    list of list of int
        For each group of presentations, another group, whose EEG is used in its place.

    Raises
    ------
    RequestError
        If there is only one group.
    """
    if len(groups) < 2:
        raise RequestError("--control shuffle needs at least two trials; choose a larger split or a larger limit")
    return [groups[number] for number in derange(len(groups), seed)]


def exchange_within(dataset: EEGDataset, groups: list[list[int]], seed: int) -> list[list[int]]:
    """Give each presentation the EEG of a neighbour in time that shows another image, for ``shuffle_within``.

    Each recording of a person is divided into short sequences of consecutive presentations (see `find_neighbourhoods`);
    the presentations of one sequence are neighbours. Therefore slow changes of the EEG are kept, but the response to
    the image is exchanged.

    Parameters
    ----------
    dataset : EEGDataset
        All trials of the split. The EEG may come from trials outside of `groups`.
    groups : list of list of int
        Groups of presentations, from `group_repeats`.
    seed : int
        Seed of the random order.

    Returns
    -------
    list of list of int
        For each group, the presentations whose EEG is averaged in place of the EEG of the group. A presentation is left
        out of the average if no neighbour shows another image.

    Raises
    ------
    NotApplicableError
        If there is a group in which no presentation has a neighbour that shows another image.
    """
    table = tabulate_trials(dataset)
    order_n, _ = derange_within(find_neighbourhoods(table), table.images_n, seed)
    other_n = table.images_n[order_n] != table.images_n
    sources = [[int(order_n[number]) for number in group if other_n[number]] for group in groups]
    if missing := [group[0] for group, source in zip(groups, sources, strict=True) if not source]:
        unknown = int(np.isnan(table.times_n[missing]).sum())
        raise NotApplicableError(
            f"{len(missing)} of {len(groups)} trials, such as {dataset.key(missing[0])}, have no neighbour in their "
            f"recording that shows another image; the time of {unknown} of these trials is unknown"
        )
    return sources


def randomise_phases(eeg_CT: np.ndarray, seed: int) -> np.ndarray:
    """Make noise with the spectrum of a trial, by a random change of the phase of each frequency.

    Parameters
    ----------
    eeg_CT : ndarray, shape (C, T)
        EEG of the trial.
    seed : int
        Seed of the random phases.

    Returns
    -------
    ndarray of float32, shape (C, T)
        Noise. Each channel has the mean and the amplitude spectrum of the trial's channel. The phases of all channels
        change by the same angle, so the covariance of the channels is also kept. The time course of the trial is lost.

    References
    ----------
    Prichard and Theiler, Generating surrogate data for time series with several simultaneously measured variables,
    Physical Review Letters 73 (1994).
    """
    samples = eeg_CT.shape[-1]
    spectrum_CF = np.fft.rfft(eeg_CT.astype(np.float64), axis=-1)
    angle_F = np.random.default_rng(seed).uniform(0, 2 * np.pi, spectrum_CF.shape[-1])
    # At frequency 0, the angle 0 keeps the mean. At the Nyquist frequency, the angle 0 or pi keeps the Fourier
    # coefficient real.
    angle_F[0] = 0.0
    if samples % 2 == 0:
        angle_F[-1] = np.pi * (angle_F[-1] > np.pi)
    return np.fft.irfft(spectrum_CF * np.exp(1j * angle_F), samples, axis=-1).astype(np.float32)


def read_noise(dataset: EEGDataset, trials: Sequence[Trial], seed: int) -> Tensor:
    """Make noise with the spectrum of each trial's mean EEG, for the control ``noise``.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the split.
    trials : sequence of Trial
        The trials.
    seed : int
        Seed of the config. The noise of a trial depends only on this seed and on the key of the trial.

    Returns
    -------
    Tensor of float32, shape (trials, 128, T)
        Noise in microvolts.
    """
    means_B128T = read_means(dataset, [trial.numbers for trial in trials]).numpy()
    noise = []
    for trial, mean_128T in zip(trials, means_B128T, strict=True):
        # Models recognise padded channels by their equal values, so make noise only from the recorded channels, and pad
        # the noise again.
        recorded_CT = mean_128T[: int(trial.meta["n"])]
        noise.append(pad_channels(randomise_phases(recorded_CT, trial_seed(seed, f"noise:{trial.key}"))))
    return torch.from_numpy(np.stack(noise))
