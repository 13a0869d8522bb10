"""Collect the evidence for a verdict: scores, trials, design of the experiment, and controls that need no generator.

`pretrain.evidence.rules` turns the evidence into a verdict. Array shapes: B trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.manifest import NAME
from finetune.generation.predictors import Prediction, Predictor, predict
from finetune.generation.trials import NotApplicableError, Trial
from finetune.images import ImageTable
from pretrain.evidence.copies import find_copies
from pretrain.evidence.design import describe_design
from pretrain.evidence.rules import Control, Design, Evidence, NotApplicable
from pretrain.evidence.trials import TrialTable, merge_copies, tabulate_trials
from pretrain.evidence.windows import KnownEEG, find_known_eeg

PREDICTORS: tuple[Predictor, ...] = ("time", "baseline", "eyes")
"""Controls that need no generator."""


def make_predictors(
    table: ImageTable,
    data: EEGDataset,
    trials: Sequence[Trial],
    score: Callable[[Prediction], NDArray[np.float64]],
    seed: int,
) -> dict[str, Control | NotApplicable]:
    """Score simple predictors of the category that use no brain response to the picture.

    The predictors use the time of the trial, the EEG before the picture, or the eye and face channels.

    Parameters
    ----------
    table : ImageTable
        Images of the train split.
    data : EEGDataset
        Split of the trials.
    trials : sequence of Trial
        The trials.
    score : callable
        Function that computes, from a prediction, the score of each trial (from 0 to 1).
    seed : int
        Seed of the predictors.

    Returns
    -------
    dict
        Maps each predictor to its scores, or to a text that says why the predictor cannot be made from the data.
    """
    found: dict[str, Control | NotApplicable] = {}
    for name in PREDICTORS:
        try:
            prediction = predict(name, table, data, trials, seed=seed)
        except NotApplicableError as error:
            found[name] = NotApplicable(reason=str(error))
        else:
            found[name] = Control(hits_n=score(prediction), checked=True)
    return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Evaluated trials, training trials and design of the experiment, which a verdict needs in addition to scores."""

    trials: TrialTable
    """The evaluated trials."""
    train: TrialTable
    """The training trials."""
    design: Design
    design_evidence: str
    known_eeg: KnownEEG
    """Evaluated trials whose EEG is also in the data that trained the model."""

    @classmethod
    def read(
        cls,
        train: EEGDataset,
        data: EEGDataset,
        trials: Sequence[Trial],
        declared: str = "",
        *,
        copies: Iterable[tuple[str, str]] | None = None,
        known_eeg: KnownEEG | None = None,
    ) -> Setting:
        """Read the data, except scores, that a verdict on trials of the split `data` needs.

        `describe_design` explains `declared`. If copies of an image have several names, they are treated as one image;
        `copies` are the pairs of names from `find_copies`, which is called if `copies` is None. `known_eeg` marks the
        presentations in `data` whose EEG also trained the model; by default, `find_known_eeg` compares the EEG of
        `data` with the training trials. A trial is marked if any of its presentations is marked.
        """
        design, evidence = describe_design(data.manifest, declared, where=str(data.path / NAME))
        copies = find_copies(train, data) if copies is None else list(copies)
        if known_eeg is None:
            known_eeg = find_known_eeg(train, data)
        tables = (
            replace(table, images_n=merge_copies(table.images_n, copies))
            for table in (tabulate_trials(data), tabulate_trials(train))
        )
        return cls(
            trials=next(tables).select([trial.numbers[0] for trial in trials]),
            train=next(tables),
            design=design,
            design_evidence=evidence,
            known_eeg=replace(
                known_eeg,
                trials={
                    name: np.array([known_n[trial.numbers].any() for trial in trials], bool)
                    for name, known_n in known_eeg.trials.items()
                },
            ),
        )

    def weigh(
        self,
        hits_n: NDArray[np.float64],
        chance: float,
        *,
        score_of: Literal["label", "image"],
        controls: dict[str, Control | NotApplicable],
        identification_n: NDArray[np.float64] | NotApplicable,
        judge_n: NDArray[np.float64] | NotApplicable,
        judge_chance: float | None = None,
    ) -> Evidence:
        """Combine scores and controls into the evidence for `pretrain.evidence.rules.judge`.

        `identification_n` is NaN for the trials of a category of which only one image was seen.
        """
        single_n = None
        if not isinstance(identification_n, NotApplicable):
            single_n = np.isnan(identification_n)
            identification_n = np.where(single_n, 0.5, identification_n)
            if single_n.all():
                identification_n = NotApplicable(reason="every category has only one seen image")
        shared = {
            name: bool(len(np.intersect1d(getattr(self.trials, name), getattr(self.train, name))))
            for name in ("subjects_n", "labels_n")
        }
        return Evidence(
            trials=self.trials,
            train=self.train,
            design=self.design,
            design_evidence=self.design_evidence,
            hits_n=hits_n,
            chance=chance,
            score_of=score_of,
            controls=controls,
            identification_n=identification_n,
            identification_left_out_n=single_n,
            judge_n=judge_n,
            judge_chance=judge_chance,
            known_eeg=self.known_eeg.trials,
            people_in_pretraining=self.known_eeg.people_in_pretraining,
            new_people=not shared["subjects_n"],
            new_concepts=not shared["labels_n"],
        )
