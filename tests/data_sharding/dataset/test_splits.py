"""The split of a subject, image or concept does not depend on the rest of the corpus."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.dataset.splits import SPLITS, TRAIN_OR_VAL, SplitConfig

NAMES = [f"sub-{i:03d}" for i in range(2000)]


def test_shares_of_subjects_are_near_the_configured_fractions() -> None:
    config = SplitConfig(val_fraction=0.2, test_fraction=0.1)
    counts = {s: sum(config.subject(n) == s for n in NAMES) for s in ("train", "val", "test")}
    assert abs(counts["val"] - 400) < 60 and abs(counts["test"] - 200) < 50


def test_seed_changes_the_split_but_the_prefix_sub_does_not() -> None:
    a, b = SplitConfig(seed=1), SplitConfig(seed=2)
    assert [a.subject(n) for n in NAMES] != [b.subject(n) for n in NAMES]
    assert [a.subject(n) for n in NAMES] == [a.subject(n.removeprefix("sub-")) for n in NAMES]


@given(st.sampled_from(NAMES), st.text(min_size=1, max_size=5), st.integers(0, 5))
def test_trial_is_left_out_if_subject_and_image_are_in_different_splits(subject: str, image: str, seed: int) -> None:
    config = SplitConfig(
        seed=seed, val_fraction=0.2, test_fraction=0.2, image_val_fraction=0.2, image_test_fraction=0.2
    )
    cell = config.trial(subject, image)
    if cell is None:
        assert config.subject(subject) != config.image(image)
    else:
        assert config.subject(subject) == cell == config.image(image)


def test_split_of_the_events_table_overrides_the_hash() -> None:
    config = SplitConfig(val_fraction=0, test_fraction=0, image_val_fraction=0.3, image_test_fraction=0.3)
    assert {config.trial("s", f"i{i}", "test") for i in range(50)} == {"test"}
    assert {config.trial("s", f"i{i}") for i in range(50)} == {"train", "val", "test"}


def test_listed_subjects_override_the_fractions() -> None:
    config = SplitConfig(val_fraction=0.5, test_subjects=["sub-007"])
    assert {n for n in NAMES if config.subject(n) == "test"} == {"sub-007"}
    assert not any(config.subject(n) == "val" for n in NAMES)


SHARES = st.sampled_from([0.0, 0.1, 0.3])
CONFIGS = st.builds(
    SplitConfig,
    seed=st.integers(0, 9),
    by=st.sampled_from(["image", "concept"]),
    val_fraction=SHARES,
    test_fraction=SHARES,
    image_val_fraction=SHARES,
    image_test_fraction=SHARES,
)
TRIALS = st.lists(
    st.tuples(
        st.sampled_from(NAMES[:12]),
        st.sampled_from(["ses-1", "ses-2"]),
        st.integers(0, 30).map(lambda i: (f"concept-{i % 7}", f"image-{i}")),
    ),
    min_size=1,
    max_size=60,
)


def assign_splits(config: SplitConfig, trials: list) -> dict:
    return {t: config.trial(t[0], t[2][1], "", t[2][0]) for t in trials}


@given(CONFIGS, TRIALS)
def test_no_subject_image_or_concept_is_in_two_splits(config: SplitConfig, trials: list) -> None:
    where = assign_splits(config, trials)
    kept = [(trial, split) for trial, split in where.items() if split is not None]
    held_out = config.image_val_fraction or config.image_test_fraction
    names = [lambda t: t[0]] if config.by_subject else []
    names += [lambda t: t[2][1]] * bool(held_out)
    names += [lambda t: t[2][0]] * bool(held_out and config.by == "concept")
    for name in names:
        splits: dict = {}
        for trial, split in kept:
            splits.setdefault(name(trial), set()).add(split)
        assert all(len(found) == 1 for found in splits.values())
    assert all(split in SPLITS for _, split in kept)


@given(CONFIGS, TRIALS, TRIALS)
def test_more_recordings_do_not_change_existing_splits(config: SplitConfig, trials: list, more: list) -> None:
    assert assign_splits(config, trials).items() <= assign_splits(config, trials + more).items()


@given(CONFIGS, st.sampled_from(NAMES), st.integers(0, 500))
def test_prefix_sub_does_not_change_the_split_of_a_trial(config: SplitConfig, subject: str, image: int) -> None:
    assert config.trial(subject, f"i{image}", "", "c") == config.trial(
        subject.removeprefix("sub-"), f"i{image}", "", "c"
    )


@pytest.mark.parametrize("by", ["image", "concept"])
def test_seed_changes_the_split_of_images_and_concepts(by: str) -> None:
    a, b = (SplitConfig(seed=seed, by=by, image_val_fraction=0.3) for seed in (1, 2))  # type: ignore[arg-type]
    pairs = [(f"image-{i}", f"concept-{i % 40}") for i in range(200)]
    assert [a.image(i, "", c) for i, c in pairs] != [b.image(i, "", c) for i, c in pairs]


def test_all_images_of_a_concept_are_in_one_split() -> None:
    config = SplitConfig(by="concept", val_fraction=0, test_fraction=0, image_val_fraction=0.2, image_test_fraction=0.2)
    splits = {c: {config.trial("s", f"{c}-{i}", "", f"c{c}") for i in range(20)} for c in range(100)}
    assert all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == set(SPLITS)
    with pytest.raises(RequestError, match="image 'x' has no concept"):
        config.trial("s", "x")


def test_corpus_may_name_only_its_test_images() -> None:
    config = SplitConfig(by="concept", image_val_fraction=0.2, image_test_fraction=0.3, val_fraction=0, test_fraction=0)
    found = {config.trial("s", f"i{c}", TRAIN_OR_VAL, f"c{c}") for c in range(100)}
    assert found == {"train", "val"}
    none = SplitConfig(image_val_fraction=0, image_test_fraction=0, val_fraction=0, test_fraction=0)
    assert none.trial("s", "i", TRAIN_OR_VAL) == "train" and none.trial("s", "i", "test") == "test"


def test_trial_without_image_is_in_the_split_of_its_subject() -> None:
    config = SplitConfig(val_fraction=0.3, test_fraction=0.3)
    assert {config.trial(name, "") == config.subject(name) for name in NAMES} == {True}


def test_invalid_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="their sum must be below 1"):
        SplitConfig(val_fraction=0.6, test_fraction=0.4)
    with pytest.raises(ValueError, match="remove each subject from one of these lists"):
        SplitConfig(val_subjects=["sub-1"], test_subjects=["1"])
    with pytest.raises(RequestError, match="no subject is left for train"):
        SplitConfig(val_subjects=["a"]).check_subjects(["a"])
    with pytest.raises(RequestError, match="'b' is not in the corpora"):
        SplitConfig(val_subjects=["b"]).check_subjects(["a", "c"])
