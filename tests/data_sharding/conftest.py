"""Small test recordings and datasets, written with the libraries that laboratories use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.reason import Reason
from data_sharding.dataset.ledger import LedgerRow, Status

NAMES = [
    "Fp1",
    "Fp2",
    "F3",
    "F4",
    "C3",
    "C4",
    "P3",
    "P4",
    "O1",
    "O2",
    "F7",
    "F8",
    "T7",
    "T8",
    "P7",
    "P8",
    "Fz",
    "Cz",
    "Pz",
]


def build_raw(n: int = 8, sfreq: float = 200.0, seconds: float = 6.0, seed: int = 0, names: list[str] | None = None):
    """Make noise with the amplitude of EEG (10 microvolts) and an alpha rhythm. The values are in volts, as in MNE."""
    import mne

    rng = np.random.default_rng(seed)
    t = np.arange(int(sfreq * seconds)) / sfreq
    x = rng.normal(0, 10e-6, (n, t.size)) + 8e-6 * np.sin(2 * np.pi * (10 * t + rng.uniform()))
    info = mne.create_info(names or NAMES[:n], sfreq, "eeg")
    return mne.io.RawArray(x, info, verbose="ERROR")


@pytest.fixture(scope="session", name="make_raw")
def make_raw_fixture():
    return build_raw


@pytest.fixture(scope="session", name="write_raw")
def write_raw_fixture():
    return write_raw


def write_raw(raw, path: Path) -> Path:
    """Write a recording in the format that the extension of `path` names."""
    import mne

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".fif":
        raw.save(path, overwrite=True, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, physical_range=(-400.0, 400.0), overwrite=True, verbose="ERROR")
    return path


def encode_png(colour: tuple[int, int, int]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def folder_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five readable recordings in four formats (one recording is a copy), a file that is not EEG, and a header
    without its data file."""
    root = tmp_path_factory.mktemp("corpus")
    write_raw(build_raw(8, 200, 6, seed=1), root / "sub-01" / "sub-01_task-rest_eeg.edf")
    write_raw(build_raw(19, 250, 5, seed=2), root / "sub-02" / "sub-02_task-rest_eeg.vhdr")
    write_raw(build_raw(6, 128, 6, seed=3), root / "sub-03" / "sub-03_task-rest_eeg.set")
    write_raw(build_raw(5, 500, 4, seed=4), root / "sub-04" / "sub-04_task-rest_raw.fif")
    write_raw(build_raw(8, 200, 6, seed=1), root / "copies" / "again_raw.fif")
    (root / "broken.bdf").write_bytes(b"not an EEG file")
    header = write_raw(build_raw(4, 250, 2, seed=5), root / "lost.vhdr")
    header.with_suffix(".eeg").unlink()
    return root


IMAGES = [f"img-{i}" for i in range(6)]
IMAGE_SPLITS = ["train", "train", "train", "train", "val", "test"]


@pytest.fixture(scope="session")
def events_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write recordings of three subjects who see six images each. The column 'split' of the events tables puts one
    image into val and one into test."""
    root = tmp_path_factory.mktemp("paired")
    (root / "images").mkdir()
    for i, name in enumerate(IMAGES):
        (root / "images" / f"{name}.png").write_bytes(encode_png((40 * i, 0, 0)))
    for s in (1, 2, 3):
        path = root / "eeg" / f"sub-0{s}" / f"sub-0{s}_task-images_eeg.vhdr"
        write_raw(build_raw(8, 250, 9, seed=10 + s), path)
        lines = ["onset\tduration\timage\tlabel_name\tcaption\timage_id\tsplit"]
        for i in range(6):
            label = "cat" if i % 2 else "dog"
            lines.append(f"{0.5 + 1.2 * i}\t0.5\t{IMAGES[i]}.png\t{label}\ta {label}\t{IMAGES[i]}\t{IMAGE_SPLITS[i]}")
        lines.append("9.5\t0.5\timg-0.png\tdog\ta dog\timg-0\ttrain")
        lines.append("3.0\t0\tn/a\tn/a\tn/a\tn/a\tn/a")
        path.with_name(f"sub-0{s}_task-images_events.tsv").write_text("\n".join(lines) + "\n")
    return root


def publish_dataset(path: Path, recordings: list[dict], *, window: int = 100, stride: int = 100, lowpass: float = 40.0):
    """Write a dataset with ledger and fingerprints, as the job does, from signals in memory.

    A recording is a dict with the keys `key`, `subject` and `raw`, and optionally `corpus`, `split` and `sha256`.
    The windows are given by one of two more keys: `starts` lists the first sample of each window at 100 Hz, and
    `trials` lists a pair (start, split) for each window. Without the keys `starts` and `trials`, the windows follow
    each other every `stride` samples. `images` (id, bytes) and `concepts` have one entry for each window, in the order
    of the windows.
    """
    import dataclasses

    from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
    from data_sharding.audit.fingerprints import write_fingerprints
    from data_sharding.common.files import sha256_file
    from data_sharding.dataset.dataset import write_dataset
    from data_sharding.dataset.ledger import NAME, count_by_status, write_ledger
    from data_sharding.dataset.samples import Sample
    from data_sharding.processing.preprocess import PreprocessSpec, preprocess
    from data_sharding.processing.survey import assess

    spec = PreprocessSpec(sfreq=100, highpass=1.0, lowpass=lowpass, window=window, stride=stride)
    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    rows, points = [], {}
    for r in recordings:
        raw = r["raw"]
        x_uv, rate = 1e6 * raw.get_data(), raw.info["sfreq"]
        y = preprocess(x_uv, rate, spec)
        points[r["key"]] = assess(x_uv, rate).fingerprint
        starts = r.get("starts") or range(0, y.shape[1] - window + 1, stride)
        trials = r.get("trials") or [(start, r.get("split", "train")) for start in starts]
        for i, (start, split) in enumerate(trials):
            meta = {
                "n": len(y), "ch_names": raw.ch_names, "positions": [None] * len(y), "reference": "average",
                "sfreq": 100.0, "start": start / 100, "recording": r["key"], "subject": r["subject"], "session": "",
                "corpus": r.get("corpus", "lab"), "bads": [], "split": split,
            }  # fmt: skip
            image = None
            if "images" in r:
                meta["image_id"], image = r["images"][i]
                meta |= {"concept": r["concepts"][i]} if "concepts" in r else {}
            kind = "jpg" if image and image[:2] == b"\xff\xd8" else "png"
            samples[split].append(
                Sample(
                    key=f"{r['key']}-{i:06d}", eeg=y[:, start : start + window], meta=meta, image=image, image_ext=kind
                )
            )
        where = sorted({split for _, split in trials})
        rows.append(
            make_ledger_row(
                r["key"],
                subject=r["subject"],
                corpus=r.get("corpus", "lab"),
                split="+".join(where),
                sha256=r.get("sha256", r["key"]),
                channels=raw.ch_names,
                windows=len(trials),
                seconds=raw.n_times / rate,
                seconds_written=1.0 * len(trials),
                n_eeg=len(y),
                n_kept=len(y),
                shards=[f"{split}/000000.tar" for split in where],
                amplitude_uv=10.0,
                sfreq=rate,
            )
        )
    manifest = write_dataset(path, samples, spec)
    write_ledger(path / NAME, rows)
    write_fingerprints(path / FINGERPRINTS, rows, points.__getitem__)
    counts, hours = count_by_status(rows)
    extra = {"ledger_sha256": sha256_file(path / NAME), "fingerprints_sha256": sha256_file(path / FINGERPRINTS)}
    hours["written"] = sum(row.seconds_written for row in rows) / 3600
    manifest = dataclasses.replace(manifest, counts=counts, hours=hours, extra=extra)
    manifest.write(path)
    return manifest


def make_ledger_row(key: str, *, status: Status = "sharded", reason: Reason | None = None, **columns) -> LedgerRow:
    """Make a ledger row with typical values, except the values in `columns`."""
    values = {
        "corpus": "lab", "path": f"{key}.edf", "files": [f"{key}.edf"], "bytes": 1000, "sha256": key, "format": "edf",
        "reader": "edf", "subject": key, "sfreq": 200.0, "seconds": 60.0, "unit": "plausible", "unit_factor": 1.0,
        "line_freq": 50.0, "line_freq_from": "spectrum",
    }  # fmt: skip
    row = LedgerRow(**{"key": key, "status": status, **values, **columns})
    if reason is not None:
        row.set_reason(status, reason)
    return row


@pytest.fixture(scope="session", name="publish")
def publish_fixture():
    return publish_dataset


@pytest.fixture(scope="session", name="make_row")
def make_row_fixture():
    return make_ledger_row
