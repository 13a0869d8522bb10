"""Noise ceilings from repeats: how well the EEG, and the generated images, agree between presentations of an image.

Array shapes: B trials, n presentations, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.generation.trials import Trial
from finetune.linear.time_courses import read_time_courses
from pretrain.evidence.channels import find_common_channels
from pretrain.evidence.statistics import repeat_agreement, split_half_reliability
from pretrain.evidence.trials import TrialTable, group_by, group_recordings, tabulate_trials

BINS = 10
"""Number of time bins of the time course of a channel."""
BLOCK = 256
"""Number of presentations that are read at once."""
SPLITS = 100
"""Number of random splits of the repeats into two halves."""


def measure_noise_ceiling(
    data: EEGDataset, trials: Sequence[Trial], predicted_B: NDArray[np.integer], *, seed: int = 0
) -> dict[str, Any]:
    """Compute the noise ceilings of the EEG and of the generated images.

    Parameters
    ----------
    data : EEGDataset
        Split of the trials.
    trials : sequence of Trial
        The evaluated trials, with the presentations of each trial.
    predicted_B : ndarray of int, shape (B,)
        Category that the dataset's classifier gives to the generated image of each trial.
    seed : int
        Seed of the random halves.

    Returns
    -------
    dict
        ``eeg`` (see `measure_eeg_reliability`) and ``generated`` (see `measure_agreement`), or texts that say why a
        ceiling cannot be computed.
    """
    table = tabulate_trials(data)
    numbers = [number for trial in trials for number in trial.numbers]
    eeg = measure_eeg_reliability(data, np.unique(numbers), table, seed=seed)
    return {"eeg": eeg, "generated": measure_agreement(predicted_B, table.select([t.numbers[0] for t in trials]))}


def measure_eeg_reliability(
    data: EEGDataset, numbers_n: NDArray[np.integer], table: TrialTable, *, seed: int = 0
) -> dict[str, Any] | str:
    """Compute how reliable a person's response to an image is, by comparing random halves of the image's presentations.

    Parameters
    ----------
    data : EEGDataset
        Split of the presentations.
    numbers_n : ndarray of int, shape (n,)
        Numbers of the presentations in `data`.
    table : TrialTable
        All trials of the split.
    seed : int
        Seed of the random halves.

    Returns
    -------
    dict or str
        ``reliability``: `split_half_reliability` of the time courses of all channels (see `read_time_courses`), as a
        mean over people. Before the reliability is computed, the mean over all presentations of a recording is
        subtracted from each time course of this recording. ``ceiling``: the square root of the reliability. Even a
        perfect model of the noise-free response correlates with the mean of all presentations by no more than about
        this value. ``by_person``: reliability of each person. ``images``: number of images that a person saw twice or
        more often, summed over people. If there is no ceiling, the result is a text that says why.
    """
    chosen = table.select(numbers_n)
    pairs_n = _name_pairs(chosen)
    repeated = np.bincount(pairs_n)[pairs_n] >= 2
    reason = "not applicable: no person saw three images twice or more often in these trials"
    if not repeated.any():
        return reason
    numbers_n, chosen, pairs_n = np.asarray(numbers_n)[repeated], chosen.select(repeated), pairs_n[repeated]
    channels = find_common_channels([(data, numbers_n.tolist())])
    if not channels:
        return "not applicable: the presentations have no channel in common"
    blocks = [numbers_n[start : start + BLOCK] for start in range(0, len(numbers_n), BLOCK)]
    values_nF = np.concatenate(
        [read_time_courses(data, [[int(n)] for n in block], channels, BINS).astype(np.float64) for block in blocks]
    )
    recording_n = np.unique(group_recordings(chosen), return_inverse=True)[1]
    for recording in range(int(recording_n.max()) + 1):
        values_nF[recording_n == recording] -= values_nF[recording_n == recording].mean(axis=0)
    found: dict[str, float] = {}
    for person in np.unique(chosen.subjects_n):
        of_person = chosen.subjects_n == person
        try:
            reliability = split_half_reliability(values_nF[of_person], pairs_n[of_person], splits=SPLITS, seed=seed)
        except RequestError:
            # Skip this person, who has too few images with repeated presentations, or a flat signal.
            continue
        found[str(person)] = reliability
    if not found:
        return reason
    mean = float(np.mean(list(found.values())))
    return {
        "reliability": mean,
        "ceiling": math.sqrt(max(0.0, mean)),
        "by_person": found,
        "images": len(np.unique(pairs_n)),
    }


def _name_pairs(trials: TrialTable) -> NDArray[np.int64]:
    """Give each pair of person and image a number, and return, for each trial, the number of its pair."""
    return group_by(trials.subjects_n, trials.images_n)


def measure_agreement(predicted_B: NDArray[np.integer], trials: TrialTable) -> dict[str, float] | str:
    """Compute how often the generated images of two trials with the same person and image have the same category.

    Parameters
    ----------
    predicted_B : ndarray of int, shape (B,)
        Category of the generated image of each trial.
    trials : TrialTable
        The trials.

    Returns
    -------
    dict or str
        ``agreement``: see `repeat_agreement`. ``chance``: expected agreement if the generated category does not depend
        on the image, which is the sum of the squared shares of the generated categories. ``ceiling``: the square root
        of the agreement. If repeats are independent, the expected accuracy of single trials is at most this value.
        ``images``: number of images of which a person has two trials or more, summed over people. If there is no
        agreement, the result is a text that says why.
    """
    pairs_B = _name_pairs(trials)
    _, count = np.unique(pairs_B, return_counts=True)
    if not (count >= 2).any():
        return (
            "not applicable: each person and image has one generated image; single presentations are generated with "
            "dreamscale generate --average_repeats 1"
        )
    agreement = repeat_agreement(predicted_B, pairs_B)
    shares = np.bincount(predicted_B) / len(predicted_B)
    return {
        "agreement": agreement,
        "chance": float(np.square(shares).sum()),
        "ceiling": math.sqrt(agreement),
        "images": int((count >= 2).sum()),
    }
