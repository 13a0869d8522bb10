"""Tests of the formats that have one module each in ``data_sharding/formats/readers``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats import open_signal as opening
from data_sharding.formats.open_signal import READERS, open_signal
from data_sharding.formats.readers import find_formats
from data_sharding.formats.signal import SignalInfo
from data_sharding.formats.sniffing import sniff


def test_every_format_is_found_and_can_be_opened() -> None:
    names = [format_.name for format_ in find_formats()]
    assert "eximia" in names and len(set(names)) == len(names)
    assert all(READERS[format_.name] is format_.open for format_ in find_formats())


def test_eximia_is_read_in_volts_and_a_truncated_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.nxe"
    frames = np.random.default_rng(0).integers(-3000, 3000, (2900, 64)).astype("<i2")
    path.write_bytes(frames.tobytes())
    recording = sniff(path)
    assert recording is not None and recording.format == "eximia" and recording.problem is None
    signal = open_signal(recording)
    kept = [i for i, kind in enumerate(signal.info.ch_types) if kind == "eeg"]
    volts = signal.read(0, 100, kept) * signal.info.scale
    assert volts.shape == (60, 100) and 1e-6 < np.abs(volts).max() < 1e-3
    assert any("eximia" in note for note in signal.info.notes)
    path.write_bytes(frames.tobytes()[:-1])
    truncated = sniff(path)
    assert truncated is not None and "64-channel frames" in str(truncated.problem)


class _LateSignal:
    """A signal that opens its file at the first `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = [str(i) for i in range(64)]
        self.info = SignalInfo(
            ch_names=names, ch_types=["eeg"] * 64, positions=[None] * 64, sfreq=1450.0, n_samples=2900, segments=[]
        )

    def read(self, start: int, stop: int, channels: list[int]) -> np.ndarray:
        frames = np.frombuffer(self.path.read_bytes(), "<i2").reshape(-1, 64)
        return frames[start:stop, channels].T.astype(np.float64)


def test_a_link_with_the_required_suffix_exists_as_long_as_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.other"
    path.write_bytes(np.arange(64 * 2900, dtype="<i2").tobytes())
    recording = sniff(path.rename(tmp_path / "a.nxe"))
    assert recording is not None
    monkeypatch.setitem(READERS, "eximia", _LateSignal)
    monkeypatch.setitem(opening.SUFFIXES, "eximia", (".toy",))
    monkeypatch.delitem(opening.UNIT_FACTORS, "eximia")
    signal = open_signal(recording)
    assert isinstance(signal, _LateSignal) and signal.path.suffix == ".toy"
    assert signal.read(0, 2, [0, 1]).tolist() == [[0, 64], [1, 65]]
