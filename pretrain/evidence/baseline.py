"""Compute features of the EEG that was recorded before the picture and so contains no response to the picture.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters. F
counts features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from pretrain.evidence.channels import Part, find_common_channels, make_row_finder
from pretrain.evidence.predictors import noise_features
from pretrain.evidence.rules import NotApplicable

LEAST_BASELINE_S = 0.05
"""Smallest duration of the baseline in seconds. The lowest frequency above 0 in the spectrum of 0.05 s of signal is 20
Hz."""
PART = 256
"""Number of trials whose EEG is in memory at once."""

Window = Callable[[int], np.ndarray]
"""Function that takes the number of a trial and returns a part [C, T] of the trial's EEG."""
Features = Callable[[np.ndarray, float], NDArray[np.float64]]
"""Function that computes features [n, F] from EEG [n, C, T] and its sampling rate in Hz."""


def compute_baseline_features(parts: Sequence[Part]) -> list[NDArray[np.float32]] | NotApplicable:
    """Compute features of the EEG before the picture.

    Parameters
    ----------
    parts : sequence of (EEGDataset, sequence of int)
        Splits, each with the indices of the trials that are used.

    Returns
    -------
    list of ndarray, each [n, F], or NotApplicable
        One array for each split: the features of its trials. `remove_line` first removes the mean and the linear trend
        of each channel, and `pretrain.evidence.predictors.noise_features` then computes the features. The baseline has
        the same duration in all trials: the shortest time that a trial stores before its picture. Only the channels
        that all trials have in common are used (`find_common_channels`). The result is `NotApplicable` if a trial is
        stored with less than `LEAST_BASELINE_S` seconds before the picture, or if the trials have no channel in common.
    """
    onsets_n = np.concatenate([dataset.trials.numbers("onset")[list(numbers)] for dataset, numbers in parts])
    spec = parts[0][0].spec
    samples, short = int(onsets_n.min()), int((onsets_n < LEAST_BASELINE_S * spec.sfreq).sum())
    if short:
        return NotApplicable(
            reason=f"{short} of {len(onsets_n)} trials are stored with less than {LEAST_BASELINE_S:g} s before the "
            "picture"
        )
    channels = find_common_channels(parts)
    if not channels:
        return NotApplicable(reason="the trials have no channel in common")

    def make_reader(dataset: EEGDataset) -> Window:
        find_rows = make_row_finder(dataset, channels)

        def read(number: int) -> np.ndarray:
            sample = dataset.read_stored(number)
            onset = int(sample.meta["onset"])
            return remove_line(sample.eeg[find_rows(number), onset - samples : onset])

        return read

    return [compute_features(dataset, numbers, make_reader(dataset)) for dataset, numbers in parts]


def remove_line(x_CT: np.ndarray) -> np.ndarray:
    """Remove the mean and the linear trend of each channel, in the EEG that was recorded before a picture.

    A high-pass filter without delay (zero phase) works forwards and backwards in time. A slow wave of the response
    therefore also appears, with opposite sign, before the picture. If the slow wave were kept, the EEG before the
    picture would predict the category even in an experiment without any fault. The removal also hides true slow changes
    of the EEG, such as drift; the control ``shuffle_within`` finds such changes.

    Parameters
    ----------
    x_CT : ndarray, shape (C, T)
        EEG before the picture.

    Returns
    -------
    ndarray of float, shape (C, T)
        EEG without the mean and the linear trend.

    References
    ----------
    Tanner et al., "How inappropriate high-pass filters can produce artifactual effects and incorrect conclusions in ERP
    studies of language and cognition", Psychophysiology 52 (2015).
    """
    from scipy.signal import detrend

    return detrend(np.asarray(x_CT, np.float64), axis=-1)


def compute_features(
    dataset: EEGDataset, numbers: Sequence[int], window: Window, features: Features = noise_features
) -> NDArray[np.float32]:
    """Compute features of the same time window of each trial.

    Parameters
    ----------
    dataset : EEGDataset
        Split of the trials.
    numbers : sequence of int
        Numbers of the trials.
    window : callable
        Function that reads a time window of a trial's EEG.
    features : callable
        Function that computes the features of several trials.

    Returns
    -------
    ndarray, [n, F]
        Features of the trials, in float32 to save memory.
    """
    found_nF = np.zeros((len(numbers), 0), np.float32)
    with progress("features of the control", len(numbers), enabled=len(numbers) >= 10_000) as advance:
        for start in range(0, len(numbers), PART):
            wanted = numbers[start : start + PART]
            x_nCT = np.stack([window(number) for number in wanted]).astype(np.float64)
            part_nF = features(x_nCT, dataset.spec.sfreq)
            if not start:
                found_nF = np.empty((len(numbers), part_nF.shape[1]), np.float32)
            found_nF[start : start + len(wanted)] = part_nF
            advance(len(wanted))
    return found_nF
