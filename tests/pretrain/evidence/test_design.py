"""Tests of the design of a dataset: the manifest is checked, and published evidence changes no block design."""

from __future__ import annotations

from typing import Any

import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.manifest import Manifest
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.evidence.design import describe_design

RANDOM = {"name": "a", "kind": "events", "design": "random", "evidence": "runs are short"}
BLOCK = {"name": "b", "kind": "events", "design": "block", "evidence": "runs are long"}
UNKNOWN = {"name": "c", "kind": "arrays", "design": "unknown", "evidence": ""}


def describe(corpora: Any, declared: str = "") -> tuple[str, str]:
    extra = {} if corpora is None else {"corpora": corpora}
    manifest = Manifest(dataset_id="d", preprocess=PreprocessSpec(), splits={}, extra=extra)
    return describe_design(manifest, declared, where="data/manifest.json")


def test_the_weakest_design_of_the_corpora_counts() -> None:
    assert describe([RANDOM]) == ("random", "a: runs are short")
    assert describe([RANDOM, UNKNOWN])[0] == "unknown"
    assert describe([RANDOM, UNKNOWN, BLOCK])[0] == "block"
    assert describe(None) == ("unknown", "the manifest does not name the design")
    assert describe({"a": {"design": "random", "evidence": "runs are short"}}) == ("random", "a: runs are short")


def test_published_evidence_replaces_only_an_unknown_design() -> None:
    design, evidence = describe([UNKNOWN], "Gifford et al. 2022")
    assert design == "random"
    assert "Gifford et al. 2022" in evidence and "c: the order of the trials was not measured" in evidence
    assert describe([BLOCK], "Gifford et al. 2022")[0] == "block"
    assert describe([UNKNOWN], "  ")[0] == "unknown"


@pytest.mark.parametrize(
    ("corpora", "says"),
    [
        ("random", "extra.corpora is not a list"),
        (["random"], "a corpus is not an object"),
        ([RANDOM | {"design": 1}], "the design of a corpus is '1', not a text"),
        ([RANDOM | {"design": "shuffled"}], "'shuffled', not one of random, block, unknown"),
        ([RANDOM | {"evidence": ["x"]}], "the evidence of a corpus"),
        ([RANDOM | {"name": None}], "the name of a corpus"),
    ],
)
def test_another_form_is_refused(corpora: Any, says: str) -> None:
    with pytest.raises(RequestError, match=r"data/manifest\.json") as caught:
        describe(corpora)
    assert says in str(caught.value)


def test_texts_lose_their_control_characters() -> None:
    _, evidence = describe([RANDOM | {"evidence": "short\x1b[31m runs\n"}])
    assert evidence.isprintable() and "short" in evidence
