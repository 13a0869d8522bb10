"""Trials that are stored with a baseline are read from their onset, or from any requested time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(sfreq=100.0, highpass=0.5, lowpass=20.0, window=50, stride=50)


def write_trials(path: Path, *, seed: int = 0, whole: int = 9, late: int = 0) -> list[Sample]:
    """Write trials from -0.2 to 0.8 s, some without their baseline. Each value is the time from the onset in units of
    10 ms, plus 0.5 times the channel number."""
    samples = []
    for i in range(whole + 3):
        n, onset = 1 + i % 4, 20 if i < whole else (7 if i == whole else 0)
        onset -= late
        x = np.arange(80 + onset, dtype=float)[None] - onset + 0.5 * np.arange(n)[:, None]
        meta = {"n": n, "sfreq": 100.0, "start": 10.0 * i - onset / 100, "onset": onset, "image_id": f"i{i}"}
        samples.append(Sample(key=f"t{seed}-{i:03d}", eeg=x, meta=meta))
    write_dataset(path, {"train": samples}, SPEC, samples_per_shard=4)
    return samples


def test_a_trial_is_read_from_its_onset(tmp_path: Path) -> None:
    samples = write_trials(tmp_path / "d")
    data = EEGDataset(tmp_path / "d")
    assert (len(data), data.n_times, data.left_out) == (12, 50, 0)
    batch = collate(data, range(12))
    for i, stored in enumerate(samples):
        sample = data[i]
        assert sample.eeg.shape == (stored.meta["n"], 50) and (sample.eeg[0] == np.arange(50)).all()
        assert sample.meta == data.meta(i) == batch.metas[i] == {**stored.meta, "onset": 0, "start": 10.0 * i}
        assert (batch[i : i + 1].packed.numpy() == sample.eeg).all()
        whole = data.read_stored(i)
        assert whole.meta == stored.meta and (whole.eeg == stored.eeg.astype(np.float16)).all()


def test_a_trial_whose_onset_is_before_its_first_sample_is_read_from_there(tmp_path: Path) -> None:
    write_trials(tmp_path / "d", late=25)
    sample = EEGDataset(tmp_path / "d")[0]
    assert (sample.eeg[0] == np.arange(5, 55)).all() and sample.meta["onset"] == -5


@pytest.mark.parametrize(
    ("tmin", "tmax", "count"), [(-0.2, 0.8, 9), (-0.05, 0.3, 10), (0.1, None, 12), (None, 0.8, 12)]
)
def test_another_part_is_read_where_it_is_stored(tmp_path: Path, tmin, tmax, count) -> None:
    write_trials(tmp_path / "d")
    data = EEGDataset(tmp_path / "d", tmin=tmin, tmax=tmax)
    begin = round(100 * (tmin or 0))
    stop = begin + 50 if tmax is None else round(100 * tmax)
    assert (len(data), data.left_out, data.n_times) == (count, 12 - count, stop - begin)
    assert [data.meta(i)["image_id"] for i in range(count)] == [f"i{i}" for i in range(count)]
    for i in range(count):
        assert (data[i].eeg[0] == np.arange(begin, stop)).all() and data[i].meta["onset"] == -begin
    for workers in (0, 2):
        for batch, _ in zip(Loader(data, 4, seed=1, num_workers=workers), range(6), strict=False):
            assert (batch.padded()[:, 0].numpy() == np.arange(begin, stop)).all()
            assert all(meta["onset"] == -begin for meta in batch.metas)


def test_a_part_that_no_trial_has_is_refused(tmp_path: Path) -> None:
    write_trials(tmp_path / "d")
    with pytest.raises(RequestError, match=r"no trial is stored from -0\.5 to 0\.5 s around the onset"):
        EEGDataset(tmp_path / "d", tmin=-0.5, tmax=0.5)
    with pytest.raises(RequestError, match=r"'tmax' \(.* s\) must be later than 'tmin'"):
        EEGDataset(tmp_path / "d", tmin=0.5, tmax=0.5)


def test_older_datasets_and_windows_without_an_onset_are_read(tmp_path: Path) -> None:
    rows = [
        Sample(key=f"w{i}", eeg=np.arange(50.0)[None] + i, meta={"n": 1, "sfreq": 100.0, "start": i}) for i in range(3)
    ]
    write_dataset(tmp_path / "old", {"train": rows}, SPEC)
    assert all("onset" not in entry for entry in json.loads((tmp_path / "old/train/000000.idx").read_bytes()))
    data = EEGDataset(tmp_path / "old")
    assert all((data[i].eeg == rows[i].eeg).all() and data[i].meta == rows[i].meta for i in range(3))
    assert EEGDataset(tmp_path / "old", tmin=0.1, tmax=0.5)[2].eeg[0].tolist() == list(range(12, 52))
    write_trials(tmp_path / "new")
    both = Mixture({str(tmp_path / "old"): 1, str(tmp_path / "new"): 1})
    batch = collate(both, range(len(both)))
    assert both.n_times == 50 and batch.packed.shape[1] == 50
    assert [both[i].meta for i in range(len(both))] == batch.metas


def test_a_damaged_onset_is_found(tmp_path: Path) -> None:
    write_trials(tmp_path / "d")
    index = tmp_path / "d" / "train" / "000000.idx"
    entries = json.loads(index.read_bytes())
    for onset, samples, message in (
        (60, 100, "has 100 time points, but 50 time points from number 60 on are needed"),
        (20, 99, "float16"),
    ):
        entries[0] |= {"onset": onset, "samples": samples}
        index.write_text(json.dumps(entries))
        with pytest.raises(RequestError, match=message):
            EEGDataset(tmp_path / "d")[0]
    entries[0]["samples"] = 2**40
    index.write_text(json.dumps(entries))
    with pytest.raises(RequestError, match="the index gives impossible offsets"):
        EEGDataset(tmp_path / "d")
