"""Find the sampling rate and the segments of a recording in which each sample has a time stamp.

Time stamps are not exact: they have jitter, the stamps of a whole chunk can be late, and some samples have no valid
stamp. (A *chunk* is a group of samples that the recorder stored together.) First, this module finds lasting jumps of
the time stamps. The cause of a lasting jump is a loss of samples, or a clock that was set back. Then, between each two
jumps, a line is fitted to the time stamps as a function of the sample number. All lines have the same slope. The slope
is the sample interval, that is, 1 divided by the sampling rate.

An *anchor* is a sample whose stamp was measured. The recorder gave the other samples of the chunk the stamp of the
anchor, or a stamp computed from the stamp of the anchor. In array shapes, S is the number of samples, and A the number
of anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.mne_signal import NotContinuous, ReadError
from data_sharding.formats.signal import Segment

SURE_S = 0.045
"""Every jump of the time stamps above this number of seconds is examined, even if the stamps have much jitter."""
JUMP = 0.75
"""If the time stamps have no jitter, jumps above this number of sample intervals are examined. If one sample is lost,
the jump is one sample interval."""
SIGMAS = 5.0
"""If the time stamps have jitter, jumps above this number of standard deviations of the jitter are examined."""
WINDOW_S = 2.0
"""The time stamps in a window of this many seconds before a jump are compared with those in a window of the same length
after the jump. If the later time stamps are shifted, the jump is lasting."""
FEWEST = 8
"""At least this many anchors are compared on each side of a jump, if the recording has enough anchors."""
WHOLE = 0.15
"""The length of a gap is rounded to whole samples if rounding changes the length by at most this fraction of a
sample."""
STEADY = 1e-4
"""If the measured rate differs from the nominal rate by less than this fraction, the nominal rate is used."""
IRREGULAR_S, IRREGULAR = 0.05, 0.05
"""Limits for a steady rate: if the stamps of more than 5 % of the anchors are more than 0.05 s away from the fitted
line, the stream has no steady rate."""
MOVED, MOST_BLOCKS = 0.2, 2000
"""Chunks are sorted by time only if sorting moves at most 20 % of all samples, and rearranges at most 2000 groups of
chunks. Otherwise the fault is probably in the clock of the stream, and not in the order of the chunks."""
MOST_BACK = 10
"""A stream has no steady rate if its stamps jump back more than 10 times, and also more than once a minute."""
NOTED_S = 0.01
"""A note is written if the clocks of the amplifier and of the time stamps differ by more than this number of seconds at
the end of the recording."""
EQUAL_S = 1e-6
"""Two intervals between time stamps are taken as equal if they differ by less than this number of seconds."""


@dataclass(kw_only=True)
class Clock:
    """Result of `fit_clock`: the sampling rate and the segments of a stream."""

    sfreq: float
    """Sampling rate in Hz."""
    order: np.ndarray | None
    """Indices that sort the samples by time. A sample that is stored twice is listed once. None if no sorting is
    needed."""
    segments: list[Segment]
    """Segments; `Segment.start` and `Segment.stop` are indices into the sorted samples."""
    begins: list[float]
    """Time stamp of the first sample of each segment, according to the line that was fitted to the segment."""
    period: float
    """Seconds between two samples, measured with the clock of the time stamps."""
    offset: float | None = None
    """Number of seconds to add to the corrected time stamps, such as `begins`, to get the time of the recording
    computer. None if the clock of the stream was not reset: then the time stamps are not corrected, and the measured
    clock offsets are valid."""
    notes: list[str] = field(default_factory=list)
    """Notes for the ledger."""

    def time_of_stamp(self, stamp: float) -> float:
        """Convert a time stamp to seconds from the recording's beginning, on the amplifier's clock."""
        # If the clock was set back, several segments can contain this stamp, so use the last segment that begins before
        # it.
        begun = [i for i, begin in enumerate(self.begins) if begin <= stamp + EQUAL_S]
        at = begun[-1] if begun else 0
        return self.segments[at].onset + (stamp - self.begins[at]) / (self.period * self.sfreq)


@dataclass(kw_only=True)
class _Anchors:
    """Anchors (samples with a measured stamp).

    The stamps of the samples ``first[i]`` to ``last[i]`` are copied or computed from the stamp of anchor ``i``.
    """

    first: np.ndarray
    last: np.ndarray
    k: np.ndarray
    """Number of the sample to which the stamp belongs, shape (A,): ``first[i]`` or ``last[i]``."""
    t: np.ndarray
    """Stamps in seconds, shape (A,)."""

    @property
    def by_last(self) -> bool:
        """Whether the measured stamp of each chunk belongs to the last sample of the chunk."""
        return self.k is self.last


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """Lines that were fitted to the anchors (samples with a measured stamp).

    A *run* is a range of consecutive anchors without a jump; one line is fitted to each run.
    """

    period: float
    """Slope of all lines: the sample interval in seconds."""
    bases: np.ndarray
    """Intercepts: the time that the line of each run gives for sample number 0."""
    error: float
    """Relative standard error of `period`."""
    deviation: float
    """Standard deviation of the distances between the anchors and their lines, in seconds."""
    doubt: np.ndarray
    """Standard error of the distance between the lines of two consecutive runs, in samples."""


def fit_clock(
    stamps: np.ndarray,
    nominal: float,
    samples: np.ndarray,
    chunks: Sequence[int] = (),
    offsets: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> Clock:
    """Find the sampling rate and the segments of a stream from its time stamps.

    Parameters
    ----------
    stamps : ndarray, shape (S,)
        Time stamps in seconds as they are stored, without any correction.
    nominal : float
        Sampling rate that the stream declares, in Hz; 0 if the stream declares none.
    samples : ndarray, shape (S, n)
        Values of the samples, to recognise samples that are stored twice.
    chunks : sequence of int
        Number of samples of each chunk of the file.
    offsets : tuple of two sequences of float
        Measured differences between the clock of the stream and the clock of the recording computer: the times of the
        measurements and the differences, both in seconds. A sudden change shows that the clock of the stream was reset.

    Returns
    -------
    Clock
        Sampling rate, segments and notes. The times of the segments are times of the amplifier's clock, that is, the
        number of samples that the amplifier had recorded (including lost samples), divided by the sampling rate. The
        length of a gap is rounded to a whole number of samples if rounding changes the length only a little.

    Raises
    ------
    NotContinuous
        If there are fewer than two samples.
    ReadError
        If the time stamps do not have a steady rate, or if most samples have no valid time stamp.
    """
    stamps = np.asarray(stamps, float)
    if len(stamps) < 2:
        raise NotContinuous(Reason("no signal", f"{len(stamps)} samples"))
    notes: list[str] = []
    valid = _valid(stamps)
    if valid.sum() < max(2, 0.5 * len(stamps)):
        text = f"{len(stamps) - valid.sum()} of {len(stamps)} samples have no valid time stamp"
        raise ReadError(Reason("no time stamps", text))
    if missing := int(len(stamps) - valid.sum()):
        notes.append(f"{missing} samples have no valid time stamp; their times are computed from their neighbours")
    starts = np.cumsum([0, *chunks])[:-1] if sum(chunks) == len(stamps) else np.zeros(1, int)
    order = np.arange(len(stamps))
    anchors = _anchors(order[valid], stamps[valid], nominal, starts)
    period = _period(anchors, nominal)
    synchronised = _follow_resets(stamps, valid, period, *offsets)
    offset = None
    if synchronised is not None:
        stamps, offset = synchronised
        notes.append("the clock of the stream was reset; its time stamps are corrected with the measured clock offsets")
    order, changes = _in_order(stamps, valid, samples, period, anchors, starts)
    notes += changes
    if changes or synchronised is not None:
        if changes:
            valid, stamps = valid[order], stamps[order]
            starts = np.flatnonzero(np.isin(order, starts))
        anchors = _anchors(np.flatnonzero(valid), stamps[valid], nominal, starts)
        period = _period(anchors, nominal)
    cuts = _find_jumps(anchors, period)
    runs = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(anchors.k)], strict=True)]
    lines = _fit_lines(anchors, runs, period)
    sfreq = _choose_rate(nominal, 1 / lines.period, lines.error, notes)
    drift = abs(sfreq * lines.period - 1)
    if drift < 2 * lines.error:
        lines = _fit_lines(anchors, runs, 1 / sfreq, fixed=True)
    elif drift * len(order) / sfreq > NOTED_S:
        notes.append(
            "the times are counted in samples of the amplifier, whose clock differs from the clock of the time stamps "
            f"by {1e6 * drift:.0f} ppm, {drift * len(order) / sfreq:.3f} s in the whole recording"
        )
    segments, begins = _place_segments(anchors, runs, lines, sfreq, len(order), notes)
    return Clock(
        sfreq=sfreq,
        order=order if changes else None,
        segments=segments,
        begins=begins,
        period=lines.period,
        offset=offset,
        notes=notes,
    )


def _valid(stamps: np.ndarray) -> np.ndarray:
    """Return a Boolean array: True for each valid time stamp. Some recorders write zero or NaN for an unknown time."""
    valid = np.isfinite(stamps)
    zero = valid & (stamps == 0)
    others = stamps[valid & ~zero]
    if zero.any() and len(others) and others.min() > 1.0:
        valid &= ~zero
    return valid


def _anchors(index: np.ndarray, stamps: np.ndarray, nominal: float, starts: np.ndarray) -> _Anchors:
    """Find the samples whose stamps were measured.

    Parameters
    ----------
    index : ndarray, shape (V,)
        Numbers of the samples with a valid stamp.
    stamps : ndarray, shape (V,)
        Stamps of the samples in `index`.
    nominal : float
        Nominal sampling rate in Hz. Stamps that were not measured were computed with this rate.
    starts : ndarray
        Number of the first sample of each chunk of the file.

    Returns
    -------
    _Anchors
        The anchors. If a chunk has one measured time stamp, this time stamp can belong to the first or to the last
        sample of the chunk. The function tries both possibilities for the whole stream, and returns the anchors with
        fewer jumps between them.
    """
    step, gap = np.diff(stamps), np.diff(index)
    computed = np.abs(step) < EQUAL_S
    if nominal > 0:
        computed |= np.abs(step - gap / nominal) < EQUAL_S
    begins = np.concatenate([[True], ~computed])
    begins |= np.isin(index, starts)
    if len(starts) < FEWEST:
        # In a file without chunks, all time stamps may have been computed from the first time stamp. Divide such a file
        # into pieces of half a second, and use one anchor for each piece.
        pace = (stamps[-1] - stamps[0]) / max(1, index[-1] - index[0])
        piece = max(1, int(0.5 * nominal if nominal > 0 else 0.5 / pace if pace > 0 else len(stamps)))
        begins[::piece] |= nominal > 0
    sizes = np.diff(np.append(np.flatnonzero(begins), len(index)))
    if len(starts) >= FEWEST and sizes[sizes > 1].sum() > 0.5 * len(index):
        # Most chunks have one measured stamp, so use only one anchor in each of the other chunks too.
        begins &= np.isin(index, starts) | (np.repeat(sizes, sizes) > 1)
    first = np.flatnonzero(begins)
    last = np.concatenate([first[1:] - 1, [len(index) - 1]])
    first_k, last_k = index[first], index[last]
    options = [_Anchors(first=first_k, last=last_k, k=k, t=stamps[at]) for k, at in ((first_k, first), (last_k, last))]
    if len(first) < FEWEST:
        return options[0]
    unsteady = []
    for a in options:
        period = _period(a, nominal)
        jumps = int((np.abs(_excess(a, period)) > _threshold(a, period)).sum())
        unsteady.append((jumps, _spread(_excess(a, period))))
    return options[int(unsteady[1] < unsteady[0])]


def _period(anchors: _Anchors, nominal: float) -> float:
    """Estimate the sample interval in seconds from anchors (measured stamps). A few jumps have no effect."""
    k, t = anchors.k, anchors.t
    if len(k) < FEWEST and nominal > 0:
        return 1 / nominal
    best, least, lag = 0.0, np.inf, 1
    while lag < len(k) and (lag == 1 or lag <= len(k) // 4):
        slopes = (t[lag:] - t[:-lag]) / (k[lag:] - k[:-lag])
        # Use the median of those 50 % of the sorted slopes that are closest together. Lost samples increase some
        # slopes, so the median of all slopes would be too large.
        slopes.sort()
        half = len(slopes) // 2
        widths = slopes[half:] - slopes[: len(slopes) - half]
        at = int(np.argmin(widths))
        if widths[at] < least:
            best, least = float(np.median(slopes[at : at + half + 1])), float(widths[at])
        lag *= 2
    if not best > 0:
        raise ReadError(Reason("the stream has no steady rate", "its time stamps do not increase"))
    return best


def _excess(anchors: _Anchors, period: float) -> np.ndarray:
    """For consecutive anchors, return the difference of their stamps minus the expected difference, in seconds."""
    return np.diff(anchors.t) - np.diff(anchors.k) * period


def _spread(x: np.ndarray) -> float:
    """Estimate the standard deviation of `x` from the median of the absolute deviations from the median of `x`."""
    return 1.4826 * float(np.median(np.abs(x - np.median(x)))) if len(x) else 0.0


def _threshold(anchors: _Anchors, period: float) -> float:
    """Return the threshold in seconds above which a jump of the time stamps is examined."""
    return min(max(SIGMAS * _spread(_excess(anchors, period)), JUMP * period), max(SURE_S, JUMP * period))


def _follow_resets(
    stamps: np.ndarray, valid: np.ndarray, period: float, times: Sequence[float], values: Sequence[float]
) -> tuple[np.ndarray, float] | None:
    """Correct the stamps if the measured clock offsets show that the clock was reset. Otherwise return None.

    The second returned value is the offset in seconds between the corrected time stamps and the clock of the computer.
    """
    at, by = np.asarray(times, float), np.asarray(values, float)
    kept = np.isfinite(at) & np.isfinite(by)
    at, by = at[kept], by[kept]
    change = np.flatnonzero(np.abs(np.diff(by)) > 0.5) + 1
    if not len(change):
        return None
    groups = [slice(a, b) for a, b in zip([0, *change], [*change, len(by)], strict=True)]
    index = np.flatnonzero(valid)
    breaks = np.flatnonzero(np.abs(np.diff(stamps[index]) - period * np.diff(index)) > 0.5) + 1
    out = stamps.copy()
    first = float(np.median(by[groups[0]]))
    for a, b in zip([0, *breaks], [*breaks, len(index)], strict=True):
        run = index[a:b]
        begin, end = float(stamps[run].min()), float(stamps[run].max())
        inside = [int(((at[g] > begin - 1) & (at[g] < end + 1)).sum()) for g in groups]
        near = [float(np.abs(at[g] - (begin + end) / 2).min()) for g in groups]
        best = max(range(len(groups)), key=lambda g: (inside[g], -near[g]))
        out[run] += float(np.median(by[groups[best]])) - first
    return out, first


def _in_order(
    stamps: np.ndarray, valid: np.ndarray, samples: np.ndarray, period: float, anchors: _Anchors, starts: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Sort chunks that are stored in a wrong order, and drop samples that are stored twice.

    Parameters
    ----------
    stamps, valid : ndarray, shape (S,)
        Stamps, and whether each stamp is valid.
    samples : ndarray, shape (S, n)
        Values of the samples.
    period : float
        Sample interval in seconds.
    anchors : _Anchors
        Anchors of the stream.
    starts : ndarray of int
        Number of the first sample of each chunk of the file.

    Returns
    -------
    order : ndarray of int
        Indices of the samples in the order of time.
    notes : list of str
        Notes about samples that are moved or dropped; empty if `order` is the order of the file.
    """
    threshold, noise = _threshold(anchors, period), _spread(_excess(anchors, period))
    index = np.flatnonzero(valid)
    t = stamps[index]
    jumps = np.diff(t) - period * np.diff(index)
    if not (jumps < -threshold).any():
        return np.arange(len(stamps)), []
    notes = []
    keep = np.ones(len(stamps), bool)
    highest = np.maximum.accumulate(t)
    for at in np.flatnonzero(jumps < -threshold) + 1:
        # A chunk is stored twice if its stamps and values are the same as those of an earlier chunk.
        for place in np.flatnonzero(t[:at] == t[at])[:4] if t[at] <= highest[at - 1] else ():
            length = min(at - place, len(t) - at)
            same = (t[place : place + length] == t[at : at + length]) & (
                samples[index[place : place + length]] == samples[index[at : at + length]]
            ).all(axis=1)
            length = length if same.all() else int(np.argmin(same))
            if length > 1:
                keep[index[at] : index[at + length - 1] + 1] = False
                break
    if twice := int((~keep).sum()):
        notes.append(f"{twice} samples are stored twice; each is used once")
    order = np.flatnonzero(keep)
    index = np.flatnonzero(valid & keep)
    t = stamps[index]
    jumps = np.diff(t) - period * np.diff(np.searchsorted(order, index))
    broken = np.abs(jumps) > threshold
    if len(starts) > 1 and period * float(np.median(np.diff(starts))) > 3 * noise:
        broken |= np.isin(index[1:], starts)
    breaks = np.flatnonzero(broken) + 1
    edges = [0, *breaks.tolist(), len(index)]
    begins, ends = t[edges[:-1]], t[[e - 1 for e in edges[1:]]]
    by_time = np.argsort(begins, kind="stable")
    gaps = begins[by_time][1:] - ends[by_time][:-1] - period
    jumped, left = (int((np.abs(x) > threshold / 2).sum()) for x in (jumps[breaks - 1], gaps))
    # Sort the chunks only if sorting closes gaps. If the clock was set back, sorting closes no gap, so the chunks are
    # not sorted.
    if gaps.min() > -threshold and left < jumped and 0 < _moved(by_time, np.diff(edges)) <= MOVED * len(index):
        pieces = np.split(order, np.searchsorted(order, index[breaks]))
        order = np.concatenate([pieces[i] for i in by_time])
        notes.append("chunks are stored in a wrong order; they are sorted by their time stamps")
    return order, notes


def _moved(by_time: np.ndarray, sizes: np.ndarray) -> int:
    """Return how many samples change their place when pieces (groups of chunks) are sorted by time.

    `by_time` has many increasing subsequences. The pieces of the subsequence with the most samples stay, and all other
    pieces move.

    Parameters
    ----------
    by_time : ndarray of int
        Numbers of the pieces in the order of time.
    sizes : ndarray of int
        Number of samples of each piece.
    """
    blocks = np.split(by_time, np.flatnonzero(np.diff(by_time) != 1) + 1)
    if len(blocks) > MOST_BLOCKS:
        return int(sizes.sum())
    first, weight = np.array([block[0] for block in blocks]), [int(sizes[block].sum()) for block in blocks]
    heaviest = np.zeros(len(blocks), int)
    for i in range(len(blocks)):
        before = heaviest[:i][first[:i] < first[i]]
        heaviest[i] = weight[i] + (before.max() if len(before) else 0)
    return int(sizes.sum() - heaviest.max())


def _find_jumps(anchors: _Anchors, period: float) -> list[int]:
    """Find the anchors (samples with a measured stamp) that are the first ones after a lasting jump of the time stamps.

    The time stamps jump after a loss of samples, and also if a chunk is late. To distinguish the two cases, the
    function compares the time stamps of `WINDOW_S` seconds before and after the jump. After a loss of samples, all
    later time stamps are late, so the lower quartile of their delays grows too. After a late chunk, the next chunks are
    not late, so the lower quartile does not grow.
    """
    k, t = anchors.k, anchors.t
    excess = _excess(anchors, period)
    threshold = _threshold(anchors, period)
    places = np.flatnonzero(np.abs(excess) > threshold) + 1
    if not len(places):
        return []
    if len(places) > max(1000, 0.2 * len(k)):
        raise ReadError(Reason("the stream has no steady rate", "its time stamps are irregular"))
    late = t - t[0] - (k - k[0]) * period
    density = max(FEWEST, round(WINDOW_S / period / max(1.0, float(np.median(np.diff(k))))))
    noise = _spread(excess)
    some = np.unique(np.linspace(1, len(k) - 1, min(1000, len(k) - 1)).astype(int))
    usual = _spread(
        np.array([np.median(late[i : i + density]) - np.median(late[max(0, i - density) : i]) for i in some])
    )
    cuts: list[int] = []
    # Examine the largest jumps first, and subtract each lasting jump from all later time stamps, so that large jumps do
    # not hide small jumps.
    for i in sorted(places.tolist(), key=lambda place: -abs(excess[place - 1])):
        jump = float(excess[i - 1])
        before, after = late[max(0, i - density) : i], late[i : i + density]
        level = float(np.median(before))
        if jump > 0:
            lasting = float(np.percentile(after, 25)) + 0.6745 * noise / np.sqrt(2) - level
        else:
            lasting = level - (float(np.percentile(after, 75)) - 0.6745 * noise / np.sqrt(2))
        # Near the ends of the recording, fewer anchors can be compared, so only larger jumps count as lasting.
        least = SIGMAS * usual * np.sqrt(density / min(len(before), len(after)))
        least = min(max(least, JUMP * period), max(SURE_S, JUMP * period))
        if lasting <= max(least, 0.5 * abs(jump)):
            continue
        step = float(np.median(after)) - level
        late[i:] -= step if abs(step - jump) < max(3 * noise, least) else jump
        cuts.append(i)
    return sorted(cuts)


def _fit_lines(anchors: _Anchors, runs: list[slice], period: float, *, fixed: bool = False) -> _Lines:
    """Fit one line to the anchors of each run. All lines have the same slope. Anchors far from their line are ignored.

    Parameters
    ----------
    anchors : _Anchors
        Anchors of the stream.
    runs : list of slice
        Ranges of anchors without a jump.
    period : float
        First estimate of the slope.
    fixed : bool
        If True, `period` is the exact slope, and only the intercepts of the lines are fitted.

    Returns
    -------
    _Lines
        The lines.

    Raises
    ------
    ReadError
        If too many anchors are far from the lines.
    """
    k, t = anchors.k - anchors.k[0], anchors.t - anchors.t[0]
    number = np.repeat(np.arange(len(runs)), [run.stop - run.start for run in runs])
    bases = np.array([np.median(t[run] - k[run] * period) for run in runs])
    error = deviation = 0.0
    centres = counts = np.zeros(len(runs))
    for _ in range(4):
        off = t - bases[number] - k * period
        good = np.abs(off) <= max(4 * _spread(off), 1e-9)
        counts = np.bincount(number, good, len(runs))
        centres, times = (
            np.bincount(number, np.where(good, x, 0.0), len(runs)) / np.maximum(counts, 1) for x in (k, t)
        )
        x, y = (np.where(good, each - mean[number], 0.0) for each, mean in ((k, centres), (t, times)))
        power = float((x**2).sum())
        if power > 0 and not fixed:
            period = float((x * y).sum()) / power
        bases = np.where(counts > 0, times - centres * period, bases)
        deviation = float(np.sqrt(((y - x * period) ** 2).sum() / max(1, good.sum())))
        error = 0.0 if fixed else deviation / np.sqrt(power) / period if power > 0 else np.inf
    away = np.abs(t - bases[number] - k * period) > max(IRREGULAR_S, 2 * period)
    if not period > 0 or away.mean() > IRREGULAR:
        raise ReadError(Reason("the stream has no steady rate", "its time stamps are irregular"))
    # The error of the distance between two lines has two causes: the scatter of the anchors, and the error of the
    # slope.
    doubt = np.hypot(
        deviation / period * np.sqrt(1 / np.maximum(counts[1:], 1) + 1 / np.maximum(counts[:-1], 1)),
        error * np.diff(centres),
    )
    bases += anchors.t[0] - anchors.k[0] * period
    return _Lines(period=period, bases=bases, error=error, deviation=deviation, doubt=doubt)


def _choose_rate(nominal: float, measured: float, error: float, notes: list[str]) -> float:
    """Return the sampling rate in Hz: the nominal rate if it fits the time stamps, or else the measured rate."""
    tolerance = max(STEADY, min(3 * error, 2e-3))
    if nominal > 0 and abs(measured / nominal - 1) < tolerance:
        return nominal
    whole = float(round(measured))
    rate = whole if whole > 0 and abs(measured / whole - 1) < tolerance else round(measured, 4)
    declared = f"{nominal:g} Hz" if nominal > 0 else "no rate"
    notes.append(f"the stream declares {declared}; its time stamps give {rate:g} Hz")
    return rate


def _place_segments(
    anchors: _Anchors, runs: list[slice], lines: _Lines, sfreq: float, n_samples: int, notes: list[str]
) -> tuple[list[Segment], list[float]]:
    """Make one segment for each run (a range of anchors without a jump).

    The onset of a segment is the number of samples that the amplifier recorded before the segment (including lost
    samples), divided by the sampling rate.

    The second returned value is a list with the time stamp of each segment's first sample.

    Notes
    -----
    The distance between the lines of two runs gives the number of samples that were lost between the runs. If the clock
    was set back, the number of lost samples is unknown, so the segment begins at the end of the previous segment, and a
    note is written. If the clock is later set forward again, the lost samples are computed from the line before the
    clock was set back.
    """
    period, bases = lines.period, lines.bases
    lost = np.zeros(len(runs))
    # Numbers of the runs whose lines serve as references to compute lost samples: run 0, and each run that begins after
    # the clock was set back.
    timelines = [0]
    jumped: list[str] = []
    for j in range(1, len(runs)):
        # If packets are lost, the gap is a whole number of samples. If the amplifier was paused, the gap can have any
        # length.
        doubt = max(WHOLE, 3 * float(lines.doubt[j - 1]))
        gained = (bases[j] - bases[:j]) / period
        back = np.flatnonzero(np.abs(gained) < doubt)
        if gained[-1] < 0 and len(back):
            # The time stamps return to the line of an earlier run (range without a jump). So the time stamps of the
            # runs between these two runs were only late, and no sample was lost.
            lost[back[-1] : j + 1] = lost[back[-1]]
            continue
        possible = [more for i in timelines if (more := lost[i] + gained[i] - lost[j - 1]) > -doubt]
        if possible:
            more = max(0.0, float(min(possible)))
            lost[j] = lost[j - 1] + (round(more) if abs(more - round(more)) < doubt else more)
        else:
            lost[j] = lost[j - 1]
            begin = (anchors.first[runs[j].start] + lost[j]) / sfreq
            jumped.append(f"{-gained[-1] * period:.3g} s at {begin:.1f} s")
            timelines.append(j)
    if len(jumped) > max(MOST_BACK, n_samples / sfreq / 60):
        raise ReadError(Reason("the stream has no steady rate", f"its time stamps jump back {len(jumped)} times"))
    if jumped:
        text = f"the time stamps jump back by {', '.join(jumped[:3])}{' ...' if len(jumped) > 3 else ''}"
        notes.append(f"{text}; a segment ends there, and the next segment begins at its end")
    if count := int((np.diff(lost) > 0).sum()):
        gaps = f"{count} gap{'s' * (count > 1)} in the time stamps"
        notes.append(f"{gaps}; {lost[-1] / sfreq:.3f} s are missing in total")
    # If each chunk has only one measured time stamp, the place of a loss between two measured time stamps is unknown,
    # so the samples between them are left out.
    unsure = lines.deviation > EQUAL_S and float(np.median(anchors.last - anchors.first)) > 0
    segments, begins = [], []
    for j, run in enumerate(runs):
        start, stop = int(anchors.first[run.start]), int(anchors.last[run.stop - 1]) + 1
        start, stop = (0 if j == 0 else start), (n_samples if j == len(runs) - 1 else stop)
        if unsure and j > 0 and anchors.by_last:
            start = int(anchors.last[run.start]) + 1
        if unsure and j < len(runs) - 1 and not anchors.by_last:
            stop = int(anchors.first[run.stop - 1])
        if stop > start:
            segments.append(Segment(start=start, stop=stop, onset=(start + lost[j]) / sfreq))
            begins.append(float(bases[j] + start * period))
    if left_out := n_samples - sum(s.stop - s.start for s in segments):
        notes.append(f"{left_out} samples next to the gaps are left out, because their exact times are unknown")
    return segments, begins
