"""Tests of preprocessing, padding of channels, and writing and reading of shards."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample, decode_eeg, encode_eeg, pad_channels, wds_decoder
from data_sharding.processing.preprocess import PreprocessSpec, preprocess, window_starts

SPEC = PreprocessSpec(sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=64)


@given(n=st.integers(1, 128), t=st.integers(1, 9))
def test_padding_repeats_the_true_channels(n: int, t: int) -> None:
    x = np.arange(n * t, dtype=np.float32).reshape(n, t)
    padded = pad_channels(x)
    assert padded.shape == (128, t)
    assert all((padded[i] == x[i % n]).all() for i in range(128))
    assert (pad_channels(torch.from_numpy(x)).numpy() == padded).all()


def test_more_than_128_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="129"):
        pad_channels(np.zeros((129, 4)))


@given(n=st.integers(1, 128), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_encoded_window_decodes_to_the_same_values(n: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0, 50, (n, 32))
    assert (decode_eeg(encode_eeg(x), n) == x.astype(np.float16)).all()
    assert decode_eeg(encode_eeg(x)).shape == (128, 32)


@pytest.mark.parametrize("length", [1, 10, 128, 440, 70_000])
def test_headers_of_all_window_lengths_are_read(length: int) -> None:
    assert decode_eeg(encode_eeg(np.zeros((1, length))), samples=length).shape == (128, length)
    with pytest.raises(ValueError, match=r"not a \.npy file of version"):
        decode_eeg(encode_eeg(np.zeros((1, length + 1))), samples=length)


def test_other_headers_of_windows_are_refused() -> None:
    for array, version in ((np.zeros((128, 4), np.float32), (1, 0)), (np.zeros((128, 4), np.float16), (2, 0))):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=version)
        with pytest.raises(ValueError, match=r"not a \.npy file of version"):
            decode_eeg(zstandard.compress(buffer.getvalue()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4])
def test_values_that_float16_cannot_hold_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="float16"):
        encode_eeg(np.array([[1.0, bad]]))


def _make_tone(freq: float, sfreq: float, seconds: float = 16.0) -> np.ndarray:
    return 10 * np.sin(2 * np.pi * freq * np.arange(int(seconds * sfreq)) / sfreq)


def test_resampling_removes_tones_above_nyquist_and_keeps_the_band() -> None:
    spec = PreprocessSpec(sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=128, reference="keep")
    middle = slice(512, -512)
    kept, gone, dc = (
        preprocess((_make_tone(f, 1000.0) + offset)[None], 1000.0, spec)[0, middle].std()
        for f, offset in ((10.0, 0.0), (118.0, 0.0), (0.001, 230_000.0))
    )
    assert kept == pytest.approx(10 / np.sqrt(2), rel=0.02)
    assert gone < 0.01 and dc < 0.1


def test_notch_removes_mains_and_keeps_neighbouring_frequencies() -> None:
    spec = PreprocessSpec(sfreq=256.0, highpass=0.5, lowpass=95.0, window=256, stride=256, reference="keep")
    line, near = (
        preprocess(_make_tone(f, 512.0)[None], 512.0, spec, line_freq=50.0)[0, 1024:-1024].std() for f in (50, 40)
    )
    assert line < 0.1 and near == pytest.approx(10 / np.sqrt(2), rel=0.05)


def test_average_reference_ignores_bad_channels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 10, (4, 1024))
    x[3] *= 1000
    out = preprocess(x, 128.0, SPEC, bads=[3])
    assert np.abs(out[:3].mean(axis=0)).max() < 1e-3


def test_non_finite_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        preprocess(np.array([[0.0, np.nan, 1.0]]), 128.0, SPEC)


def test_incomplete_windows_are_left_out() -> None:
    assert list(window_starts(127, SPEC)) == []
    assert list(window_starts(256, SPEC)) == [0, 64, 128]


def test_scaling_is_the_same_for_numpy_and_torch() -> None:
    x = np.random.default_rng(0).normal(0, 30, (2, 5, 64)).astype(np.float32)
    x[1] = 0
    scaled = SPEC.scale_for_model(x)
    assert scaled[0].std() == pytest.approx(1, rel=1e-4) and (scaled[1] == 0).all()
    assert np.allclose(SPEC.scale_for_model(torch.from_numpy(x)).numpy(), scaled, atol=1e-5)
    x[1] = 2 * x[0] + 5
    for channels in (2, [1, 3]):
        scaled = SPEC.scale_for_model(x, channels)
        assert scaled.dtype == np.float32
        assert np.allclose(SPEC.scale_for_model(torch.from_numpy(x), channels).numpy(), scaled, atol=1e-5)
        counts = [channels] * len(x) if isinstance(channels, int) else channels
        for own, window, count in zip(scaled, x, counts, strict=True):
            assert own[:count].std() == pytest.approx(1.0, abs=1e-4)
            assert np.allclose(own * window[:count].std(), window, atol=1e-3)


def test_dataset_is_reproducible_and_readable(tmp_path: Path, paired_dataset: Path) -> None:
    data = EEGDataset(paired_dataset, "train").require_images()
    samples = [data[i] for i in range(len(data))]
    again = write_dataset(tmp_path / "again", {"train": samples}, data.spec, labels=data.labels, samples_per_shard=40)
    assert [s.sha256 for s in again.splits["train"]] == [s.sha256 for s in data.manifest.splits["train"]]
    assert data.labels[samples[3].meta["label"]] == samples[3].meta["label_name"]
    assert data.meta(3) == samples[3].meta and samples[3].image is not None


def test_plain_webdataset_reads_our_shards(paired_dataset: Path) -> None:
    import webdataset as wds

    shards = [str(p) for p in sorted((paired_dataset / "train").glob("*.tar"))]
    rows = list(wds.WebDataset(shards, shardshuffle=False).decode(wds_decoder, "rgb8"))
    ours = EEGDataset(paired_dataset, "train")
    assert len(rows) == len(ours)
    for number, row in enumerate(rows):
        assert row["__key__"] == ours.key(number) and row["image.png"].shape == (32, 32, 3)
        assert (row["eeg.npy.zst"] == pad_channels(ours[number].eeg)).all()


def test_missing_unpaired_and_damaged_datasets_are_refused(tmp_path: Path, unpaired_dataset: Path) -> None:
    with pytest.raises(RequestError, match="no such dataset"):
        EEGDataset(tmp_path / "none")
    with pytest.raises(RequestError, match=r"no manifest\.json"):
        EEGDataset(tmp_path)
    with pytest.raises(RequestError, match="no samples in split 'dev'; the dataset has train, val, test"):
        EEGDataset(unpaired_dataset, "dev")
    with pytest.raises(RequestError, match="no paired images"):
        EEGDataset(unpaired_dataset).require_images()
    broken = tmp_path / "broken"
    shutil.copytree(unpaired_dataset, broken)
    tar = next((broken / "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(RequestError, match="dreamscale verify"):
        EEGDataset(broken)


@pytest.mark.parametrize("key", ["a.b", "a b", ""])
def test_invalid_sample_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Sample(key=key, eeg=np.zeros((1, 4)), meta={"n": 1}).members()
