"""Tests of the description of the training data: subjects, devices and licences."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.ledger import NAME, LedgerRow, write_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.mixture import Mixture
from pretrain.train import main as pretrain
from pretrain.training.data_summary import (
    check_licenses,
    describe_data,
    describe_people,
    describe_people_in_words,
    describe_versions_in_words,
)

from ..conftest import write_config


def make_row(key: str, subject: str, split: str = "train", **columns) -> LedgerRow:
    values = {"corpus": "lab", "path": f"{key}.edf", "files": [], "status": "sharded", "subject_from": "table"}
    return LedgerRow(**{**values, "key": key, "subject": subject, "split": split, **columns})


ROWS = [
    make_row("a", "anna", age=34.0, sex="F", device="BrainAmp", license="CC0-1.0", recording_year=2011),
    make_row("b", "anna", age=35.0, sex="F", device="BrainAmp", license="CC0-1.0", recording_year=2012),
    make_row("c", "bert", age=90.0, sex="M", license="CC-BY-4.0"),
    make_row("d", "S01", subject_from="recognised", group="control"),
    make_row("e", "e", subject_from="unknown"),
    make_row("f", "carl", split="val", license="secret"),
]


@pytest.fixture
def dataset(unpaired_dataset: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(unpaired_dataset, tmp_path / "data"))
    write_ledger(path / NAME, ROWS)
    return path


def test_people_of_the_split_are_counted(dataset: Path) -> None:
    people = describe_people(EEGDataset(dataset, "train"))
    assert (people["subjects"], people["recordings"], people["unknown"], people["not_confirmed"]) == (3, 5, 1, 1)
    assert people["age"] == {"30 to 39": 1, "90 or older": 1, "": 1} and people["sex"] == {"F": 1, "M": 1, "": 1}
    assert people["license"] == {"CC0-1.0": 2, "": 2, "CC-BY-4.0": 1}
    text = "\n".join(describe_people_in_words(people))
    assert "subject of 1 of 5 recordings is not known" in text and "subjects of 1 of 5 recordings were recogn" in text
    assert "Age in years (subjects): 30 to 39 1, 90 or older 1, unknown 1" in text
    assert "Licence (recordings): CC0-1.0 2, CC-BY-4.0 1, unknown 2" in text
    assert "Task" not in text, "nothing is known about tasks"
    assert describe_people_in_words({}) == [], "a run of an older version"


def test_people_of_a_mixture_are_added(dataset: Path, unpaired_dataset: Path, tmp_path: Path) -> None:
    assert describe_people(EEGDataset(unpaired_dataset, "train")) == {"subjects": 3}, "a dataset without a ledger"
    mixed = describe_people(Mixture({str(dataset): 1.0}, "train"))
    assert mixed == describe_people(EEGDataset(dataset, "train"))


def test_versions_of_the_datasets_are_named(dataset: Path) -> None:
    manifest = Manifest.read(dataset)
    dataclasses.replace(manifest, extra={**manifest.extra, "version": 3}).write(dataset)
    alone = describe_data(EEGDataset(dataset, "train"), {}, 0)
    assert describe_versions_in_words(alone) == [f"- Dataset id `{manifest.dataset_id}`, version 3"]
    mixed = Mixture({str(dataset): 1.0}, "train")
    assert describe_versions_in_words(describe_data(mixed, {}, 0)) == [
        f"- Dataset id `{mixed.manifest.dataset_id}`",
        f"- Dataset id `{manifest.dataset_id}`, version 3, in the mixture",
    ]
    assert describe_versions_in_words({"dataset_id": "a"}) == ["- Dataset id `a`"], "a run of an older version"


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (["CC0*"], "1 x CC-BY-4.0"),
        (["cc0-1.0", "CC-BY-*"], "2 x unknown"),
        (["*"], "set the key 'license' of the corpus"),
    ],
)
def test_licences_that_are_not_allowed_are_named(allowed: list[str], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_licenses(allowed, {"CC0-1.0": 2, "": 2, "CC-BY-4.0": 1}, "run")
    assert words in str(caught.value)


def test_allowed_licences_pass() -> None:
    check_licenses([], None, "run")
    check_licenses(["cc0*", "CC-BY-?.0"], {"CC0-1.0": 2, "CC-BY-4.0": 1}, "run")
    with pytest.raises(RequestError, match="are not known"):
        check_licenses(["CC0*"], None, "run")


def test_training_is_refused_before_it_begins(dataset: Path, tmp_path: Path, capsys) -> None:
    config = write_config(
        tmp_path / "config.yaml", dataset=str(dataset), output=str(tmp_path / "run"), allowed_licenses=["CC0*"]
    )
    assert pretrain([str(config)]) == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert "1 x CC-BY-4.0" in error and "2 x unknown" in error and "secret" not in error, "val is not training data"
