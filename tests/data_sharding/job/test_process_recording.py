"""Tests that process one recording and check the folder of results, without Ray."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.common.files import read_json
from data_sharding.corpora import CorpusConfig, Trial, list_items
from data_sharding.dataset.samples import decode_eeg
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import PartResult, Task
from data_sharding.processing import preprocess as preprocessing
from data_sharding.processing import streaming
from data_sharding.processing.preprocess import PreprocessSpec, preprocess
from data_sharding.processing.quality import QualitySpec

SPEC = PreprocessSpec(
    sfreq=100, highpass=1.0, lowpass=40.0, window=100, stride=100, quality=QualitySpec(leave_out_edges=False)
)
"""Settings that keep windows up to the ends of the segments, because the recordings are short."""


@pytest.fixture
def process(tmp_path: Path):
    """Return a function that processes the only recording in a folder."""

    def run(root: Path, spec: PreprocessSpec = SPEC, trials: tuple[Trial, ...] | None = None, **corpus) -> PartResult:
        (item,) = list_items(CorpusConfig(root=str(root), name="c", **corpus))
        item = dataclasses.replace(item, trials=trials)
        split = SplitConfig(val_fraction=0, test_fraction=0)
        labels = tuple(sorted({trial.label_name for trial in trials or ()}))
        return process_recording(
            Task(item=item, spec=spec, split=split, labels=labels, work=tmp_path / "work", timeout_s=60)
        )

    return run


def samples(tmp_path: Path, result: PartResult) -> list[tuple[dict, np.ndarray]]:
    """Return the metadata and windows that the processing of one recording has written."""
    folder = tmp_path / "work" / "parts" / result.part[:2] / result.part
    data, out = (folder / "train.tar").read_bytes(), []
    for entry in read_json(folder / "train.idx"):
        parts = {name: data[at : at + size] for name, (at, size) in entry["members"].items()}
        meta = json.loads(parts["json"])
        out.append((meta, decode_eeg(parts["eeg.npy.zst"], meta["n"]).astype(float)))
    return out


def trial(onset: float, **more) -> Trial:
    return Trial(onset=onset, image="", image_id="", label_name="a", caption="", split="train", **more)


def test_windows_do_not_reach_over_gaps(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw.set_annotations(mne.Annotations([0.0, 2.5, 4.2], [0, 0, 0.3], ["boundary", "boundary", "BAD_ACQ_SKIP"]))
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg")
    row = result.row
    # The gaps divide the signal into segments of 2.5, 1.7 and 1.5 s. These segments contain 2 + 1 + 1 windows of 1 s.
    assert row.windows == 4 and row.seconds_written == 4.0


def test_unknown_unit_is_set_aside_unless_the_config_gives_a_factor(
    tmp_path: Path, make_raw, write_raw, process
) -> None:
    raw = make_raw(4, 200, 6)
    raw.apply_function(lambda x: 1e6 * x)
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg")
    row = result.row
    assert row.status == "quarantined" and row.reason.startswith("unit unknown: set aside")
    assert row.amplitude_uv > 1e6
    result = process(tmp_path / "eeg", unit_factors={"*.fif": 1e-6})
    row = result.row
    assert row.status == "sharded" and row.unit == "configured" and 2 < row.amplitude_uv < 20


def test_channels_with_nan_are_left_out_and_named(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw._data[2, 10:] = np.nan
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg")
    row = result.row
    assert row.status == "sharded" and row.channels == ["Fp1", "Fp2", "F4"]
    assert row.notes == ["left out, because almost all values are NaN or infinite: F3"]


def test_too_short_flat_and_foreign_recordings(tmp_path: Path, make_raw, write_raw, process) -> None:
    write_raw(make_raw(4, 200, 0.8), tmp_path / "short" / "a_raw.fif")
    assert process(tmp_path / "short").row.reason.startswith("too short: 0.80 s")
    flat = make_raw(3, 200, 3)
    flat.apply_function(lambda x: 0 * x + 1e-5)
    write_raw(flat, tmp_path / "flat" / "a_raw.fif")
    assert process(tmp_path / "flat").row.reason == "no usable channel: 3 flat"
    write_raw(make_raw(2, 200, 3, names=["ECG", "HEOG"]), tmp_path / "ecg" / "a_raw.fif")
    assert process(tmp_path / "ecg").row.reason == "no EEG channel: only ECG, HEOG"


def test_a_part_is_used_again_only_for_the_same_work(tmp_path: Path, make_raw, write_raw, process) -> None:
    path = write_raw(make_raw(3, 200, 3, seed=1), tmp_path / "eeg" / "a_raw.fif")
    first = process(tmp_path / "eeg")
    folder = tmp_path / "work" / "parts" / first.part[:2] / first.part
    stamp = (folder / "train.tar").stat().st_mtime_ns
    assert process(tmp_path / "eeg") == first == PartResult.from_json(read_json(folder / "result.json"))
    assert (folder / "train.tar").stat().st_mtime_ns == stamp
    write_raw(make_raw(3, 200, 3, seed=2), path)
    assert process(tmp_path / "eeg").part != first.part
    assert process(tmp_path / "eeg", line_freq=50.0).row.line_freq_from == "config"


def test_windows_are_those_of_the_whole_segment(
    tmp_path: Path, make_raw, write_raw, process, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw(5, 160, 70)
    raw._data += 0.23
    raw.set_annotations(mne.Annotations([30.0], [0], ["boundary"]))
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 5 * 8 * 1500)
    monkeypatch.setattr(preprocessing, "FILTER_BYTES", 1)
    result = process(tmp_path / "eeg", line_freq=50.0)
    row = result.row
    x_uv = 1e6 * raw.get_data()
    wanted = np.concatenate(
        [preprocess(part, 160, SPEC, line_freq=50.0) for part in (x_uv[:, :4800], x_uv[:, 4800:])], axis=1
    )
    found = samples(tmp_path, result)
    assert row.windows == len(found) == 70 and row.seconds_written == 70.0
    for i, (meta, eeg) in enumerate(found):
        assert meta["start"] == i and meta["reference"] == "average"
        # The file contains volts as float32 with an offset of 0.23 V. Near this offset, neighbouring float32 numbers
        # differ by 0.015 microvolts, so the values are not more precise than that.
        np.testing.assert_allclose(eeg, wanted[:, 100 * i : 100 * i + 100], rtol=1e-3, atol=0.05)


def test_memory_does_not_grow_with_the_recording(
    tmp_path: Path, make_raw, write_raw, process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(preprocessing, "FILTER_BYTES", 2**20)
    peaks = []
    for seconds in (40, 280):
        write_raw(make_raw(16, 1000, seconds), tmp_path / f"{seconds}" / "a.edf")
        tracemalloc.start()
        assert process(tmp_path / f"{seconds}").row.windows == seconds
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The longer recording would take 36 MB of memory as float64.
    assert peaks[1] < 15e6 and peaks[1] < peaks[0] + 5e6


def test_spans_marked_as_bad_are_left_out_and_counted(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw.set_annotations(mne.Annotations([1.5, 3.2], [0.2, 1.0], ["BAD_muscle", "bad"]))
    raw.info["bads"] = ["Fp2"]
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg")
    row = result.row
    assert row.windows_left_out == {"overlaps a span marked as bad": 3} and row.seconds_written == 3.0
    assert row.bads == ["Fp2: marked bad"]


def test_reference_by_name(tmp_path: Path, make_raw, write_raw, process) -> None:
    names = ["C3", "C4", "M1", "Pz", "M2", "O1"]
    raw = make_raw(6, 200, 5, names=names)
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    kept = samples(tmp_path, process(tmp_path / "eeg", dataclasses.replace(SPEC, reference="keep")))
    linked = samples(tmp_path, process(tmp_path / "eeg", dataclasses.replace(SPEC, reference=["M1", "M2"])))
    assert linked[0][0]["ch_names"] == ["C3", "C4", "Pz", "O1"] and linked[0][0]["reference"] == "M1+M2"
    ears = preprocess(1e6 * raw.get_data(["M1", "M2"]), 200, dataclasses.replace(SPEC, reference="keep")).mean(axis=0)
    np.testing.assert_allclose(linked[2][1], kept[2][1] - ears[200:300], atol=0.05)
    result = process(tmp_path / "eeg", dataclasses.replace(SPEC, reference="Pz"))
    row = result.row
    assert row.channels == ["C3", "C4", "O1"] and "Pz" in row.channels_left_out["reference"]
    result = process(tmp_path / "eeg", dataclasses.replace(SPEC, reference=["TP9", "M2"]))
    row = result.row
    assert (row.status, row.reason) == ("excluded", "no reference: channel TP9 is not in the recording")


def test_windows_beyond_a_peak_to_peak_are_left_out(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 6)
    raw._data[1, 500:520] += 600e-6
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg", dataclasses.replace(SPEC, reject_uv=200.0))
    row = result.row
    assert row.windows_left_out == {"peak to peak beyond 200 microvolts": 1} and row.windows == 5


def test_trigger_line_typed_as_eeg_is_left_out_by_its_signal(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(5, 200, 6, names=["C3", "C4", "Line", "Pz", "O1"])
    raw._data[2] = 0
    raw._data[2, 100::200] = 1e-3
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg")
    row = result.row
    assert row.channels == ["C3", "C4", "Pz", "O1"] and row.bads == []
    assert row.channels_left_out == {"trigger, by its signal": ["Line"]}


def test_epochs_are_segments_of_their_own(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 20)
    events = np.array([[i, 0, 1] for i in (300, 1000, 1700, 2500)])
    epochs = mne.Epochs(raw, events, tmin=-0.5, tmax=1.0 - 1 / 200, baseline=None, preload=True, verbose="ERROR")
    (tmp_path / "eeg").mkdir()
    epochs.save(tmp_path / "eeg" / "a-epo.fif", verbose="ERROR")
    result = process(tmp_path / "eeg")
    row = result.row
    assert row.status == "sharded" and row.windows == 4 and row.seconds == 6.0
    wanted = preprocess(1e6 * epochs.get_data()[2], 200, SPEC)[:, :100]
    np.testing.assert_allclose(samples(tmp_path, result)[2][1], wanted, atol=0.05)
    shown = (trial(99.0, segment=1), trial(99.0, segment=3), trial(99.0, segment=4))
    result = process(tmp_path / "eeg", trials=shown)
    row = result.row
    assert row.windows == 2 and sum(row.windows_left_out.values()) == 1
    wanted = preprocess(1e6 * epochs.get_data()[3], 200, SPEC)
    found = samples(tmp_path, result)[1][1]
    np.testing.assert_allclose(found, wanted[:, : found.shape[1]], atol=0.05)
    result = process(tmp_path / "eeg", dataclasses.replace(SPEC, window=200, stride=200))
    row = result.row
    assert row.status == "excluded" and row.reason.startswith("too short: 4 epochs of at most 1.50 s")


def test_trials_near_a_gap_and_out_of_order(tmp_path: Path, make_raw, write_raw, process) -> None:
    raw = make_raw(4, 200, 8)
    raw.set_annotations(mne.Annotations([3.0], [0.5], ["BAD_ACQ_SKIP"]))
    write_raw(raw, tmp_path / "eeg" / "a_raw.fif")
    result = process(tmp_path / "eeg", trials=tuple(trial(t) for t in (5.25, 0.4, 2.5, 3.2, 7.5, -0.3, 0.9)))
    row = result.row
    found = samples(tmp_path, result)
    assert [round(meta["start"] + meta["onset"] / SPEC.sfreq, 6) for meta, _ in found] == [0.4, 0.9, 5.25]
    assert row.windows_left_out == {
        "overlaps a gap in the recording": 2,
        "trial beyond the recording": 2,
    }
    wanted = preprocess(1e6 * raw.get_data()[:, 700:], 200, SPEC)
    meta, eeg = found[2]
    np.testing.assert_allclose(eeg[:, meta["onset"] :], wanted[:, 175:275], atol=0.05)
