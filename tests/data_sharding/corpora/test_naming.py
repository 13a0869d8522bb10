"""Subjects are recognised in common file names. Dates, runs and sessions are never mistaken for subjects."""

from __future__ import annotations

import re

import pytest

from data_sharding.corpora.naming import confirming_pattern, find_look_alikes, recognise

NAMES = {
    "S01.edf": "S01",
    "s1.edf": "s1",
    "rest/P03_eyes_open.edf": "P03",
    "P03/P03_2.bdf": "P03",
    "s01a.edf": "s01",
    "S05EO.vhdr": "S05",
    "h05.edf": "h05",
    "MDD_S1_EC.edf": "S1",
    "P300_S01.edf": "S01",
    "pat12.edf": "pat12",
    "participant-7/run1.edf": "participant-7",
    "VP01.vhdr": "VP01",
    "vpn3_s1.vhdr": "vpn3",
    "data/Proband_03.bdf": "Proband_03",
    "subject_A.edf": "subject_A",
    "Patient_AB12_x.edf": "Patient_AB12",
    "pt-03.edf": "pt-03",
    "Subject00_1.edf": "Subject00",
    "A00054488/A00054488.raw": "A00054488",
    "ID12345.edf": "ID12345",
    "chb01/chb01_03.edf": "chb01",
    "S001/S001R04.edf": "S001",
    "S02R1.edf": "S02",
    "SC4001E0-PSG.edf": "SC400",
    "SC4112E0-PSG.edf": "SC411",
    "ST7011J0-PSG.edf": "ST701",
    "A01T.gdf": "A01",
    "B0103T.gdf": "B01",
    "aaaaaaac/s001_2015/aaaaaaac_s001_t000.edf": "aaaaaaac",
    "NDARAB123CDE/rest.mff": "NDARAB123CDE",
}
NO_NAMES = [
    "20200131.edf", "S20200131.edf", "M200131.edf", "rec_2020.edf", "S2019.edf", "run01.edf", "R04.edf", "t1.edf",
    "session2/rec.edf", "day2/night1.edf", "P300.edf", "subject_rest.edf", "patient_20200131.edf", "part1.edf",
    "point3.edf", "anna/rec1.edf", "test_raw_h5.set", "1.edf", "001/rest.edf",
]  # fmt: skip


@pytest.mark.parametrize(("path", "subject"), NAMES.items())
def test_name_is_found_and_the_printed_pattern_finds_the_same(path: str, subject: str) -> None:
    found = recognise(path)
    assert found.subject == subject and found.scheme is not None and not found.candidates
    match = re.search(confirming_pattern([found.scheme], {path: subject}) or "", path)
    assert match and match.group("subject") == subject


@pytest.mark.parametrize("path", NO_NAMES)
def test_dates_runs_and_words_are_no_subjects(path: str) -> None:
    assert not recognise(path).subject


@pytest.mark.parametrize("path", ["s13_S07.set", "P03/s1.edf", "pat12/subject_1.edf", "S01_S02.edf"])
def test_several_names_in_one_path_are_not_used(path: str) -> None:
    found = recognise(path)
    assert not found.subject and len(found.candidates) == 2


def test_one_pattern_confirms_several_schemes() -> None:
    subjects = {path: recognise(path).subject for path in ("S01_a.edf", "VP02_b.edf", "chb03_01.edf")}
    schemes = [scheme for path in subjects if (scheme := recognise(path).scheme)]
    pattern = confirming_pattern(schemes, subjects)
    assert pattern and "'" not in pattern
    for path, subject in subjects.items():
        match = re.search(pattern, path)
        assert match and match.group("subject") == subject


def test_names_that_differ_only_in_form_are_grouped() -> None:
    assert find_look_alikes(["S1", "s01", "S001", "sub-01", "sub-1", "P1", "S10"]) == [
        ["sub-01", "sub-1"],
        ["S001", "S1", "s01"],
    ]
