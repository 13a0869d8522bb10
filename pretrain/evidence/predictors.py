"""Predictors of the label that are no better than chance if the experiment has no fault.

None of the predictors in this file sees the response to the picture. If a predictor is better than chance, no response
is needed to predict the label, so the score of a model does not show that the model uses a response. Tensor names end
with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters. In array names, L is
the number of labels, F the number of features, and k the number of neighbours.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_sharding.common.errors import RequestError
from pretrain.evidence.features import BANDS, band_power
from pretrain.evidence.ridge import STRENGTHS, RidgeFit, RidgeSums
from pretrain.evidence.trials import TrialTable, group_by, group_recordings, join_tables

NEAREST = (1, 5)
"""One rule for each number: this many training trials, the nearest in time in the same recording, vote for the
label."""
POOLED = (5, 25)
"""Two rules for each number: this many training trials, at the most similar time in any recording, vote for the label.
One rule takes the time in seconds, the other takes it as a fraction of the duration of the recording."""
INNER_FOLDS = 5
"""Largest number of inner folds of the training trials."""
_ROWS = 2000
"""Largest number of rows in a matrix of time distances, or of features in float64, to limit the memory."""

Labels = NDArray[np.int64]
UNKNOWN = -1
"""Value that a rule returns for a trial whose label the rule cannot predict."""


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Recording, time and label of each trial.

    A recording or a person has the same number in the training trials as in the test trials.
    """

    recording_n: Labels
    subject_n: Labels
    time_n: NDArray[np.float64]
    relative_n: NDArray[np.float64]
    """[n] time of each trial, divided by the time of the last trial of its recording."""
    label_n: Labels
    """[n] number of the label; 0 for all test trials, so that no rule can use a test label."""

    def select(self, chosen: NDArray[np.bool_]) -> _Places:
        return _Places(**{name: values[chosen] for name, values in vars(self).items()})


Rule = Callable[[_Places, _Places, float | None], Labels]
"""A rule predicts the labels of test trials from training trials.

A rule takes three arguments: the training trials, the test trials, and the gap. Rules are compared on the training
trials alone, so in this comparison the test trials are the training trials themselves. The gap is then a number of
seconds. A rule must not predict a trial's label from trials of the same recording that are nearer in time than the gap.
A rule over several recordings must leave out the trial's own recording. To predict the labels of real test trials, the
gap is None.
"""


def predict_from_time(train: TrialTable, test: TrialTable) -> Labels:
    """Predict labels from the person, the recording and the time of each trial, without any EEG.

    Parameters
    ----------
    train, test : TrialTable
        The training trials and the test trials. The labels and images of the test trials are not used.

    Returns
    -------
    ndarray of int, shape (number of test trials,)
        Predicted labels.

    Raises
    ------
    RequestError
        If there are no training trials.

    Notes
    -----
    Several rules compete. A rule predicts the most common label of one of these groups of training trials:

    - the nearest trials in the same recording;
    - all trials of the same recording;
    - the trials of any recording at the most similar time since its start, in seconds or as a fraction of its duration;
    - all trials of the same person;
    - all training trials.

    The rule that predicts the most training trials correctly is used. This rule is chosen separately for three groups
    of test trials: test trials of a recording that also has training trials, other test trials of a person who also has
    training trials, and all other test trials. When a rule predicts a training trial, the trials of the same recording
    that are too near in time may not vote. Too near means nearer than test trials usually are to training trials: the
    limit is the median distance from a test trial to the nearest training trial of its recording.
    """
    if not len(train):
        raise RequestError("there are no training trials, so nothing can be predicted from time; give a train split")
    labels_L, number_n = np.unique(train.labels_n, return_inverse=True)
    fit, new = _find_places(train, test, number_n)
    nearest = [_vote_of_nearest(k) for k in NEAREST]
    pooled = [_vote_of_pooled(k, name) for k in POOLED for name in ("time_n", "relative_n")]
    own_recording = np.isin(new.recording_n, fit.recording_n)
    own_person = np.isin(new.subject_n, fit.subject_n) & ~own_recording
    found_n = np.full(len(test), UNKNOWN)
    for chosen, rules in (
        (own_recording, [*nearest, _commonest_of_recording, *pooled, _commonest]),
        (own_person, [_commonest_of_person, *pooled, _commonest]),
        (~own_recording & ~own_person, [*pooled, _commonest]),
    ):
        if chosen.any():
            found_n[chosen] = _predict_by_best(rules, fit, new.select(chosen))
    return labels_L[found_n]


def _find_places(train: TrialTable, test: TrialTable, number_n: NDArray[np.integer]) -> tuple[_Places, _Places]:
    both = join_tables(train, test)
    recording_n = group_recordings(both)
    last = np.zeros(recording_n.max() + 1)
    np.fmax.at(last, recording_n, both.times_n)
    places = _Places(
        recording_n=recording_n,
        subject_n=group_by(both.subjects_n),
        time_n=both.times_n,
        relative_n=both.times_n / np.where(last > 0, last, 1.0)[recording_n],
        label_n=np.concatenate([number_n, np.zeros(len(test), np.int64)]).astype(np.int64),
    )
    in_train = np.arange(len(both)) < len(train)
    return places.select(in_train), places.select(~in_train)


def _predict_by_best(rules: list[Rule], fit: _Places, new: _Places) -> Labels:
    """Predict each trial's label with the first rule that can; rules with more hits on training trials come first."""
    gap = _median_gap(fit, new)
    hits = [float((rule(fit, fit, gap) == fit.label_n).mean()) for rule in rules]
    found = np.full(len(new.time_n), UNKNOWN)
    for number in np.argsort(-np.array(hits), kind="stable"):
        if not (missing := found == UNKNOWN).any():
            break
        found[missing] = rules[number](fit, new.select(missing), None)
    return found


def _median_gap(fit: _Places, new: _Places) -> float:
    """Return the median distance in seconds from a test trial to the nearest training trial of its recording."""
    gaps = [distance.min(axis=1) for _, _, distance in _distances(fit, new) if distance.shape[1]]
    known = np.concatenate(gaps) if gaps else np.array([])
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else 0.0


def _distances(fit: _Places, new: _Places) -> Iterator[tuple[Labels, Labels, NDArray[np.float64]]]:
    """Compute the distances in time between test trials and training trials, recording by recording.

    Yields, for each recording, the indices of its test trials, the indices of its training trials, and the matrix of
    the distances between them in seconds. A recording with many test trials is yielded in parts. The distance between
    two trials is infinite if the time of one trial is unknown.
    """
    for recording in np.unique(new.recording_n):
        rows, columns = np.flatnonzero(new.recording_n == recording), np.flatnonzero(fit.recording_n == recording)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            distance = np.abs(new.time_n[part, None] - fit.time_n[None, columns])
            yield part, columns, np.where(np.isfinite(distance), distance, np.inf)


def _count_votes(labels_nk: Labels, valid_nk: NDArray[np.bool_]) -> Labels:
    """Return the most common valid label of each row; if two labels are equally common, the label that comes first."""
    votes = np.zeros((len(labels_nk), int(labels_nk.max(initial=0)) + 1))
    # An earlier vote in the row counts slightly more, so that the label that comes first wins a tie.
    weight_k = 1 + 0.5 / (1 + np.arange(labels_nk.shape[1])) / max(1, labels_nk.shape[1])
    rows = np.broadcast_to(np.arange(len(labels_nk))[:, None], labels_nk.shape)
    np.add.at(votes, (rows, labels_nk), np.where(valid_nk, weight_k, 0.0))
    return np.where(valid_nk.any(axis=1), votes.argmax(axis=1), UNKNOWN)


def _vote_of_nearest(k: int) -> Rule:
    """Make the rule that predicts the most common label of the k nearest trials in the same recording."""

    def rule(fit: _Places, new: _Places, gap: float | None) -> Labels:
        found = np.full(len(new.time_n), UNKNOWN)
        for rows, columns, distance in _distances(fit, new):
            if not len(columns):
                continue
            if gap is not None:
                distance = _hide_near(distance, rows, columns, gap)
            near = _find_nearest(distance, k)
            valid = np.isfinite(np.take_along_axis(distance, near, axis=1))
            found[rows] = _count_votes(fit.label_n[columns[near]], valid)
        return found

    return rule


def _find_nearest(distance: NDArray[np.float64], k: int) -> Labels:
    """Return, for each row of a distance matrix, the columns of the k smallest distances, the smallest first."""
    # A partition is much faster than a complete sort if a recording has thousands of trials.
    near = np.argpartition(distance, k - 1, axis=1)[:, :k] if k < distance.shape[1] else np.argsort(distance, axis=1)
    order = np.argsort(np.take_along_axis(distance, near, axis=1), axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)


def _hide_near(distance: NDArray[np.float64], rows: Labels, columns: Labels, gap: float) -> NDArray[np.float64]:
    """Make the distance infinite from a trial to itself, and between trials that are nearer in time than the gap."""
    return np.where((distance < gap) | (rows[:, None] == columns[None]), np.inf, distance)


def _commonest_of_recording(fit: _Places, new: _Places, gap: float | None) -> Labels:
    """For each trial, predict the most common label of the training trials in the same recording."""
    found = np.full(len(new.time_n), UNKNOWN)
    for rows, columns, distance in _distances(fit, new):
        if not len(columns):
            continue
        # If `gap` is None, the times of the trials do not matter, so training trials with unknown time vote too.
        valid = np.ones(distance.shape, bool)
        if gap is not None:
            valid = (distance >= gap) & (rows[:, None] != columns[None])
        one_hot = np.eye(int(fit.label_n.max()) + 1)[fit.label_n[columns]]
        counts = valid @ one_hot
        found[rows] = np.where(valid.any(axis=1), counts.argmax(axis=1), UNKNOWN)
    return found


def _commonest_of_person(fit: _Places, new: _Places, gap: float | None) -> Labels:
    """For each trial, predict the most common label of the training trials of the same person.

    If `gap` is given, the trials of the predicted trial's own recording do not vote. If the person has no other
    recording, all trials of the person vote except the predicted trial itself.
    """
    votes = np.zeros((int(max(fit.subject_n.max(), new.subject_n.max())) + 1, int(fit.label_n.max()) + 1))
    np.add.at(votes, (fit.subject_n, fit.label_n), 1)
    counts = votes[new.subject_n]
    if gap is not None:
        own = np.zeros((int(fit.recording_n.max()) + 1, votes.shape[1]))
        np.add.at(own, (fit.recording_n, fit.label_n), 1)
        others = counts - own[new.recording_n]
        itself = np.eye(votes.shape[1])[new.label_n]
        counts = np.where(others.any(axis=1, keepdims=True), others, counts - itself)
    return np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), UNKNOWN)


def _vote_of_pooled(k: int, name: str) -> Rule:
    """Make the rule that predicts the most common label of the k trials, of any recording, nearest in the time `name`.

    `name` is a field of `_Places`: ``time_n`` or ``relative_n``.
    """

    def rule(fit: _Places, new: _Places, gap: float | None) -> Labels:
        found = np.full(len(new.time_n), UNKNOWN)
        at_fit, at_new = getattr(fit, name), getattr(new, name)
        if gap is None:
            folds = [(np.isfinite(at_fit), np.isfinite(at_new))]
        else:
            part = fit.recording_n % INNER_FOLDS
            folds = [((part != p) & np.isfinite(at_fit), (part == p) & np.isfinite(at_new)) for p in np.unique(part)]
        for known, asked in folds:
            if known.any() and asked.any():
                found[asked] = _vote_in_time(at_fit[known], fit.label_n[known], at_new[asked], k)
        return found

    return rule


def _vote_in_time(at_n: NDArray[np.float64], label_n: Labels, at_m: NDArray[np.float64], k: int) -> Labels:
    from sklearn.neighbors import KDTree

    near = KDTree(at_n[:, None]).query(at_m[:, None], k=min(k, len(at_n)), return_distance=False)
    return _count_votes(label_n[near], np.ones(near.shape, bool))


def _commonest(fit: _Places, new: _Places, gap: float | None) -> Labels:
    """For each trial, predict the most common label of all training trials."""
    del gap
    return np.full(len(new.time_n), np.bincount(fit.label_n).argmax())


def predict_from_features(
    train_x_nF: ArrayLike,
    train_labels_n: ArrayLike,
    test_x_mF: ArrayLike,
    *,
    groups_n: ArrayLike | None = None,
    seed: int = 0,
) -> Labels:
    """Predict labels from features with ridge regression on one-hot labels.

    Parameters
    ----------
    train_x_nF, test_x_mF : array, shapes (n, F) and (m, F)
        Features of the training trials and of the test trials.
    train_labels_n : array of int, shape (n,)
        Labels of the training trials.
    groups_n : array, shape (n,), optional
        Group of each training trial, such as its recording. All trials of a group are in the same inner fold (a fold of
        the training trials). By default, each trial is a group of its own.
    seed : int
        Seed for the random division of the groups into inner folds.

    Returns
    -------
    ndarray of int, shape (m,)
        Predicted labels. The features are standardised with mean and standard deviation of the training trials, and the
        penalty is chosen on inner folds of the training trials.

    Raises
    ------
    RequestError
        If a feature is not finite, if the shapes do not fit together, or if there are no training trials.
    """
    x_nF, new_mF = _check_features(train_x_nF, "training"), _check_features(test_x_mF, "test")
    labels_L, number_n = np.unique(np.asarray(train_labels_n), return_inverse=True)
    if len(number_n) != len(x_nF) or not len(x_nF) or x_nF.shape[1] != new_mF.shape[1]:
        raise RequestError(
            f"the training features have the shape {x_nF.shape}, the test features {new_mF.shape}, and there are "
            f"{len(number_n)} training labels; give at least one training trial, one label for each training trial, "
            "and equal numbers of features"
        )
    blocks = [slice(start, start + _ROWS) for start in range(0, len(x_nF), _ROWS)]
    fold_n = _divide_into_folds(len(x_nF), groups_n, seed)
    sums = [RidgeSums(x_nF.shape[1], len(labels_L)) for _ in range(int(fold_n.max()) + 1)]
    for block in blocks:
        one_hot_nL = np.eye(len(labels_L))[number_n[block]]
        for fold, of_fold in enumerate(sums):
            inside_n = fold_n[block] == fold
            of_fold.add(x_nF[block][inside_n], one_hot_nL[inside_n])
    total = functools.reduce(operator.add, sums)
    # A constant feature becomes 0, because a division by its tiny standard deviation would enlarge rounding errors.
    scale_F = total.compute_scale(1e-9 * np.maximum(1.0, np.abs(total.mean_F)))
    hits = np.zeros(len(STRENGTHS))
    for fold in range(len(sums) if len(sums) > 1 else 0):
        fitted = functools.reduce(operator.add, [part for number, part in enumerate(sums) if number != fold]).fit(
            scale_F
        )
        held_n = np.flatnonzero(fold_n == fold)
        for number in range(len(STRENGTHS)):
            found_n = _find_labels(fitted, number, x_nF, held_n)
            hits[number] += (found_n == number_n[held_n]).sum()
    # If several penalties are equally good, use the strongest penalty.
    best = len(STRENGTHS) - 1 - int(hits[::-1].argmax()) if hits.any() else len(STRENGTHS) // 2
    return labels_L[_find_labels(total.fit(scale_F), best, new_mF, np.arange(len(new_mF)))].astype(np.int64)


def _find_labels(fitted: RidgeFit, number: int, x_nF: NDArray[np.floating], rows: Labels) -> Labels:
    """Return the label with the largest score for each trial in `rows`; the penalty is ``STRENGTHS[number]``."""
    weights_FL = fitted.compute_weights(number)
    parts = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
    found = [((x_nF[part] - fitted.mean_F) @ weights_FL + fitted.mean_L).argmax(axis=1) for part in parts]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _check_features(values: ArrayLike, what: str) -> NDArray[np.floating]:
    """Return the features as an array of floats; features in float32 are not copied."""
    x_nF = np.asarray(values)
    x_nF = x_nF if x_nF.dtype == np.float32 else x_nF.astype(np.float64, copy=False)
    if x_nF.ndim != 2:
        raise RequestError(f"the {what} features have the shape {x_nF.shape}; give one row of features for each trial")
    if bad := int((~np.isfinite(x_nF)).any(axis=1).sum()):
        raise RequestError(
            f"{bad} of {len(x_nF)} {what} trials have a feature that is NaN or infinite; correct these features"
        )
    return x_nF


def _divide_into_folds(n: int, groups_n: ArrayLike | None, seed: int) -> Labels:
    """Return the inner fold [n] of each trial; all trials are in fold 0 if there is only one group of trials."""
    rng = np.random.default_rng([seed, n])
    group_n = np.arange(n) if groups_n is None else group_by(groups_n)
    if len(group_n) != n:
        raise RequestError(f"there are {len(group_n)} groups for {n} training trials; give one group for each trial")
    groups = int(group_n.max()) + 1
    return (rng.permutation(groups) % min(INNER_FOLDS, groups))[group_n]


def noise_features(x_nCT: ArrayLike, sfreq: float) -> NDArray[np.float64]:
    """Compute features that need no response to the picture: mean and logarithmic band power of each channel.

    The caller gives either the EEG before the picture, or eye and face channels.

    Parameters
    ----------
    x_nCT : array, shape (n, C, T)
        EEG in microvolts.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    ndarray, shape (n, C x (1 + bands))
        Mean of each channel, followed by the features of `pretrain.evidence.features.band_power`.

    Raises
    ------
    RequestError
        If a value is not finite, or if the signal is too short for the bands.
    """
    x_nCT = np.asarray(x_nCT, np.float64)
    if x_nCT.ndim != 3 or not x_nCT.shape[-1]:
        raise RequestError(f"the EEG has the shape {x_nCT.shape}; give trials x channels x samples")
    if not np.isfinite(x_nCT).all():
        raise RequestError("the EEG has values that are NaN or infinite; leave out the trials that have such values")
    frequencies = np.fft.rfftfreq(x_nCT.shape[-1], 1 / sfreq)
    low, high = min(low for low, _ in BANDS.values()), max(high for _, high in BANDS.values())
    if not ((frequencies >= low) & (frequencies < high)).any():
        raise RequestError(
            f"{x_nCT.shape[-1]} samples at {sfreq:g} Hz are too short for a frequency from {low} to {high} Hz; give a "
            "longer part of each trial"
        )
    return np.concatenate([x_nCT.mean(axis=-1), band_power(x_nCT, sfreq)], axis=1)
