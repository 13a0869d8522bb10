"""Find the marks of interruptions and of missing signal in the records of EDF, BDF and GDF files.

MNE joins all records without gaps, and ignores the Status bits of BioSemi amplifiers. In GDF files, special values mean
that a sample is missing, and MNE returns these values as if they were signal.

In array shapes, R is the number of records, N the number of time points of one channel in a record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.headers import Layout
from data_sharding.formats.marks.interruptions import Annotation, Found
from data_sharding.formats.mne_signal import ReadError
from data_sharding.formats.signal import Segment

TAL = re.compile(rb"([+-]\d{1,15}(?:\.\d{1,15})?)(?:\x15(\d{1,15}(?:\.\d{1,15})?))?\x14([^\x00]*)\x14\x00")
"""Pattern of a time-stamped annotations list (TAL) of EDF+: onset, duration, texts."""
ROUNDING_S = 1.1e-3
"""Smallest gap between records, in seconds, that is taken as real. Smaller gaps are caused by onsets that were rounded
to milliseconds."""
RECORDS_AT_ONCE = 4096
NEW_EPOCH, CMS_IN_RANGE, MK2 = 1 << 16, 1 << 20, 1 << 23
"""Bits of the Status channel of a BioSemi amplifier. Bit 22 means that the battery is low; this bit is not used,
because a low battery does not change the signal."""
STARTS_PER_S = 1.0
"""If bit 16 (a new epoch) rises more often than this number of times per second, the channel named Status was not
written by a BioSemi amplifier."""
GDF_DTYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<i8", 8: "<u8", 16: "<f4", 17: "<f8"}
"""NumPy type for each sample type code of GDF."""


def read_annotations(path: Path, layout: Layout) -> tuple[np.ndarray, list[Annotation]]:
    """Read all annotation signals of an EDF+ or BDF+ file.

    Parameters
    ----------
    path : Path
        File on a local disk. (On an object store this function would be slow, because it reads a part of every record.)
    layout : Layout
        Layout of the records.

    Returns
    -------
    onsets : ndarray, shape (R,)
        Onset of each record in seconds; NaN if the record has no onset.
    annotations : list of Annotation
        Annotations, whose onsets use the same clock as the onsets of the records. In EDF+, an annotation belongs to one
        channel if its text ends with ``@@`` and the label of this channel.
    """
    signals = [i for i, label in enumerate(layout.labels) if label in headers.ANNOTATIONS]
    starts = np.concatenate([[0], np.cumsum(layout.per_record)]) * layout.width
    onsets = np.full(headers.count_records(path, layout), np.nan)
    annotations = []
    with path.open("rb", buffering=0) as stream:
        for record in range(len(onsets)):
            for i in signals:
                stream.seek(layout.header_bytes + record * layout.record_bytes + int(starts[i]))
                lists = TAL.findall(stream.read(layout.width * layout.per_record[i]))
                # In each record, the first annotation signal begins with a list that contains the record's onset and no
                # text.
                if i == signals[0] and lists and not lists[0][1] and lists[0][2][:1] in (b"", b"\x14"):
                    onsets[record] = float(lists[0][0])
                for onset, duration, words in lists:
                    for word in filter(None, words.split(b"\x14")):
                        text, _, channel = headers.decode_text(word)[0].partition("@@")
                        names = (channel.strip(),) if channel.strip() else ()
                        annotations.append(Annotation(float(onset), float(duration or 0), text, names))
    return onsets, annotations


def find_runs(onsets: np.ndarray, layout: Layout) -> tuple[list[tuple[int, int, float]], list[str]]:
    """Divide the records of an EDF+ file into runs: consecutive records without gaps between them.

    Parameters
    ----------
    onsets : ndarray, shape (R,)
        Onset of each record in seconds; NaN if the record has no onset.
    layout : Layout
        Layout of the records.

    Returns
    -------
    runs : list of (int, int, float)
        For each run of consecutive records: number of its first record, number of its last record plus one, and onset
        in seconds from the onset of the file's first record.
    notes : list of str
        Notes for the ledger.

    Raises
    ------
    ReadError
        If the file is EDF+D (records with gaps), but the first record has no onset, or more than half of all records
        have no onset.
    """
    count, length = len(onsets), layout.record_s
    known = np.isfinite(onsets)
    if not count or not known[0] or known.mean() < 0.5:
        if layout.interrupted and count:
            first = int(np.flatnonzero(~known)[0]) + 1
            text = f"record {first} has no onset, and the header says that there are gaps between records"
            raise ReadError(Reason("damaged header", text))
        return [(0, count, 0.0)], []
    notes = []
    times = onsets - onsets[0]
    for i in np.flatnonzero(~known):
        times[i] = times[i - 1] + length
    jumps = np.abs(np.diff(times) - length) > ROUNDING_S
    # If a gap in time is next to a record whose onset is unknown, the gap can be before or after this record. The
    # record then becomes a run (records without a gap between them) of its own.
    for i in np.flatnonzero(~known):
        jumps[i - 1] |= bool(jumps[i : i + 1].any())
    if not known.all():
        notes.append(f"{(~known).sum()} records of {count} have no onset")
    if not layout.interrupted and jumps.mean() > 0.5:
        notes.append("most onsets of records contradict the length of the records, so the onsets are not used")
        return [(0, count, 0.0)], notes
    starts = [0, *(np.flatnonzero(jumps) + 1).tolist()]
    runs: list[tuple[int, int, float]] = []
    moved = 0
    for a, b in zip(starts, [*starts[1:], count], strict=True):
        earliest = runs[-1][2] + (runs[-1][1] - runs[-1][0]) * length if runs else 0.0
        moved += times[a] < earliest - ROUNDING_S
        runs.append((a, b, max(float(times[a]), earliest)))
    if moved:
        notes.append(f"the onsets of the records go back {moved} times; such segments are placed one after the other")
    return runs, notes


def segments_of_runs(runs: list[tuple[int, int, float]], per_record: int) -> list[Segment]:
    """Convert runs (consecutive records without gaps) to segments of a channel with `per_record` samples per record."""
    return [Segment(start=a * per_record, stop=b * per_record, onset=onset) for a, b, onset in runs]


def _blocks(path: Path, layout: Layout, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read blocks of at most 4096 records; yield the number of each block's first record, and the block's bytes."""
    if not count:
        return
    shape = (count, layout.record_bytes)
    data = np.memmap(path, np.uint8, "r", layout.header_bytes, shape)
    for first in range(0, count, RECORDS_AT_ONCE):
        yield first, data[first : first + RECORDS_AT_ONCE]


def find_status_marks(path: Path, layout: Layout) -> tuple[list[Found], list[str]]:
    """Read from the BioSemi Status channel where new epochs begin, and when the CMS electrode was out of range.

    Parameters
    ----------
    path : Path
        BDF file on a local disk.
    layout : Layout
        Layout of the records.

    Returns
    -------
    found : list of Found
        Marks. The time of a mark is the sample number in the file, divided by the sampling rate.
    notes : list of str
        Notes for the ledger.
    """
    at = next((i for i, label in enumerate(layout.labels) if label.lower() == "status"), None)
    if at is None or layout.width != 3 or not layout.per_record[at]:
        return [], []
    begin, size = 3 * sum(layout.per_record[:at]), 3 * layout.per_record[at]
    rate = layout.per_record[at] / layout.record_s
    rises: list[np.ndarray] = []
    edges: list[np.ndarray] = []  # Samples at which bit 20 (CMS in range) changes.
    total, seen = 0, 0
    last: int | None = None
    first_low = False
    for _, data in _blocks(path, layout, headers.count_records(path, layout)):
        parts = data[:, begin : begin + size].reshape(-1, 3).astype(np.uint32)
        status = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        seen |= int(np.bitwise_or.reduce(status))
        if last is None:
            last = int(status[0])
            first_low = not last & CMS_IN_RANGE
        changes = np.diff(status, prepend=np.uint32(last)) != 0
        at_change = np.flatnonzero(changes)
        before = np.where(at_change > 0, status[at_change - 1], last)
        turned = status[at_change] ^ before
        rises.append(total + at_change[(turned & NEW_EPOCH > 0) & (status[at_change] & NEW_EPOCH > 0)])
        edges.append(total + at_change[turned & CMS_IN_RANGE > 0])
        total, last = total + len(status), int(status[-1])
    starts = np.concatenate([*rises, np.zeros(0, int)])
    if len(starts) > STARTS_PER_S * total / rate:
        text = "bit 16 of the Status channel changes too often, so the channel does not come from a BioSemi amplifier"
        return [], [text]
    found = [Found("new epoch", float(position) / rate) for position in starts]
    if not seen & CMS_IN_RANGE and not seen & MK2:
        # Bits 20 and 23 are never set, so another program wrote the Status channel, and bit 20 says nothing about CMS.
        return found, []
    turns = np.concatenate([*([np.zeros(1, int)] if first_low else []), *edges, np.zeros(0, int)])
    turns = turns.tolist() + ([total] if len(turns) % 2 else [])
    for a, b in zip(turns[::2], turns[1::2], strict=True):
        found.append(Found("CMS out of range", a / rate, (b - a) / rate))
    return found, []


def find_missing(path: Path, layout: Layout, numbers: list[int]) -> tuple[list[Found], bool]:
    """Find the samples of a GDF file that are missing in all channels of `numbers`.

    Parameters
    ----------
    path : Path
        GDF file on a local disk.
    layout : Layout
        Layout of the records.
    numbers : list of int
        Channels of one sampling rate, by their numbers in the header.

    Returns
    -------
    found : list of Found
        Gaps: spans in which the values of all channels are missing.
    some : bool
        True if there is a time at which values are missing in some channels but not in all.

    Notes
    -----
    NaN and values outside the digital range are missing values. A value at the limit of the digital range is either
    missing, or an overflow of one channel. Such a value is treated as missing only if, at the same time, every other
    channel also has a missing value or a value at its limit.
    """
    spans: list[tuple[int, int]] = []
    some = False
    count = layout.per_record[numbers[0]]
    for first, data in _blocks(path, layout, headers.count_gdf_records(path, layout)):
        everywhere = np.ones(len(data) * count, bool)
        anywhere = np.zeros(len(data) * count, bool)
        for i in numbers:
            values = gdf_values(data, layout, i)
            if values is None:
                return [], False
            low, high = layout.digital[i]
            absent = _is_missing(values, low, high)
            anywhere |= absent
            everywhere &= absent | (values == low) | (values == high)
        some |= bool((anywhere & ~everywhere).any())
        edges = np.flatnonzero(np.diff(everywhere, prepend=False, append=False))
        for a, b in (edges.reshape(-1, 2) + first * count).tolist():
            if spans and spans[-1][1] == a:
                spans[-1] = (spans[-1][0], b)
            else:
                spans.append((a, b))
    rate = count / layout.record_s
    return [Found("GDF missing samples", a / rate, (b - a) / rate) for a, b in spans], some


def _is_missing(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values < low) | (values > high) | (values != values)


def set_missing(x: np.ndarray, path: Path, layout: Layout, numbers: list[int], start: int) -> None:
    """Replace values that are missing in a GDF file by NaN.

    Parameters
    ----------
    x : ndarray, shape (n, S)
        Values of the channels. The function changes the array in place.
    path : Path
        The file.
    layout : Layout
        Layout of the records.
    numbers : list of int
        For each of the n channels: number of the channel in the header.
    start : int
        Index, in the whole signal, of the first sample in `x`.
    """
    count = layout.per_record[numbers[0]]
    first, last = start // count, -(-(start + x.shape[1]) // count)
    shape = (last - first, layout.record_bytes)
    data = np.memmap(path, np.uint8, "r", layout.header_bytes + first * layout.record_bytes, shape)
    for row, i in enumerate(numbers):
        values = gdf_values(data, layout, i)
        if values is not None:
            x[row, _is_missing(values, *layout.digital[i])[start - first * count :][: x.shape[1]]] = np.nan


def gdf_values(data: np.ndarray, layout: Layout, number: int) -> np.ndarray | None:
    """Return the digital values of a channel in records of a GDF file.

    Parameters
    ----------
    data : ndarray, shape (R, bytes of a record), uint8
        Records of the file.
    layout : Layout
        Layout of the records.
    number : int
        Number of the channel in the header.

    Returns
    -------
    ndarray, shape (R * N,), or None
        The values; None if the file stores the values in a number type that NumPy does not have.
    """
    if layout.types[number] not in GDF_DTYPES:
        return None
    sizes = [headers.GDF_BYTES[kind] * n for kind, n in zip(layout.types, layout.per_record, strict=True)]
    begin = sum(sizes[:number])
    part = np.ascontiguousarray(data[:, begin : begin + sizes[number]])
    return part.view(GDF_DTYPES[layout.types[number]]).reshape(-1)


def read_gdf_events(path: Path, layout: Layout) -> list[Annotation]:
    """Read the event table of a GDF file.

    Parameters
    ----------
    path : Path
        GDF file on a local disk.
    layout : Layout
        Layout of the records.

    Returns
    -------
    list of Annotation
        The events; the text of an event is its event code as a decimal number. An event without a duration lasts until
        its end event, if the file has one. The end event has the code of the event plus 0x8000, and the same channel.
    """
    with path.open("rb") as stream:
        version = float(stream.read(8)[4:])
        stream.seek(layout.header_bytes + headers.count_gdf_records(path, layout) * layout.record_bytes)
        head, rest = stream.read(8), stream.read(headers.MAX_READ)
    if len(head) < 8 or head[0] not in (1, 3):
        return []
    if version < 1.94:
        rate, count = float(int.from_bytes(head[1:4], "little")), int.from_bytes(head[4:8], "little")
    else:
        rate, count = float(np.frombuffer(head, "<f4", 1, 4)[0]), int.from_bytes(head[1:4], "little")
    size = 12 if head[0] == 3 else 6
    count = min(count, len(rest) // size)
    rate = rate if 0 < rate < np.inf else max(layout.per_record) / layout.record_s
    # In GDF, the first sample has the number 1.
    positions = (np.frombuffer(rest, "<u4", count).astype(float) - 1) / rate
    codes = np.frombuffer(rest, "<u2", count, 4 * count).astype(int)
    lengths, channels = np.zeros(count), np.zeros(count, int)
    if head[0] == 3:
        channels = np.frombuffer(rest, "<u2", count, 6 * count).astype(int)  # 0 means all channels
        lengths = np.frombuffer(rest, "<u4", count, 8 * count) / rate
    ends: dict[tuple[int, int], list[float]] = {}
    for position, code, channel in zip(positions.tolist(), codes.tolist(), channels.tolist(), strict=True):
        if code & 0x8000:
            ends.setdefault((code & 0x7FFF, channel), []).append(position)
    events = []
    for position, code, length, channel in zip(
        positions.tolist(), codes.tolist(), lengths.tolist(), channels.tolist(), strict=True
    ):
        end = min((end for end in ends.get((code, channel), []) if end > position), default=position)
        names = (layout.labels[channel - 1].strip("\0 "),) if 0 < channel <= len(layout.labels) else ()
        events.append(Annotation(position, length or end - position, str(code), names))
    return events
