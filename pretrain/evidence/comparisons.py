"""Compare two scores on the same trials, such as the model's own score and the score of a control.

A comparison *holds* if the three conditions in the docstring of `pretrain.evidence.rules` are met. In array shapes, n
is the number of trials, and V the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pretrain.evidence.statistics import PairedDifference, compare_paired, holm
from pretrain.evidence.trials import TrialTable

LEVEL = 0.05
"""Level of significance: a comparison holds only if its corrected p-value is below this level."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table of comparisons."""

    name: str
    """The two scores that are compared, such as ``own - shuffle``."""
    question: Literal["leak", "signal", "content"]
    """Question that the comparison helps to answer. The p-values of one question are corrected together."""
    n: int
    """Number of trials."""
    left: float
    """Mean of the first score."""
    right: float
    """Mean of the second score."""
    difference: PairedDifference
    """Mean difference between the two scores, with intervals and p-values."""
    p_corrected: float
    """The p-value after Holm's correction over the comparisons of the same question."""
    holds: bool
    """True if the comparison holds: the first score is larger, by the three conditions in the docstring of
    `pretrain.evidence.rules`."""


def measure_comparisons(
    trials: TrialTable, columns: Sequence[tuple[Any, ...]], resamples: int, seed: int
) -> list[Comparison]:
    """Measure the mean difference of each comparison, with intervals and corrected p-values.

    Parameters
    ----------
    trials : TrialTable
        The test trials.
    columns : sequence of tuple
        For each comparison: the question, the name, the two scores [n], and a mask [n] of the trials that are used.
    resamples : int
        Number of bootstrap resamples and of random permutations.
    seed : int
        Seed of the resamples.

    Returns
    -------
    list of Comparison
        One row for each comparison, in the given order. Comparisons of the same trials share their bootstrap resamples.
    """
    found: dict[str, PairedDifference] = {}
    groups: dict[tuple[bytes, bool], list[tuple[Any, ...]]] = {}
    for column in columns:
        # A predictor that is better than chance without a response shows a fault of the dataset, even if it succeeds
        # for these people only. So the bootstrap keeps these people and draws only images.
        same_people = column[0] == "leak" and column[1].endswith("- chance")
        groups.setdefault((column[4].tobytes(), same_people), []).append(column)
    for (_, same_people), same in groups.items():
        usable = same[0][4]
        more_Vn = np.stack([(left_n - right_n)[usable] for _, _, left_n, right_n, _ in same])
        part = trials.select(usable)
        measured = compare_paired(
            more_Vn, part.images_n, part.subjects_n, same_people=same_people, resamples=resamples, seed=seed
        )
        found |= {column[1]: difference for column, difference in zip(same, measured, strict=True)}
    corrected: dict[str, float] = {}
    for question in ("leak", "signal", "content"):
        names = [column[1] for column in columns if column[0] == question]
        corrected |= dict(zip(names, map(float, holm([found[name].p for name in names])), strict=True))
    rows = []
    for question, name, left_n, right_n, usable in columns:
        difference, p = found[name], corrected[name]
        holds = difference.interval[0] > 0 and p < LEVEL
        if name.startswith("own") and difference.p_people is not None:
            holds = holds and difference.p_people < LEVEL
        rows.append(
            Comparison(
                name=name,
                question=question,
                n=int(usable.sum()),
                left=float(left_n[usable].mean()),
                right=float(right_n[usable].mean()),
                difference=difference,
                p_corrected=p,
                holds=bool(holds),
            )
        )
    return rows
