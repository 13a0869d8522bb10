"""Verdicts on constructed sets whose truth is known; `benchmarks/verdict_rates.py` runs them with more seeds."""

from __future__ import annotations

import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_sharding.common.errors import RequestError
from pretrain.evidence.rules import Control, judge

BENCHMARK = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "verdict_sets.py"))
SETS, make_evidence = BENCHMARK["SETS"], BENCHMARK["make_evidence"]
MANY = {"clean": 20, "blocks and drift": 20, "blocks, drift and response": 20}
"""Sets with many seeds. The other sets have `FEW` seeds, so that the tests stay fast."""
FEW = 3


def count_words(name: str, seeds: int, **changes: int) -> Counter[str]:
    design = replace(SETS[name][0], **changes)
    return Counter(judge(make_evidence(design, seed), resamples=500, seed=seed).word for seed in range(seeds))


@pytest.mark.parametrize("name", [name for name in SETS if name != "null"])
def test_the_verdict_is_the_truth(name: str) -> None:
    seeds = MANY.get(name, FEW)
    words = count_words(name, seeds)
    right = words[SETS[name][1]]
    assert right >= (0.95 if SETS[name][1] == "confounded" else 0.9) * seeds, words


def test_a_null_set_rarely_shows_a_signal() -> None:
    words = count_words("null", 100, images=20)
    assert words["signal"] + words["category only"] <= 5, words
    assert words["no signal"] >= 90, words


def test_a_verdict_does_not_depend_on_names_and_order_of_labels() -> None:
    evidence = make_evidence(SETS["clean"][0], 0)
    moved = replace(evidence.trials, labels_n=evidence.trials.labels_n * 3 + 7)
    trained = replace(evidence.train, labels_n=evidence.train.labels_n * 3 + 7)
    one, other = (judge(found, resamples=500) for found in (evidence, replace(evidence, trials=moved, train=trained)))
    assert one.as_json() == other.as_json()


def test_a_control_that_was_not_checked_is_refused() -> None:
    evidence = make_evidence(SETS["clean"][0], 0)
    forged = Control(hits_n=evidence.hits_n, checked=False)
    with pytest.raises(RequestError, match="control shuffle: was not checked"):
        judge(replace(evidence, controls={**evidence.controls, "shuffle": forged}))
