"""The table of segments (`.seg`) of an ANT file is read with care. The C library of the reader crashes if the table is
damaged, so the library never gets the table."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import ReadError, open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import sniff

LINE = "45541.501 0.5 300\n"


def write_ant(path: Path, table: str) -> Path:
    """Write an ANT file of 600 samples at 100 Hz, with the text of its table of segments."""
    from antio.libeep import pyeep

    path.parent.mkdir(parents=True, exist_ok=True)
    channels = pyeep.create_channel_info()
    for name in ("Fp1", "Fp2", "C3", "C4"):
        pyeep.add_channel(channels, name, "REF", "uV")
    handle = pyeep.write_cnt(str(path), 100, channels, 0)
    pyeep.add_samples(handle, np.random.default_rng(0).normal(0, 10, 2400).tolist(), 4)
    pyeep.close(handle)
    data = bytearray(path.read_bytes())
    info = b"[StartDate]\n45541.5\n[StartFraction]\n0.25\n[MachineMake]\neego\n[MachineModel]\nEE_226\n"
    info += b"[SubjectName]\na\n[SubjectDateOfBirth]\n0 0 0 14 7 124 0 0 0\n\0"
    info += b"\0" * (len(info) % 2)
    data += b"info" + struct.pack("<I", len(info)) + info
    struct.pack_into("<I", data, 4, len(data) - 8)
    path.write_bytes(data)
    path.with_suffix(".seg").write_bytes(table.encode())
    return path


def open_file(path: Path) -> Signal:
    recording = sniff(path)
    assert recording is not None and recording.problem is None
    return open_signal(recording)


@pytest.mark.parametrize(
    "table",
    [
        f"NumberSegments=2\n{LINE}",
        "\ufeff; a comment\r\nnumberSegments = 2\r\n45541,501 0,5 300\r\n\r\n",
        f"NumberSegments=2\n{LINE}[End]\n",
        f"{LINE}NumberSegments=2",
    ],
)
def test_tables_in_several_notations(tmp_path: Path, table: str) -> None:
    path = write_ant(tmp_path / "a.cnt", table)
    if table.endswith("2"):
        path.with_suffix(".seg").rename(tmp_path / "A.SEG")
    segments = open_file(path).info.segments
    assert [(s.start, s.stop, round(s.onset, 4)) for s in segments] == [(0, 300, 0.0), (300, 600, 86.65)]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (LINE, "a.seg has no line 'NumberSegments=2'"),
        (f"NumberSegments=1\n{LINE}", "a.seg says NumberSegments=1, but has lines for 2 segments"),
        (f"NumberSegments=2\n{LINE * 3}", "a.seg says NumberSegments=2, but has lines for 4 segments"),
        (f"NumberSegments=3\n{LINE}", "a.seg says NumberSegments=3, but has lines for 2 segments"),
        (f"NumberSegments=-3\n{LINE}", "line 1 of a.seg is neither 'NumberSegments=N' nor three numbers"),
        (f"NumberSegments=99999999999\n{LINE}", "line 1 of a.seg is neither"),
        (f"NumberSegments=two\n{LINE}", "line 1 of a.seg is neither"),
        (f"NumberSegments=2\n{'1' * 5000}\n{LINE}", "line 2 of a.seg is neither"),
        (f"NumberSegments=2\n{'1' * 400} 0.5 300\n", "line 2 of a.seg is neither"),
        (f"NumberSegments=2\n45541.501 {'9' * 400} 300\n", "line 2 of a.seg is neither"),
        ("NumberSegments=2\n45541.501 0.5\n", "line 2 of a.seg is neither"),
        ("NumberSegments=2\n45541.501 0.5 -300\n", "line 2 of a.seg is neither"),
        ("NumberSegments=2\n45541.6 0 5000\n", "a.seg has 5000 samples after the first segment, but the recording"),
        ("NumberSegments=2\n45541.6 0 0\n", "a.seg has 0 samples after the first segment"),
        ("\n", "a.seg has no line 'NumberSegments=1'"),
    ],
)
def test_damaged_tables_are_refused_with_a_reason(tmp_path: Path, table: str, text: str) -> None:
    path = write_ant(tmp_path / "a.cnt", table)
    with pytest.raises(ReadError) as error:
        open_file(path)
    assert text in str(error.value)
    assert str(error.value).endswith("correct a.seg, or remove it if the recording was never interrupted")
