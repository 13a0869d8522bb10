"""Hostile values of `tmin`, `tmax` and `stimulus_delay_ms`: every trial is stored at the right time, in every kind of
corpus that has these keys.

The right times are computed with fractions, without the code of the job, and every sample is compared with the true
signal at its time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest
import yaml
from PIL import Image

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.job.run import main as shard
from data_sharding.processing.preprocess import PreprocessSpec, filters

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SPEC = PreprocessSpec(window=256, stride=256)
ONSETS = ["8.003", "9.5", "9.627", "14.771", "19", "22.2215"]
"""Onsets in seconds. The second and the third trial overlap."""


def nearest(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 100, 0)).save(folder / f"{i}.jpg")


def write_raw(path: Path, uv: np.ndarray, sfreq: float, gaps: Sequence[tuple[float, float]] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES, sfreq, "eeg"), verbose="ERROR")
    if gaps:
        raw.set_annotations(mne.Annotations(*zip(*((a, b - a) for a, b in gaps), strict=True), "BAD_ACQ_SKIP"))
    if path.suffix == ".fif":
        raw.save(path, fmt="double", overwrite=True, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, physical_range=(-200.0, 200.0), overwrite=True, verbose="ERROR")


def write_corpus(
    root: Path, kind: str, sfreq: float, onsets: Sequence[str], true_uv: Callable, seconds: int = 32
) -> dict[str, Any]:
    """Write one recording with trials; return the keys of its corpus."""
    uv = true_uv(7, 8, np.arange(round(seconds * sfreq)) / sfreq)
    images = [f"{i % 3}.jpg" for i in range(len(onsets))]
    write_images(root / "images")
    if kind == "arrays":
        (root / "eeg").mkdir()
        np.save(root / "eeg" / "a.npy", uv)
        rows = [{"onset": float(t), "image": image} for t, image in zip(onsets, images, strict=True)]
        about = {"sfreq": sfreq, "ch_names": NAMES, "unit": "uV", "events": rows}
        (root / "eeg" / "a.json").write_text(json.dumps(about))
        return {"kind": "arrays", "images": str(root / "images")}
    table = "".join(f"{t}\t0.1\t{image}\n" for t, image in zip(onsets, images, strict=True))
    if kind == "bids":
        (root / "eeg").mkdir(exist_ok=True)
        (root / "eeg" / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
        write_raw(root / "eeg" / "sub-01" / "eeg" / "sub-01_task-x_eeg.vhdr", uv, sfreq)
        events = root / "eeg" / "sub-01" / "eeg" / "sub-01_task-x_events.tsv"
        events.write_text(f"onset\tduration\tstim_file\n{table}")
        return {"kind": "bids", "images": str(root / "images")}
    write_raw(root / "eeg" / f"a{kind}", uv, sfreq)
    (root / "eeg" / "a_events.tsv").write_text(f"onset\tduration\timage\n{table}")
    return {"kind": "events", "images": str(root / "images")}


def assert_times(samples: list, onsets: Sequence[str], keys: dict[str, Any], spec: PreprocessSpec) -> None:
    """Check the time of each trial, and its first and last sample."""
    sfreq, delay = Fraction(spec.sfreq), Fraction(str(keys.get("stimulus_delay_ms", 0))) / 1000
    tmin = Fraction(str(keys.get("tmin", -0.2)))
    tmax = Fraction(str(keys["tmax"])) if "tmax" in keys else max(tmin, Fraction(0)) + Fraction(spec.window) / sfreq
    assert len(samples) == len(onsets)
    for (meta, x), onset in zip(samples, onsets, strict=True):
        assert meta["onset"] == -nearest(tmin * sfreq)
        assert x.shape[1] == nearest(tmax * sfreq) - nearest(tmin * sfreq)
        error = Fraction(meta["start"]) * sfreq + meta["onset"] - (Fraction(onset) + delay) * sfreq
        assert abs(float(error)) <= 0.5 + 1e-3, f"the onset at {onset} s is wrong by {float(error)} samples"


@pytest.mark.parametrize(
    ("kind", "sfreq", "keys", "target"),
    [
        (".vhdr", 500, {"stimulus_delay_ms": -37.3, "tmin": -0.2, "tmax": 1.1}, 256),
        (".edf", 200, {"stimulus_delay_ms": 1.7, "tmin": -0.1}, 256),
        (".edf", 200, {"stimulus_delay_ms": 1000, "tmin": 0.123, "tmax": 1.456}, 256),
        ("_raw.fif", 333, {"stimulus_delay_ms": -1000, "tmin": -0.333, "tmax": 1}, 256),
        ("_raw.fif", 1000, {"stimulus_delay_ms": 2.5, "tmin": -0.1, "tmax": 1.022}, 250),
        ("_raw.fif", 512, {"tmin": 0.102, "tmax": 1.126}, 250),
        ("_raw.fif", 250, {"tmin": -0.5, "tmax": 1.5}, 333),
        (".set", 128, {"stimulus_delay_ms": 129, "tmin": 0.002, "tmax": 1.9}, 256),
        (".bdf", 1024, {"stimulus_delay_ms": 0.4, "tmin": -1.0, "tmax": 2}, 125),
        ("bids", 500, {"stimulus_delay_ms": -12.2, "tmin": -0.3, "tmax": 1.2}, 256),
        ("bids", 250, {"stimulus_delay_ms": 333.3, "tmin": 0.25}, 100),
        ("arrays", 250, {"stimulus_delay_ms": -3.1, "tmin": -0.7, "tmax": 1.01}, 256),
        ("arrays", 173.61, {"stimulus_delay_ms": 21, "tmin": 0.0}, 128),
    ],
)
def test_continuous_recordings(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, kind, sfreq, keys, target
) -> None:
    spec = PreprocessSpec(sfreq=target, window=target, stride=target, lowpass=40.0)
    corpus = write_corpus(tmp_path, kind, sfreq, ONSETS, true_uv)
    (sharded,) = shard_all(tmp_path / "eeg", spec=spec, **corpus, **keys).values()
    assert not sharded.row.windows_left_out, sharded.row
    assert_times(sharded.samples, ONSETS, keys, spec)
    assert_true(sharded, 7, ends=True, spec=spec)


@pytest.mark.parametrize("delay", [-1000, -300.5, 0, 2, 700, 999.9])
@pytest.mark.parametrize(("tmin", "tmax"), [(-0.2, None), (0.5, 1.75), (-1.5, 1.0)])
def test_trials_at_gaps_and_at_the_ends(
    tmp_path: Path, shard_all: Callable, true_uv: Callable, delay: float, tmin: float, tmax: float | None
) -> None:
    """A delay may move a trial over a gap, or out of the recording."""
    onsets = ["0", "0.001", "0.3", "1", "8.3", "9", "9.001", "9.3", "9.5", "10.5", "11.3", "11.999", "12", "12.1"]
    onsets += ["12.5", "27.25", "28.3", "29", "29.001", "29.003", "29.3", "29.9985"]
    keys = {"stimulus_delay_ms": delay, "tmin": tmin, **({} if tmax is None else {"tmax": tmax})}
    write_images(tmp_path / "images")
    write_raw(tmp_path / "eeg" / "a_raw.fif", true_uv(7, 8, np.arange(7500) / 250), 250, [(10.0, 12.0)])
    table = "".join(f"{t}\t{i}.jpg\n" for i, t in enumerate(onsets))
    (tmp_path / "eeg" / "a_events.tsv").write_text(f"onset\timage\n{table}")
    for i in range(3, len(onsets)):
        (tmp_path / "images" / f"{i}.jpg").write_bytes((tmp_path / "images" / f"{i % 3}.jpg").read_bytes())
    found = shard_all(tmp_path / "eeg", kind="events", images=str(tmp_path / "images"), **keys)["a_raw.fif"]
    half, got = Fraction(1, 2), {int(meta["image_id"]): (meta, x) for meta, x in found.samples}
    for number, onset in enumerate(onsets):
        # All times are in samples at 256 Hz.
        at = (Fraction(onset) + Fraction(str(delay)) / 1000) * 256
        low, high = (
            Fraction(str(tmin)) * 256,
            Fraction(str(tmax)) * 256 if tmax else max(Fraction(str(tmin)), 0) * 256 + 256,
        )
        needed = at + max(low, 0)
        home = [(a, b) for a, b in ((0, 2560), (3072, 7680)) if needed >= a - half and needed + 256 <= b + half]
        assert (number in got) == bool(home), f"{onset}: {float(needed)}, {home}"
        if not home:
            continue
        meta, x = got[number]
        begin, end = meta["start"] * 256, meta["start"] * 256 + x.shape[1]
        assert abs(begin + meta["onset"] - at) <= 0.5 + 1e-3
        assert abs(begin - max(at + low, home[0][0])) <= 1 and abs(end - min(at + high, home[0][1])) <= 1
        assert begin + max(meta["onset"] + nearest(max(low, Fraction(0))), 0) + 256 <= end + 1e-6


EPOCHS = [
    # The epochs are from `first` to `first` + 6 s.
    ("a-epo.fif", 250, -1.0, {"stimulus_delay_ms": -250.3}),
    ("a-epo.fif", 200, -0.333, {"tmin": -0.5, "tmax": 2}),
    ("a-epo.fif", 512, 0.4, {"stimulus_delay_ms": 500}),
    ("a.set", 256, -2.5, {"tmin": 0.3, "tmax": 1.8, "stimulus_delay_ms": 40.4}),
    ("a.npy", 173.61, -1.2, {"tmin": -1.2, "tmax": 4.8}),
    ("a.npy", 250, 0, {"stimulus_delay_ms": -300}),
    ("things", 250, -0.5, {"stimulus_delay_ms": 12.2, "tmin": -0.2, "tmax": 1.4}),
    ("things", 100, -0.1, {}),
    ("things", 1000, 0.25, {"stimulus_delay_ms": 16.7, "tmin": 0.5}),
]


@pytest.mark.parametrize(("name", "sfreq", "first", "keys"), EPOCHS)
@pytest.mark.parametrize("target", [256, 125])
def test_epochs(
    tmp_path: Path, shard_all: Callable, true_uv: Callable, name: str, sfreq: float, first: float, keys, target: int
) -> None:
    from scipy.signal import sosfiltfilt

    centres = [10.0, 25.0, 40.5, 60.25]
    times = np.arange(round(6 * sfreq)) / sfreq + first
    uv = np.stack([true_uv(9, 8, centre + times) for centre in centres])
    corpus = write_epochs(tmp_path, name, uv, sfreq, first, times)
    spec = PreprocessSpec(sfreq=target, window=target, stride=target, lowpass=40.0, highpass=5.0, notch="off")
    (sharded,) = shard_all(tmp_path / "eeg", spec=spec, **corpus, **keys).values()
    assert sharded.row.status == "sharded" and len(sharded.samples) == 4, sharded.row
    f, delay = Fraction(target), Fraction(str(keys.get("stimulus_delay_ms", 0))) / 1000
    begin, end = (
        Fraction(str(first)) - delay,
        Fraction(str(first)) - delay + Fraction(round(6 * sfreq)) / Fraction(str(sfreq)),
    )
    low = max(begin, Fraction(str(keys["tmin"]))) if "tmin" in keys else begin
    high = min(end, Fraction(str(keys["tmax"]))) if "tmax" in keys else end
    sos, length = filters(sfreq, spec, None), round(6 * sfreq) / sfreq
    for number, ((meta, x), centre) in enumerate(zip(sharded.samples, centres, strict=True)):
        start = meta["start"] - number * length
        # The first sample of an epoch has an exact time, so the stored part begins on a sample of the epoch.
        shift = nearest((low - begin) * f) if low > begin else 0
        assert abs(-meta["onset"] - low * f) <= 1 and abs(x.shape[1] - (high - low) * f) <= 1 + 1e-6
        assert abs(start * target - shift) <= 1 + 1e-6
        at = centre + first + start + np.arange(-2000, x.shape[1] + 2000) / target
        truth = sosfiltfilt(sos, true_uv(9, 8, at), axis=1)[:, 2000:-2000]
        truth -= truth.mean(0)
        inner = [i for i in range(x.shape[1]) if 1.5 < start + i / target < 4.5]
        if len(inner) > target // 4:
            for a, b in zip(x[:, inner], truth[:, inner], strict=True):
                assert np.corrcoef(a, b)[0, 1] > 0.998 and abs(a @ b / (b @ b) - 1) < 2e-3


def write_epochs(
    root: Path, name: str, uv: np.ndarray, sfreq: float, first: float, times: np.ndarray
) -> dict[str, Any]:
    """Write epochs, one for each trial; return the keys of the corpus."""
    write_images(root / "images")
    eeg = root / "eeg"
    eeg.mkdir(exist_ok=True)
    images = [f"{i % 3}.jpg" for i in range(len(uv))]
    if name == "things":
        for i in range(2):
            folder = root / "images" / "training_images" / f"0000{i + 1}_thing{i}"
            folder.mkdir(parents=True)
            (folder / f"x{i}.jpg").write_bytes((root / "images" / f"{i}.jpg").read_bytes())
        table = {f"{part}_img_{what}": [] for part in ("train", "test") for what in ("concepts", "files")}
        table["train_img_concepts"] = [f"0000{i + 1}_thing{i}" for i in range(2)]
        table["train_img_files"] = [f"x{i}.jpg" for i in range(2)]
        np.save(eeg / "image_metadata.npy", table)
        x = uv.reshape(2, 2, *uv.shape[1:])
        (eeg / "sub-01").mkdir()
        content = {"preprocessed_eeg_data": x, "ch_names": NAMES, "times": np.round(times, 4)}
        np.save(eeg / "sub-01" / "preprocessed_eeg_training.npy", content)
        return {
            "kind": "things_eeg2",
            "images": str(root / "images"),
            "options": {"unit": "uV", "partitions": ["training"]},
        }
    if name == "a.npy":
        np.save(eeg / name, uv)
        about = {"sfreq": sfreq, "ch_names": NAMES, "unit": "uV", "tmin": first, "images": images}
        (eeg / "a.json").write_text(json.dumps(about))
        return {"kind": "arrays", "images": str(root / "images")}
    events = np.column_stack([np.arange(len(uv)) * 10_000, np.zeros(len(uv), int), np.ones(len(uv), int)])
    epochs = mne.EpochsArray(1e-6 * uv, mne.create_info(NAMES, sfreq, "eeg"), events, first, verbose="ERROR")
    if name.endswith(".set"):
        epochs.export(eeg / name, overwrite=True, verbose="ERROR")
    else:
        epochs.save(eeg / name, fmt="double", overwrite=True, verbose="ERROR")
    stem = name.rpartition(".")[0]
    table = "".join(f"{6 * i - first}\t{image}\n" for i, image in enumerate(images))
    (eeg / f"{stem}_events.tsv").write_text(f"onset\timage\n{table}")
    return {"kind": "events", "images": str(root / "images")}


@pytest.mark.parametrize(
    ("sfreq", "tmin", "tmax"),
    [(125, -0.1, 2.9), (250, 0.102, 2.926), (500, -0.027, 2.5)],
)
def test_each_part_inside_the_stored_part_can_be_read(
    tmp_path: Path, true_uv: Callable, sfreq: int, tmin: float, tmax: float
) -> None:
    """The job and the reader of the dataset round times in the same way. So rounding leaves no trial out."""
    corpora = []
    for name, kind in (("a.npy", "epochs"), ("_raw.fif", "events")):
        root, onsets = tmp_path / kind, ["8.003", "11.114", "14.225", "17.336"]
        if kind == "epochs":
            times = np.arange(round(3 * sfreq)) / sfreq + tmin
            uv = np.stack([true_uv(1, 8, t + times) for t in (9, 20, 31)])
            keys = write_epochs(root, name, uv, sfreq, tmin, times)
        else:
            keys = write_corpus(root, name, sfreq, onsets, true_uv)
        corpora.append({"root": str(root / "eeg"), "name": kind, "tmin": tmin, "tmax": tmax, **keys})
    config = {
        "corpora": corpora,
        "preprocess": {"sfreq": sfreq, "window": sfreq, "stride": sfreq, "highpass": 5.0, "lowpass": 40.0},
        "split": {"val_fraction": 0.0, "test_fraction": 0.0, "image_val_fraction": 0.0, "image_test_fraction": 0.0},
        "ray": {"num_cpus": 2, "memory_gb": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    assert shard([str(tmp_path / "job.yaml"), "--output", str(tmp_path / "set")]) == 0
    stored = EEGDataset(tmp_path / "set", "train")
    assert len(stored) == 7 and len(stored.shards) == 1
    whole = [stored.read_stored(i) for i in range(7)]
    for a, b in (
        (tmin, tmax),
        (tmin, round(tmin + 1.0, 3)),
        (max(tmin, 0.3), tmax),
        (0.5, 1.1),
        (1.004, 1.02),
        (1.5, None),
    ):
        part = EEGDataset(tmp_path / "set", "train", tmin=a, tmax=b)
        assert part.left_out == 0 and len(part) == 7, (a, b)
        high = Fraction(str(b)) if b is not None else Fraction(str(a)) + 1
        low, high = nearest(Fraction(str(a)) * sfreq), nearest(high * sfreq)
        for i, sample in enumerate(whole):
            first = sample.meta["onset"] + low
            assert np.array_equal(part[i].eeg, sample.eeg[:, first : first + high - low])
