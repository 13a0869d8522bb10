"""Divide trials into folds: training trials, trials for choosing settings such as the ridge penalty, and test trials.

Trials of one subject resemble each other, and so do trials of one image. If a classifier has seen the subject or the
image of a trial in training, its accuracy on this trial is too high. Three rules prevent accuracies that are too high:

- No image is in both the training trials and the test trials of a fold. The EEG of a test trial is not equal to the EEG
  of a training trial, and does not overlap in time with the EEG of a training trial of the same recording.
- With ``folds: subjects``, no subject is in both the training trials and the test trials. With ``folds: split``, the
  dataset's splits are used, and the report names the subjects that are in both the training and the test trials.
- Settings, such as the ridge penalty, are chosen without the test trials: on the val split, and on inner folds. The
  inner folds divide the training trials of a fold again, by subject and image.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from data_sharding.common.errors import RequestError
from pretrain.evidence.windows import overlap_in_time
from pretrain.probe.config import ProbeConfig

if TYPE_CHECKING:
    from pretrain.probe.features import Trials

LeftOut = dict[str, dict[str, int]]
"""Number of trials that were left out. The outer key is the reason (images or eeg), the inner key is train or test."""
INNER_FOLDS = 5
"""Largest number of inner folds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Indices of the training, validation and test trials of one fold."""

    train: np.ndarray
    """Indices of the trials on which a classifier is trained."""
    val: np.ndarray
    """Indices of the trials that are used only to choose settings; the array may be empty."""
    test: np.ndarray
    """Indices of the trials on which a classifier is tested; test trials are used for nothing else."""


def divide_images(trials: Trials, numbers: np.ndarray, parts: int) -> np.ndarray:
    """Divide images into groups, so that each group has the same mixture of labels.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    numbers : ndarray of int
        Indices of the trials whose images are divided.
    parts : int
        Number of groups.

    Returns
    -------
    ndarray of int
        Index of the group for each trial in `numbers`. All trials of one image are in the same group.
    """
    _, first, image = np.unique(trials.images_n[numbers], return_index=True, return_inverse=True)
    part = np.empty(len(first), np.int64)
    part[np.argsort(trials.labels_n[numbers][first], kind="stable")] = np.arange(len(first)) % parts
    return part[image]


def _share_images(trials: Trials, numbers: np.ndarray) -> bool:
    """Return whether any two subjects saw the same image."""
    pairs = np.unique(np.stack([trials.images_n[numbers], trials.subjects_n[numbers]]), axis=1)
    return len(np.unique(pairs[0])) < pairs.shape[1]


def _share_eeg(trials: Trials, numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return, for each trial in `numbers`, whether a trial in `others` has equal EEG, or EEG that overlaps in time."""
    overlap = overlap_in_time(trials.table.select(numbers), trials.table.select(others), trials.window_s)
    return overlap | np.isin(trials.digests_n[numbers], trials.digests_n[others])


def make_outer_folds(trials: Trials, config: ProbeConfig) -> tuple[list[Fold], LeftOut]:
    """Divide the trials into folds; no image is in both the training trials and the test trials of a fold.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    config : ProbeConfig
        Config of the probe.

    Returns
    -------
    list of Fold
        The folds. Each trial is a test trial in at most one fold.
    LeftOut
        Number of trials that were left out, by reason and kind. Reasons: ``images``: trials whose image is in both the
        training and the test trials. ``eeg``: other trials whose EEG is in both the training and the test trials.
        Kinds: ``test``: test trials. ``train``: training trials, summed over all folds.

    Raises
    ------
    RequestError
        If there are no test trials, if all training trials of a fold have the same label, or if `config.folds` is
        subjects and the dataset has one subject only.
    """
    if config.folds == "split":
        folds, left_out = _fold_of_splits(trials, config)
    else:
        folds, left_out = _fold_by_subjects(trials, config)
    if any(len(np.unique(trials.labels_n[fold.train])) < 2 for fold in folds):
        raise RequestError(
            f"{config.dataset}: all training trials have the same label, so there is nothing to learn; probe a "
            "dataset with at least two labels in the train split"
        )
    return folds, left_out


def _fold_of_splits(trials: Trials, config: ProbeConfig) -> tuple[list[Fold], LeftOut]:
    every, none = np.arange(len(trials)), np.array([], int)
    train = every[trials.splits_n == "train"]
    # Test trials must not be used to choose settings such as the ridge penalty. So if the val split is the test split,
    # the val split is not used to choose settings.
    val = none if config.split == "val" else every[trials.splits_n == "val"]
    test = every[trials.splits_n == config.split]
    fitted = np.concatenate([train, val])
    new = test[~np.isin(trials.images_n[test], trials.images_n[fitted])]
    kept = new[~_share_eeg(trials, new, fitted)]
    if not len(kept):
        raise RequestError(
            f"{config.dataset}: every image or all EEG of split '{config.split}' is in the training or val split as "
            "well; set 'folds: subjects', or make the dataset again with 'split.by: image'"
        )
    left_out = {
        "images": {"test": len(test) - len(new), "train": 0},
        "eeg": {"test": len(new) - len(kept), "train": 0},
    }
    return [Fold(train=train, val=val, test=kept)], left_out


def _fold_by_subjects(trials: Trials, config: ProbeConfig) -> tuple[list[Fold], LeftOut]:
    every, none = np.arange(len(trials)), np.array([], int)
    subjects = np.unique(trials.subjects_n)
    if len(subjects) < 2:
        raise RequestError(
            f"{config.dataset}: the dataset has only one subject, but 'folds: subjects' needs at least two; set "
            "'folds: split'"
        )
    parts = config.image_groups if _share_images(trials, every) else 1
    if parts == 1 and config.image_groups == 1 and _share_images(trials, every):
        raise RequestError(
            "image_groups is 1, but the subjects saw the same images, so no training trials would be left; set "
            "image_groups to at least 2"
        )
    part = divide_images(trials, every, parts)
    folds, left_out = [], {name: {"test": 0, "train": 0} for name in ("images", "eeg")}
    for subject in subjects:
        for group in range(parts):
            test = every[(trials.subjects_n == subject) & (part == group)]
            if not len(test):
                continue
            others = every[trials.subjects_n != subject]
            new = others[~np.isin(trials.images_n[others], trials.images_n[test])]
            train = new[~_share_eeg(trials, new, test)]
            folds.append(Fold(train=train, val=none, test=test))
            left_out["images"]["train"] += len(others) - len(new)
            left_out["eeg"]["train"] += len(new) - len(train)
    return folds, left_out


def make_inner_folds(trials: Trials, fold: Fold) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide the training trials of a fold into inner folds, on which settings such as the ridge penalty are chosen.

    The held-out trials and the training trials of an inner fold have different subjects and different images. If all
    training trials are from one subject, the held-out trials and the training trials of an inner fold differ only in
    their images.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    fold : Fold
        The fold. Only the fold's train and val trials are used.

    Returns
    -------
    list of (ndarray, ndarray)
        One pair for each inner fold: the indices of its training trials, and of its held-out trials. If the fold has
        val trials, the last pair is (train, val); the two parts of this pair may have subjects and images in common.
        The list is empty if no inner folds can be made.
    """
    train = fold.train
    subjects, subject = np.unique(trials.subjects_n[train], return_inverse=True)
    groups = min(INNER_FOLDS, len(subjects))
    if groups == 1:
        groups = INNER_FOLDS
        of_image = divide_images(trials, train, groups)
        pairs = [(of_image != g, of_image == g) for g in range(groups)]
    elif _share_images(trials, train):
        of_image, of_subject = divide_images(trials, train, groups), subject % groups
        pairs = [((of_subject != g) & (of_image != g), (of_subject == g) & (of_image == g)) for g in range(groups)]
    else:
        pairs = [(subject % groups != g, subject % groups == g) for g in range(groups)]
    found = [(train[fit], train[held]) for fit, held in pairs]
    if len(fold.val):
        found.append((train, fold.val))
    return [(fit, held) for fit, held in found if len(held) and len(np.unique(trials.labels_n[fit])) > 1]


def shuffle_labels(trials: Trials, sets: int, seed: int) -> np.ndarray:
    """Shuffle the labels between images. All trials of one image still have the same label.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    sets : int
        Number of sets of shuffled labels.
    seed : int
        Seed of the random numbers for the shuffles.

    Returns
    -------
    ndarray, [S, n]
        Sets of shuffled labels, one set in each row.
    """
    _, first, image = np.unique(trials.images_n, return_index=True, return_inverse=True)
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(trials.labels_n[first])[image] for _ in range(sets)])
