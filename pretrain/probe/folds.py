"""Which trials a probe fits on, chooses by and scores: never the same subject or image on two sides.

Letters in names: n trials, S sets of labels.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from data_sharding.common.errors import RequestError

if TYPE_CHECKING:
    from pretrain.probe.features import Trials
    from pretrain.probe.run import ProbeConfig

INNER_FOLDS = 5
"""At most; what is chosen is chosen on them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Numbers of the trials of one fit."""

    train: np.ndarray
    """Fitted on."""
    val: np.ndarray
    """Only chosen by; may be empty."""
    test: np.ndarray
    """Only scored."""


def image_parts(trials: Trials, numbers: np.ndarray, parts: int) -> np.ndarray:
    """Divide images into parts with the same mixture of labels.

    Parameters
    ----------
    trials : Trials
        All trials.
    numbers : ndarray of int
        Those whose images are to be divided.
    parts : int
        How many.

    Returns
    -------
    ndarray of int
        Part of each trial of `numbers`.
    """
    _, first, image = np.unique(trials.images_n[numbers], return_index=True, return_inverse=True)
    part = np.empty(len(first), np.int64)
    part[np.argsort(trials.labels_n[numbers][first], kind="stable")] = np.arange(len(first)) % parts
    return part[image]


def _images_shared(trials: Trials, numbers: np.ndarray) -> bool:
    pairs = np.unique(np.stack([trials.images_n[numbers], trials.subjects_n[numbers]]), axis=1)
    return len(np.unique(pairs[0])) < pairs.shape[1]


def outer_folds(trials: Trials, config: ProbeConfig) -> tuple[list[Fold], dict[str, int]]:
    """What is fitted on what; no image is on both sides.

    Parameters
    ----------
    trials : Trials
        All trials.
    config : ProbeConfig
        The request.

    Returns
    -------
    list of Fold
        The folds; a trial is scored once.
    dict of str to int
        Trials left out because their image is on the other side, by side.

    Raises
    ------
    RequestError
        If there is nothing to learn or to score.
    """
    every, none = np.arange(len(trials)), np.array([], int)
    if config.folds == "split":
        train = every[trials.splits_n == "train"]
        # What is chosen is not chosen on what is scored.
        val = none if config.split == "val" else every[trials.splits_n == "val"]
        test = every[trials.splits_n == config.split]
        kept = test[~np.isin(trials.images_n[test], trials.images_n[np.concatenate([train, val])])]
        if not len(kept):
            raise RequestError(
                f"{config.dataset}: every image of split '{config.split}' is in the training or val split as well; "
                "give folds: subjects, or shard with a split by images"
            )
        folds = [Fold(train=train, val=val, test=kept)]
        left_out = {"test": len(test) - len(kept), "train": 0}
    else:
        subjects = np.unique(trials.subjects_n)
        if len(subjects) < 2:
            raise RequestError(f"{config.dataset}: one subject only; folds: subjects leaves out one of several")
        parts = config.image_groups if _images_shared(trials, every) else 1
        if parts == 1 and config.image_groups == 1 and _images_shared(trials, every):
            raise RequestError("image_groups is 1, but subjects saw the same images; give at least 2")
        part = image_parts(trials, every, parts)
        folds, left_out = [], {"test": 0, "train": 0}
        for subject in subjects:
            for group in range(parts):
                test = every[(trials.subjects_n == subject) & (part == group)]
                if not len(test):
                    continue
                others = every[trials.subjects_n != subject]
                train = others[~np.isin(trials.images_n[others], trials.images_n[test])]
                folds.append(Fold(train=train, val=none, test=test))
                left_out["train"] += len(others) - len(train)
    if any(len(np.unique(trials.labels_n[fold.train])) < 2 for fold in folds):
        raise RequestError(f"{config.dataset}: training trials of one label only; there is nothing to tell apart")
    return folds, left_out


def inner_folds(trials: Trials, fold: Fold) -> list[tuple[np.ndarray, np.ndarray]]:
    """What choices are made on: other subjects and other images than those fitted on, as in the scoring.

    Parameters
    ----------
    trials : Trials
        All trials.
    fold : Fold
        Only its train and val are looked at.

    Returns
    -------
    list of (ndarray, ndarray)
        Trials fitted on, and trials held out; empty where no such folds can be made.
    """
    train = fold.train
    subjects, subject = np.unique(trials.subjects_n[train], return_inverse=True)
    groups = min(INNER_FOLDS, len(subjects))
    if groups == 1:
        groups = INNER_FOLDS
        of_image = image_parts(trials, train, groups)
        pairs = [(of_image != g, of_image == g) for g in range(groups)]
    elif _images_shared(trials, train):
        of_image, of_subject = image_parts(trials, train, groups), subject % groups
        pairs = [((of_subject != g) & (of_image != g), (of_subject == g) & (of_image == g)) for g in range(groups)]
    else:
        pairs = [(subject % groups != g, subject % groups == g) for g in range(groups)]
    found = [(train[fit], train[held]) for fit, held in pairs]
    if len(fold.val):
        found.append((train, fold.val))
    return [(fit, held) for fit, held in found if len(held) and len(np.unique(trials.labels_n[fit])) > 1]


def shuffled_labels(trials: Trials, sets: int, seed: int) -> np.ndarray:
    """Give labels to images at random.

    Parameters
    ----------
    trials : Trials
        All trials.
    sets : int
        How many times.
    seed : int
        Of the shuffles.

    Returns
    -------
    ndarray, [S, n]
        Labels; trials of one image still share theirs.
    """
    _, first, image = np.unique(trials.images_n, return_index=True, return_inverse=True)
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(trials.labels_n[first])[image] for _ in range(sets)])
