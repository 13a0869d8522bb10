"""Converts the bad spans of the raw signal to faults at the target sampling rate.

A *gap* is a time span inside a segment in which no good channel has a signal. A gap divides its segment into *pieces*,
and filters process each piece separately. A channel without a signal in a part of a window is bad in this window; the
other channels of the window are used.

The *transient* of a filter is the part of its output that is wrong because the input begins, ends or is missing nearby.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_sharding.formats.signal import Segment
from data_sharding.processing.preprocess import PreprocessSpec, band_of
from data_sharding.processing.quality import NO_SIGNAL, Cells
from data_sharding.processing.streaming import Scratch, resampler_reach

Interval = tuple[int, int]
MARKED = "marked bad"
"""Kind of fault, if the file or its sidecar marks the channel as bad in the whole recording or in a span."""


@dataclass(frozen=True)
class Fault:
    """A time span in a segment in which a channel is bad. Sample numbers are at the target sampling rate."""

    start: int
    """First sample of the fault, counted from the start of the segment."""
    stop: int
    """Last sample of the fault plus one, counted from the start of the segment."""
    kind: str
    """Kind of the fault, for example "flat" (the values do not change)."""
    rings: bool = True
    """True if filters process the samples of the fault. Then the samples around the fault contain a filter transient.
    False for a fault next to a gap (a time span in which no good channel has a signal)."""


@dataclass
class WindowFaults:
    """Bad rows (channels) of a window."""

    bad: dict[int, str] = field(default_factory=dict)
    """Rows that are bad in the window, each with the kind of its fault."""
    silent: set[int] = field(default_factory=set)
    """Rows without a signal in a part of the window."""
    near: set[int] = field(default_factory=set)
    """Rows without a signal shortly before or after the window. In the window, these rows contain a filter
    transient."""


@dataclass(kw_only=True)
class Faults:
    """Faults of a recording.

    A row number is the index of a channel in the filtered signal (see `data_sharding.job.cut_windows.Clean.rows`).
    """

    reach: int = 0
    """Length of a filter transient in samples."""
    pieces: list[list[Interval]]
    """For each segment: start and stop of the pieces between gaps. A segment without a gap is a single piece."""
    gaps: dict[int, list[Fault]] = field(default_factory=dict)
    """For the number of each segment: the gaps of the segment."""
    dead: dict[int, dict[int, list[Fault]]] = field(default_factory=dict)
    """For the number of each segment, and for each row: the faults in which the row has no signal."""
    busy: dict[int, dict[int, list[Fault]]] = field(default_factory=dict)
    """For the number of each segment, and for each row: the faults in which the row has muscle activity or mains
    noise."""

    def judge(self, segment: int, start: int, stop: int) -> WindowFaults:
        """Find the bad rows of a window; `start` and `stop` are samples counted from the start of the segment."""
        found = WindowFaults()
        for row, faults in self.busy.get(segment, {}).items():
            length: Counter[str] = Counter()
            for fault in _overlapping(faults, start, stop):
                length[fault.kind] += min(stop, fault.stop) - max(start, fault.start)
            for kind, samples in length.items():
                if 2 * samples >= stop - start:
                    found.bad[row] = kind
        for row, faults in self.dead.get(segment, {}).items():
            for fault in _overlapping(faults, start - self.reach, stop + self.reach):
                if fault.start < stop and fault.stop > start:
                    found.silent.add(row)
                elif not fault.rings:
                    continue
                found.bad[row] = fault.kind
        found.near = {row for row in self.dead.get(segment, {}) if row in found.bad and row not in found.silent}
        return found

    def transient(self, piece: Interval, start: int, stop: int) -> int:
        """Count the samples of a window that are affected by the filter transients at the two ends of `piece`."""
        begin, end = piece[0] + self.reach, piece[1] - self.reach
        return min(stop - start, max(0, min(stop, begin) - start) + max(0, stop - max(start, end)))


class Bridge:
    """Reads a piece of a segment, with a straight line in each row where the row has no signal.

    Without the straight line, a sudden loss of the signal would cause large filter transients. The windows in the
    dataset do not contain the straight line: they contain zeros where a row has no signal.

    Parameters
    ----------
    scratch : Scratch
        The signal at the target rate.
    rows : sequence of int
        Rows to read from the scratch file.
    factor : float
        Factor that converts the values in the scratch file to microvolts.
    begin : int
        Number of the segment's first sample in the scratch file.
    piece : (int, int)
        Start and stop of the piece, counted from the start of the segment.
    dead : dict
        For each row: the faults in which the row has no signal (from `Faults.dead`).
    """

    def __init__(
        self,
        scratch: Scratch,
        rows: Sequence[int],
        factor: float,
        begin: int,
        piece: Interval,
        dead: dict[int, list[Fault]],
    ) -> None:
        self._scratch, self._rows, self._factor = scratch, list(rows), factor
        self._offset = begin + piece[0]
        n_samples = piece[1] - piece[0]
        self._lines: list[tuple[int, int, int, float, float]] = []
        for row, faults in dead.items():
            for fault in _overlapping(faults, *piece):
                a, b = max(0, fault.start - piece[0]), min(n_samples, fault.stop - piece[0])
                before = self._value(row, a - 1) if a > 0 else None
                after = self._value(row, b) if b < n_samples else before
                before = after if before is None else before
                self._lines.append((row, a, b, before or 0.0, after or 0.0))

    def _value(self, row: int, sample: int) -> float:
        at = self._offset + sample
        return self._factor * float(self._scratch.read(at, at + 1)[self._rows[row], 0])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read samples of the piece in microvolts, [rows, stop - start]."""
        x = self._factor * self._scratch.read(self._offset + start, self._offset + stop)[self._rows]
        for row, a, b, before, after in self._lines:
            first, last = max(a, start), min(b, stop)
            if first < last:
                share = (np.arange(first, last) - a + 1) / (b - a + 1)
                x[row, first - start : last - start] = before + (after - before) * share
        return x


def find_faults(
    cells: Cells,
    rows: Sequence[int],
    good: Sequence[int],
    *,
    segments: Sequence[Segment],
    lengths: Sequence[int],
    sfreq: float,
    spec: PreprocessSpec,
    line_freq: float | None,
    reach: int,
    marked: Sequence[tuple[int, float, float]] = (),
) -> Faults:
    """Convert the bad spans of the raw signal to faults at the target rate, and find the gaps.

    Parameters
    ----------
    cells : Cells
        The measured quality of the raw signal.
    rows : sequence of int
        Rows of the signal that the windows need.
    good : sequence of int
        Positions, in the list `rows`, of the channels that are good in the recording as a whole.
    segments : sequence of Segment
        Segments of the recording.
    lengths : sequence of int
        Number of samples of each segment at the target rate.
    sfreq : float
        Sampling rate of the recording in Hz.
    spec : PreprocessSpec
        Preprocessing settings.
    line_freq : float or None
        Mains frequency in Hz.
    reach : int
        Length of a filter transient in samples.
    marked : sequence of (int, float, float)
        Spans in which the file or its sidecar marks a single channel as bad: position in `rows`, and start and end in
        seconds from the recording's beginning. In such a span, the channel is treated as if it had no signal.

    Returns
    -------
    Faults
        The faults of the recording.
    """
    faults = Faults(reach=reach, pieces=[[(0, length)] for length in lengths])
    around, ratio = resampler_reach(sfreq, spec.sfreq, band_of(sfreq, spec)[1]), spec.sfreq / sfreq
    for number, spans in cells.spans(rows, line_freq).items():
        whole = segments[number].stop - segments[number].start
        for span in spans:
            silent = span.kind in NO_SIGNAL
            more = around if silent else 0
            start = max(0, math.floor(span.start * ratio) - more)
            # Resampling can round the length of a segment up. So if a span ends with the segment, let it end with the
            # last resampled sample.
            end = math.ceil(span.stop * ratio) + more if span.stop < whole else lengths[number]
            table = (faults.dead if silent else faults.busy).setdefault(number, {})
            table.setdefault(span.row, []).append(Fault(start, min(end, lengths[number]), span.kind))
    _add_marked(faults, marked, segments, lengths, spec.sfreq)
    for number in sorted(faults.dead):
        dead = {row: _join(found) for row, found in faults.dead[number].items()}
        faults.dead[number] = dead
        if gaps := _common(dead, good):
            holes = [(gap.start, gap.stop) for gap in gaps]
            faults.gaps[number] = gaps
            faults.pieces[number] = subtract([(0, lengths[number])], holes)
            faults.dead[number] = {row: _cut_out(found, holes) for row, found in dead.items()}
    return faults


def _add_marked(
    faults: Faults,
    marked: Sequence[tuple[int, float, float]],
    segments: Sequence[Segment],
    lengths: Sequence[int],
    sfreq: float,
) -> None:
    """Add the spans in which the file marks a single channel as bad; `find_faults` explains the arguments."""
    onsets = [segment.onset for segment in segments]
    for row, begin, end in marked:
        for number in range(max(0, bisect.bisect_right(onsets, begin) - 1), bisect.bisect_left(onsets, end)):
            # Before rounding, shorten the span by a thousandth of a sample at each end, so that a tiny error of `begin`
            # or `end` does not add a whole sample.
            start = max(0, math.floor((begin - onsets[number]) * sfreq + 1e-3))
            stop = min(lengths[number], math.ceil((end - onsets[number]) * sfreq - 1e-3))
            if start < stop:
                faults.dead.setdefault(number, {}).setdefault(row, []).append(Fault(start, stop, MARKED))


def _overlapping(faults: list[Fault], start: int, stop: int) -> Iterable[Fault]:
    """Yield the faults that overlap an interval. The argument `faults` must be sorted by time."""
    first = bisect.bisect_right(faults, start, key=lambda fault: fault.stop)
    for fault in itertools.islice(faults, first, None):
        if fault.start >= stop:
            break
        yield fault


def _join(faults: list[Fault]) -> list[Fault]:
    """Merge overlapping faults of one channel. If faults are merged, the kind of the longer fault is used."""
    out: list[Fault] = []
    for fault in sorted(faults, key=lambda f: f.start):
        if out and fault.start <= out[-1].stop:
            last = out.pop()
            longer = fault if fault.stop - fault.start > last.stop - last.start else last
            fault = Fault(last.start, max(last.stop, fault.stop), longer.kind)
        out.append(fault)
    return out


def _cut_out(faults: list[Fault], gaps: list[Interval]) -> list[Fault]:
    """Return the parts of a row's faults that are outside the gaps."""
    out = []
    for fault in faults:
        whole = (fault.start, fault.stop)
        touched = bool(intersect([whole], gaps))
        out += [dataclasses.replace(fault, start=a, stop=b, rings=not touched) for a, b in subtract([whole], gaps)]
    return out


def _common(dead: dict[int, list[Fault]], good: Sequence[int]) -> list[Fault]:
    """Return the gaps: time spans in which no good channel has a signal."""
    if not good or not set(good) <= dead.keys():
        return []
    common = [(f.start, f.stop) for f in dead[good[0]]]
    for row in good[1:]:
        common = intersect(common, [(f.start, f.stop) for f in dead[row]])
    gaps = []
    for start, stop in common:
        kinds = Counter(next(iter(_overlapping(dead[row], start, stop))).kind for row in good)
        gaps.append(Fault(start, stop, kinds.most_common(1)[0][0]))
    return gaps


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Return the intersection of two lists of intervals.

    Each list must be sorted, without overlap between its intervals.
    """
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            out.append((start, stop))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def subtract(a: Sequence[Interval], b: Iterable[Interval]) -> list[Interval]:
    """Remove the intervals `b` from the intervals `a`. The intervals `a` must be sorted and must not overlap."""
    rest: list[Interval] = []
    remove, j = sorted(b), 0
    for start, stop in a:
        while j < len(remove) and remove[j][1] <= start:
            j += 1
        k = j
        while k < len(remove) and remove[k][0] < stop:
            if remove[k][0] > start:
                rest.append((start, remove[k][0]))
            start = max(start, remove[k][1])
            k += 1
        if start < stop:
            rest.append((start, stop))
    return rest


def union_length(intervals: Iterable[Interval]) -> int:
    """Return the number of samples in the union of the intervals."""
    total, end = 0, -1
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
