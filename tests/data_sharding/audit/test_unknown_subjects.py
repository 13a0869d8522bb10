"""If subjects are unknown, ``dreamscale verify`` and ``dreamscale inspect`` do not claim that no subject is shared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_sharding.audit.inspect_dataset import main as inspect
from data_sharding.audit.verify import main as verify
from data_sharding.common.files import sha256_file
from data_sharding.common.reason import Reason
from data_sharding.dataset.ledger import NAME, read_ledger, write_ledger
from data_sharding.dataset.manifest import Manifest

SPLITS = ["train", "train", "val", "test"]


def change(path: Path, split: dict | None = None, **columns) -> Path:
    """Replace columns of the ledger, and the section `split` of the config."""
    rows = [dataclasses.replace(row, **columns) for row in read_ledger(path)]
    write_ledger(path / NAME, rows)
    manifest = Manifest.read(path)
    extra = manifest.extra | {"ledger_sha256": sha256_file(path / NAME)}
    config = {"split": split} if split is not None else {}
    dataclasses.replace(manifest, extra=extra, config=config).write(path)
    return path


@pytest.fixture
def make(publish, make_raw, tmp_path: Path):
    def build(name: str, subjects: list[str], splits: list[str], first: int = 0) -> Path:
        recordings = [
            {"key": f"{name}{i}", "subject": s or f"{name}{i}", "corpus": name, "split": splits[i]}
            | {"raw": make_raw(6, 200, 8, seed=first + i)}
            for i, s in enumerate(subjects)
        ]
        publish(tmp_path / name, recordings)
        return tmp_path / name

    return build


def last_line(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_one_unknown_subject_is_enough(make, capsys) -> None:
    path = make("lab", ["sub-01", "sub-01", "sub-02", ""], SPLITS)
    assert verify([str(path)]) == 3
    line = last_line(capsys)
    assert "not known whether a person is in several splits" in line and "1 of 4 recordings are unknown" in line
    assert line.endswith("make the dataset again with 'dreamscale shard' and a new folder in the key 'output'")
    assert inspect([str(path), "--json", "true"]) == 0
    table = {row["split"]: row for row in json.loads(capsys.readouterr().out)["split"]}
    assert (table["train"]["subjects"], table["test"]["subjects"], table["test"]["subject unknown"]) == (1, 0, 1)


def test_proof_of_leakage_wins_over_unknown_subjects(make, capsys) -> None:
    assert verify([str(make("lab", ["sub-01", "", "sub-01", ""], SPLITS))]) == 1
    assert "the splits share data" in last_line(capsys)


def test_recognised_subjects_are_a_condition(make, capsys) -> None:
    path = change(make("lab", ["S1", "S1", "S2", "S3"], SPLITS), subject_from="recognised")
    assert verify([str(path)]) == 0
    out = capsys.readouterr().out
    assert "not confirmed: subjects of 4 recordings" in out
    assert "share nothing, if the subjects of 4 of 4 recordings are right" in out.splitlines()[-1]


def test_known_subjects_are_called_clean(make, capsys) -> None:
    path = change(make("lab", ["S1", "S1", "S2", "S3"], SPLITS), subject_from="config")
    assert verify([str(path)]) == 0 and "the splits share nothing; next" in last_line(capsys)


def test_names_that_look_alike_are_a_question(make, capsys) -> None:
    assert verify([str(make("lab", ["S1", "S1", "S01", "S3"], SPLITS))]) == 0
    out = capsys.readouterr().out
    assert "to look at: the names S01, S1 in" in out and "questions about 1 subjects above" in out.splitlines()[-1]
    assert "share nothing" not in out


def test_copies_under_two_names_are_a_question(make, make_row, capsys) -> None:
    path = make("lab", ["anna", "bert", "carl", "dora"], SPLITS)
    rows = read_ledger(path)
    copy = make_row("copy", corpus="lab", subject="dora", status="duplicate", reason=Reason("duplicate"))
    copy.duplicate_of = rows[0].key
    write_ledger(path / NAME, [*rows, copy])
    change(path)
    manifest = Manifest.read(path)
    dataclasses.replace(manifest, counts=manifest.counts | {"found": 5}).write(path)
    assert verify([str(path)]) == 0
    out = capsys.readouterr().out
    assert "to look at: anna of corpus lab and dora of corpus lab have copies of one recording" in out
    assert "are in train and test: are they one person?" in out


def test_one_split_has_nothing_to_compare(make, capsys) -> None:
    assert verify([str(make("lab", ["", "", ""], ["train"] * 3))]) == 0
    assert "all samples are in train, so there are no splits to compare" in last_line(capsys)


def test_splits_that_hold_no_subject_out_are_not_called_clean(make, capsys) -> None:
    path = change(make("lab", ["", "", "", ""], SPLITS), split={"val_fraction": 0.0, "test_fraction": 0.0})
    assert verify([str(path)]) == 0
    line = last_line(capsys)
    assert "the config holds out no subjects" in line and "share nothing" not in line


@pytest.mark.parametrize("unknown_here", [True, False])
def test_two_datasets_of_which_one_has_unknown_subjects(make, capsys, unknown_here: bool) -> None:
    here = make("here", ["" if unknown_here else "S1", "S2"], ["train"] * 2)
    there = make("there", ["P1", "P2" if unknown_here else ""], ["train"] * 2, first=10)
    assert verify([str(here), "--against", str(there)]) == 3
    line = last_line(capsys)
    assert "not known whether they share subjects" in line and "of 1 recordings are unknown" in line
