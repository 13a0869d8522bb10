"""Compares sharded samples of synthetic recordings with their true signal; this signal can be computed for any time.

The true signals are sums of sinusoids. The environment variable `DREAMSCALE_CASES` contains the path of a folder with
recordings. The file ``truth.py`` in the folder of the recordings computed their signals. `true_uv` computes the same
signals, so that tests can write further recordings.

In array shapes, `n` is the number of channels, `S` a number of samples, and `T` the number of samples in a window.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.files import read_json
from data_sharding.corpora import CorpusConfig, list_items
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.samples import decode_eeg
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec, filters

CASES = Path(os.environ.get("DREAMSCALE_CASES") or "/nonexistent")
NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SPEC = PreprocessSpec(window=256, stride=256)


def true_uv(seed: int, n: int, seconds: np.ndarray) -> np.ndarray:
    """Return the true signal [n, S] in microvolts at the times `seconds`: 60 sinusoids from 3 to 28 Hz, about 20 µV."""
    random = np.random.default_rng(seed)
    hertz = random.uniform(3.0, 28.0, 60)
    weight = 1 / np.sqrt(hertz)
    weight /= np.sqrt((weight**2).sum() / 2)
    shared = random.uniform(0, 2 * np.pi, 60)
    own = random.uniform(0, 2 * np.pi, (n, 60))
    gain = 20.0 * (1 + 0.25 * np.arange(n) / max(n - 1, 1))
    angle = 2 * np.pi * hertz[:, None] * np.asarray(seconds, float)
    common = (weight[:, None] * np.cos(angle + shared[:, None])).sum(0)
    single = [(weight[:, None] * np.cos(angle + phase[:, None])).sum(0) for phase in own]
    return np.array([g * (0.75 * common + 0.66 * x) for g, x in zip(gain, single, strict=True)])


@dataclasses.dataclass
class Sharded:
    """Result of sharding one recording."""

    row: LedgerRow
    """Row of the recording in the ledger."""
    samples: list[tuple[dict, np.ndarray]]
    """Metadata and signal [n, T] in microvolts of every window, in the order of time."""

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of every window in seconds from the recording's start."""
        return [(meta["start"], meta["start"] + x.shape[1] / meta["sfreq"]) for meta, x in self.samples]

    def touches(self, begin: float, end: float) -> bool:
        """Return whether a window overlaps the span from `begin` to `end`, in seconds."""
        return any(a < end - 1e-9 and b > begin + 1e-9 for a, b in self.spans)


@pytest.fixture
def shard_all(tmp_path: Path) -> Callable[..., dict[str, Sharded]]:
    """Return a function that shards every recording below a folder, without Ray, and without a search for copies."""

    def run(root: Path, spec: PreprocessSpec = SPEC, **corpus) -> dict[str, Sharded]:
        out = {}
        for item in list_items(CorpusConfig(root=str(root), name="c", **corpus)):
            split = SplitConfig(val_fraction=0, test_fraction=0)
            labels = tuple(sorted({trial.label_name for trial in item.trials or ()} - {""}))
            result = process_recording(
                Task(item=item, spec=spec, split=split, labels=labels, work=tmp_path / "work", timeout_s=60)
            )
            folder, samples = tmp_path / "work" / "parts" / result.part[:2] / result.part, []
            for part in result.samples:
                data = (folder / f"{part}.tar").read_bytes()
                for entry in read_json(folder / f"{part}.idx"):
                    parts = {name: data[at : at + size] for name, (at, size) in entry["members"].items()}
                    meta = json.loads(parts["json"])
                    samples.append((meta, decode_eeg(parts["eeg.npy.zst"], meta["n"]).astype(float)))
            out[item.path] = Sharded(result.row, sorted(samples, key=lambda sample: sample[0]["start"]))
        return out

    return run


def assert_true(
    sharded: Sharded,
    seed: int,
    *,
    n: int = 8,
    names: Iterable[str] = NAMES,
    spec: PreprocessSpec = SPEC,
    clock: Callable[[float], float] = lambda seconds: seconds,
    skip: Iterable[str] = (),
    ends: bool = False,
) -> None:
    """Check that windows agree with the true signal: gain within 0.1 %, correlation above 0.998, and the same order of
    channels.

    Parameters
    ----------
    sharded : Sharded
        The recording to check. The recording must have at least one window.
    seed, n : int
        Seed and number of channels of the true signal.
    names : iterable of str
        Names of the true signal's channels.
    spec : PreprocessSpec
        Settings with which the recording was sharded.
    clock : callable
        Function that converts the start of a window, in seconds from the recording's start, to the time of the true
        signal.
    skip : iterable of str
        Channels that are not compared, because they are marked as bad or are missing.
    ends : bool
        If True, also compare the first and the last window of each row of consecutive windows. By default, these
        windows are not compared, because the filters have a transient near the ends of a segment.
    """
    from scipy.signal import sosfiltfilt

    assert sharded.row.status == "sharded", sharded.row.reason
    names, skip, margin = list(names), set(skip), round(8 * spec.sfreq)
    good = [i for i, name in enumerate(names) if name not in skip]
    sos = filters(sharded.row.sfreq, spec, sharded.row.line_freq)
    begins, stops = {round(a, 4) for a, _ in sharded.spans}, {round(b, 4) for _, b in sharded.spans}
    inner = [(a, b) for a, b in sharded.spans if ends or (round(a, 4) in stops and round(b, 4) in begins)]
    assert inner, "no window to compare"
    for meta, x in sharded.samples:
        assert meta["sfreq"] == spec.sfreq
        if not any(a == meta["start"] for a, _ in inner):
            continue
        assert [name for name in meta["ch_names"] if name not in skip] == [names[i] for i in good]
        times = clock(meta["start"]) + np.arange(-margin, x.shape[1] + margin) / spec.sfreq
        truth = sosfiltfilt(sos, true_uv(seed, n, times), axis=1)[good, margin:-margin]
        if spec.reference == "average":
            truth -= truth.mean(0)
        own = x[[i for i, name in enumerate(meta["ch_names"]) if name not in skip]]
        for name, a, b in zip([names[i] for i in good], own, truth, strict=True):
            place = f"{sharded.row.path}, {name}, window at {meta['start']} s"
            assert np.corrcoef(a, b)[0, 1] > 0.998, place
            assert abs(a @ b / (b @ b) - 1) < 1e-3, f"{place}: gain {a @ b / (b @ b):.5f}"


@pytest.fixture(name="assert_true", scope="session")
def assert_true_fixture():
    return assert_true


@pytest.fixture(name="true_uv", scope="session")
def true_uv_fixture():
    return true_uv


@pytest.fixture(scope="session")
def cases() -> Path:
    """Return the folder of recordings with a known true signal; skip the test if there is no such folder."""
    if not CASES.is_dir():
        pytest.skip("DREAMSCALE_CASES does not name the folder of recordings with known truth")
    return CASES


def write_edf(
    path: Path,
    uv: np.ndarray,
    rate: int = 250,
    *,
    labels: list[str] | None = None,
    units: list[bytes] | None = None,
    scale: Iterable[float] = (),
    low: list[str] | None = None,
    high: list[str] | None = None,
    bdf: bool = False,
) -> Path:
    """Write an EDF or BDF file with records of 1 s, in which all main fields of the header can be chosen.

    Parameters
    ----------
    path : Path
        File to write.
    uv : ndarray, shape (n, S)
        Signal in microvolts.
    rate : int
        Sampling rate in Hz.
    labels, units : list
        Label and unit of each channel.
    scale : iterable of float
        For each channel, the value in the channel's physical unit that equals one microvolt. The physical range in the
        header is from -500 to 500 times this value.
    low, high : list of str, optional
        Texts that replace the correct physical minimum and maximum.
    bdf : bool
        Whether to write BDF.
    """
    n, seconds = len(uv), uv.shape[1] // rate
    labels, units, scale = labels or NAMES[:n], units or [b"uV"] * n, list(scale) or [1.0] * n
    top = 2**23 - 1 if bdf else 2**15 - 1
    digital = np.clip(np.round((uv + 500) / 1000 * (2 * top + 1)) - top - 1, -top - 1, top).astype("<i4")
    fields = [
        [label.encode("latin-1").ljust(16) for label in labels],
        [b" " * 80] * n,
        [unit.ljust(8) for unit in units],
        [text.encode().ljust(8) for text in low or [f"{-500 * s:g}" for s in scale]],
        [text.encode().ljust(8) for text in high or [f"{500 * s:g}" for s in scale]],
        [str(-top - 1).encode().ljust(8)] * n,
        [str(top).encode().ljust(8)] * n,
        [b" " * 80] * n,
        [str(rate).encode().ljust(8)] * n,
        [b" " * 32] * n,
    ]
    assert all(len(field) in (8, 16, 32, 80) for column in fields for field in column)
    head = (b"\xffBIOSEMI" if bdf else b"0".ljust(8)) + b" " * 160 + b"01.01.2012.00.00"
    head += str(256 * (n + 1)).encode().ljust(8) + (b"24BIT" if bdf else b"").ljust(44)
    head += str(seconds).encode().ljust(8) + b"1".ljust(8) + str(n).encode().ljust(4)
    body = digital[:, : seconds * rate].reshape(n, seconds, rate).swapaxes(0, 1)
    data = body.astype("<i4").view("u1").reshape(-1, 4)[:, :3].tobytes() if bdf else body.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(b"".join(column) for column in fields) + data)
    return path


@pytest.fixture(name="write_edf", scope="session")
def write_edf_fixture():
    return write_edf


def write_gdf(
    path: Path,
    signals: dict[str, tuple[np.ndarray, int]] | list[tuple[str, tuple[np.ndarray, int]]],
    *,
    version: str = "GDF 2.20",
    units: Iterable[int | str] = (),
    scale: Iterable[float] = (),
    flat: Iterable[str] = (),
) -> Path:
    """Write a GDF file with 16-bit samples and records of 1 s.

    Parameters
    ----------
    path : Path
        File to write.
    signals : dict of str to (ndarray, int), or list of such pairs
        For each channel: signal in microvolts, and sampling rate in Hz.
    version : str
        ``GDF 1.25`` (units are texts) or ``GDF 2.20`` (units are codes).
    units : iterable of int or str
        Unit of each channel; microvolts by default.
    scale : iterable of float
        For each channel, the value in the channel's physical unit that equals one microvolt.
    flat : iterable of str
        Channels whose physical minimum and maximum are zero.
    """
    import struct

    signals = list(signals.items()) if isinstance(signals, dict) else signals
    old, n = version < "GDF 1.9", len(signals)
    seconds = min(len(x) // rate for _, (x, rate) in signals)
    units, scale = list(units) or ["uV" if old else 4275] * n, list(scale) or [1.0] * n
    fixed, header = bytearray(256), bytearray(256 * n)
    fixed[:8] = version.encode()
    struct.pack_into("<q" if old else "<H", fixed, 184, 256 * (n + 1) if old else n + 1)
    struct.pack_into("<qII", fixed, 236, seconds, 1, 1)
    struct.pack_into("<I" if old else "<H", fixed, 252, n)
    data = []
    for i, (label, (x, rate)) in enumerate(signals):
        struct.pack_into("16s", header, 16 * i, label.encode())
        if old:
            struct.pack_into("8s", header, 96 * n + 8 * i, str(units[i]).encode().ljust(8))
        else:
            struct.pack_into("<H", header, 102 * n + 2 * i, units[i])
        reach = 0.0 if label in flat else 500 * (1 + i) * scale[i]
        struct.pack_into("<d", header, 104 * n + 8 * i, -reach)
        struct.pack_into("<d", header, 112 * n + 8 * i, reach)
        struct.pack_into("<q" if old else "<d", header, 120 * n + 8 * i, -32768)
        struct.pack_into("<q" if old else "<d", header, 128 * n + 8 * i, 32767)
        struct.pack_into("<i", header, 216 * n + 4 * i, rate)
        struct.pack_into("<i", header, 220 * n + 4 * i, 3)
        digital = np.round((x / (1000 * (1 + i)) + 0.5) * 65535 - 32768)
        data.append(np.clip(digital, -32768, 32767).astype("<i2")[: seconds * rate].reshape(seconds, rate))
    records = b"".join(b"".join(block[s].tobytes() for block in data) for s in range(seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(fixed) + bytes(header) + records + b"\x01" + bytes(7))
    return path


@pytest.fixture(name="write_gdf", scope="session")
def write_gdf_fixture():
    return write_gdf
