"""The job says which splits have no sample, why, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from data_sharding.corpora import Item, Trial
from data_sharding.dataset.splits import SplitConfig
from data_sharding.formats.sniffing import Recording
from data_sharding.job.announce import describe_empty_splits

NO_FRACTIONS = {"val_fraction": 0.0, "test_fraction": 0.0, "image_val_fraction": 0.0, "image_test_fraction": 0.0}


def make_item(subject: str, images: Iterable[str] | None = None, *, split: str = "", known: bool = True) -> Item:
    """Make a recording. Each image is the image of one trial; without `images`, the recording has no trials."""
    trials = None
    if images is not None:
        trials = tuple(
            Trial(onset=i, image=name, image_id=name, label_name="x", caption="x", split=split, concept=name[:1])
            for i, name in enumerate(images)
        )
    return Item(
        key=f"lab/{subject}" if known else subject,
        corpus="lab",
        path=f"{subject}.edf",
        recording=Recording(path=Path(f"{subject}.edf"), format="edf", files=()),
        subject=subject,
        session="",
        subject_from="recognised" if known else "unknown",
        trials=trials,
    )


@pytest.mark.parametrize(
    ("split", "items", "lines"),
    [
        (
            {"seed": 0, "val_fraction": 0.3},
            [make_item(f"S{i}") for i in range(1, 6)],
            ["test has no subjects: the hash put none of 5 subjects there (test_fraction 0.1, seed 0); choose another"],
        ),
        (
            {"seed": 0, "val_fraction": 0.3},
            [make_item(f"S{i}", known=False) for i in range(1, 6)],
            ["test has no subjects: the hash put none of 5 recordings (whose subjects are not known, so that each"],
        ),
        (
            {"seed": 0, "val_fraction": 0.3},
            [*(make_item(f"S{i}", known=False) for i in range(1, 5)), make_item("S5"), make_item("S5")],
            ["test has no subjects: the hash put none of 1 subject and 4 recordings (whose subjects are not known"],
        ),
        (
            {"val_subjects": ["S1"]},
            [make_item("S1"), make_item("S2")],
            ["test has no subjects: test_subjects is empty"],
        ),
        (
            {"val_fraction": 0.0, "test_fraction": 0.0},
            [make_item("S1")],
            ["val has no subjects: the config holds out no subjects", "test has no subjects: the config holds out no"],
        ),
    ],
)
def test_splits_without_subjects(split: dict, items: list[Item], lines: list[str]) -> None:
    assert_lines(describe_empty_splits(SplitConfig(**split), items), lines)


def assert_lines(said: list[str], starts: list[str]) -> None:
    assert len(said) == len(starts) and all(a.startswith(b) for a, b in zip(said, starts, strict=True)), said


class TestImages:
    def test_subjects_of_a_split_saw_none_of_its_images(self) -> None:
        split = SplitConfig(val_subjects=["S1", "S3"], test_subjects=["S2"], image_val_fraction=0.2)
        where = {name: split.image(name) for name in (f"i{k}" for k in range(40))}
        of = {part: [name for name, found in where.items() if found == part] for part in ("train", "val", "test")}
        items = [
            make_item("S1", of["train"]),
            make_item("S3", of["train"][:2]),
            make_item("S2", of["test"]),
            make_item("S4", where),
        ]
        (line,) = describe_empty_splits(split, items)
        assert line == (
            "val has no samples: the config holds out subjects and images, and its 2 subjects (S1, S3) saw none of the "
            f"{len(of['val'])} val images, so all their {len(of['train']) + 2} trials are left out; to hold out only "
            "subjects, set image_val_fraction and image_test_fraction to 0; to hold out only images, set val_fraction "
            "and test_fraction to 0, and leave val_subjects and test_subjects empty"
        )
        for change in (
            {"image_val_fraction": 0.0, "image_test_fraction": 0.0},
            {"val_subjects": [], "test_subjects": [], "val_fraction": 0.0, "test_fraction": 0.0},
        ):
            settings = {"val_subjects": ["S1", "S3"], "test_subjects": ["S2"], "image_val_fraction": 0.2, **change}
            assert describe_empty_splits(SplitConfig(**settings), items) == [], "both ways of the message work"

    def test_there_are_no_images_of_the_split(self) -> None:
        split = SplitConfig(**NO_FRACTIONS | {"image_test_fraction": 0.5}, val_subjects=["S1"], test_subjects=["S2"])
        images = [f"i{k}" for k in range(20)]
        said = describe_empty_splits(split, [make_item(f"S{k}", images) for k in range(1, 4)])
        assert_lines(said, ["val has no samples: the config holds out subjects and images, and its 1 subject (S1) saw"])
        assert "no val image, because there is none, so all their 20 trials are left out" in said[0]

    def test_splits_of_the_corpus_are_named(self) -> None:
        split = SplitConfig(**NO_FRACTIONS, val_subjects=["S1"])
        items = [make_item("S1", ["a", "b"], split="train"), make_item("S2", ["a", "b"], split="train")]
        said = describe_empty_splits(split, items)
        assert_lines(said, ["val has no samples", "test has no subjects: test_subjects is empty"])
        assert "to 0, and remove the splits that the corpus gives to its images; to hold out only images" in said[0]
        said = describe_empty_splits(SplitConfig(**NO_FRACTIONS), items)
        start = "has no samples: the corpus puts none of its 2 images there"
        assert_lines(said, [f"val {start}", f"test {start}"])

    def test_only_images_are_held_out(self) -> None:
        items = [make_item("S1", ["a", "b"])]
        said = describe_empty_splits(SplitConfig(**NO_FRACTIONS | {"image_val_fraction": 0.001}), items)
        assert_lines(
            said,
            [
                "val has no samples: the hash put none of 2 images there (image_val_fraction 0.001, by image, seed 0)",
                "test has no samples: image_test_fraction is 0",
            ],
        )


def test_recordings_of_a_split_that_could_not_be_used(make_row: Callable) -> None:
    split = SplitConfig(val_subjects=["S1", "S2"], test_subjects=["S3"])
    items = [make_item(f"S{k}") for k in range(1, 5)]
    rows = [make_row(item.key, subject=item.subject, split=split.subject(item.subject)) for item in items]
    assert describe_empty_splits(split, items, rows) == []
    for row in rows[:2]:
        row.status = "quarantined"
    said = describe_empty_splits(split, items, rows)
    assert_lines(said, ["val has no samples: none of its 2 recordings could be used; the ledger has the reason"])
