"""The sidecar files of a BIDS dataset describe people, devices and rights. If a sidecar file is invalid, only the
values of this file are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_sharding.corpora import CorpusConfig, Item, list_items
from data_sharding.job.task import describe_row, new_row


@pytest.fixture
def root(write_raw, make_raw, tmp_path: Path) -> Path:
    for subject in ("01", "02", "03"):
        path = tmp_path / "study" / f"sub-{subject}" / "eeg" / f"sub-{subject}_task-rest_eeg.vhdr"
        write_raw(make_raw(4, 200, 3, seed=int(subject)), path)
    root = tmp_path / "study"
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "License": "CC0"}))
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tgroup\tname\nsub-01\t34\tF\tpatient\tHarry\nsub-02\t89+\tmale\tn/a\tAnna\n"
    )
    device: dict[str, Any] = {
        "Manufacturer": "Brain Products",
        "ManufacturersModelName": "actiCHamp",
        "TaskName": "eyes closed",
    }
    device["HardwareFilters"] = {"Highpass RC filter": {"Half amplitude cutoff (Hz)": 0.0159, "Roll-off": "6dB/Octave"}}
    (root / "task-rest_eeg.json").write_text(json.dumps(device))
    return root


def find(root: Path, **keys) -> list[Item]:
    return list_items(CorpusConfig(kind="bids", root=str(root), **keys))


def test_sidecars_describe_people_device_and_rights(root: Path) -> None:
    first, second, third = find(root)
    row = new_row(first)
    describe_row(row, first)
    assert (row.subject_from, row.age, row.sex, row.group) == ("bids", 34.0, "F", "patient")
    assert (row.device, row.task, row.license) == ("Brain Products actiCHamp", "rest", "CC0")
    assert row.device_filters == "Highpass RC filter: 0.0159, 6dB/Octave"
    assert (second.about["age"], second.about["sex"], "group" in second.about) == (90.0, "M", False)
    assert "age" not in third.about and "Harry" not in str(first), "no row, and no name"


@pytest.mark.parametrize(("unit", "age"), [("years", 34.0), ("months", 2.83), ("Weeks", 0.65), ("dog years old", 34.0)])
def test_unit_of_the_age(root: Path, unit: str, age: float) -> None:
    (root / "participants.json").write_text(json.dumps({"age": {"Description": "age", "Units": unit}}))
    assert find(root)[0].about["age"] == pytest.approx(age)


def test_unknown_unit_of_the_age_leaves_the_age_out(root: Path) -> None:
    (root / "participants.json").write_text(json.dumps({"age": {"Units": "moons"}}))
    assert "age" not in find(root)[0].about and find(root)[0].about["sex"] == "F"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "participant_id\tage\tsex\nsub-01\told\tF\n",
            "participants.tsv: age 'old' is not a number of years; left out",
        ),
        ("participant_id\tage\nsub-01\t3\t4\t5\n", "participants.tsv not used: participants.tsv, line 2: its number"),
    ],
)
def test_broken_participants_table_costs_only_its_values(root: Path, text: str, note: str) -> None:
    (root / "participants.tsv").write_text(text)
    first = find(root)[0]
    assert any(note in entry for entry in first.info_patch["notes"]) and "age" not in first.about
    assert first.recording.problem is None and first.subject == "sub-01"


def test_licence_of_the_config_wins_and_a_table_can_join_two_names(root: Path, tmp_path: Path) -> None:
    (tmp_path / "people.tsv").write_text("path\tsubject\tage\nsub-0[12]/*\tanna\t35\n")
    first, second, third = find(root, license="CC-BY-4.0", subjects=str(tmp_path / "people.tsv"))
    assert [(item.subject, item.subject_from) for item in (first, second, third)] == [
        ("anna", "table"),
        ("anna", "table"),
        ("sub-03", "bids"),
    ]
    assert first.about["license"] == "CC-BY-4.0" and first.about["age"] == 35.0, "the table wins over participants.tsv"


class TestYearOfTheRecording:
    def write(self, root: Path, time: str, name: str = "eeg/sub-01_task-rest_eeg.vhdr") -> Item:
        (root / "sub-01" / "sub-01_scans.tsv").write_text(f"filename\tacq_time\neeg/other.vhdr\tx\n{name}\t{time}\n")
        return find(root)[0]

    @pytest.mark.parametrize(
        ("time", "year"),
        [
            ("2017-05-24T11:30:00", 2017),
            ("2017-05-24T11:30:00.25Z", 2017),
            ("2017-05-24", 2017),
            ("1918-05-24T11:30:00", None),
            ("1970-01-01T00:00:00", None),
            ("n/a", None),
        ],
    )
    def test_from_scans_tsv(self, root: Path, time: str, year: int | None) -> None:
        first = self.write(root, time)
        row = new_row(first)
        describe_row(row, first)
        assert row.recording_year == year
        assert "notes" not in first.info_patch and "05-24" not in str(first)
        assert "recording_year" not in find(root)[1].about

    def test_in_a_session(self, root: Path, write_raw, make_raw) -> None:
        name = "sub-01_ses-a_task-rest_eeg.vhdr"
        write_raw(make_raw(4, 200, 3), root / "sub-01" / "ses-a" / "eeg" / name)
        table = root / "sub-01" / "ses-a" / "sub-01_ses-a_scans.tsv"
        table.write_text(f"filename\tacq_time\neeg/{name}\t2019-02-01T00:00:00\n")
        years = {item.path.rsplit("/", 1)[-1]: item.about.get("recording_year") for item in find(root)}
        assert years == {name: 2019} | {f"sub-0{i}_task-rest_eeg.vhdr": None for i in (1, 2, 3)}

    def test_the_year_in_the_header_stays(self, root: Path) -> None:
        first = self.write(root, "2017-05-24T11:30:00")
        row = new_row(first)
        row.recording_year = 2011
        describe_row(row, first)
        assert row.recording_year == 2011

    def test_a_time_that_cannot_be_read_is_not_quoted(self, root: Path) -> None:
        first = self.write(root, "24.05.2017 11:30")
        (note,) = first.info_patch["notes"]
        assert note == "sub-01_scans.tsv: the acq_time of the recording is not a date as BIDS writes it; not used"
        (root / "sub-01" / "sub-01_scans.tsv").write_text("file\tacq_time\na\t2017-05-24\n")
        assert find(root)[0].info_patch["notes"] == [
            "sub-01_scans.tsv not used: sub-01_scans.tsv: no column 'filename'"
        ]
