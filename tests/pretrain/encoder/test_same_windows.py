"""Tests that `encode` makes the same windows as sharding, bit for bit, and finds the same bad channels."""

from __future__ import annotations

import json
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.common.files import read_json
from data_sharding.corpora import CorpusConfig, list_items
from data_sharding.dataset.samples import decode_eeg
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import BEFORE, PreprocessSpec
from pretrain.encoder.recording import open_recording, windows_of

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"]
SPECS = {
    "today": PreprocessSpec(window=256, stride=256),
    "overlap": PreprocessSpec(window=200, stride=77, sfreq=128, highpass=1, lowpass=40, reference=["O1", "O2"]),
    "older version": PreprocessSpec.from_dict({"window": 256, "stride": 256}),
}


def write_recording(path: Path, *, missing: bool) -> Path:
    """Write a recording with a dropout, a dead channel, muscle activity, a pause, a bad span and missing values."""
    rng, rate = np.random.default_rng(0), 500
    x = np.cumsum(rng.normal(0, 1, (len(NAMES), 90 * rate)), axis=1)
    x -= np.cumsum(np.pad(x, ((0, 0), (250, 0)))[:, :-250] - np.pad(x, ((0, 0), (500, 0)))[:, :-500], axis=1) / 1000
    x = 20 * x / x.std(axis=1, keepdims=True) + 15 * np.sin(2 * np.pi * 50 * np.arange(x.shape[1]) / rate)
    x[:, 20 * rate : 25 * rate] = 300.0
    if missing:
        x[:, 40 * rate : 40 * rate + 100] = np.nan
    x[2, 30 * rate : 36 * rate] = 0.0
    x[4, 50 * rate : 56 * rate] += rng.normal(0, 200, 6 * rate)
    x[5, 60 * rate : 61 * rate] = 1e7
    raw = mne.io.RawArray(1e-6 * x, mne.create_info(NAMES, rate, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations([70.0, 80.0], [0.0, 1.0], ["boundary", "BAD_move"]))
    path.parent.mkdir()
    raw.save(path, fmt="double", verbose="ERROR")
    return path


@pytest.mark.parametrize("name", SPECS)
def test_windows_are_equal_bit_for_bit(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    # Older versions of Dreamscale left out channels with missing values. So for the spec of an older version, the
    # recording must not have missing values.
    recording = write_recording(tmp_path / "eeg" / "a_raw.fif", missing=name != "older version")
    (item,) = list_items(CorpusConfig(root=str(recording.parent), name="c"))
    split = SplitConfig(val_fraction=0, test_fraction=0)
    result = process_recording(Task(item=item, spec=spec, split=split, labels=(), work=tmp_path, timeout_s=60))
    folder, row = tmp_path / "parts" / result.part[:2] / result.part, result.row
    data, shards = (folder / "train.tar").read_bytes(), []
    for entry in read_json(folder / "train.idx"):
        parts = {kind: data[at : at + size] for kind, (at, size) in entry["members"].items()}
        meta = json.loads(parts["json"])
        shards.append((meta, decode_eeg(parts["eeg.npy.zst"], meta["n"])))
    with windows_of(open_recording(recording), spec) as found:
        encoded = list(found.stream)
        assert [round(one.start_s, 6) for one in encoded] == [meta["start"] for meta, _ in shards]
        for one, (meta, eeg) in zip(encoded, shards, strict=True):
            assert found.names == meta["ch_names"] and found.positions == meta["positions"]
            assert [found.names[i] for i in one.bads] == meta["bads"]
            np.testing.assert_array_equal(one.x.astype(np.float16), eeg)
        account = found.account
    assert dict(account.windows) == row.windows_left_out and account.seconds_left_out() == row.seconds_left_out
    assert dict(account.kinds) == row.bad_in_windows and account.seconds_written() == row.seconds_written
    if name == "older version":
        assert not row.bad_in_windows and shards[0][0]["start"] == 0.0
        assert {key: spec.to_dict().get(key, before) for key, before in BEFORE.items()} == BEFORE
    else:
        assert {"flat", "muscle"} <= set(row.bad_in_windows)
        assert {"clipped in every channel", "missing values in every channel", "overlaps a span marked as bad"} <= set(
            row.windows_left_out
        )
