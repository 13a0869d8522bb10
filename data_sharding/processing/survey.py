"""Measure a recording's signal: its unit, bad channels, mains frequency, and fingerprint.

Every sample is checked for clipping, constant values and missing values. Amplitudes and spectra are measured only in
*stretches*: intervals of about four seconds that are spread evenly over the recording. The total length of the
stretches is limited, so beyond this limit, the time for amplitudes and spectra does not grow with the length of the
recording.

Letters in array shapes: n channels, S samples at the recorded rate, P samples of the fingerprint, F frequencies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_sharding.formats.signal import Segment
from data_sharding.processing.quality import MISSING_UV, UNCHECKED, Cells, QualitySpec
from data_sharding.processing.streaming import Resampler, resample, zero_phase

PLAUSIBLE_UV = (0.2, 500.0)
"""Plausible range of the robust amplitude of EEG (between 1 and 40 Hz, in microvolts).

If the unit is wrong by a factor of a thousand, the amplitude lies outside this range.
"""
USABLE_UV = (0.1, 1000.0)
"""Smallest and largest robust amplitude, in microvolts, of a good channel."""
FLAT_SHARE = 0.9
"""A channel is flat if more than this fraction of its cells (tenths of a second) are constant. A channel is also flat
if, in its other cells, more than this fraction of the samples equal the previous sample. Cells in which all channels
are constant are ignored."""
CLIPPED_SHARE = 0.05
"""A channel is clipped if more than this fraction of its samples equal its minimum, or equal its maximum. Samples in
cells at the rail (see `CLIPPED_CELLS`) are not counted, because these cells make the channel bad only in some
windows."""
CLIPPED_CELLS = 0.5
"""A channel is also clipped if more than this fraction of its cells are at the rail. (A cell is at the rail if many of
its samples equal the largest or the smallest value of the channel.)"""
MISSING_SHARE = 0.9
"""A channel is left out if more than this fraction of its cells have missing values."""
DEAD_SHARE = 0.05
"""A stretch (about four seconds) is ignored for a channel if the channel has no signal in more than this fraction of
the stretch's cells (tenths of a second)."""
TRIGGER_LEVELS = 32
"""Largest number of distinct values of a trigger channel. A trigger channel changes rarely between a few values."""
TRIGGER_UV = 200.0
"""A channel is a trigger channel only if its peak-to-peak value is above this limit (in microvolts, if the unit in the
file is right). A dead channel with one noisy bit is below this limit."""
TONE_SHARE = 0.5
"""A channel is a test tone if a single frequency has more than this fraction of the channel's power above 1 Hz. The
frequency of the tone must be above `TONE_ABOVE_HZ`, and must not be a harmonic of the mains frequency."""
TONE_ABOVE_HZ = 30.0
NOISY_RATIO = 5.0
"""A channel is noisy if its amplitude above 45 Hz is more than 5 times the median of all channels, and if the condition
of `NOISY_Z` is true too. (With muscle activity, the amplitude is up to 3 times the median.)"""
NOISY_Z = 5.0
"""Second condition for a noisy channel: the logarithm of its amplitude above 45 Hz is more than this many robust
standard deviations above the median of all channels (Bigdely-Shamlo et al. 2015)."""
LONELY = 0.1
"""A channel is also noisy if its largest correlation with another channel is below this value. This is tested only if
the median of the largest correlations of all channels is above `TOGETHER`."""
TOGETHER = 0.6
MIN_TO_COMPARE = 8
"""Channels are compared with each other only if at least this many channels are good after the other checks."""
MEASURE_HZ = 128.0
SURVEY_HZ = 1000.0
"""If the sampling rate is at least twice this value, the signal is first resampled: its rate is divided by the largest
whole number with which the new rate is not below this value."""
STRETCH_S = 4.0
STRETCHES_S = 256.0
"""Largest total length, in seconds, of the stretches in which amplitudes and spectra are measured."""
STRETCHES_SHARE = 0.25
LEAST_STRETCHES_S = 32.0
"""In a short recording, the total length of the stretches is a quarter of the recording, but at least this many
seconds."""
SPECTRUM_HZ = 0.45
"""Channels are compared only at frequencies below this fraction of the sampling rate, because amplifiers remove higher
frequencies."""
MAINS = (50.0, 60.0)
LINE_RATIO = 5.0
"""A recording has mains noise if the power at 50 or 60 Hz is more than 5 times the power at neighbouring
frequencies."""
FINGERPRINT_STEP_S = 0.1
FINGERPRINT_POINTS = 64
HEAD_S = 10.0
"""The first samples of the fingerprint are computed from this many seconds at the beginning of the signal."""
LATER_S = (8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0)
"""Start of each later interval of the fingerprint, in seconds. With the later intervals, two recordings that begin with
the same calibration signal have different fingerprints."""
LATER_POINTS = 32
"""Number of fingerprint samples from each later interval."""
SETTLE_S = 2.0
"""Each later interval of the fingerprint is filtered together with this many seconds before and after it, so that
filter transients do not change the fingerprint."""


@dataclass(kw_only=True)
class Verdict:
    """Result of the survey of a signal: unit, bad channels, mains frequency and fingerprint."""

    amplitude_uv: float
    """Median of the robust amplitudes of the good channels, in microvolts. The *robust amplitude* of a channel is
    1.4826 times the median absolute value of its signal between 1 and 40 Hz."""
    factor: float
    """Factor that converts the values to microvolts: 1, or the factor from the config."""
    unit: str
    """Whether the unit is right. "plausible": EEG can have the measured amplitude. "configured": the config gives the
    factor, so the unit is not checked. "unknown": EEG cannot have the measured amplitude."""
    bads: dict[int, str] = field(default_factory=dict)
    """Bad channels: the key is the row, the value is the reason (flat, clipped, trigger, test tone, noisy, too small or
    too large)."""
    not_eeg: dict[int, str] = field(default_factory=dict)
    """Channels whose signal cannot be EEG: the key is the row, the value is the kind of signal. `bads` contains these
    rows too."""
    not_finite: list[int] = field(default_factory=list)
    """Rows that consist almost only of NaN or infinite values."""
    line_freq: float | None = None
    """Mains frequency in Hz, from the spectrum of the good channels."""
    fingerprint: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Fingerprint, shape (n, P): samples of the filtered signal, 64 from the beginning and 32 from each later interval.
    Each row has the norm 1; the row of a flat channel is zero."""
    channel_uv: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Robust amplitude of each channel in microvolts, shape (n,); see `amplitude_uv`."""


def filter_to_band(x_uv: np.ndarray, sfreq: float) -> tuple[np.ndarray, float]:
    """Filter a signal to the band from 1 to 40 Hz, in which amplitudes are measured.

    Parameters
    ----------
    x_uv : ndarray, shape (n, S)
        Microvolts.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    y : ndarray, shape (n, S')
        Signal between 1 and 40 Hz.
    rate : float
        Sampling rate of `y` in Hz.
    """
    x = x_uv - x_uv.mean(axis=-1, keepdims=True)
    rate = min(sfreq, MEASURE_HZ)
    high = min(40.0, 0.45 * rate)
    x = resample(x, sfreq, rate, high)
    n_samples = x.shape[-1]
    blocks = zero_phase(lambda a, b: x[:, a:b], n_samples, _measuring_filter(rate, high), int(2 * rate), n_samples)
    return np.concatenate(list(blocks), axis=1), rate


@functools.lru_cache(maxsize=16)
def _measuring_filter(rate: float, high: float) -> np.ndarray:
    from scipy.signal import butter

    return np.asarray(butter(2, [1.0, high], btype="bandpass", fs=rate, output="sos"))


@functools.lru_cache(maxsize=4)
def _hann_window(n: int) -> np.ndarray:
    return np.hanning(n + 1)[:-1]


def stretches_of(segments: Sequence[Segment], sfreq: float) -> list[tuple[int, int]]:
    """Choose the stretches (intervals of about four seconds) in which amplitudes and spectra are measured.

    Parameters
    ----------
    segments : sequence of Segment
        Segments of the recording.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    list of (int, int)
        Start and stop sample of each stretch, in the order of time. The stretches are spread evenly, and no stretch
        crosses the end of a segment.
    """
    length = max(1, round(STRETCH_S * sfreq))
    every = []
    for segment in segments:
        whole = max(1, (segment.stop - segment.start) // length)
        begins = [segment.start + i * length for i in range(whole)]
        every += [(b, min(b + length, segment.stop)) for b in begins]
    mean = sum(b - a for a, b in every) / max(1, len(every))
    wanted_s = min(STRETCHES_S, max(LEAST_STRETCHES_S, STRETCHES_SHARE * mean * len(every) / sfreq))
    count = min(len(every), max(1, int(wanted_s * sfreq / max(mean, 1))))
    return [every[i] for i in np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))] if every else []


class _StretchBuffer:
    """Collects the blocks of a stretch (an interval of about four seconds).

    The blocks are resampled and converted to microvolts, and the value of the stretch's first sample is subtracted from
    each channel.
    """

    def __init__(self, sfreq: float, rate: float, scale: float) -> None:
        self._resampler, self._scale = Resampler(sfreq, rate, 0.45 * rate), scale
        self._parts: list[np.ndarray] = []
        self._offset: np.ndarray | float = 0.0
        self._whole: np.ndarray | None = None

    def push(self, x: np.ndarray) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            if not self._parts:
                self._offset = self._scale * x[:, :1]
            self._parts.append(self._resampler.push(x, self._scale, self._offset))

    def finish(self) -> np.ndarray:
        if self._whole is None:
            rest = self._resampler.finish()
            self._whole = np.concatenate([*self._parts, rest], axis=1) if self._parts else rest
            self._parts = []
        return self._whole


class Survey:
    """Measures a signal block by block, while the blocks are read.

    Parameters
    ----------
    n_channels : int
        Number of channels.
    sfreq : float
        Sampling rate in Hz.
    segments : sequence of Segment
        Segments of the recording.
    scale : float
        Factor that converts the values as read from the file to microvolts.

    Notes
    -----
    The result does not depend on the size of the blocks.
    """

    def __init__(
        self,
        n_channels: int,
        sfreq: float,
        segments: Sequence[Segment],
        scale: float = 1.0,
        *,
        quality: QualitySpec = UNCHECKED,
        factor: float = 1.0,
    ) -> None:
        self.sfreq, self.scale = sfreq, scale
        self.cells = Cells(n_channels, sfreq, segments, scale * factor, quality)
        """Quality of the signal, for each channel and each tenth of a second."""
        self._n_samples = 0
        self._steps = np.zeros(n_channels, int)
        self._levels: list[set[float]] = [set() for _ in range(n_channels)]
        self._restless = np.zeros(n_channels, bool)
        self._last: np.ndarray | None = None
        self._plan = stretches_of(segments, sfreq)
        self._next = 0
        self._rate = sfreq / max(1, int(sfreq / SURVEY_HZ))
        self._stretch = self._make_buffer()
        after = LATER_POINTS * FINGERPRINT_STEP_S + SETTLE_S
        spans = [(0.0, HEAD_S), *((begin - SETTLE_S, begin + after) for begin in LATER_S)]
        self._spans = [(round(begin * sfreq), round(end * sfreq)) for begin, end in spans]
        """Start and stop of each interval of the fingerprint, in samples counted over all calls of `push`."""
        self._prints: dict[int, _StretchBuffer] = {}
        longest = max((b - a for a, b in self._plan), default=0)
        self._n_fft = int(longest * self._rate / sfreq) if longest >= 2 * sfreq else 0
        self._power = np.zeros((n_channels, self._n_fft // 2 + 1))
        self._n_power = 0
        self._mains: dict[float, list[np.ndarray]] = {line: [] for line in MAINS}
        self._amplitudes: list[np.ndarray] = []
        self._rough: list[np.ndarray] = []
        self._rough_at: list[int] = []
        self._similar: list[np.ndarray] = []

    def push(self, start: int, x: np.ndarray) -> np.ndarray:
        """Measure a block.

        Parameters
        ----------
        start : int
            Number of the block's first sample in the signal.
        x : ndarray, shape (n, b)
            Values as read from the file, not yet multiplied by `scale`. Blocks must come in order.

        Returns
        -------
        ndarray, shape (n, b), float64
            The same values, but each missing value is replaced by the last valid value before it, because filters
            cannot process NaN. `cells` stores where values are missing, so that the replacements do not get into
            windows.
        """
        if not x.shape[1]:
            return x
        x = np.ascontiguousarray(x, np.float64)
        missing = self.cells.missing.sum()
        self.cells.push(start, x)
        # Check the last samples of the block separately, because their cell is incomplete and not measured yet.
        tail = x[:, -min(x.shape[1], self.cells.length) :]
        if missing != self.cells.missing.sum() or not (np.abs(tail) < MISSING_UV / self.cells.to_uv).all():
            x = self._hold_values(x)
        self._find_levels(x)
        self._last = x[:, -1].copy()
        for number, (begin, end) in enumerate(self._spans):
            if begin < self._n_samples + x.shape[1] and end > self._n_samples:
                part = x[:, max(begin - self._n_samples, 0) : end - self._n_samples]
                self._prints.setdefault(number, self._make_buffer()).push(part)
        self._n_samples += x.shape[1]
        while self._next < len(self._plan) and self._plan[self._next][0] < start + x.shape[1]:
            begin, end = self._plan[self._next]
            self._stretch.push(x[:, max(begin - start, 0) : end - start])
            if start + x.shape[1] < end:
                break
            self._measure_stretch(self._stretch.finish())
            self._stretch = self._make_buffer()
            self._next += 1
        return x

    def _hold_values(self, x: np.ndarray) -> np.ndarray:
        """Replace each missing value by the last valid value before it, or else by the first valid value after it."""
        with np.errstate(invalid="ignore"):
            valid = np.abs(x) < MISSING_UV / self.cells.to_uv
        x = x.copy()
        for i in np.flatnonzero(~valid.all(axis=1)):
            found = np.flatnonzero(valid[i])
            before = x[i, found[0]] if len(found) else 0.0
            if self._last is not None:
                before = self._last[i]
            at = np.maximum.accumulate(np.where(valid[i], np.arange(x.shape[1]), -1))
            x[i] = np.where(at >= 0, x[i, np.maximum(at, 0)], before)
        return x

    def _make_buffer(self) -> _StretchBuffer:
        return _StretchBuffer(self.sfreq, self._rate, self.scale)

    def _find_levels(self, x: np.ndarray) -> None:
        """To find trigger channels, count how often each channel changes, and collect its distinct values."""
        n = x.shape[1]
        pairs = np.unique(np.linspace(0, max(0, n - 2), 64).astype(int)) if n > 1 else np.zeros(0, int)
        rows = np.arange(len(x))
        if n >= 256:
            # A trigger channel is constant in most samples of a block, but a block of fewer than 256 samples is too
            # short to test this.
            moving = (x[:, pairs] == x[:, pairs + 1]).mean(axis=1) < 0.25
            self._restless |= moving
            rows = rows[~moving]
        for i in rows[~self._restless[rows]].tolist():
            changed = np.flatnonzero(x[i, 1:] != x[i, :-1])
            self._steps[i] += len(changed) + (self._last is not None and x[i, 0] != self._last[i])
            if n >= 256 and len(changed) >= 0.5 * n:
                self._restless[i] = True
            elif len(self._levels[i]) <= TRIGGER_LEVELS:
                self._levels[i].add(float(x[i, 0]))
                self._levels[i].update(np.unique(x[i, 1:][changed])[: TRIGGER_LEVELS + 1].tolist())

    def _measure_stretch(self, x: np.ndarray) -> None:
        """Measure amplitude, spectrum and correlations of the channels in a stretch (about four seconds)."""
        x -= x.mean(axis=1, keepdims=True)
        y, _ = filter_to_band(x, self._rate)
        self._amplitudes.append(np.abs(y).astype(np.float32))
        norm = np.linalg.norm(y, axis=1)
        unit = y / np.where(norm > 0, norm, 1.0)[:, None]
        alike = np.abs(unit @ unit.T)
        np.fill_diagonal(alike, 0.0)
        self._similar.append(alike.max(axis=1))
        if self._n_fft and x.shape[1] >= self._n_fft:
            from scipy.fft import rfft

            spectrum = np.asarray(rfft(x[:, : self._n_fft] * _hann_window(self._n_fft), axis=1))
            power = np.abs(spectrum) ** 2
            self._power += power
            self._n_power += 1
            frequency = self._frequencies
            self._measure_mains(spectrum)
            rough = (frequency > 45) & (frequency < min(120.0, SPECTRUM_HZ * self._rate))
            for line in (50.0, 60.0, 100.0):
                rough &= np.abs(frequency - line) > 2.5
            if np.count_nonzero(rough) > 20:
                self._rough.append(np.sqrt(power[:, rough].mean(axis=1)))
                self._rough_at.append(len(self._amplitudes) - 1)

    def _measure_mains(self, spectrum: np.ndarray) -> None:
        """Measure the power of a stretch (four seconds) near 50 and 60 Hz, and add it to the sums over all stretches.

        The power of each stretch is divided by the median power at the neighbouring frequencies, so that artefacts in a
        few stretches do not hide the mains noise. An artefact in all channels can also hide the mains noise. So the
        power is measured a second time, after the median over channels is subtracted.
        """
        for line, totals in self._mains.items():
            bins = np.flatnonzero(np.abs(self._frequencies - line) < 6)
            # Computing the median over channels takes long, so the second measurement (after the median is subtracted)
            # is made only in some of the stretches.
            with_common = len(spectrum) >= MIN_TO_COMPARE and (self._n_power <= 8 or self._n_power % 4 == 0)
            if self._rate / 2 <= line + 3 or not len(bins):
                continue
            around = np.abs(self._frequencies[bins] - line) > 2
            for i, common in enumerate((False, True)[: 1 + with_common]):
                part = spectrum[:, bins]
                if common:
                    part = part - (np.median(part.real, axis=0) + 1j * np.median(part.imag, axis=0))
                power = np.abs(part) ** 2
                base = np.median(power[:, around], axis=1, keepdims=True) if around.any() else np.zeros((len(part), 1))
                if len(totals) <= i:
                    totals.append(np.zeros(power.shape))
                totals[i] += power / np.where(base > 0, base, np.inf)

    @property
    def _frequencies(self) -> np.ndarray:
        return np.arange(self._power.shape[1]) * (self._rate / max(1, self._n_fft))

    def verdict(self, factor: float | None = None) -> Verdict:
        """Decide on the unit and the bad channels, based on the blocks that were measured so far.

        Parameters
        ----------
        factor : float, optional
            Known factor that converts the values, after multiplication by `scale`, to microvolts. If `factor` is given,
            the unit is not checked.

        Returns
        -------
        Verdict
            Result of the survey; its `unit` is "unknown" if EEG cannot have the measured amplitude.
        """
        times, n = factor or 1.0, len(self._steps)
        cells = self.cells
        # Ignore the stretches (about four seconds each) in which a channel is dead, because the channel can be good in
        # the rest of the recording.
        samples, at_rail, dead = cells.summarise(self._plan[: self._next])
        live_in = dead <= DEAD_SHARE
        live_in[:, ~live_in.any(axis=0)] = True
        robust = times * self._robust_amplitudes(live_in)
        finite = cells.share_missing() <= (MISSING_SHARE if cells.spec.check else 0.0)
        extent, constant, repeated = cells.extent, cells.share_constant(), cells.share_repeated()
        bads: dict[int, str] = {}
        not_eeg: dict[int, str] = {}
        tone = self._tone()
        for i in np.flatnonzero(finite).tolist():
            if not extent[i] > 0:
                bads[i] = "flat"
            elif constant[i] > FLAT_SHARE or repeated[i] > FLAT_SHARE or self._is_trigger(i):
                bads[i] = "flat"
                if self._is_trigger(i):
                    bads[i] = not_eeg[i] = "trigger"
            elif samples[i] > CLIPPED_SHARE or at_rail[i] > CLIPPED_CELLS:
                bads[i] = "clipped"
            elif tone[i]:
                bads[i] = "test tone"
        live = np.array([i for i in np.flatnonzero(finite) if i not in bads], int)
        amplitude = float(np.median(robust[live])) if len(live) else 0.0
        plausible = PLAUSIBLE_UV[0] <= amplitude <= PLAUSIBLE_UV[1]
        unit = "configured" if factor is not None else "plausible" if plausible else "unknown"
        if unit != "unknown":
            for i in live:
                if not USABLE_UV[0] <= robust[i] <= USABLE_UV[1]:
                    bads[int(i)] = "too small" if robust[i] < USABLE_UV[0] else "too large"
            bads |= dict.fromkeys(self._noisy(np.array([i for i in live if i not in bads], int), live_in), "noisy")
        left = [i for i in range(n) if finite[i] and i not in bads]
        return Verdict(
            amplitude_uv=amplitude,
            factor=times,
            unit=unit,
            bads=dict(sorted(bads.items())),
            not_eeg=not_eeg,
            not_finite=np.flatnonzero(~finite).tolist(),
            line_freq=self.line_frequency(left),
            fingerprint=self._fingerprint(),
            channel_uv=robust,
        )

    def _is_trigger(self, i: int) -> bool:
        """Return whether a channel is a trigger channel, which changes rarely and has only a few distinct values."""
        levels = len(self._levels[i])
        returns = 2 <= levels <= TRIGGER_LEVELS and self._steps[i] >= max(3, 2 * (levels - 1))
        high = self.scale * (self.cells.high.value[i] + self.cells.low.value[i]) > TRIGGER_UV
        still = self._steps[i] < (1 - FLAT_SHARE) * max(1, self._n_samples - 1)
        return bool(returns and high and still and not self._restless[i])

    def _robust_amplitudes(self, live: np.ndarray) -> np.ndarray:
        """Return the robust amplitude of each channel, [n]: 1.4826 times the median absolute value.

        For each channel, the stretches (about four seconds each) in which the channel has no signal are ignored.
        """
        if not self._amplitudes:
            return np.zeros(len(self._steps))
        robust = _row_medians(np.concatenate(self._amplitudes, axis=1))
        for i in np.flatnonzero(~live.all(axis=0)):
            robust[i] = np.median(np.concatenate([self._amplitudes[k][i] for k in np.flatnonzero(live[:, i])]))
        return 1.4826 * robust.astype(float)

    def _tone(self) -> np.ndarray:
        """For each channel, return whether it is a test tone: a frequency that is neither rhythm nor mains harmonic."""
        if not self._n_power:
            return np.zeros(len(self._steps), bool)
        frequency = self._frequencies
        power = np.where(frequency >= 1.0, self._power, 0.0)
        # With Hann's window, the power of a single frequency is spread over three bins.
        near = power.copy()
        near[:, 1:] += power[:, :-1]
        near[:, :-1] += power[:, 1:]
        allowed = frequency > TONE_ABOVE_HZ
        for mains in (50.0, 60.0):
            allowed &= np.abs(frequency - mains * np.round(frequency / mains)) > 1.0
        share = np.where(allowed, near, 0.0).max(axis=1) / np.maximum(power.sum(axis=1), 1e-30)
        return share > TONE_SHARE

    def _noisy(self, live: np.ndarray, live_in: np.ndarray) -> list[int]:
        """Return the rows with much more high-frequency noise than other rows, or without correlation to any other row.

        Parameters
        ----------
        live : ndarray of int
            Rows to compare.
        live_in : ndarray of bool, shape (stretches, n)
            True where a channel (a column) has a signal in a stretch (a row) of about four seconds.
        """
        if len(live) < MIN_TO_COMPARE:
            return []
        found: set[int] = set()
        if self._rough:
            shown = np.where(live_in[self._rough_at], np.stack(self._rough), np.nan)[:, live]
            rough = np.log(np.maximum(_median(shown), 1e-12))
            middle = np.median(rough)
            deviation = 1.4826 * np.median(np.abs(rough - middle))
            out = (rough - middle > np.log(NOISY_RATIO)) & (rough - middle > NOISY_Z * deviation)
            found |= set(live[out].tolist())
        alike = _median(np.where(live_in, np.stack(self._similar), np.nan)[:, live])
        if np.median(alike) > TOGETHER:
            found |= set(live[alike < LONELY].tolist())
        return sorted(found)

    def line_frequency(self, rows: Sequence[int]) -> float | None:
        """Find the mains frequency in the spectrum.

        Parameters
        ----------
        rows : sequence of int
            Rows of the good channels.

        Returns
        -------
        float or None
            50 or 60 Hz. None if the spectrum shows no mains noise, if every stretch is shorter than two seconds, or if
            the sampling rate is too low.
        """
        best, ratio = None, LINE_RATIO
        for line, totals in self._mains.items():
            distance = np.abs(self._frequencies - line)
            distance = distance[distance < 6]
            for total in totals if len(rows) else ():
                power = np.median(total[list(rows)], axis=0)
                around = np.median(power[distance > 2])
                if around > 0 and power[distance <= 1].max() / around > ratio:
                    best, ratio = line, power[distance <= 1].max() / around
        return best

    def _fingerprint(self) -> np.ndarray:
        """Compute the fingerprint; the same signal gives the same fingerprint in every file format."""
        none = np.zeros((len(self._steps), 0), np.float32)
        head = self._stretch_points(0, 0.0, FINGERPRINT_POINTS)
        if head.shape[1] < 2:
            return none
        parts = [head]
        if head.shape[1] == FINGERPRINT_POINTS:
            for number in range(1, len(self._spans)):
                if self._n_samples < self._spans[number][1]:
                    break
                parts.append(self._stretch_points(number, SETTLE_S, LATER_POINTS))
        points = np.concatenate(parts, axis=1)
        # Normalise each row, because one of two files with the same signal may state a wrong unit.
        norm = np.linalg.norm(points, axis=1, keepdims=True)
        return np.where(norm > 1e-6, points / np.maximum(norm, 1e-12), 0.0).astype(np.float32)

    def _stretch_points(self, number: int, begin_s: float, count: int) -> np.ndarray:
        """Return at most `count` samples of an interval for the fingerprint.

        The first of these samples is `begin_s` seconds after the start of the interval.
        """
        x = self._prints[number].finish() if number in self._prints else np.zeros((len(self._steps), 0))
        if x.shape[1] < 2:
            return np.zeros((len(x), 0))
        x = np.where(np.isfinite(x).all(axis=1, keepdims=True), x, 0.0)
        y, rate = filter_to_band(x, self._rate)
        count = min(count, int((y.shape[-1] - 1) / rate / FINGERPRINT_STEP_S))
        return y[:, np.round((begin_s + np.arange(max(count, 0)) * FINGERPRINT_STEP_S) * rate).astype(int)]


def _row_medians(x: np.ndarray) -> np.ndarray:
    """Return the median of each row, like np.median, but in half the time if no value is NaN."""
    if np.isnan(x).any():
        return np.median(x, axis=1)
    middle = x.shape[1] // 2
    x = np.partition(x, middle, axis=1)
    upper = x[:, middle]
    return upper if x.shape[1] % 2 else np.stack([x[:, :middle].max(axis=1), upper]).mean(axis=0)


def _median(x: np.ndarray) -> np.ndarray:
    """Return the median over the rows (stretches) for each channel, ignoring NaN; zero for a channel of NaN only."""
    if np.isnan(x).any():
        return np.array([np.median(row[~np.isnan(row)]) if not np.isnan(row).all() else 0.0 for row in x.T])
    return np.median(x, axis=0)


def assess(x_uv: np.ndarray, sfreq: float, *, factor: float | None = None) -> Verdict:
    """Find the unit and the bad channels of a signal in memory.

    Parameters
    ----------
    x_uv : ndarray, shape (n, S)
        Signal as read; in microvolts if the unit that the file states is right.
    sfreq : float
        Sampling rate in Hz.
    factor : float, optional
        Known factor that converts these values to microvolts. If `factor` is given, the unit is not checked.

    Returns
    -------
    Verdict
        Result of the survey; its `unit` is "unknown" if EEG cannot have the measured amplitude.
    """
    survey = Survey(len(x_uv), sfreq, [Segment(start=0, stop=x_uv.shape[-1], onset=0.0)])
    survey.push(0, np.asarray(x_uv, np.float64))
    return survey.verdict(factor)
