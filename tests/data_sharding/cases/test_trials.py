"""Trials are stored with their baseline, all repeats of an image are stored, and every time is exact to the sample."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import mne
import numpy as np
import pytest
from PIL import Image

from data_sharding.processing.preprocess import PreprocessSpec, filters

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SPEC = PreprocessSpec(window=256, stride=256)


def _encode_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _encode_jpeg()


def write_images(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        path = folder / "images" / f"kind{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG)
    return folder / "images"


def write_table(path: Path, onsets: list[float], images: int = 3) -> None:
    lines = ["onset\timage", *(f"{t!r}\tkind{i % images % 2}/{i % images}.jpg" for i, t in enumerate(onsets))]
    path.write_text("\n".join(lines) + "\n")


def write_raw(path: Path, x_uv: np.ndarray, sfreq: float, spans: list | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(1e-6 * x_uv, mne.create_info(NAMES, sfreq, "eeg"), verbose="ERROR")
    if spans:
        raw.set_annotations(mne.Annotations(*zip(*((a, b - a, text) for a, b, text in spans), strict=True)))
    if path.suffix == ".fif":
        raw.save(path, overwrite=True, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, physical_range=(-200.0, 200.0), overwrite=True, verbose="ERROR")


def events(root: Path, tmp_path: Path, **keys) -> dict:
    return {"kind": "events", "images": str(tmp_path / "images"), **keys}


@pytest.mark.parametrize(
    ("name", "sfreq", "keys", "begin", "count"),
    [
        ("a.vhdr", 500.0, {}, -51, 307),
        ("a.edf", 200.0, {"tmin": -0.5, "tmax": 1.5}, -128, 512),
        ("a_raw.fif", 250.0, {"stimulus_delay_ms": 37.0, "tmin": -0.1}, -26, 282),
        ("a.set", 256.0, {"tmin": 0.3}, 77, 256),
        ("a.bdf", 512.0, {"tmin": 0.0}, 0, 256),
    ],
)
def test_a_trial_is_stored_around_its_onset(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, name, sfreq, keys, begin, count
) -> None:
    onsets = [8.003, 11.5, 14.77, 19.0, 22.221]
    path = tmp_path / "eeg" / name
    write_raw(path, true_uv(3, 8, np.arange(int(30 * sfreq)) / sfreq), sfreq)
    write_images(tmp_path)
    write_table(path.parent / "a_events.tsv", onsets)
    (sharded,) = shard_all(path.parent, **events(path.parent, tmp_path, **keys)).values()
    assert len(sharded.samples) == 5 and not sharded.row.windows_left_out
    assert_true(sharded, 3, ends=True)
    for (meta, x), onset in zip(sharded.samples, onsets, strict=True):
        delay = keys.get("stimulus_delay_ms", 0) / 1000
        assert meta["onset"] == -begin and x.shape[1] == count
        assert abs(meta["start"] + meta["onset"] / 256 - onset - delay) <= 0.5 / 256 + 1e-6
    assert [(meta["image_id"], meta["repeat"]) for meta, _ in sharded.samples] == [
        ("kind0/0", 0),
        ("kind1/1", 0),
        ("kind0/2", 0),
        ("kind0/0", 1),
        ("kind1/1", 1),
    ]
    assert (sharded.row.trial_tmin, sharded.row.trial_tmax) == (
        pytest.approx(begin / 256, abs=1e-5),
        pytest.approx((begin + count) / 256, abs=1e-5),
    )


def test_a_missing_baseline_shortens_the_trial_and_is_counted(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    path = tmp_path / "eeg" / "a_raw.fif"
    spans = [(10.0, 10.1, "BAD_muscle"), (20.0, 20.2, "BAD"), (30.0, 32.0, "BAD_ACQ_SKIP")]
    write_raw(path, true_uv(4, 8, np.arange(10_000) / 250), 250.0, spans)
    write_images(tmp_path)
    # What is special in the eight trials, in the order of `onsets`: (1) the recording begins in the baseline; (2) a bad
    # span is in the baseline; (3) a bad span is in the window; (4) a gap is in the baseline; (5) a gap is in the
    # window; (6) nothing is special; (7) the recording ends soon after the window; (8) the recording ends in the
    # window.
    onsets = [0.1, 10.15, 19.5, 32.05, 29.5, 25.0, 38.9, 39.5]
    write_table(path.parent / "a_events.tsv", onsets)
    (sharded,) = shard_all(path.parent, **events(path.parent, tmp_path, tmin=-0.2, tmax=1.3)).values()
    found = {
        round(meta["start"] + meta["onset"] / 256, 1): (meta["onset"], x.shape[1] - meta["onset"])
        for meta, x in sharded.samples
    }
    assert found == {0.1: (26, 333), 10.1: (0, 333), 32.1: (13, 333), 25.0: (51, 333), 38.9: (51, 282)}
    assert sharded.row.windows_left_out == {
        "overlaps a gap in the recording": 1,
        "overlaps a span marked as bad": 1,
        "trial beyond the recording": 1,
    }
    (note,) = [note for note in sharded.row.notes if "trials" in note]
    assert note.startswith("4 of 5 trials are stored without") and "1 overlaps a span marked as bad" in note
    assert "3 at the edge of the recording, of an epoch or of a gap" in note
    assert all(np.isfinite(x).all() and (x.std(axis=1) > 1).all() for _, x in sharded.samples)


def write_epochs(path: Path, true_uv: Callable, seed: int, sfreq: float, tmin: float, onsets: list[float]) -> None:
    times = np.arange(round(5 * sfreq)) / sfreq + tmin
    x = 1e-6 * np.stack([true_uv(seed, 8, onset + times) for onset in onsets])
    path.parent.mkdir(parents=True, exist_ok=True)
    info = mne.create_info(NAMES, sfreq, "eeg")
    events = np.column_stack([np.arange(len(x)) * 10_000, np.zeros(len(x), int), np.ones(len(x), int)])
    if path.suffix == ".set":
        mne.EpochsArray(x, info, events, tmin, verbose="ERROR").export(path, overwrite=True, verbose="ERROR")
    elif path.suffix == ".npy":
        np.save(path, 1e6 * x)
    else:
        mne.EpochsArray(x, info, events, tmin, verbose="ERROR").save(path, overwrite=True, verbose="ERROR")


def assert_epochs_true(sharded, true_uv: Callable, seed: int, sfreq: float, onsets: list[float]) -> None:
    from scipy.signal import sosfiltfilt

    assert sharded.row.status == "sharded" and len(sharded.samples) == len(onsets), sharded.row
    sos = filters(sfreq, SPEC, None)
    for (meta, x), onset in zip(sharded.samples, onsets, strict=True):
        times = onset + (np.arange(-2000, x.shape[1] + 2000) - meta["onset"]) / 256
        truth = sosfiltfilt(sos, true_uv(seed, 8, times), axis=1)[:, 2000:-2000]
        truth -= truth.mean(0)
        middle = slice(x.shape[1] // 4, -x.shape[1] // 4)
        for a, b in zip(x[:, middle], truth[:, middle], strict=True):
            assert np.corrcoef(a, b)[0, 1] > 0.998 and abs(a @ b / (b @ b) - 1) < 1e-2


@pytest.mark.parametrize(
    ("name", "sfreq", "tmin", "times"),
    [
        ("a-epo.fif", 250.0, -1.0, "own"),
        ("b-epo.fif", 200.0, -1.5, "joined"),
        ("c.set", 256.0, -0.5, "own"),
        ("d.set", 128.0, -0.75, "joined"),
    ],
)
def test_epochs_know_their_onset(
    tmp_path: Path, shard_all: Callable, true_uv: Callable, name, sfreq, tmin, times
) -> None:
    """An events table can contain times in the original recording, or times in the file. In the file, each epoch begins
    at the end of the previous epoch."""
    onsets, root = [3.0, 9.5, 17.25, 31.0], tmp_path / "eeg"
    write_epochs(root / name, true_uv, 5, sfreq, tmin, onsets)
    write_images(tmp_path)
    joined = [5 * i - tmin for i in range(4)]
    stem = name.removesuffix(".fif").removesuffix(".set")
    write_table(root / f"{stem}_events.tsv", onsets if times == "own" else joined)
    (sharded,) = shard_all(root, **events(root, tmp_path)).values()
    assert_epochs_true(sharded, true_uv, 5, sfreq, onsets)
    assert all(meta["onset"] == round(-tmin * 256) and x.shape[1] == 1280 for meta, x in sharded.samples)
    assert [meta["image_id"] for meta, _ in sharded.samples] == ["kind0/0", "kind1/1", "kind0/2", "kind0/0"]


def test_epochs_of_eeglab_that_are_marked_for_rejection(tmp_path: Path, shard_all: Callable, true_uv: Callable) -> None:
    from scipy.io import loadmat, savemat

    onsets = [3.0, 9.5, 17.25, 31.0]
    write_epochs(tmp_path / "eeg" / "a.set", true_uv, 5, 256.0, -0.5, onsets)
    eeg = {name: value for name, value in loadmat(tmp_path / "eeg" / "a.set").items() if not name.startswith("__")}
    table = np.zeros((8, 4))
    table[2, 3] = 1
    eeg["reject"] = {"rejmanual": [0, 1, 0, 0], "rejmanualE": table, "icarejkurt": np.zeros(0)}
    savemat(tmp_path / "eeg" / "a.set", eeg, appendmat=False)
    (sharded,) = shard_all(tmp_path / "eeg").values()
    assert sharded.row.windows_left_out == {"overlaps a span marked as bad": 5}
    assert {int(meta["start"] // 5) for meta, _ in sharded.samples} == {0, 2, 3}
    bads = {int(meta["start"] // 5): meta["bads"] for meta, _ in sharded.samples}
    assert bads == {0: [], 2: [], 3: ["F3"]} and sharded.row.bad_in_windows == {"marked bad": 5}


def test_a_table_of_other_times_gives_no_epoch_a_wrong_image(
    tmp_path: Path, shard_all: Callable, true_uv: Callable
) -> None:
    """One epoch was rejected, so the table has one row more than the file has epochs."""
    onsets, root = [3.0, 9.5, 17.25, 31.0], tmp_path / "eeg"
    write_epochs(root / "a-epo.fif", true_uv, 5, 250.0, -1.0, onsets[1:])
    write_images(tmp_path)
    write_table(root / "a-epo_events.tsv", onsets)
    (sharded,) = shard_all(root, **events(root, tmp_path)).values()
    assert sharded.row.windows_left_out == {"the table does not describe the epochs": 4}
    # Write the times at which the events were in the file before its first epoch was rejected. In the present file,
    # three of these times are in the epoch of another event.
    write_table(root / "a-epo_events.tsv", [1.0, 6.0, 11.0, 16.0])
    (sharded,) = shard_all(root, **events(root, tmp_path)).values()
    assert sharded.row.reason == "no window left: 4 the table does not describe the epochs"
    write_table(root / "a-epo_events.tsv", [11.0, 1.0])
    (sharded,) = shard_all(root, **events(root, tmp_path)).values()
    assert_epochs_true(sharded, true_uv, 5, 250.0, [9.5, 31.0])
    assert [meta["image_id"] for meta, _ in sharded.samples] == ["kind1/1", "kind0/0"]


@pytest.mark.parametrize(("tmin", "keys"), [(-1.0, {}), (-0.25, {"tmin": -0.2, "stimulus_delay_ms": 12.0})])
def test_epochs_in_arrays_declare_their_tmin(
    tmp_path: Path, shard_all: Callable, true_uv: Callable, tmin, keys
) -> None:
    onsets, root = [3.0, 9.5, 17.25, 31.0], tmp_path / "arrays"
    write_epochs(root / "a.npy", true_uv, 6, 250.0, tmin, onsets)
    about = {"sfreq": 250, "ch_names": NAMES, "unit": "uV", "tmin": tmin, "labels": ["x", "y", "x", "y"]}
    (root / "a.json").write_text(json.dumps(about))
    (sharded,) = shard_all(root, kind="arrays", **keys).values()
    delay = keys.get("stimulus_delay_ms", 0) / 1000
    shift = round((delay - tmin) * 256) / 256 + tmin  # The onset is rounded to a sample.
    assert_epochs_true(sharded, true_uv, 6, 250.0, [onset + shift for onset in onsets])
    want = 51 if keys else 256
    assert all(meta["onset"] == want for meta, _ in sharded.samples) and "repeat" not in sharded.samples[0][0]
    about["tmin"] = "early"
    (root / "a.json").write_text(json.dumps(about))
    (sharded,) = shard_all(root, kind="arrays", **keys).values()
    assert "tmin 'early' is not a time in seconds" in sharded.row.reason


def test_an_epoch_that_ends_before_its_window_is_left_out_alone(tmp_path: Path, shard_all: Callable, true_uv) -> None:
    root = tmp_path / "arrays"
    write_epochs(root / "a.npy", true_uv, 6, 250.0, -4.5, [3.0, 9.5])
    about = {"sfreq": 250, "ch_names": NAMES, "unit": "uV", "tmin": -4.5, "labels": ["x", "y"]}
    (root / "a.json").write_text(json.dumps(about))
    (sharded,) = shard_all(root, kind="arrays").values()
    assert sharded.row.windows_left_out == {"the epoch ends before the window of 1 s": 2}
    assert sharded.row.reason_category == "no window left"
