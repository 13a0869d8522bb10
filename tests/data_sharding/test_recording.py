"""One recording to its part, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.corpora import CorpusConfig, list_items
from data_sharding.files import read_json
from data_sharding.preprocess import PreprocessSpec
from data_sharding.recording import Task, process_recording
from data_sharding.splits import SplitConfig

SPEC = PreprocessSpec(sfreq=100, highpass=1.0, lowpass=40.0, window=100, stride=100)


@pytest.fixture
def process(tmp_path: Path):
    """Run the only recording of a folder."""

    def run(root: Path, **corpus) -> dict:
        (item,) = list_items(CorpusConfig(root=str(root), name="c", **corpus))
        split = SplitConfig(val_fraction=0, test_fraction=0)
        return process_recording(
            Task(item=item, spec=SPEC, split=split, labels=(), work=tmp_path / "work", timeout_s=60)
        )

    return run


def test_windows_do_not_reach_over_gaps(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw.set_annotations(mne.Annotations([0.0, 2.5, 4.2], [0, 0, 0.3], ["boundary", "boundary", "BAD_ACQ_SKIP"]))
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    row = process(tmp_path / "eeg")
    # Each piece is cut from its own beginning: 2.5 s, 1.7 s and 1.5 s.
    assert row["windows"] == 4 and row["seconds_written"] == 4.0


def test_unknown_unit_is_set_aside_and_can_be_said(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw.apply_function(lambda x: 1e6 * x)
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    row = process(tmp_path / "eeg")
    assert row["status"] == "quarantined" and row["reason"].startswith("unit unknown: set aside")
    assert row["amplitude_uv"] > 1e6
    row = process(tmp_path / "eeg", unit_factors={"*.fif": 1e-6})
    assert row["status"] == "sharded" and row["unit"] == "configured" and 2 < row["amplitude_uv"] < 20


def test_channels_without_numbers_are_left_out_and_named(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw._data[2, 100] = np.nan
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    row = process(tmp_path / "eeg")
    assert row["status"] == "sharded" and row["channels"] == ["Fp1", "Fp2", "F4"]
    assert row["notes"] == ["NaN or infinite values, left out: F3"]


def test_too_short_flat_and_foreign_recordings(tmp_path: Path, make_raw, write_raw, process) -> None:
    write_raw(make_raw(4, 200, 0.8), tmp_path / "short" / "a_raw.fif")
    assert process(tmp_path / "short")["reason"].startswith("too short: 0.80 s")
    flat = make_raw(3, 200, 3)
    flat.apply_function(lambda x: 0 * x + 1e-5)
    write_raw(flat, tmp_path / "flat" / "a_raw.fif")
    assert process(tmp_path / "flat")["reason"] == "no usable channel: 3 flat"
    write_raw(make_raw(2, 200, 3, names=["ECG", "HEOG"]), tmp_path / "ecg" / "a_raw.fif")
    assert process(tmp_path / "ecg")["reason"] == "no EEG channel: only ECG, HEOG"


def test_a_part_is_taken_up_again_only_for_the_same_work(tmp_path: Path, make_raw, write_raw, process) -> None:
    path = write_raw(make_raw(3, 200, 3, seed=1), tmp_path / "eeg" / "a_raw.fif")
    first = process(tmp_path / "eeg")
    folder = tmp_path / "work" / "parts" / first["part"][:2] / first["part"]
    stamp = (folder / "train.tar").stat().st_mtime_ns
    assert process(tmp_path / "eeg") == first == read_json(folder / "row.json")
    assert (folder / "train.tar").stat().st_mtime_ns == stamp
    write_raw(make_raw(3, 200, 3, seed=2), path)
    assert process(tmp_path / "eeg")["part"] != first["part"]
    assert process(tmp_path / "eeg", line_freq=50.0)["line_freq_from"] == "config"
