"""Age, sex, year, device and filters are read from headers of any format. The result contains no data that identify a
person."""

from __future__ import annotations

import datetime
from pathlib import Path

import mne
import pytest

from data_sharding.formats.about import Patient, describe, hide, mne_about, parse_patient, years_between
from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.sniffing import sniff

PERSON = {
    "his_id": "MCH-0234567",
    "first_name": "Harry",
    "last_name": "Haagse",
    "birthday": datetime.date(1951, 5, 2),
    "sex": 2,
}


def day(*numbers: int) -> datetime.datetime:
    return datetime.datetime(*numbers, tzinfo=datetime.UTC)


def test_fif_file_gives_age_but_no_identity(make_raw, write_raw, tmp_path: Path) -> None:
    raw = make_raw(4, 200, 3)
    raw.set_meas_date(day(2011, 3, 12))
    raw.info["subject_info"] = PERSON
    raw.info["device_info"] = {"type": "EEG", "model": "Quick32", "serial": "SN-7", "site": "Ward 9"}
    path = write_raw(raw, tmp_path / "a_raw.fif")
    recording = sniff(path)
    assert recording is not None
    about = open_signal(recording).info.about
    assert (about.age, about.sex, about.year, about.device) == (59, "F", 2011, "EEG Quick32")
    text = str(about)
    assert not any(word in text for word in ("Harry", "Haagse", "0234567", "1951", "SN-7", "Ward"))


@pytest.mark.parametrize(
    ("highpass", "lowpass", "text"), [(0.1, 40.0, "high-pass 0.1 Hz, low-pass 40 Hz"), (0, 100, "")]
)
def test_low_pass_of_the_sampling_itself_is_no_filter(highpass: float, lowpass: float, text: str) -> None:
    info = mne.create_info(2, 200.0, "eeg")
    with info._unlock():
        info["highpass"], info["lowpass"] = highpass, lowpass
    assert mne_about(info).filters == text


def test_brainvision_header_names_the_amplifier(make_raw, write_raw, tmp_path: Path) -> None:
    path = write_raw(make_raw(4, 250, 3), tmp_path / "a.vhdr")
    path.write_text(path.read_text() + "\nRecorded with actiCHamp Plus\n")
    recording = sniff(path)
    assert recording is not None and open_signal(recording).info.about.device == "actiCHamp Plus"


@pytest.mark.parametrize(
    ("birth", "recorded", "age"),
    [
        ((1951, 5, 2), (2011, 5, 1), 59),
        ((1951, 5, 2), (2011, 5, 2), 60),
        ((1915, 1, 2), (2011, 5, 2), 90),
        ((2011, 4, 2), (2011, 5, 2), 0),
        ((2012, 1, 2), (2011, 5, 2), None),
        ((1900, 1, 1), (2011, 5, 2), None),
        ((2011, 5, 2), (2011, 5, 2), None),
    ],
)
def test_age_in_whole_years(birth: tuple, recorded: tuple, age: int | None) -> None:
    assert years_between(datetime.date(*birth), datetime.date(*recorded)) == age


def gdf(text: str) -> bytes:
    return b"GDF 2.20" + text.encode("latin-1").ljust(66, b"\0") + bytes(182)


def test_patient_field_of_gdf() -> None:
    assert parse_patient(gdf("P1234 Haagse_Harry"), "gdf") == Patient(
        identity="p1234 haagse harry", code="", names=("haagse", "harry"), field="p1234 haagse_harry"
    )
    assert parse_patient(gdf("X X"), "gdf") is None and parse_patient(gdf(""), "gdf") is None


def test_messages_lose_the_words_of_the_patient_field() -> None:
    assert hide("bad field 'mch-0234567 Haagse_Harry'", ["MCH-0234567", "Haagse", "Harry"]) == "bad field '*** ***_***'"


def test_header_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.edf").write_bytes(b"0" * 100)
    about = describe(tmp_path / "a.edf", "edf", None)
    assert about == describe(tmp_path / "missing.edf", "edf", None) and about.age is None and about.device == ""


def test_note_that_quotes_a_mark_shows_no_name(make_raw, write_raw, tmp_path: Path) -> None:
    raw = make_raw(4, 200, 6)
    raw.set_annotations(mne.Annotations([2.0], [0.0], ["BAD Haagse moved"]))
    path = write_raw(raw, tmp_path / "a.edf")
    data = bytearray(path.read_bytes())
    data[8:88] = b"MCH-0234567 F 02-MAY-1951 Haagse_Harry".ljust(80)
    path.write_bytes(bytes(data))
    recording = sniff(path)
    assert recording is not None
    (note,) = (note for note in open_signal(recording).info.notes if "BAD" in note)
    assert "BAD *** moved" in note


def test_reader_that_quotes_the_header_shows_no_name(tmp_path: Path, monkeypatch) -> None:
    from data_sharding.formats import open_signal as module

    head = b"0".ljust(8) + b"MCH-0234567 F 02-MAY-1951 Haagse_Harry".ljust(80) + b"Startdate X X X X".ljust(80)
    path = tmp_path / "a.edf"
    path.write_bytes(head + bytes(1000))

    def quote(_: Path) -> None:
        raise ValueError("cannot parse 'MCH-0234567 F 02-MAY-1951 Haagse_Harry'")

    monkeypatch.setitem(module.READERS, "edf", quote)
    from data_sharding.formats.sniffing import Recording

    with pytest.raises(module.ReadError) as caught:
        open_signal(Recording(path=path, format="edf", files=(path,)))
    text = str(caught.value)
    assert "cannot parse" in text and "Haagse" not in text and "0234567" not in text and "1951" not in text
