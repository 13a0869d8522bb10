"""Predictors: each one chooses a training picture for every trial, in place of an image from a generator.

The predictors ``time``, ``baseline`` and ``eyes`` use no brain response to the picture, so a score above chance is
evidence of a confound. The predictor ``nearest`` uses the response, but can only show training pictures.

Array shapes: n presentations, m test presentations, C channels, T time points, F features, B trials, M training images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.formats.channels import is_grid, is_net, kind_of
from finetune.eeg import PART, group_repeats
from finetune.generation.trials import NotApplicableError, Trial, trial_seed
from finetune.images import ImageTable
from finetune.linear.time_courses import read_time_courses
from pretrain.evidence.baseline import Window, compute_baseline_features, compute_features
from pretrain.evidence.channels import Part, find_common_channels, iterate_layouts, make_row_finder
from pretrain.evidence.predictors import noise_features, predict_from_features, predict_from_time
from pretrain.evidence.rules import NotApplicable
from pretrain.evidence.trials import group_recordings, tabulate_trials
from pretrain.probe.features import time_courses

Predictor = Literal["time", "baseline", "eyes", "nearest"]
PREDICTORS: tuple[Predictor, ...] = ("time", "baseline", "eyes", "nearest")
"""Controls that show a training picture of a predicted category."""
BINS = 25
"""Number of time bins of a time course, as in the linear baseline."""
FACE_Y, FACE_Z = 0.03, -0.015
"""An electrode more than 3 cm in front of the ears and more than 1.5 cm below the plane through the nasion and the ears
is on the face (head coordinates in metres). By this rule, no electrode of the 10-05 system is on the face, but the
electrodes 125 to 128 of a HydroCel net with 128 electrodes are on the face."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Training pictures that a predictor chose for the trials."""

    rows_B: NDArray[np.int64]
    """[B] row of the picture in the table of the training images."""
    labels_B: NDArray[np.int64]
    """[B] predicted category."""


def predict(
    name: Predictor,
    table: ImageTable,
    test: EEGDataset,
    trials: Sequence[Trial],
    *,
    seed: int,
    average_repeats: int = 0,
) -> Prediction:
    """Predict the category of each trial, and choose a training picture of this category.

    Parameters
    ----------
    name : str
        time, baseline, eyes or nearest.
    table : ImageTable
        Images of the train split. The train split must be opened with the same `tmin` and `tmax` as `test`.
    test : EEGDataset
        Split that contains `trials`.
    trials : sequence of Trial
        Trials for which pictures are chosen. If a trial has several presentations, the most common predicted category
        is used; ``nearest`` averages the EEG of the presentations.
    seed : int
        Seed for the choice among the training pictures of the predicted category.
    average_repeats : int
        Largest number of presentations of an image that ``nearest`` averages into one training trial; 0 averages all
        presentations.

    Returns
    -------
    Prediction
        Rows of the chosen pictures in `table`, and predicted categories.

    Raises
    ------
    NotApplicableError
        If the predictor cannot be made from the data.
    """
    train = table.dataset
    if name == "nearest":
        rows_B = _find_nearest(train, test, trials, table, average_repeats)
        return Prediction(rows_B=rows_B, labels_B=table.labels[rows_B])
    numbers = [number for trial in trials for number in trial.numbers]
    labels = dict(zip(numbers, _predict_labels(name, train, test, numbers, seed).tolist(), strict=True))
    labels_B = [Counter(labels[number] for number in trial.numbers).most_common(1)[0][0] for trial in trials]
    rows_B = []
    for trial, label in zip(trials, labels_B, strict=True):
        candidates = np.flatnonzero(table.labels == label)
        rng = np.random.default_rng(trial_seed(seed, f"picture:{trial.key}"))
        rows_B.append(int(rng.choice(candidates)))
    return Prediction(rows_B=np.array(rows_B, np.int64), labels_B=np.array(labels_B, np.int64))


def _predict_labels(
    name: Predictor, train: EEGDataset, test: EEGDataset, numbers: list[int], seed: int
) -> NDArray[np.int64]:
    """Predict the label of each presentation in `numbers`."""
    table = tabulate_trials(train)
    if name == "time":
        return predict_from_time(table, tabulate_trials(test).select(numbers))
    parts: list[Part] = [(train, range(len(train))), (test, numbers)]
    if name == "baseline":
        features = compute_baseline_features(parts)
        if isinstance(features, NotApplicable):
            raise NotApplicableError(features.reason)
    else:
        channels = _find_common_face_channels(parts)
        features = [compute_features(*part, _read_rows(part[0], channels), _compute_eye_features) for part in parts]
    x_nF, new_mF = features
    return predict_from_features(x_nF, table.labels_n, new_mF, groups_n=group_recordings(table), seed=seed)


def _compute_eye_features(x_nCT: np.ndarray, sfreq: float) -> Floats:
    """Compute spectrum, mean and time course of each channel."""
    courses_nF = time_courses(x_nCT, min(BINS, x_nCT.shape[-1]))
    return np.concatenate([noise_features(x_nCT, sfreq), courses_nF], axis=1)


def find_face_channels(names: Sequence[str], positions: Sequence[Sequence[float] | None]) -> list[str]:
    """Find the channels of eyes and face among the channels of a trial.

    Parameters
    ----------
    names : sequence of str
        Names of the channels.
    positions : sequence of (float, float, float) or None
        Positions in metres in head coordinates (x to the right ear, y to the nose, z up); None if unknown.

    Returns
    -------
    list of str
        Names of the channels that record the eyes (EOG), or whose electrode is below the eyes or on the cheeks.
    """
    grid, net = is_grid(list(names)), is_net(list(names))
    found = []
    for name, place in zip(names, positions, strict=True):
        on_face = place is not None and place[1] > FACE_Y and place[2] < FACE_Z
        if on_face or kind_of(name, grid=grid, net=net) == "eog":
            found.append(name)
    return found


def _find_common_face_channels(parts: Sequence[Part]) -> list[str]:
    """Return the channels of eyes and face that all presentations have."""
    common = set(find_common_channels(parts))
    for names, places in iterate_layouts(parts):
        common &= set(find_face_channels(names, places))
    if not common:
        raise NotApplicableError("no eye or face channel is in all trials")
    return sorted(common)


def _read_rows(dataset: EEGDataset, channels: list[str]) -> Window:
    """Return a function that reads the given channels of a trial."""
    find_rows = make_row_finder(dataset, channels)
    return lambda number: dataset[number].eeg[find_rows(number)]


def _find_nearest(
    train: EEGDataset, test: EEGDataset, trials: Sequence[Trial], table: ImageTable, average_repeats: int
) -> NDArray[np.int64]:
    """For each trial, find the training image whose EEG has the most similar time courses."""
    from sklearn.neighbors import NearestNeighbors

    fit, new = group_repeats(train, average_repeats), [trial.numbers for trial in trials]
    parts: list[Part] = [(train, range(len(train))), (test, [number for group in new for number in group])]
    channels = find_common_channels(parts)
    if not channels:
        raise NotApplicableError("the trials have no channel in common")
    bins = min(BINS, train.n_times)

    def features(dataset: EEGDataset, groups: list[list[int]]) -> np.ndarray:
        blocks = [groups[start : start + PART] for start in range(0, len(groups), PART)]
        return np.concatenate([read_time_courses(dataset, block, channels, bins) for block in blocks])

    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(features(train, fit))
    found = search.kneighbors(features(test, new), return_distance=False)[:, 0]
    return np.array([table.row_of[fit[number][0]] for number in found], np.int64)
