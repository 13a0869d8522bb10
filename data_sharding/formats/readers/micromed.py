"""Read Micromed files (``.trc``) through neo."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats.mne_signal import ReadError
from data_sharding.formats.readers import Format
from data_sharding.formats.signal import Segment

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording

HEADER_BYTES = 1 << 20
"""The zones of the header lie in this number of bytes at the beginning of the file."""
PARTS_AT = 176 + 16 * 4
"""Position of the header's entry for the zone TRONCA, the table of parts."""


def _recognise(file: File) -> Recording | None:
    if file.head.startswith(b"* MICROMED"):
        version = file.head[175:176]
        told = f"has version {version[0]}" if version else "ends before the version"
        fault = Reason("no reader", f"the Micromed header {told}; Dreamscale reads only version 4")
        return file.recording("micromed", problem=None if version == b"\x04" else fault)
    if file.suffix == ".trc":
        return file.recording("micromed", problem=Reason("unreadable", "not Micromed: it has no Micromed header"))
    return None


def _open(path: Path) -> Any:
    from neo.rawio import MicromedRawIO

    from data_sharding.formats.readers.neo_signal import NeoSignal

    signal = NeoSignal(MicromedRawIO(filename=str(path)))
    with path.open("rb") as stream:
        table = read_parts(stream.read(HEADER_BYTES))
    sfreq, n = signal.info.sfreq, signal.info.n_samples
    if len(table) > 1 and table[0] == (0, 0):
        # If the first row of the table is (0, 0), neo regards this row as the end of the table, and reads the file as
        # one part. So this function reads the table itself.
        segments = []
        for (time, start), stop in zip(table, [*(start for _, start in table[1:]), n], strict=True):
            if not start < stop <= n:
                text = f"the table of parts places a part at samples {start} to {stop} of {n}"
                raise ReadError(Reason("damaged Micromed header", text))
            segments.append(Segment(start=start, stop=stop, onset=max(time / sfreq, _end_of(segments, sfreq))))
        signal.info = dataclasses.replace(signal.info, segments=segments)
    elif table and table[0][1] > 0:
        why = "because they belong to no part in the header's table of parts"
        note = f"the first {table[0][1]} samples are not used, {why}"
        signal.info = dataclasses.replace(signal.info, notes=[*signal.info.notes, note])
    return signal


def read_parts(header: bytes) -> list[tuple[int, int]]:
    """Return the time and position of the first sample of each part (signal without a gap); empty if no table of parts.

    The time counts samples from the beginning of the original recording, and the position counts samples from the
    beginning of the signal in the file.
    """
    name, at, size = struct.unpack_from("<8sII", header, PARTS_AT)
    if name.strip() != b"TRONCA" or at + size > len(header):
        return []
    rows = list(struct.iter_unpack("<II", header[at : at + size // 8 * 8]))
    count = max((i for i, row in enumerate(rows, start=1) if any(row)), default=0)
    return rows[:count]


def _end_of(segments: list[Segment], sfreq: float) -> float:
    """Return the time in seconds at which the last segment ends; 0 without segments."""
    return segments[-1].onset + (segments[-1].stop - segments[-1].start) / sfreq if segments else 0.0


FORMAT = Format(
    name="micromed",
    recognise=_recognise,
    open=_open,
    title="Micromed (`.trc`)",
    recognised_by="`* MICROMED`",
    compared="version",
    package="neo",
)
