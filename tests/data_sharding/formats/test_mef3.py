"""Small MEF3 recordings with a known signal are read correctly, and damaged ones get a reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import find_recordings

NAMES = ["Cz", "Fp1", "Oz", "RA1"]
RATE, BEGIN = 500, 1_700_000_000_000_000
needs_pymef = pytest.mark.skipif(importlib.util.find_spec("pymef") is None, reason="needs pymef")


def make_uv(seconds: float = 4.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return np.array([30 * (i + 1) * np.sin(2 * np.pi * (5 + i) * time) for i in range(len(NAMES))])


def write_mef3(
    path: Path,
    uv: np.ndarray,
    *,
    gap: tuple[int, float] | None = None,
    rates: dict[str, int] | None = None,
    unit: str = "uV",
    factor: float = 0.01,
    password: str | None = None,
) -> Path:
    """Write a recording. `gap` is the sample before which the amplifier was stopped, and the length of the stop."""
    from pymef.mef_session import MefSession

    session = MefSession(str(path), password, new_session=True)
    for name, row in zip(NAMES, uv, strict=True):
        rate = (rates or {}).get(name, RATE)
        x = np.round(row / factor).astype("int32")
        at = gap[0] if gap else len(x)
        about = {
            "sampling_frequency": float(rate),
            "units_conversion_factor": factor,
            "units_description": unit.encode(),
            "start_sample": 0,
            "AC_line_frequency": 60.0,
        }
        zone = {"recording_time_offset": 0, "DST_start_time": 0, "DST_end_time": 0, "GMT_offset": 0}
        end = BEGIN + at * 1_000_000 // rate
        session.write_mef_ts_segment_metadata(name, 0, password, password, BEGIN, end, about, zone)
        session.write_mef_ts_segment_data(name, 0, password, password, 250, x[:at])
        if gap:
            begin = end + round(1e6 * gap[1])
            end = begin + (len(x) - at) * 1_000_000 // rate
            session.append_mef_ts_segment_data(name, 0, password, password, begin, end, 250, x[at:], True)
    session.close()
    return path


def open_only(root: Path) -> Signal:
    (recording,) = find_recordings(root)
    assert recording.format == "mefd" and recording.problem is None
    return open_signal(recording)


def test_a_folder_without_signal_or_without_the_reader_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.mefd" / "Cz.timd").mkdir(parents=True)
    (tmp_path / "a.mefd" / "Cz.timd" / "note.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no signal: the folder contains no signal|reader not installed: .*pymef"):
        open_only(tmp_path)


@needs_pymef
class TestSignal:
    @pytest.mark.parametrize("unit", ["uV", "microvolts", "mV"])
    def test_values_names_and_rate(self, tmp_path: Path, unit: str) -> None:
        uv = make_uv()
        write_mef3(tmp_path / "a.mefd", uv / (1000 if unit == "mV" else 1), unit=unit, factor=1e-5)
        signal = open_only(tmp_path)
        info = signal.info
        assert info.ch_names == NAMES and info.ch_types == ["eeg", "eeg", "eeg", "seeg"] and info.sfreq == RATE
        assert (info.n_samples, info.line_freq, info.notes) == (2000, 60.0, [])
        assert [(s.start, s.stop, s.onset) for s in info.segments] == [(0, 2000, 0.0)]
        np.testing.assert_allclose(1e6 * signal.read(0, 2000, [0, 1, 2, 3]), uv, atol=0.02)
        np.testing.assert_allclose(1e6 * signal.read(700, 900, [2, 0]), uv[[2, 0], 700:900], atol=0.02)
        signal.close()

    @pytest.mark.parametrize("seconds", [7.0, 0.004])
    def test_a_stop_divides_the_recording(self, tmp_path: Path, seconds: float) -> None:
        uv = make_uv()
        write_mef3(tmp_path / "a.mefd", uv, gap=(1200, seconds))
        signal = open_only(tmp_path)
        segments = [(s.start, s.stop, round(s.onset, 6)) for s in signal.info.segments]
        assert segments == [(0, 1200, 0.0), (1200, 2000, 2.4 + seconds)]
        np.testing.assert_allclose(1e6 * signal.read(1000, 1500, [1]), uv[[1], 1000:1500], atol=0.02)

    def test_a_stop_of_no_length_divides_nothing(self, tmp_path: Path) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv(), gap=(1200, 0.0))
        assert [(s.start, s.stop) for s in open_only(tmp_path).info.segments] == [(0, 2000)]

    def test_a_channel_with_another_rate_is_left_out(self, tmp_path: Path) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv(), rates={"Fp1": 250})
        info = open_only(tmp_path).info
        assert info.ch_names == ["Cz", "Oz", "RA1"] and info.left_out == {"Fp1": "another sampling rate"}

    def test_no_factor_is_an_unknown_unit(self, tmp_path: Path) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv(), unit="foo")
        assert list(open_only(tmp_path).info.unknown_units) == ["Cz", "Fp1", "Oz", "RA1"]

    @pytest.mark.parametrize(
        ("end", "cut", "reason"),
        [
            ("tdat", 100, r"truncated: Oz-000000\.tidx promises \d+ bytes, but Oz-000000\.tdat has less"),
            ("tidx", 10, r"truncated: the size of Oz-000000\.tidx is not a whole number of entries"),
            ("tdat", None, r"sidecar missing: Oz-000000\.tdat is missing"),
        ],
    )
    def test_damaged_files_are_refused(self, tmp_path: Path, end: str, cut: int | None, reason: str) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv())
        file = tmp_path / "a.mefd" / "Oz.timd" / "Oz-000000.segd" / f"Oz-000000.{end}"
        if cut is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(ValueError, match=reason):
            open_only(tmp_path)

    def test_encrypted_recordings_are_refused(self, tmp_path: Path) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv(), password="secret")
        with pytest.raises(ValueError, match="encrypted"):
            open_only(tmp_path)
