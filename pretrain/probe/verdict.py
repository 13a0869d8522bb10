"""Judge the encoder's linear probe by the written rules of `pretrain.evidence.rules`.

In array shapes, n is the number of trials of the dataset, s the number of scored test trials, and F the number of
features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.evidence.predictors import predict_from_features, predict_from_time
from pretrain.evidence.rules import Control, Design, Evidence, NotApplicable
from pretrain.evidence.trials import TrialTable, derange_within, find_neighbourhoods, group_by, group_recordings
from pretrain.probe.features import Trials
from pretrain.probe.folds import Fold

MEASURE = "the encoder's linear probe predicts the right label"
"""Description of what the score of a trial measures, for the verdict."""
NOT_MADE = {
    "noise": "the probe makes no features of noise",
    "no_eeg": "a linear classifier needs the features of an EEG",
    "eyes": "the probe does not classify eye and face channels alone",
    "nearest": "the probe generates no image",
}
"""Controls that a probe does not make, with the reasons."""

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What a verdict on a probe needs in addition to the predicted labels: trials, folds, design and baseline."""

    trials: Trials
    folds: list[Fold]
    classes: int
    """Number of labels of the dataset."""
    design: Design
    design_evidence: str
    baseline_nF: NDArray[np.floating] | NotApplicable
    """[n, F] features of the EEG before the picture, for all trials of the dataset."""
    seed: int = 0
    """Seed for the exchange of EEG between trials, and for the inner folds of the predictor from the baseline."""

    @property
    def scored(self) -> Labels:
        """Indices of the test trials of all folds."""
        return np.concatenate([fold.test for fold in self.folds])


def collect_evidence(setting: Setting, predicted_s: Labels) -> Evidence:
    """Collect the evidence for a verdict on the encoder.

    Parameters
    ----------
    setting : Setting
        The trials, the folds and the design.
    predicted_s : ndarray of int, shape (number of scored trials,)
        Labels that the classifier on the encoder's tokens predicts for the test trials, fold by fold.

    Returns
    -------
    Evidence
        The evidence for `pretrain.evidence.rules.judge`. The score of a trial is 1 if the predicted label is right.
        Chance is the larger of two numbers: the share of the most common label among the scored trials, and 1 / (number
        of labels).
    """
    table, folds = setting.trials.table, setting.folds
    tested = table.select(setting.scored)
    share = float(np.unique(tested.labels_n, return_counts=True)[1].max() / len(tested))
    # If all scored trials have the same label, the share of this label is 1, and no score could be larger. Chance is
    # then 1 / (number of labels).
    chance = max(1 / setting.classes, share if share < 1 else 0.0)
    # With several folds, the training trials of one fold can be test trials of another fold. There is then no single
    # set of training trials that the rules could compare with all test trials.
    train: TrialTable | NotApplicable = NotApplicable(
        reason="each fold has its own training trials, and no image is in both training and test trials of a fold"
    )
    if len(folds) == 1:
        train = table.select(folds[0].train)
    return Evidence(
        trials=tested,
        train=train,
        design=setting.design,
        design_evidence=setting.design_evidence,
        hits_n=(predicted_s == tested.labels_n).astype(float),
        chance=chance,
        score_of="label",
        controls={name: NotApplicable(reason=reason) for name, reason in NOT_MADE.items()}
        | _exchange_eeg(setting, tested, predicted_s)
        | _predict_without_response(setting, tested),
        identification_n=NotApplicable(reason="a probe predicts labels only"),
        judge_n=NotApplicable(reason="a probe shows no image that must be judged"),
        new_people=not _is_shared(table.subjects_n, folds),
        new_concepts=not _is_shared(table.labels_n, folds),
    )


def _is_shared(values_n: NDArray, folds: list[Fold]) -> bool:
    """Return whether a value, such as a subject, is in both the training and the test trials of at least one fold."""
    return any(np.isin(values_n[fold.test], values_n[fold.train]).any() for fold in folds)


def _exchange_eeg(setting: Setting, tested: TrialTable, predicted_s: Labels) -> dict[str, Control | NotApplicable]:
    """Give each test trial the EEG of another trial.

    The label that a classifier predicts for a trial depends only on the EEG of the trial, so the function exchanges the
    predicted labels in place of the EEG. Each fold has its own classifier, so labels are exchanged only between trials
    of the same fold.
    """
    fold_s = np.repeat(np.arange(len(setting.folds)), [len(fold.test) for fold in setting.folds])
    near_s = np.zeros(len(tested), np.int64)
    for fold in np.unique(fold_s):
        near_s[fold_s == fold] = find_neighbourhoods(tested.select(fold_s == fold))
    groups = {"shuffle": fold_s, "shuffle_within": group_by(fold_s, near_s)}
    alone = {
        "shuffle": "each fold has only one test trial",
        "shuffle_within": "no trial has a neighbour whose time is known",
    }
    found: dict[str, Control | NotApplicable] = {}
    for name, group_s in groups.items():
        order_s, alone_s = derange_within(group_s, tested.images_n, setting.seed)
        if alone_s.all():
            found[name] = NotApplicable(reason=alone[name])
            continue
        found[name] = Control(
            hits_n=(predicted_s[order_s] == tested.labels_n).astype(float),
            checked=True,
            left_out_n=alone_s | (tested.images_n[order_s] == tested.images_n),
        )
    return found


def _predict_without_response(setting: Setting, tested: TrialTable) -> dict[str, Control | NotApplicable]:
    """Make two controls: labels predicted from the time alone, and labels predicted from the EEG before the picture."""
    table, baseline_nF = setting.trials.table, setting.baseline_nF
    if not _is_shared(table.labels_n, setting.folds):
        new = NotApplicable(reason="no label of the test trials is among the labels of the training trials")
        return {"time": new, "baseline": new}

    def score(predict: Callable[[Fold], Labels]) -> Control:
        predicted_s = np.concatenate([predict(fold) for fold in setting.folds])
        return Control(hits_n=(predicted_s == tested.labels_n).astype(float), checked=True)

    def use_time(fold: Fold) -> Labels:
        return predict_from_time(table.select(fold.train), table.select(fold.test))

    if isinstance(baseline_nF, NotApplicable):
        return {"time": score(use_time), "baseline": baseline_nF}
    recording_n = group_recordings(table)

    def use_baseline(fold: Fold) -> Labels:
        return predict_from_features(
            baseline_nF[fold.train],
            table.labels_n[fold.train],
            baseline_nF[fold.test],
            groups_n=recording_n[fold.train],
            seed=setting.seed,
        )

    return {"time": score(use_time), "baseline": score(use_baseline)}
