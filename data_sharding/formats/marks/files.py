"""Find the interruptions and events that MNE does not read correctly from ANT, EGI, Neuroscan and EEGLAB files."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_sharding.common.errors import one_line
from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.marks.interruptions import Annotation, Found
from data_sharding.formats.mne_signal import ReadError
from data_sharding.formats.signal import Segment

SECONDS_A_DAY = 86400
DAYS_TO_1970 = 25569
"""Day number of 1 January 1970 in ANT files. In these files, day 0 is 30 December 1899."""
_DECIMAL = r"\d{1,15}(?:[.,]\d{1,30})?"
"""Pattern of a number in a table of segments. A number with hundreds of digits would become infinite."""
NEUROSCAN_EVENT_BYTES = {1: 8, 2: 19, 3: 19}
"""Size of an event in bytes, for each type of the Neuroscan event table."""
NEUROSCAN_STOPS = {0xB: "correction of the DC offset", 0xE: "discontinuity"}
"""Codes of Neuroscan events at which the signal is interrupted."""
NEUROSCAN_REJECT, NEUROSCAN_ACCEPT = 0xC, 0xD
"""Codes of the Neuroscan events at which a rejected time span begins and ends."""


def read_ant_segments(table: Path, n_samples: int, sfreq: float, start: float | None) -> list[Segment]:
    """Read the table of segments (``.seg``) next to an ANT file.

    Parameters
    ----------
    table : Path
        The table.
    n_samples : int
        Number of samples of the recording.
    sfreq : float
        Sampling rate in Hz.
    start : float or None
        Start of the recording in seconds since 1970; None if it is unknown.

    Returns
    -------
    list of Segment
        Segments. If `start` is None, the gaps between segments are unknown, and each segment begins where the previous
        segment ends.

    Raises
    ------
    ReadError
        If the table is damaged, or contradicts the number of samples. Then it is not known where the recording was
        interrupted.

    Notes
    -----
    The table begins with the line ``NumberSegments=N``, and has one more line for each segment except the first. Such a
    line has three numbers: the start of the segment in days, exact to a second; the fraction of a second to add to the
    start; and the number of samples of the segment.
    """
    with table.open("rb") as stream:
        content = stream.read(headers.MAX_READ).decode("utf-8-sig", "replace")
    lines = [line.strip(" \t\0") for line in content.splitlines()]
    number, rows = None, []
    for place, line in enumerate(lines, start=1):
        if not line or line[0] in ";#[":
            continue
        if header := re.fullmatch(r"NumberSegments\s*=\s*(\d{1,9})", line, re.IGNORECASE):
            number = int(header.group(1))
        elif row := re.fullmatch(rf"({_DECIMAL})\s+({_DECIMAL})\s+(\d{{1,15}})", line):
            day, fraction = (float(text.replace(",", ".")) for text in row.groups()[:2])
            rows.append((day, fraction, int(row.group(3))))
        else:
            text = f"line {place} of {table.name} is neither 'NumberSegments=N' nor three numbers"
            raise _unusable(table, "damaged table of segments", text)
    if number is None:
        text = f"{table.name} has no line 'NumberSegments={len(rows) + 1}'"
        raise _unusable(table, "damaged table of segments", text)
    if max(number, 1) != len(rows) + 1:
        text = f"{table.name} says NumberSegments={number}, but has lines for {len(rows) + 1} segments"
        raise _unusable(table, "damaged table of segments", text)
    counts = [count for _, _, count in rows]
    first = n_samples - sum(counts)
    if first <= 0 or min(counts, default=1) <= 0:
        text = f"{table.name} has {sum(counts)} samples after the first segment, but the recording has {n_samples}"
        raise _unusable(table, "sidecar of another recording", text)
    segments = [Segment(start=0, stop=first, onset=0.0)]
    for day, fraction, count in rows:
        last = segments[-1]
        begin = last.onset + (last.stop - last.start) / sfreq
        if start is not None:
            seconds = (day - DAYS_TO_1970) * SECONDS_A_DAY + fraction
            begin = max(begin, round(seconds - start, 6))
        segments.append(Segment(start=last.stop, stop=last.stop + count, onset=begin))
    return segments


def _unusable(table: Path, category: str, text: str) -> ReadError:
    what = f"correct {table.name}, or remove it if the recording was never interrupted"
    return ReadError(Reason(category, f"{text}, so it is not known where the recording was interrupted; {what}"))


def find_mff_pauses(begins: Sequence[int], ends: Sequence[int], sfreq: float) -> list[Found]:
    """Find the pauses between the epochs of an MFF recording.

    Parameters
    ----------
    begins, ends : sequence of int
        First sample, and last sample plus one, of each epoch. MNE computes these sample numbers from the times in
        ``epochs.xml``, which are microseconds in some files and nanoseconds in others.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    list of Found
        Pauses with exact sample positions. (MNE fills a pause with zeros, and the annotation that MNE adds for the
        pause begins half a sample too early.)
    """
    return [
        Found("MFF pause", int(end) / sfreq, int(begin - end) / sfreq, "pause")
        for end, begin in zip([0, *ends], begins, strict=False)
        if begin > 0
    ]


def find_neuroscan_marks(path: Path, sfreq: float, n_bytes: int) -> list[Found]:
    """Find the discontinuities and the rejected time spans in the event table of a Neuroscan file.

    Parameters
    ----------
    path : Path
        The ``.cnt`` file.
    sfreq : float
        Sampling rate in Hz.
    n_bytes : int
        Number of bytes that one sample of one channel has in the file.

    Returns
    -------
    list of Found
        Marks. Some programs place an event one sample later than others, so one sample is left out at each
        discontinuity.
    """
    with path.open("rb") as stream:
        head = stream.read(900)
        n, at = struct.unpack_from("<H", head, 370)[0], struct.unpack_from("<I", head, 886)[0]
        stream.seek(at)
        table = stream.read(headers.MAX_READ)
    if at < 900 or len(table) < 9 or table[0] not in NEUROSCAN_EVENT_BYTES:
        return []
    kind, size = table[0], NEUROSCAN_EVENT_BYTES[table[0]]
    count = min(struct.unpack_from("<i", table, 1)[0], len(table) - 9) // size
    found: list[Found] = []
    rejected: float | None = None
    for i in range(max(count, 0)):
        _, _, code, offset = struct.unpack_from("<HBBi", table, 9 + i * size)
        sample = offset if kind == 3 else (offset - 900 - 75 * n) // (n * n_bytes)
        time = max(sample - 1, 0) / sfreq
        if code >> 4 in NEUROSCAN_STOPS:
            found.append(Found("Neuroscan stop", time, 1 / sfreq, NEUROSCAN_STOPS[code >> 4]))
        if code >> 4 in (NEUROSCAN_REJECT, NEUROSCAN_ACCEPT) and rejected is not None:
            found.append(Found("Neuroscan rejection", rejected, time - rejected, "rejected"))
            rejected = None
        if code >> 4 == NEUROSCAN_REJECT:
            rejected = time
    if rejected is not None:
        found.append(Found("Neuroscan rejection", rejected, 0.0, "rejected"))
    return found


def read_epoch_events(path: Path) -> tuple[list[Annotation], list[str]]:
    """Read the events of an EEGLAB file with epochs.

    Parameters
    ----------
    path : Path
        The ``.set`` file.

    Returns
    -------
    events : list of Annotation
        Events. Times are those of a signal in which all epochs follow each other without gaps.
    notes : list of str
        A note for the ledger if the events cannot be read. In this case, the file is used as if it had no events.
    """
    import mne

    try:
        found = mne.read_annotations(path)
    except Exception as error:
        text = f"the events cannot be read ({one_line(error)[:80]}), so cuts and bad spans inside epochs are not known"
        return [], [text]
    columns = zip(found.onset, np.nan_to_num(np.asarray(found.duration, float)), found.description, strict=True)
    return [Annotation(float(onset), float(duration), str(text)) for onset, duration, text in columns], []
