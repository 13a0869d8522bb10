"""Small MEF3 recordings with a known signal are read correctly, and damaged ones get a reason."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.readers.mef3 import HEADER_BYTES, INDEX
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import find_recordings

NAMES = ["Cz", "Fp1", "Oz", "RA1"]
RATE, BEGIN = 500, 1_700_000_000_000_000
RATE_PLACE = 8720
"""Offset of the sampling rate in a header file (``.tmet``)."""
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


def change_index(path: Path, change: Callable[[np.ndarray], None], channels: str = "*") -> None:
    """Change the entries of the index of each channel in place."""
    for file in path.glob(f"{channels}.timd/*.segd/*.tidx"):
        content = file.read_bytes()
        entries = np.frombuffer(content, INDEX, offset=HEADER_BYTES).copy()
        change(entries)
        file.write_bytes(content[:HEADER_BYTES] + entries.tobytes())


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

    @pytest.mark.parametrize("ppm", [-1000, 1000])
    def test_a_drift_of_the_clock_is_no_gap(self, tmp_path: Path, ppm: int) -> None:
        def drift(entries: np.ndarray) -> None:
            entries["time"] -= np.arange(len(entries)) * (500_000 * ppm // 1_000_000)

        change_index(write_mef3(tmp_path / "a.mefd", make_uv(200.0)), drift)
        assert [(s.start, s.stop, s.onset) for s in open_only(tmp_path).info.segments] == [(0, 100_000, 0.0)]

    def test_a_clock_that_was_set_back_begins_one_segment(self, tmp_path: Path) -> None:
        def set_back(entries: np.ndarray) -> None:
            entries["time"][10:] += 1_000_000  # Times are stored as negative numbers.
            entries["time"][30:] -= 3_000_000

        change_index(write_mef3(tmp_path / "a.mefd", make_uv(20.0)), set_back)
        segments = [(s.start, s.stop, round(s.onset, 6)) for s in open_only(tmp_path).info.segments]
        assert segments == [(0, 2500, 0.0), (2500, 7500, 5.0), (7500, 10_000, 18.0)]

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("at", 2**62, r"truncated: Oz-000000\.tidx promises \d+ bytes"),
            ("at", -5, r"damaged: entry 3 of Oz-000000\.tidx is not the place of a block"),
            ("size", 2**32 - 1, r"truncated: Oz-000000\.tidx promises \d+ bytes"),
            ("count", 0, r"damaged: entry 3 of Oz-000000\.tidx is not the place of a block"),
            ("count", 2**32 - 1, r"damaged: entry 4 of Oz-000000\.tidx does not begin where the previous block ends"),
            ("first", 2**63 - 1, r"damaged: entry 3 of Oz-000000\.tidx does not begin where the previous block ends"),
        ],
    )
    def test_every_entry_of_an_index_is_checked(self, tmp_path: Path, field: str, value: int, reason: str) -> None:
        def damage(entries: np.ndarray) -> None:
            entries[field][3] = value

        change_index(write_mef3(tmp_path / "a.mefd", make_uv()), damage, "Oz")
        with pytest.raises(ValueError, match=reason):
            open_only(tmp_path)

    @pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
    def test_an_impossible_rate_is_refused(self, tmp_path: Path, rate: float) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv())
        header = tmp_path / "a.mefd" / "Oz.timd" / "Oz-000000.segd" / "Oz-000000.tmet"
        content = bytearray(header.read_bytes())
        assert struct.unpack_from("<d", content, RATE_PLACE) == (RATE,)
        struct.pack_into("<d", content, RATE_PLACE, rate)
        header.write_bytes(content)
        with pytest.raises(ValueError, match="damaged header: the sampling rate of channel Oz is"):
            open_only(tmp_path)

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

    @pytest.mark.parametrize("kind", ["pipe", "folder"])
    def test_a_header_must_be_a_file(self, tmp_path: Path, kind: str) -> None:
        header = write_mef3(tmp_path / "a.mefd", make_uv()) / "Oz.timd" / "Oz-000000.segd" / "Oz-000000.tmet"
        header.unlink()
        os.mkfifo(header) if kind == "pipe" else header.mkdir()
        what = "is a device, a socket or a named pipe" if kind == "pipe" else "is not a file"
        with pytest.raises(ValueError, match=rf"unreadable: Oz-000000\.tmet {what}"):
            open_only(tmp_path)

    def test_parts_that_do_not_follow_each_other_are_refused(self, tmp_path: Path) -> None:
        from pymef.mef_session import MefSession

        path, begin = write_mef3(tmp_path / "a.mefd", make_uv()), BEGIN + 20_000_000
        session = MefSession(str(path), None)
        about = {"sampling_frequency": float(RATE), "units_conversion_factor": 0.01, "units_description": b"uV"}
        zone = {"recording_time_offset": 0, "DST_start_time": 0, "DST_end_time": 0, "GMT_offset": 0}
        for name in NAMES:
            more = {**about, "start_sample": 3000 if name == "Oz" else 2000}
            session.write_mef_ts_segment_metadata(name, 1, None, None, begin, begin + 2_000_000, more, zone)
            session.write_mef_ts_segment_data(name, 1, None, None, 250, np.arange(1000, dtype="int32"))
        session.close()
        with pytest.raises(ValueError, match=r"truncated: the parts \(\*\.segd\) of channel Oz do not follow"):
            open_only(tmp_path)

    def test_encrypted_recordings_are_refused(self, tmp_path: Path) -> None:
        write_mef3(tmp_path / "a.mefd", make_uv(), password="secret")
        with pytest.raises(ValueError, match="encrypted"):
            open_only(tmp_path)
