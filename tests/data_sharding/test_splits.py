"""Who and what is held out, whatever else is in the corpus."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.errors import RequestError
from data_sharding.splits import SplitConfig

NAMES = [f"sub-{i:03d}" for i in range(2000)]


def test_shares_are_about_right() -> None:
    config = SplitConfig(val_fraction=0.2, test_fraction=0.1)
    counts = {s: sum(config.subject(n) == s for n in NAMES) for s in ("train", "val", "test")}
    assert abs(counts["val"] - 400) < 60 and abs(counts["test"] - 200) < 50


def test_seed_and_prefix() -> None:
    a, b = SplitConfig(seed=1), SplitConfig(seed=2)
    assert [a.subject(n) for n in NAMES] != [b.subject(n) for n in NAMES]
    assert [a.subject(n) for n in NAMES] == [a.subject(n.removeprefix("sub-")) for n in NAMES]


@given(st.sampled_from(NAMES), st.text(min_size=1, max_size=5), st.integers(0, 5))
def test_no_trial_mixes_splits(subject: str, image: str, seed: int) -> None:
    config = SplitConfig(
        seed=seed, val_fraction=0.2, test_fraction=0.2, image_val_fraction=0.2, image_test_fraction=0.2
    )
    cell = config.trial(subject, image)
    if cell is None:
        assert config.subject(subject) != config.image(image)
    else:
        assert config.subject(subject) == cell == config.image(image)


def test_table_goes_before_hash() -> None:
    config = SplitConfig(val_fraction=0, test_fraction=0, image_val_fraction=0.3, image_test_fraction=0.3)
    assert {config.trial("s", f"i{i}", "test") for i in range(50)} == {"test"}
    assert {config.trial("s", f"i{i}") for i in range(50)} == {"train", "val", "test"}


def test_lists_go_before_fractions() -> None:
    config = SplitConfig(val_fraction=0.5, test_subjects=["sub-007"])
    assert {n for n in NAMES if config.subject(n) == "test"} == {"sub-007"}
    assert not any(config.subject(n) == "val" for n in NAMES)


def test_faults() -> None:
    with pytest.raises(ValueError, match="leave a share for train"):
        SplitConfig(val_fraction=0.6, test_fraction=0.4)
    with pytest.raises(ValueError, match="choose one"):
        SplitConfig(val_subjects=["sub-1"], test_subjects=["1"])
    with pytest.raises(RequestError, match="no subject is left for train"):
        SplitConfig(val_subjects=["a"]).check_subjects(["a"])
    with pytest.raises(RequestError, match="'b' is in none"):
        SplitConfig(val_subjects=["b"]).check_subjects(["a", "c"])
