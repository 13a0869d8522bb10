"""Compares sharded samples with recordings whose true signal is known at any time.

The true signals are the sums of sinusoids in ``truth.py`` of the folder that `DREAMSCALE_CASES` names. `true_uv` is the
same function, so that tests can also write recordings of their own.

In array shapes, n is the number of channels, S a number of samples, and T the number of samples in a window.
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
    """Return the true signal [n, S] in microvolts at these times: 60 sinusoids from 3 to 28 Hz, about 20 microvolts."""
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
    """What became of one recording."""

    row: LedgerRow
    """Its row in the ledger."""
    samples: list[tuple[dict, np.ndarray]]
    """Metadata and signal [n, T] in microvolts of every window, in the order of time."""

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of every window in seconds from the recording's start."""
        return [(meta["start"], meta["start"] + x.shape[1] / meta["sfreq"]) for meta, x in self.samples]

    def touches(self, begin: float, end: float) -> bool:
        """Return whether a window overlaps this span of seconds."""
        return any(a < end - 1e-9 and b > begin + 1e-9 for a, b in self.spans)


@pytest.fixture
def shard_all(tmp_path: Path) -> Callable[..., dict[str, Sharded]]:
    """Return a function that shards every recording below a folder, without Ray and without the search for copies."""

    def run(root: Path, spec: PreprocessSpec = SPEC, **corpus) -> dict[str, Sharded]:
        out = {}
        for item in list_items(CorpusConfig(root=str(root), name="c", **corpus)):
            split = SplitConfig(val_fraction=0, test_fraction=0)
            result = process_recording(
                Task(item=item, spec=spec, split=split, labels=(), work=tmp_path / "work", timeout_s=60)
            )
            folder, samples = tmp_path / "work" / "parts" / result.part[:2] / result.part, []
            if result.samples:
                data = (folder / "train.tar").read_bytes()
                for entry in read_json(folder / "train.idx"):
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
    """Compare windows with the true signal: gain within 0.1 %, correlation above 0.998, names in order.

    Parameters
    ----------
    sharded : Sharded
        The recording to check. It must have at least one window.
    seed, n : int
        Seed and number of channels of the true signal.
    names : iterable of str
        Names of the true signal's channels.
    spec : PreprocessSpec
        Settings with which the recording was sharded.
    clock : callable
        Converts the start of a window, in seconds from the recording's start, to the time of the true signal.
    skip : iterable of str
        Channels without the true signal: marked as bad, or absent.
    ends : bool
        Whether to compare also the first and the last window of each run of neighbouring windows. Near the ends of a
        segment, a filter has less signal on one side, so its result differs from that of the endless true signal.
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
    """Return the folder of recordings with known truth; skip the test if there is none."""
    if not CASES.is_dir():
        pytest.skip("DREAMSCALE_CASES does not name the folder of recordings with known truth")
    return CASES
