"""Tiny files of Micromed, Blackrock, Neuralynx, Nicolet and NWB with a known signal are read correctly."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import find_recordings

NAMES = ["Fp1", "Cz", "Oz", "EOG"]
RATE = 500


def make_uv(seconds: float = 4.0, n: int = 4) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return np.array([30 * (i + 1) * np.sin(2 * np.pi * (5 + i) * time) for i in range(n)])


def open_only(root: Path) -> Signal:
    (recording,) = find_recordings(root)
    assert recording.problem is None, recording.problem
    return open_signal(recording)


def assert_equal(signal: Signal, uv: np.ndarray, names: list[str] = NAMES, atol: float = 0.2) -> None:
    assert signal.info.ch_names == names and signal.info.sfreq == pytest.approx(RATE)
    assert signal.info.n_samples == uv.shape[1]
    read = signal.read(0, uv.shape[1], list(range(len(names))))
    np.testing.assert_allclose(1e6 * signal.info.scale * read, uv, atol=atol)
    part = signal.read(700, 900, [2, 0])
    np.testing.assert_allclose(1e6 * signal.info.scale * part, uv[[2, 0], 700:900], atol=atol)
    signal.close()


def write_micromed(path: Path, uv: np.ndarray, units: list[int], parts: Sequence[tuple[int, int]] = ()) -> None:
    zones = ["ORDER", "LABCOD", "NOTE", "FLAGS", "TRONCA", "IMPED_B", "IMPED_E", "MONTAGE", "COMPRESS", "AVERAGE"]
    zones += ["HISTORY", "DVIDEO", "EVENT A", "EVENT B", "TRIGGER"]
    n, places = len(uv), {}
    head = bytearray(8192)
    head[:32] = b"* MICROMED  Brain-Quick file *\x00\x00"
    struct.pack_into("bbbbbb", head, 128, 1, 1, 100, 10, 0, 0)
    struct.pack_into("<IHHHH", head, 138, len(head), n, 2 * n, RATE, 2)
    head[175] = 4
    at = 640
    for zone in zones:
        size = {"ORDER": 2 * n, "LABCOD": 128 * n, "TRONCA": 800}.get(zone, 8)
        places[zone] = at
        struct.pack_into("<8sII", head, 176 + 16 * zones.index(zone), zone.ljust(8).encode(), at, size)
        at += size
    for i, unit in enumerate(units):
        struct.pack_into("<H", head, places["ORDER"] + 2 * i, i)
        scale = {-1: 1000, 0: 1, 1: 0.001}[unit]
        low, high = round(-1000 * scale), round(1000 * scale)
        struct.pack_into("<BB6s6s", head, places["LABCOD"] + 128 * i, 1, 0, NAMES[i].encode(), b"G2")
        struct.pack_into("<iiiiih", head, places["LABCOD"] + 128 * i + 14, 0, 65535, 32768, low, high, unit)
        struct.pack_into("<H", head, places["LABCOD"] + 128 * i + 44, 1)
    for i, part in enumerate(parts):
        struct.pack_into("<II", head, places["TRONCA"] + 8 * i, *part)
    digital = np.round(uv / 2000 * 65536 + 32768).astype("<u2")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(head) + digital.T.tobytes())


def test_micromed(tmp_path: Path) -> None:
    pytest.importorskip("neo", reason="the extra neo is not installed")
    write_micromed(tmp_path / "a.TRC", make_uv(), [0, -1, 1, 0])
    assert_equal(open_only(tmp_path), make_uv())


@pytest.mark.parametrize("parts", [[(0, 0), (1500, 800)], [(100, 0), (1600, 800)]])
def test_micromed_with_a_part_cut_out(tmp_path: Path, parts: list[tuple[int, int]]) -> None:
    """Each part of the recording is a pair: its first sample in the original recording, and its first sample in this
    file."""
    pytest.importorskip("neo", reason="the extra neo is not installed")
    write_micromed(tmp_path / "a.TRC", make_uv(), [0, 0, 0, 0], parts)
    signal = open_only(tmp_path)
    assert [(s.start, s.stop, s.onset) for s in signal.info.segments] == [(0, 800, 0.0), (800, 2000, 3.0)]
    assert_equal(signal, make_uv())


def test_micromed_with_samples_before_the_first_part(tmp_path: Path) -> None:
    pytest.importorskip("neo", reason="the extra neo is not installed")
    write_micromed(tmp_path / "a.TRC", make_uv(), [0, 0, 0, 0], [(100, 300)])
    info = open_only(tmp_path).info
    assert info.notes == [
        "the first 300 samples are not used, because they belong to no part in the header's table of parts"
    ]
    assert info.n_samples == 1700


def write_blackrock(path: Path, parts: list[tuple[int, np.ndarray]], units: list[str]) -> None:
    n = len(units)
    size = 314 + 66 * n
    basic = struct.pack(
        "<8sBBI16s256sII8HI", b"NEURALCD", 2, 3, size, b"", b"", 30000 // RATE, 30000, 2012, 1, 0, 1, 0, 0, 0, 0, n
    )
    extended = b""
    for i, unit in enumerate(units):
        top = 5 if unit == "mV" else 5000
        extended += struct.pack(
            "<2sH16sBBhhhh16sIIHIIH", b"CC", i + 1, NAMES[i].encode(), 1, i, -32764, 32764, -top, top, unit.encode(),
            0, 0, 0, 0, 0, 0,
        )  # fmt: skip
    data = b""
    for stamp, uv in parts:
        digital = np.round(uv / 5000 * 32764).astype("<i2")
        data += struct.pack("<BII", 1, stamp, uv.shape[1]) + digital.T.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(basic + extended + data)


def test_blackrock_with_a_pause(tmp_path: Path) -> None:
    pytest.importorskip("neo", reason="the extra neo is not installed")
    uv = make_uv()
    parts = [(0, uv[:, :1000]), (30000 * 10, uv[:, 1000:])]
    write_blackrock(tmp_path / "a.ns2", parts, ["uV", "mV", "uV", "uV"])
    signal = open_only(tmp_path)
    assert signal.info.ch_types == ["eeg", "eeg", "eeg", "seeg"]
    assert [(s.start, s.stop) for s in signal.info.segments] == [(0, 1000), (1000, 2000)]
    assert signal.info.segments[1].onset == pytest.approx(10.0)
    assert_equal(signal, uv)


def write_neuralynx(folder: Path, uv: np.ndarray, names: list[str], gap_at: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        text = (
            "######## Neuralynx Data File Header\n-FileType NCS\n-FileVersion 3.4\n-RecordSize 1044\n"
            "-TimeCreated 2019/01/01 10:00:00\n-TimeClosed 2019/01/01 11:00:00\n"
            '-ApplicationName Cheetah "6.3.2"\n-HardwareSubSystemName "AcqSystem1"\n'
            "-HardwareSubSystemType DigitalLynxSX\n"
            f"-SamplingFrequency {RATE}\n-ADMaxValue 32767\n-ADBitVolts 0.00000003\n-AcqEntName {name}\n"
            f"-NumADChannels 1\n-ADChannel {i}\n-InputRange 1000\n-InputInverted False\n"
            "-DSPLowCutFilterEnabled False\n"
            "-DspLowCutFrequency 0\n-DSPHighCutFilterEnabled False\n-DspHighCutFrequency 200\n"
        )
        digital = np.round(uv[i] * 1e-6 / 3e-8).astype("<i2")
        records = b""
        for number in range(len(digital) // 512):
            begin = number * 512 * 1_000_000 // RATE + (5_000_000 if gap_at and number >= gap_at else 0)
            samples = digital[512 * number : 512 * (number + 1)]
            records += struct.pack("<QIII", 1_000_000 + begin, i, RATE, 512) + samples.tobytes()
        (folder / f"{name}.ncs").write_bytes(text.encode().ljust(16384, b"\0") + records)


def test_neuralynx_folder_is_one_recording(tmp_path: Path) -> None:
    pytest.importorskip("neo", reason="the extra neo is not installed")
    uv = make_uv(512 * 8 / RATE)
    names = sorted(NAMES[:3])
    write_neuralynx(tmp_path / "whole", uv, names)
    write_neuralynx(tmp_path / "pause", uv, names, gap_at=4)
    found = {recording.path.parent.name: recording for recording in find_recordings(tmp_path)}
    assert set(found) == {"whole", "pause"} and len(found["whole"].files) == 3
    assert_equal(open_signal(found["whole"]), uv[:3], names)
    pause = open_signal(found["pause"])
    assert [(s.start, s.stop) for s in pause.info.segments] == [(0, 2048), (2048, 4096)]
    assert pause.info.segments[1].onset == pytest.approx(2048 / RATE + 5.0, abs=1e-3)
    assert_equal(pause, uv[:3], names)


def test_nicolet(tmp_path: Path) -> None:
    uv = make_uv()
    (tmp_path / "a.data").write_bytes(np.round(uv / 0.05).astype("<i2").T.tobytes())
    (tmp_path / "a.head").write_text(
        f"start_ts=2012-01-01 10:00:00.000\nnum_samples=2000\nsample_freq={RATE}\nconversion_factor=0.05\n"
        f"num_channels=4\nelec_names=[{','.join(NAMES)}]\npat_id=1\nadm_id=1\nrec_id=1\n"
        "duration_in_sec=4\nsample_bytes=2\n"
    )
    assert_equal(open_only(tmp_path), uv)
    (tmp_path / "a.data").write_bytes(bytes(100))
    (recording,) = find_recordings(tmp_path)
    assert recording.problem is not None and "the header states" in recording.problem


def write_nwb(
    path: Path,
    uv: np.ndarray,
    *,
    unit: str = "microvolts",
    conversion: float = 0.05,
    stamps: np.ndarray | None = None,
    start: float = 0.0,
    invalid: list[tuple[float, float]] | None = None,
) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        series = file.create_group("acquisition/eeg")
        series.attrs["neurodata_type"] = "ElectricalSeries"
        data = series.create_dataset("data", data=np.round(uv / 0.05).astype("i2").T)
        data.attrs["conversion"], data.attrs["unit"] = conversion, unit
        if stamps is None:
            series.create_dataset("starting_time", data=start).attrs["rate"] = float(RATE)
        else:
            series.create_dataset("timestamps", data=stamps)
        series.create_dataset("electrodes", data=np.arange(4))
        table = file.create_group("general/extracellular_ephys/electrodes")
        table.create_dataset("id", data=np.arange(4))
        table.create_dataset("label", data=[name.encode() for name in NAMES])
        if invalid:
            times = file.create_group("intervals/invalid_times")
            times.create_dataset("start_time", data=[begin for begin, _ in invalid])
            times.create_dataset("stop_time", data=[end for _, end in invalid])


def test_nwb_with_a_rate_or_time_stamps(tmp_path: Path) -> None:
    uv = make_uv()
    for name in ("rate", "stamps"):
        (tmp_path / name).mkdir()
    write_nwb(tmp_path / "rate" / "a.nwb", uv, unit="volts", conversion=5e-8)
    assert_equal(open_only(tmp_path / "rate"), uv)
    stamps = 100 + np.arange(2000) / RATE + 7.0 * (np.arange(2000) >= 1200)
    write_nwb(tmp_path / "stamps" / "a.nwb", uv, unit="microvolts", conversion=0.05, stamps=stamps)
    signal = open_only(tmp_path / "stamps")
    assert [(s.start, s.stop) for s in signal.info.segments] == [(0, 1200), (1200, 2000)]
    assert signal.info.segments[1].onset == pytest.approx(2.4 + 7.0)
    assert signal.info.ch_types == ["eeg", "eeg", "eeg", "seeg"]
    assert_equal(signal, uv)


def test_nwb_with_invalid_times(tmp_path: Path) -> None:
    """An NWB file counts the times of samples and of invalid spans from one reference time, not from the first
    sample."""
    write_nwb(tmp_path / "a.nwb", make_uv(), start=50.0, invalid=[(51.0, 52.5), (53.0, np.nan)])
    info = open_only(tmp_path).info
    assert [(begin, end) for begin, end, _ in info.bad_spans] == [(1.0, 2.5)]
    assert info.notes == ["1 rows of the table invalid_times have no usable times; not used"]


def test_nwb_with_time_stamps_of_a_rate_that_is_not_whole(tmp_path: Path) -> None:
    write_nwb(tmp_path / "a.nwb", make_uv(), stamps=np.arange(2000) * 3 / 1000)
    assert open_only(tmp_path).info.sfreq == 333.3333


@pytest.mark.parametrize("name", ["a.trc", "a.ns5", "a.ncs", "a.nwb"])
def test_files_with_another_content_are_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else" * 40)
    (recording,) = find_recordings(tmp_path)
    assert recording.problem is not None and "it" in recording.problem and recording.continuous
