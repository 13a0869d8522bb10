"""Measure the quality of a raw (unfiltered) signal: missing values, dead and clipped channels, muscle and mains noise.

The signal of each channel is divided into *cells*: short intervals of a tenth of a second. While the signal is read,
each cell gets flags. After the whole signal is read, consecutive cells with the same flag are merged into spans. The
flags are stored compressed, to save memory. A cell is *at the rail* if many of its samples equal the largest or
smallest value of the channel, as in a clipped signal.

Letters in array shapes: n channels, k cells of one channel, L samples per cell, b samples per block.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_sharding.formats.signal import Segment

CELL_S = 0.1
"""Length of a cell in seconds. A cell is a whole number of periods of mains noise: 5 at 50 Hz, and 6 at 60 Hz."""
SAMPLED = 4
"""Muscle activity, mains noise and repeated values are measured only in every fourth cell of a segment."""
MISSING, CONSTANT, DEAD, HIGH, LOW, MUSCLE, MAINS_50, MAINS_60, LARGE = (1 << bit for bit in range(9))
"""Flags of a cell. MISSING: the cell has missing values. CONSTANT: all values are equal. DEAD: the signal is too small.
HIGH (or LOW): many samples equal the channel's largest (or smallest) value. MUSCLE: muscle activity. MAINS_50,
MAINS_60: mains noise at 50 or 60 Hz. LARGE: the signal is too large."""
MISSING_UV = 1e12
"""A value above this limit (in microvolts) is treated as missing, because no amplifier can measure it."""
RAIL_SHARE = 0.1
"""A cell is at the rail if more than this share of its samples, and at least 3 samples, equal the channel's largest or
smallest value."""
MOST_HARMONICS_HZ = 1000.0
"""When muscle activity is measured, harmonics of the mains frequency are removed only up to this frequency."""
TONAL = 4.0
"""The harmonics of the mains frequency are removed from a cell only if their mean energy is more than 4 times the mean
energy of the other frequencies."""
RHYTHMS_HZ = (10.0, 20.0, 30.0)
"""Frequencies of slow rhythms that are not muscle activity."""
LEAST_MUSCLE_HZ = 175.0
"""Lowest sampling rate at which muscle activity is measured. At lower rates, a cell has too few samples to tell muscle
activity from the rhythms in `RHYTHMS_HZ` and from mains noise."""
LEAST_FREE = 4
"""The harmonics of the mains frequency are removed only if a cell has at least 4 samples more than the number of
removed signals (basis and harmonics)."""
SHORTEST = {"missing values": 1, "flat": 2, "clipped": 2, "too small": 3, "too large": 1, "muscle": 1, "mains noise": 1}
"""A span is a fault only if it has at least this number of cells (tenths of a second). A single cell with a small
signal can be normal EEG."""
NO_SIGNAL = frozenset({"missing values", "flat", "clipped", "too small", "too large"})
"""Kinds of fault that mean that the channel has no usable signal."""
JOINED = 3
"""Two spans without a signal are merged if fewer than 3 cells (tenths of a second) are between the spans."""


@dataclass(frozen=True, kw_only=True)
class QualitySpec:
    """Settings that decide which parts of a signal are bad.

    Limits in microvolts apply to the raw signal before any filter; `large_uv` applies to the filtered signal too.
    """

    check: bool = True
    """Check every channel in every window. If false, each channel is either good or bad in the whole recording, and
    filter transients at the ends of segments are ignored."""
    leave_out_edges: bool = True
    """Leave out the beginning and the end of each segment, where the filters have a transient. Trials and epochs are
    kept, and their samples have the key `transient_s`."""
    dead_uv: float = 0.1
    """A channel is dead where its standard deviation within a tenth of a second, after subtraction of a linear trend,
    is below this value in microvolts. (The noise of an amplifier without electrodes can be that small.)"""
    large_uv: float = 5000.0
    """A channel is too large in a window if the absolute value of its filtered signal exceeds this value in microvolts.
    A channel is also too large where its raw signal changes by more than twice this value within a tenth of a
    second."""
    muscle_uv: float = 50.0
    """A channel has muscle activity in a window if its root mean square above 35 Hz, without mains noise, exceeds this
    value in microvolts in at least half of the window."""
    mains_uv: float = 500.0
    """A channel has mains noise in a window if its root mean square at 50 or 60 Hz exceeds this value in microvolts in
    at least half of the window."""
    max_bad_share: float = 0.5
    """Leave out a window if more than this fraction of the recording's good channels are bad in the window."""

    def __post_init__(self) -> None:
        for name in ("dead_uv", "large_uv", "muscle_uv", "mains_uv"):
            if not getattr(self, name) > 0:
                raise ValueError(f"preprocess.quality.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"preprocess.quality.max_bad_share must be from 0 to 1, got {self.max_bad_share}")


UNCHECKED = QualitySpec(check=False, leave_out_edges=False)
"""Settings that give the same result as older versions, which judged each channel only for the whole recording."""


@dataclass(frozen=True)
class Span:
    """A part of a segment in which one channel is bad."""

    row: int
    """Index of the channel in the argument `rows` of `Cells.spans`."""
    kind: str
    """Kind of the fault, for example "flat" (the values do not change)."""
    start: int
    """First sample of the span at the recorded rate, counted from the start of the segment."""
    stop: int
    """Last sample of the span plus one, counted from the start of the segment."""


@dataclass
class _Rail:
    """The largest (or the smallest) value of each channel, and how many samples have this value."""

    value: np.ndarray
    """Largest value of each channel so far, shape (n,). A `_Rail` for smallest values stores them with the opposite
    sign."""
    since: np.ndarray
    """Number of the cell in which `value` occurred first, shape (n,). HIGH (or LOW) flags of earlier cells are invalid,
    because a later cell has a larger (or smaller) value."""
    samples: np.ndarray = field(init=False)
    """How many samples have this value in cells that are not at the rail, shape (n,)."""

    def __post_init__(self) -> None:
        self.samples = np.zeros(len(self.value), int)


@functools.lru_cache(maxsize=16)
def _basis(length: int, sfreq: float) -> tuple[np.ndarray, dict[int, slice]]:
    """Return orthonormal basis signals for one cell (0.1 s): offset, trend, slow rhythms up to 30 Hz, mains noise.

    Returns
    -------
    basis : ndarray, shape (L, K)
        Orthonormal columns. What remains of a cell, after the components in `basis` are removed, is muscle activity and
        noise.
    mains : dict
        For each flag of mains noise (MAINS_50 and MAINS_60): the columns of `basis` for this noise.
    """
    t = (np.arange(length) - (length - 1) / 2) / sfreq
    columns = [np.ones(length), t]
    for hertz in RHYTHMS_HZ:
        if hertz < 0.4 * sfreq and len(columns) + 2 < length - 4:
            columns += [np.cos(2 * np.pi * hertz * t), np.sin(2 * np.pi * hertz * t)]
    mains = {}
    for flag, hertz in ((MAINS_50, 50.0), (MAINS_60, 60.0)):
        if hertz < 0.45 * sfreq and len(columns) + 2 < length - 2:
            mains[flag] = slice(len(columns), len(columns) + 2)
            columns += [np.cos(2 * np.pi * hertz * t), np.sin(2 * np.pi * hertz * t)]
    basis = np.linalg.qr(np.stack(columns, axis=1))[0]
    return np.ascontiguousarray(basis, np.float32), mains


@functools.lru_cache(maxsize=16)
def _harmonics(length: int, sfreq: float) -> np.ndarray:
    """Return orthonormal signals [L, K] for the harmonics of 50 and 60 Hz.

    All returned signals are orthogonal to the signals of `_basis`.
    """
    basis = _basis(length, sfreq)[0]
    t = (np.arange(length) - (length - 1) / 2) / sfreq
    top = min(0.45 * sfreq, MOST_HARMONICS_HZ)
    hertz = sorted({h for line in (50, 60) for h in range(2 * line, int(top) + 1, line)})
    columns = [wave(2 * np.pi * h * t) for h in hertz for wave in (np.cos, np.sin)]
    whole = np.linalg.qr(np.column_stack([basis.astype(float), *columns]))[0]
    return np.ascontiguousarray(whole[:, basis.shape[1] :], np.float32)


def _without_harmonics(x: np.ndarray, rest: np.ndarray, sfreq: float) -> np.ndarray:
    """Remove the harmonics of mains noise from the energy of cells (tenths of a second): they are no muscle activity.

    Muscle activity has energy at all frequencies, also at those of the harmonics. So the harmonics are removed only
    from cells in which their mean energy is much larger than the mean energy of the other frequencies (see `TONAL`).

    Parameters
    ----------
    x : ndarray, shape (cells, L)
        Cells of the signal.
    rest : ndarray, shape (cells,)
        Energy of each cell without the components in `_basis`.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    ndarray, shape (cells,)
        Energy of each cell without the harmonics.
    """
    length = x.shape[1]
    harmonics, n_free = _harmonics(length, sfreq), length - _basis(length, sfreq)[0].shape[1]
    count = harmonics.shape[1]
    if not count or n_free - count < LEAST_FREE:
        return rest
    part = ((x @ harmonics) ** 2).sum(axis=1)
    other = np.maximum(rest - part, 0) / (n_free - count)
    return np.where(part / count > TONAL * other, other * n_free, rest)


class Cells:
    """Measures a signal in cells (tenths of a second) while the signal is read, and then merges cells into spans.

    Parameters
    ----------
    n_channels : int
        Number of channels.
    sfreq : float
        Sampling rate in Hz.
    segments : sequence of Segment
        Segments of the recording. A cell never crosses the end of a segment.
    to_uv : float
        Factor that converts the values as read from the file to microvolts.
    spec : QualitySpec
        Thresholds.
    """

    def __init__(
        self, n_channels: int, sfreq: float, segments: Sequence[Segment], to_uv: float, spec: QualitySpec
    ) -> None:
        self.length = max(8, round(CELL_S * sfreq))
        """Number of samples of a cell."""
        self.sfreq, self.segments, self.to_uv, self.spec = sfreq, list(segments), abs(to_uv), spec
        self.high = _Rail(np.full(n_channels, -np.inf), np.zeros(n_channels, int))
        self.low = _Rail(np.full(n_channels, -np.inf), np.zeros(n_channels, int))
        self.n_cells, self.n_all_constant = 0, 0
        self.constant, self.missing, self.dead = (np.zeros(n_channels, int) for _ in range(3))
        """Three counts of shape (n,): number of cells with the flag CONSTANT, with the flag MISSING, and with the flag
        DEAD."""
        self.repeated, self.compared = np.zeros(n_channels, int), np.zeros(n_channels, int)
        """Two counts of shape (n,): number of samples that equal the previous sample, and number of samples that were
        compared with the previous sample. Only samples in every fourth cell are compared (see `SAMPLED`), and none in
        constant cells."""
        self._flags: list[tuple[int, int, bytes]] = []
        self._firsts: list[int] = []
        self._segment, self._done = 0, 0
        self._recent = np.empty((n_channels, 0))

    @property
    def extent(self) -> np.ndarray:
        """Largest minus smallest value of each channel, [n]."""
        return self.high.value + self.low.value

    def push(self, start: int, x: np.ndarray) -> None:
        """Measure a block.

        Parameters
        ----------
        start : int
            Number of the block's first sample in the signal.
        x : ndarray, shape (n, b), float64
            Values as read from the file. Blocks must come in the order of time, and each row must be contiguous in
            memory.
        """
        while self._segment < len(self.segments):
            segment = self.segments[self._segment]
            begin, stop = segment.start + self._done, min(segment.stop, start + x.shape[1])
            if begin >= start + x.shape[1]:
                break
            if not self._done:
                self._firsts.append(self.n_cells)
            if begin < stop:
                self._add(x[:, begin - start : stop - start])
            if stop < segment.stop:
                break
            self._finish_segment()

    def _add(self, part: np.ndarray) -> None:
        """Add the next samples of a segment, and measure all cells that are complete now."""
        length, first = self.length, self._done % self.length
        held = self._recent[:, self._recent.shape[1] - first :] if first else part[:, :0]
        used = min(length - first, part.shape[1]) if first else 0
        if first and first + used == length:
            self._measure(np.concatenate([held, part[:, :used]], axis=1)[:, None, :])
        k = (part.shape[1] - used) // length
        if k:
            rest = part[:, used : used + k * length]
            strides = (rest.strides[0], length * rest.strides[1], rest.strides[1])
            self._measure(np.lib.stride_tricks.as_strided(rest, (len(rest), k, length), strides, writeable=False))
        self._done += part.shape[1]
        keep = 2 * length
        if part.shape[1] < keep and self._recent.shape[1]:
            part = np.concatenate([self._recent, part], axis=1)
        self._recent = part[:, -keep:].copy()

    def _finish_segment(self) -> None:
        """Measure the last samples of a segment, which do not fill a cell.

        To fill the last cell, samples of the previous cell are used again, so the two cells overlap.
        """
        if self._done % self.length:
            self._measure(self._recent[:, -min(self.length, self._done) :][:, None, :])
        self._segment, self._done = self._segment + 1, 0
        self._recent = self._recent[:, :0]

    def _measure(self, x: np.ndarray) -> None:
        """Set the flags of `k` cells of each channel; `x` contains the samples of these cells, [n, k, L]."""
        flags = np.zeros(x.shape[:2], np.uint16)
        # Process the rows in portions of 2 MB, so that a portion fits into the CPU's cache.
        portion = max(1, 2**18 // (x.shape[1] * x.shape[2]))
        with np.errstate(invalid="ignore", over="ignore"):
            for first in range(0, len(x), portion):
                rows = slice(first, min(first + portion, len(x)))
                self._measure_rows(rows, x[rows], flags[rows])
        constant = (flags & CONSTANT) > 0
        self.n_all_constant += int(constant.all(axis=0).sum())
        self._flags.append((self.n_cells, x.shape[1], zlib.compress(flags.T.tobytes(), 1)))
        self.n_cells += x.shape[1]

    def _measure_rows(self, rows: slice, x: np.ndarray, flags: np.ndarray) -> None:
        """Set the flags of `k` cells in each of `r` rows; `x` contains the samples of these cells, [r, k, L].

        In most blocks, most rows have no fault. To save time, the minimum and maximum of a row and a few samples of
        each cell show whether the row can have a fault. Only rows that can have a fault are measured cell by cell.
        """
        length, n_cells = x.shape[2], x.shape[1]
        whole = x.reshape(len(x), -1) if n_cells == 1 else _join_cells(x)
        low, high = whole.min(axis=1), whole.max(axis=1)
        limit = MISSING_UV / self.to_uv
        # Minimum and maximum show missing values: both are NaN if a value is NaN, and one of them is infinite if a
        # value is infinite.
        plain = (low >= -limit) & (high <= limit) & (high - low <= 2 * self.spec.large_uv / self.to_uv)
        plain &= length == self.length
        quiet = np.zeros(x.shape[:2], bool)
        if plain.any():
            thin = x[:, :, :: max(1, length // 8)]
            for rail, ends in ((self.high, high), (self.low, -low)):
                value = rail.value[rows]
                found = np.flatnonzero(plain & (ends >= value))
                if len(found):
                    # The largest (or smallest) value of the row is at least as extreme as that of the channel so far.
                    # If this value occurs even among the few samples in `thin`, the row may be clipped, so it is
                    # measured cell by cell.
                    at = (thin[found] == (ends if rail is self.high else low)[found][:, None, None]).any(axis=(1, 2))
                    plain[found[at]] = False
            thin = thin - thin[:, :, :1]
            energy = np.einsum("rkl,rkl->rk", thin, thin) - ((thin @ _line(thin.shape[2])) ** 2).sum(axis=2)
            least = self.spec.dead_uv / self.to_uv if self.spec.check else 0.0
            quiet = energy <= 16 * thin.shape[2] * least**2 + 1e-12 * (thin * thin).sum(axis=2)
            plain &= np.count_nonzero(quiet, axis=1) < 0.1 * n_cells
        for i in np.flatnonzero(plain).tolist():
            self._note_extremes(rows.start + i, whole[i], float(low[i]), float(high[i]))
            for k in np.flatnonzero(quiet[i]).tolist():
                flags[i, k] |= self._judge_quiet(x[i, k])
        full = np.flatnonzero(~plain)
        if len(full):
            part = flags[full]
            self._measure_cells(rows.start + full, x[full], part)
            flags[full] = part
        constant = (flags & CONSTANT) > 0
        self.missing[rows] += np.count_nonzero(flags & MISSING, axis=1)
        self.constant[rows] += np.count_nonzero(constant, axis=1)
        self.dead[rows] += np.count_nonzero(flags & DEAD, axis=1)
        offset = -(self.n_cells - self._firsts[self._segment]) % SAMPLED
        if length == self.length and offset < n_cells:
            self._measure_sampled(rows, x[:, offset::SAMPLED], flags[:, offset::SAMPLED])

    def _note_extremes(self, row: int, x: np.ndarray, low: float, high: float) -> None:
        """Update a channel's largest and smallest value from samples `x` that are certainly not clipped."""
        for rail, end, value in ((self.high, high, high), (self.low, -low, low)):
            if end < rail.value[row]:
                continue
            at = x == value
            if end > rail.value[row]:
                rail.value[row], rail.samples[row] = end, 0
                rail.since[row] = self.n_cells + int(at.argmax()) // self.length
            rail.samples[row] += np.count_nonzero(at)

    def _judge_quiet(self, x: np.ndarray) -> np.uint16:
        """Return the flags of a single cell [L], whose signal is so small that the cell may be dead."""
        if x.min() == x.max():
            return np.uint16(CONSTANT | DEAD)
        return np.uint16(DEAD if self._is_dead(x[None])[0] else 0)

    def _is_dead(self, x: np.ndarray) -> np.ndarray:
        """For each cell in `x` [m, L], return whether its signal is too small after a linear trend is subtracted."""
        x = x - x.mean(axis=1, keepdims=True)
        energy = (x**2).sum(axis=1) - ((x @ _line(x.shape[1])) ** 2).sum(axis=1)
        return energy < x.shape[1] * (self.spec.dead_uv / self.to_uv) ** 2

    def _measure_cells(self, rows: np.ndarray, x: np.ndarray, flags: np.ndarray) -> None:
        """Set the flags of rows that may have faults, cell by cell."""
        low, high = x.min(axis=2), x.max(axis=2)
        limit = MISSING_UV / self.to_uv
        finite = (low >= -limit) & (high <= limit)
        constant = (low == high) & finite
        flags |= np.where(finite, np.where(constant, np.uint16(CONSTANT | DEAD), np.uint16(0)), np.uint16(MISSING))
        if self.spec.check:
            flags[finite & (high - low > 2 * self.spec.large_uv / self.to_uv)] |= np.uint16(LARGE)
            if x.shape[2] == self.length:
                r, k = np.nonzero(finite & ~constant)
                dead = self._is_dead(x[r, k]) if len(r) else np.zeros(0, bool)
                flags[r[dead], k[dead]] |= np.uint16(DEAD)
        for rail, ends, sign, flag in ((self.high, high, 1.0, HIGH), (self.low, low, -1.0, LOW)):
            self._find_rail(rows, x, rail, ends, sign, finite, constant, flags, flag)

    def _find_rail(
        self,
        rows: np.ndarray,
        x: np.ndarray,
        rail: _Rail,
        ends: np.ndarray,
        sign: float,
        finite: np.ndarray,
        constant: np.ndarray,
        flags: np.ndarray,
        flag: int,
    ) -> None:
        """Flag the clipped cells. A cell is a tenth of a second of one channel.

        In all other cells, count the samples that equal the channel's largest (or smallest) value.
        """
        if not finite.any():
            return
        signed = np.where(finite, sign * ends, -np.inf)
        best = signed.max(axis=1)
        new = np.flatnonzero(best > rail.value[rows])
        if len(new):
            rail.value[rows[new]], rail.samples[rows[new]] = best[new], 0
            rail.since[rows[new]] = self.n_cells + signed[new].argmax(axis=1)
        at = (signed == rail.value[rows][:, None]) & finite
        flags[at & constant] |= np.uint16(flag)
        r, k = np.nonzero(at & ~constant)
        if len(r):
            count = np.count_nonzero(x[r, k] == ends[r, k][:, None], axis=1)
            found = (count >= 3) & (count > RAIL_SHARE * x.shape[2])
            flags[r[found], k[found]] |= np.uint16(flag)
            np.add.at(rail.samples, rows[r[~found]], count[~found])

    def _measure_sampled(self, rows: slice, x: np.ndarray, flags: np.ndarray) -> None:
        """Measure every fourth cell: set the flags of muscle activity and mains noise, and count repeated values."""
        live = (flags & CONSTANT) == 0
        same = np.count_nonzero(x[:, :, 1:] == x[:, :, :-1], axis=2)
        self.repeated[rows] += np.where(live, same, 0).sum(axis=1)
        self.compared[rows] += live.sum(axis=1) * (self.length - 1)
        if not self.spec.check:
            return
        basis, mains = _basis(self.length, self.sfreq)
        x = (x - x[:, :, :1]).astype(np.float32)
        parts = (x @ basis) ** 2
        scale = self.to_uv**2 / self.length
        if self.sfreq >= LEAST_MUSCLE_HZ:
            rest = np.einsum("rkl,rkl->rk", x, x) - parts.sum(axis=2)
            r, k = np.nonzero((scale * rest > self.spec.muscle_uv**2) & live)
            if len(r):
                loud = scale * _without_harmonics(x[r, k], rest[r, k], self.sfreq) > self.spec.muscle_uv**2
                flags[r[loud], k[loud]] |= np.uint16(MUSCLE)
        for flag, columns in mains.items():
            flags[(scale * parts[:, :, columns].sum(axis=2) > self.spec.mains_uv**2) & live] |= np.uint16(flag)

    # --- after the signal was read -----------------------------------------------------------------------------------

    def share_constant(self) -> np.ndarray:
        """For each channel, return the fraction of its cells that are constant, [n].

        Cells that are constant in all channels are ignored.
        """
        return self._share(self.constant - self.n_all_constant)

    def share_missing(self) -> np.ndarray:
        """For each channel, return the fraction of its cells that have missing values, [n]."""
        return self.missing / max(1, self.n_cells)

    def share_repeated(self) -> np.ndarray:
        """Return the fraction of samples of each channel that equal the sample before, [n]. Ignore constant cells."""
        return self.repeated / np.maximum(1, self.compared)

    def summarise(self, stretches: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measure how much of each channel is clipped, and how much of each stretch (some seconds) has no signal.

        Parameters
        ----------
        stretches : sequence of (int, int)
            Start and stop sample of each stretch in the signal.

        Returns
        -------
        samples : ndarray, shape (n,)
            Fraction of samples with the channel's largest value, or fraction of samples with its smallest value,
            whichever is larger. Cells at the rail, constant cells and cells with missing values are left out.
        cells : ndarray, shape (n,)
            Fraction of each channel's cells that are at the rail (many samples equal the channel's largest or smallest
            value). Constant cells and cells with missing values are left out.
        dead : ndarray, shape (stretches, n)
            For each stretch and channel: fraction of cells without a signal (dead, missing values, too large or at the
            rail).
        """
        n = len(self.constant)
        at_rail, dead = np.zeros(n, int), np.zeros((len(stretches), n))
        places = []
        for start, stop in stretches:
            number = max(0, int(np.searchsorted([s.start for s in self.segments], start, side="right")) - 1)
            offset = self.segments[number].start
            first = (
                self._firsts[number] + (start - offset) // self.length if number < len(self._firsts) else self.n_cells
            )
            places.append((first, first + max(1, (stop - start) // self.length)))
        for first, flags in self._read_flags():
            if not flags.any():
                continue
            rail = (flags & (HIGH | LOW)) > 0
            at_rail += np.count_nonzero(rail & ((flags & CONSTANT) == 0), axis=1)
            lost = rail | ((flags & (DEAD | MISSING | LARGE)) > 0)
            for i, (a, b) in enumerate(places):
                if a < first + flags.shape[1] and b > first:
                    dead[i] += np.count_nonzero(lost[:, max(0, a - first) : b - first], axis=1) / (b - a)
        live = self.n_cells - self.constant - self.missing
        samples = np.maximum(self.high.samples, self.low.samples)
        samples = samples / np.maximum(1, (live - at_rail) * self.length)
        return samples, at_rail / np.maximum(1, live), dead

    def _share(self, count: np.ndarray) -> np.ndarray:
        return np.clip(count / max(1, self.n_cells - self.n_all_constant), 0, 1)

    def _read_flags(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield for each block: the number of its first cell, and the flags [n, k] of its cells.

        The flags were set while the signal was read, by comparison with the channel's largest (or smallest) value until
        then. So a HIGH (or LOW) flag is removed if a later cell has a larger (or smaller) value.
        """
        n = len(self.constant)
        for first, k, packed in self._flags:
            flags = np.frombuffer(zlib.decompress(packed), np.uint16).reshape(k, n).T
            if flags.any():
                flags = flags.copy()
                number = first + np.arange(k)
                for rail, flag in ((self.high, HIGH), (self.low, LOW)):
                    flags[(number < rail.since[:, None])] &= np.uint16(~flag & 0xFFFF)
            yield first, flags

    def spans(self, rows: Sequence[int], line_freq: float | None) -> dict[int, list[Span]]:
        """Merge consecutive cells with the same fault into spans.

        Parameters
        ----------
        rows : sequence of int
            Rows of the channels whose spans are wanted.
        line_freq : float, optional
            Mains frequency in Hz. If None, noise at 50 Hz and noise at 60 Hz are both taken as mains noise.

        Returns
        -------
        dict
            The key is the number of a segment, the value is a list of the spans of this segment in which a channel is
            bad. Segments without spans are not in the dictionary.
        """
        if not self.spec.check:
            return {}
        lines = MAINS_50 | MAINS_60
        if line_freq is not None:
            lines = MAINS_50 if abs(line_freq - 50) < 5 else MAINS_60 if abs(line_freq - 60) < 5 else 0
        at, firsts, runs = np.array(list(rows), int), np.array(self._firsts), _Runs()
        for first, flags in self._read_flags():
            flags = flags[at]
            if not flags.any():
                continue
            number = int(np.searchsorted(firsts, first, side="right")) - 1
            cell, rail = first - int(firsts[number]), (flags & (HIGH | LOW)) > 0
            runs.add(number, cell, "missing values", (flags & MISSING) > 0)
            runs.add(number, cell, "too large", (flags & LARGE) > 0)
            counts = {"clipped": rail, "flat": ((flags & CONSTANT) > 0) & ~rail}
            runs.add(number, cell, "dead", ((flags & DEAD) > 0) | rail, counts)
            for kind, mask in (("muscle", MUSCLE), ("mains noise", lines)):
                runs.add(number, cell, kind, _widen((flags & mask) > 0))
        out: dict[int, list[Span]] = {}
        for (number, row, _), found in sorted(runs.found.items()):
            segment = self.segments[number]
            for run in found:
                if run.cells < SHORTEST[run.kind]:
                    continue
                # The channel loses its signal somewhere inside the cell before the run, and has it again from somewhere
                # inside the cell after the run, so include these two cells.
                margin = int(run.kind in NO_SIGNAL and run.kind != "missing values")
                start, stop = max(0, run.start - margin), run.stop + margin
                stop = min(stop * self.length, segment.stop - segment.start)
                out.setdefault(number, []).append(Span(row, run.kind, start * self.length, stop))
        return out


@dataclass
class _Run:
    """A run: consecutive cells of one channel with the same fault."""

    start: int
    stop: int
    kind: str
    cells: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class _Runs:
    """Merges consecutive cells (tenths of a second) with the same fault into runs, block by block."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int, str], list[_Run]] = {}
        """Lists of runs, sorted by time. The key has the number of the segment, the position of the channel, and the
        name of a group of faults."""

    def add(
        self, segment: int, first: int, group: str, mask: np.ndarray, counts: dict[str, np.ndarray] | None = None
    ) -> None:
        """Add the cells of a block, [n, k].

        If `counts` (a mask for each kind of fault) is given, the kind of a run is the most common kind of fault in its
        cells. If fewer than half of the cells have the most common kind, the kind of the run is "too small".
        """
        gap = 1 if group in ("muscle", "mains noise") else JOINED
        for row in np.flatnonzero(mask.any(axis=1)).tolist():
            edges = np.flatnonzero(np.diff(mask[row].astype(np.int8), prepend=0, append=0))
            found = self.found.setdefault((segment, row, group), [])
            for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                if not found or first + a - found[-1].stop >= gap:
                    found.append(_Run(first + a, first + b, group))
                run = found[-1]
                run.stop, run.cells = first + b, run.cells + b - a
                for kind, other in (counts or {}).items():
                    run.counts[kind] = run.counts.get(kind, 0) + int(np.count_nonzero(other[row, a:b]))
                if counts is not None:
                    most = max(run.counts, key=run.counts.__getitem__)
                    run.kind = most if 2 * run.counts[most] >= run.cells else "too small"


def _widen(mask: np.ndarray) -> np.ndarray:
    """Copy the flag of each measured cell to the three cells after it, because only every fourth cell is measured."""
    if not mask.any():
        return mask
    wide = mask.copy()
    for shift in range(1, SAMPLED):
        wide[:, shift:] |= mask[:, :-shift]
    return wide


def _join_cells(x: np.ndarray) -> np.ndarray:
    """Return consecutive cells [r, k, L] as rows of samples [r, k * L], without a copy."""
    shape, strides = (len(x), x.shape[1] * x.shape[2]), (x.strides[0], x.strides[2])
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)


@functools.lru_cache(maxsize=16)
def _line(length: int) -> np.ndarray:
    """Return an orthonormal basis [L, 2] of a constant and a linear trend."""
    t = np.arange(length) - (length - 1) / 2
    return np.linalg.qr(np.stack([np.ones(length), t], axis=1))[0]
