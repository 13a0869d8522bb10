"""Preprocess EEG: resample, filter, re-reference and scale. Sharding, training and `encode` all use this module.

Letters in array shapes: C channels, S samples at the recorded rate, T samples at the target rate, B windows per batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from data_sharding.common.errors import one_line
from data_sharding.common.files import digest_of
from data_sharding.common.typed_values import check_fields
from data_sharding.common.untrusted import check_preprocess
from data_sharding.processing.quality import UNCHECKED, QualitySpec
from data_sharding.processing.scaling import scale_windows, standard_deviation
from data_sharding.processing.streaming import lookahead, resample, resampler_reach, zero_phase

FILTER_BYTES = 8 * 2**20
"""Size in bytes of each block of float64 samples that the filters process."""


BEFORE: dict[str, Any] = {
    "reject_uv": 0.0,
    "notch_width_hz": 0.0,
    "quality": dataclasses.asdict(UNCHECKED),
}
"""Fields of `PreprocessSpec` that did not exist in older versions. With the given values, the result is the same as in
older versions."""
MIN_HIGHPASS = 0.001
"""Lowest accepted value of `highpass` in Hz. Below this limit, the response of the high-pass filter may be too long for
the memory."""
MAX_SFREQ_BY_HIGHPASS = 500_000
"""Largest accepted ratio of `sfreq` to `highpass`. The length of the high-pass filter's response in samples grows with
this ratio. At the largest ratio, the response needs about one gigabyte of memory."""
LINE_FREQS = (10.0, 1000.0)
"""Lowest and highest accepted mains frequency in Hz. Every harmonic inside the band needs a notch filter, so a
frequency near zero would need too many filters."""
NOTCH_GAIN = 1e-3
"""A harmonic of the mains frequency gets no notch filter if the band-pass filter reduces its amplitude to at most this
fraction."""
TRANSIENT_ENERGY = 3e-5
"""The transient of a filter is taken as finished when the rest of the impulse response has at most this fraction of the
energy."""


def check_line_freq(value: Any, what: str) -> float:
    """Check a mains frequency from a config or from a file.

    Parameters
    ----------
    value : Any
        The mains frequency in Hz: a number, or a text such as ``50 Hz``.
    what : str
        Name of the value. The error message begins with this name.

    Returns
    -------
    float
        The mains frequency in Hz.

    Raises
    ------
    ValueError
        If the value is not a number within `LINE_FREQS`.
    """
    low, high = LINE_FREQS
    text = (
        re.fullmatch(r"\s*(\d{1,4}(?:\.\d{1,6})?)\s*(?:hz)?\s*", value, re.IGNORECASE)
        if isinstance(value, str)
        else None
    )
    value = float(text[1]) if text else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"{what} is {one_line(value)[:40]}; mains have 50 or 60 Hz, so it must be a number from {low:g} to {high:g}"
        )
    return float(value)


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Settings of the preprocessing, which makes windows from a recording.

    The dataset id depends on these settings, and the encoder package contains them.

    References
    ----------
    The default band (5 to 95 Hz) and the default window (512 samples) come from DreamDiffusion (Bai et al., arXiv
    2306.16934). The paper does not state sampling rate, reference and scaling, so the defaults of these three settings
    are common choices.
    """

    sfreq: float = 256.0
    """Target sampling rate in Hz."""
    highpass: float = 5.0
    """Lower edge of the pass band in Hz."""
    lowpass: float = 95.0
    """Upper edge of the pass band in Hz. For a recording with a low sampling rate, the upper edge is 0.45 times that
    rate."""
    notch: Literal["auto", "off"] | float | bool = "auto"
    """Notch filter. auto: remove the recording's mains frequency and its harmonics inside the band. off (or no): use no
    notch filter. A number in Hz: remove this frequency and its harmonics from every recording."""
    reference: str | list[str] = "average"
    """Reference. average: subtract the mean over good channels. keep: do not change the reference. Channel names (Cz,
    or [M1, M2]): subtract the mean of these channels; a recording without one of these channels is quarantined."""
    window: int = 512
    """Length of a window in samples at the target rate."""
    stride: int = 512
    """Distance between the starts of two windows, in samples at the target rate."""
    scaling: Literal["window", "constant"] = "window"
    """Scale of the model input. window: divide each window by its own standard deviation. constant: divide each window
    by `scale_uv`."""
    scale_uv: float = 10.0
    """With `scaling: constant`, windows are divided by this value in microvolts."""
    clip: float = 20.0
    """Clip the scaled model input at plus and minus this value. 0: do not clip. The windows in the dataset are never
    clipped."""
    notch_width_hz: float = 4.0
    """Width in Hz of the notch filter around the mains frequency and around each harmonic. At the edges of the notch,
    the filter halves the amplitude. The width must be larger than the drift of the mains frequency. With 0, the filter
    has the width that older versions used: a thirtieth of the removed frequency."""
    reject_uv: float = 0.0
    """Leave out each window in which the peak-to-peak amplitude of a good channel exceeds this value in microvolts. 0:
    keep all windows."""
    quality: QualitySpec = field(default_factory=QualitySpec)
    """Settings that decide which parts of the recorded signal are bad."""

    def __post_init__(self) -> None:
        if not self.sfreq > 0:
            raise ValueError(f"preprocess.sfreq must be positive, got {self.sfreq}")
        if not 0 < self.highpass < self.lowpass:
            raise ValueError(f"preprocess: need 0 < highpass < lowpass, got {self.highpass} and {self.lowpass}")
        if self.highpass < MIN_HIGHPASS:
            raise ValueError(f"preprocess.highpass must be at least {MIN_HIGHPASS} Hz, got {self.highpass}")
        if self.sfreq > MAX_SFREQ_BY_HIGHPASS * self.highpass:
            raise ValueError(
                f"preprocess.highpass must be at least {self.sfreq / MAX_SFREQ_BY_HIGHPASS:g} Hz with sfreq "
                f"{self.sfreq:g}, got {self.highpass}; otherwise the filter is too long"
            )
        if self.lowpass > 0.45 * self.sfreq:
            raise ValueError(
                f"preprocess.lowpass {self.lowpass} Hz needs sfreq of at least {self.lowpass / 0.45:.1f} Hz, "
                f"got {self.sfreq}"
            )
        if self.window < 1 or self.stride < 1:
            raise ValueError(f"preprocess: window and stride must be at least 1, got {self.window} and {self.stride}")
        if not self.scale_uv > 0 or self.clip < 0:
            raise ValueError(f"preprocess: need scale_uv > 0 and clip >= 0, got {self.scale_uv} and {self.clip}")
        if self.reject_uv < 0:
            raise ValueError(f"preprocess.reject_uv must not be negative, got {self.reject_uv}")
        if isinstance(self.notch, bool):
            # Without quotes, YAML reads the word off as false, and the word on as true.
            object.__setattr__(self, "notch", "auto" if self.notch else "off")
        if not isinstance(self.notch, str) and not LINE_FREQS[0] <= self.notch < 0.5 * self.sfreq:
            raise ValueError(
                f"preprocess.notch {self.notch} is not between {LINE_FREQS[0]:g} and half of sfreq; use auto, off, or "
                "the mains frequency in Hz"
            )
        if isinstance(self.notch, str) and self.notch not in ("auto", "off"):
            raise ValueError(f"preprocess.notch '{self.notch}' is not valid; use auto, off, or a frequency in Hz")
        if self.notch_width_hz and not 0.1 <= self.notch_width_hz <= 10:
            raise ValueError(f"preprocess.notch_width_hz must be 0, or from 0.1 to 10, got {self.notch_width_hz}")
        if not self.reference or not all(self.reference):
            raise ValueError("preprocess.reference is empty; use average, keep, or names of channels")
        if isinstance(self.quality, dict):
            object.__setattr__(self, "quality", QualitySpec(**self.quality))
        # Give equal settings (512 and 512.0) the same type, because the checksum of the spec depends on how a number is
        # written.
        if not isinstance(self.notch, str):
            object.__setattr__(self, "notch", float(self.notch))
        if self.reference not in ("average", "keep"):
            object.__setattr__(self, "reference", self.reference_channels)

    @property
    def reference_channels(self) -> list[str]:
        """Names of the reference channels; empty if `reference` is average or keep."""
        if isinstance(self.reference, str):
            return [] if self.reference in ("average", "keep") else [self.reference]
        return list(self.reference)

    @property
    def reference_name(self) -> str:
        """Text in the metadata of a sample that says which reference the sample has."""
        if names := self.reference_channels:
            return "+".join(names)
        return "average" if self.reference == "average" else "recorded"

    @property
    def window_s(self) -> float:
        """Length of a window in seconds."""
        return self.window / self.sfreq

    def to_samples(self, seconds: float) -> int:
        """Convert a time to a number of samples, rounded to the nearest whole number; halves are rounded up.

        The job and the reader of the dataset must round in the same way: if a part of a trial is inside another part in
        seconds, it is inside in samples, too. (`round` is not used, because it rounds halves to the even number.)
        """
        # Products such as 0.102 * 250 can be slightly too small, so round them first.
        return math.floor(round(seconds * self.sfreq, 6) + 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary.

        A field that older versions did not have is left out if its value is the one in `BEFORE`, that is, if it does
        not change the result. Thus a spec from an older version keeps its checksum.
        """
        values = dataclasses.asdict(self)
        for key, before in BEFORE.items():
            if values[key] == before:
                values.pop(key)
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str = "preprocess") -> PreprocessSpec:
        """Make a spec from a dictionary that `to_dict` returned, in this version or in an older version.

        Parameters
        ----------
        values : dict
            The dictionary. The type and the range of every value are checked, because the dictionary comes from a file.
        where : str
            Path of the file, for the message.

        Returns
        -------
        PreprocessSpec
            The spec.

        Raises
        ------
        RequestError
            If a value has another type than its field, or if `check_preprocess` refuses a value.
        ValueError
            If the values contradict each other.
        """
        return cls(**check_fields(cls, {**BEFORE, **check_preprocess(values, where)}, where))

    def digest(self) -> str:
        """Return the checksum of the spec (hexadecimal SHA-256)."""
        return digest_of(self.to_dict())

    def differences(self, other: PreprocessSpec) -> dict[str, str]:
        """Describe the differences between this spec and another spec.

        Parameters
        ----------
        other : PreprocessSpec
            The spec to compare with.

        Returns
        -------
        dict of str to str
            For each key that differs, the text ``preprocess.KEY OURS against THEIRS``, in the order of the fields.
        """
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {
            key: f"preprocess.{key} {value} against {theirs[key]}"
            for key, value in ours.items()
            if value != theirs[key]
        }

    def scale_for_model(self, x_uv: Any, channels: Any = None) -> Any:
        """Scale microvolts to model input.

        Parameters
        ----------
        x_uv : ndarray or Tensor, shape (..., C, T)
            Windows in microvolts, float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            Number of recorded channels, as in `divisor`.

        Returns
        -------
        ndarray or Tensor, shape (..., C, T)
            Scaled windows, clipped at +-`clip`. A window of zeros stays zero.
        """
        return scale_windows(x_uv, scaling=self.scaling, scale_uv=self.scale_uv, clip=self.clip, channels=channels)

    def divisor(self, x_uv: Any, channels: Any = None) -> Any:
        """Compute the divisor that scales microvolts to model input.

        Parameters
        ----------
        x_uv : ndarray or Tensor, shape (..., C, T)
            Windows in microvolts, float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            Number of recorded channels: an integer for all windows, or one integer for each window. All further rows
            are padding and are ignored. By default, all rows are used.

        Returns
        -------
        float, or ndarray or Tensor, shape (..., 1, 1)
            `scale_uv` if `scaling` is constant; otherwise the standard deviation of each window, at least 0.001.
        """
        return self.scale_uv if self.scaling == "constant" else standard_deviation(x_uv, channels)


def band_of(sfreq: float, spec: PreprocessSpec) -> tuple[float, float]:
    """Return the pass band for a recording.

    Parameters
    ----------
    sfreq : float
        Sampling rate of the recording in Hz.
    spec : PreprocessSpec
        Preprocessing settings.

    Returns
    -------
    tuple of float
        Lower and upper edge in Hz; the upper edge is at most 0.45 times the sampling rate of the recording.
    """
    return spec.highpass, min(spec.lowpass, 0.45 * sfreq)


def filters(sfreq: float, spec: PreprocessSpec, line_freq: float | None) -> np.ndarray:
    """Design the band-pass and the notch filters at the target rate.

    Parameters
    ----------
    sfreq : float
        Sampling rate of the recording in Hz.
    spec : PreprocessSpec
        Preprocessing settings.
    line_freq : float or None
        Mains frequency of the recording in Hz; None if it is unknown, or if the recording has no mains noise. With
        None, notch filters are made only if `spec.notch` is a number.

    Returns
    -------
    ndarray, shape (n_sections, 6)
        Second-order sections. The caller must apply the sections forward and backward.
    """
    low, high = band_of(sfreq, spec)
    line = line_freq if spec.notch == "auto" else None if isinstance(spec.notch, str) else spec.notch
    return _sections(low, high, spec.sfreq, line or None, spec.notch_width_hz).copy()


@functools.lru_cache(maxsize=16)
def _sections(low: float, high: float, sfreq: float, line: float | None, width: float) -> np.ndarray:
    from scipy.signal import butter, iirnotch, sosfreqz, tf2sos

    band = np.asarray(butter(4, [low, high], btype="bandpass", fs=sfreq, output="sos"))
    sections, nyquist = [band], 0.5 * sfreq
    if line and not width:
        sections += [
            np.asarray(tf2sos(*iirnotch(f, 30.0, fs=sfreq))) for f in np.arange(line, high, line) if f < nyquist
        ]
    elif line:
        # The band-pass filter is not steep, so mains harmonics just above the band are not removed completely. So
        # `harmonics` also contains the harmonics above the band.
        harmonics = np.arange(line, nyquist - width, line)
        # Square the gain, because the filter is applied forward and backward.
        gains = np.abs(sosfreqz(band, harmonics, fs=sfreq)[1]) ** 2
        for f in harmonics[gains > NOTCH_GAIN]:
            edges = [f - width / 2, f + width / 2]
            sections.append(np.asarray(butter(2, edges, btype="bandstop", fs=sfreq, output="sos")))
    return np.concatenate(sections)


def transient_length(sfreq: float, spec: PreprocessSpec, line_freq: float | None) -> int:
    """Compute how many samples of the filtered signal are affected by an end of the segment.

    Parameters
    ----------
    sfreq : float
        Sampling rate of the recording in Hz.
    spec : PreprocessSpec
        Preprocessing settings.
    line_freq : float or None
        Mains frequency in Hz, or None (see the function `filters`).

    Returns
    -------
    int
        Number of samples at the target rate, counted from the end of the segment. Beyond these samples, the resampling
        filter has no effect. The high-pass and the notch filters have little effect there: at most the fraction
        `TRANSIENT_ENERGY` of the energy of their response lies beyond these samples.
    """
    reach = resampler_reach(sfreq, spec.sfreq, band_of(sfreq, spec)[1])
    return reach + _response_length(filters(sfreq, spec, line_freq).tobytes(), spec.highpass, spec.sfreq)


@functools.lru_cache(maxsize=16)
def _response_length(sections: bytes, highpass: float, sfreq: float) -> int:
    """Return the length of the response of the high-pass filter or of the notch filters, whichever is longer."""
    from scipy.fft import irfft, rfft
    from scipy.signal import butter, sosfilt

    notches = np.frombuffer(sections).reshape(-1, 6)[4:].copy()
    parts = [np.asarray(butter(4, highpass, btype="highpass", fs=sfreq, output="sos"))]
    parts += [notches] if len(notches) else []
    longest = 0
    for sos in parts:
        n = lookahead(sos)
        response = np.asarray(sosfilt(sos, np.eye(1, n)[0]))
        # The impulse response of a filter that runs forward and backward is the autocorrelation of its impulse response
        # in one direction. The peak of the autocorrelation is the effect of an input sample on the output at the same
        # time. The other values are its effect on the output at other times, that is, the filter's transient.
        spectrum = np.asarray(rfft(response, 2 * n))
        energy = np.asarray(irfft(np.abs(spectrum) ** 2))[1:n] ** 2
        left = energy[::-1].cumsum()[::-1]
        longest = max(longest, int(np.count_nonzero(left > TRANSIENT_ENERGY * left[0])))
    return longest


def clean_blocks(
    read: Callable[[int, int], np.ndarray],
    n_samples: int,
    sfreq: float,
    spec: PreprocessSpec,
    *,
    line_freq: float | None,
    reference: Sequence[int],
    block: int | None = None,
) -> Iterator[np.ndarray]:
    """Filter and re-reference one segment that is already at the target rate.

    Parameters
    ----------
    read : callable
        Function of (start, stop) that returns the samples from `start` to `stop - 1` in microvolts, shape (C, stop -
        start).
    n_samples : int
        Length of the segment, in samples at the target rate.
    sfreq : float
        Sampling rate of the recording in Hz; the upper edge of the pass band depends on it.
    spec : PreprocessSpec
        Preprocessing settings.
    line_freq : float or None
        Mains frequency in Hz, or None (see the function `filters`).
    reference : sequence of int
        Rows of the reference channels. The mean of these rows is subtracted. If the list is empty, nothing is
        subtracted.
    block : int, optional
        Number of samples per block. By default, a block has at most `FILTER_BYTES` bytes.

    Yields
    ------
    ndarray, shape (C, b), float64
        The next block of the filtered signal, in microvolts.
    """
    sos = filters(sfreq, spec, line_freq)
    # Extend the segment at both ends by two periods of the lowest frequency of the pass band. (`zero_phase` extends a
    # short segment by less.)
    pad = int(2 * spec.sfreq / spec.highpass)
    if block is None:
        block = FILTER_BYTES // (8 * max(1, read(0, 1).shape[0]))
    rows = list(reference)
    for x in zero_phase(read, n_samples, sos, pad, block):
        # Compute the mean as a matrix product, because `x[rows].mean()` would first copy the rows.
        if rows:
            weights = np.zeros(len(x))
            weights[rows] = 1 / len(rows)
            x = x - weights @ x
        yield x


def reference_rows(n_channels: int, spec: PreprocessSpec, bads: Sequence[int], names: Sequence[str]) -> list[int]:
    """Find the rows of the reference channels.

    Parameters
    ----------
    n_channels : int
        Number of rows of the signal.
    spec : PreprocessSpec
        Preprocessing settings.
    bads : sequence of int
        Rows of the bad channels, which are left out of an average reference.
    names : sequence of str
        Names of the rows; needed if the spec names reference channels.

    Returns
    -------
    list of int
        Rows of the reference channels. The list is empty with `reference: keep`. The list is also empty with an average
        reference, if the recording has only one good channel.

    Raises
    ------
    ValueError
        If no channel is good enough for an average reference, or if a reference channel in the spec is missing or bad.
    """
    if wanted := spec.reference_channels:
        row_of = {name.casefold(): i for i, name in enumerate(names)}
        if absent := [name for name in wanted if name.casefold() not in row_of]:
            raise ValueError(f"reference channel {', '.join(absent)} is not in the recording")
        rows = [row_of[name.casefold()] for name in wanted]
        if broken := [name for name, row in zip(wanted, rows, strict=True) if row in set(bads)]:
            raise ValueError(f"reference channel {', '.join(broken)} is bad")
        return rows
    if spec.reference == "keep":
        return []
    good = sorted(set(range(n_channels)) - set(bads))
    if not good:
        raise ValueError("no good channel is left for the average reference")
    return good if len(good) > 1 else []


def preprocess(
    data_uv: np.ndarray,
    sfreq: float,
    spec: PreprocessSpec,
    *,
    line_freq: float | None = None,
    bads: list[int] | None = None,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Resample, filter and re-reference a recording without gaps, with the settings of a spec.

    Parameters
    ----------
    data_uv : ndarray, shape (C, S)
        Signal in microvolts.
    sfreq : float
        Sampling rate of the signal in Hz.
    spec : PreprocessSpec
        Preprocessing settings.
    line_freq : float, optional
        Mains frequency in Hz, or None (see the function `filters`).
    bads : list of int, optional
        Rows of the bad channels. The average reference is computed without the bad channels, but is subtracted from all
        channels.
    names : sequence of str, optional
        Names of the channels; needed if the spec names reference channels.

    Returns
    -------
    ndarray, shape (C, T), float32
        Signal in microvolts at `spec.sfreq`. The signal is not scaled for a model (see
        `PreprocessSpec.scale_for_model`).

    Raises
    ------
    ValueError
        If the array is empty, is not two-dimensional, or contains NaN or infinite values. The error is also raised if
        there are no usable reference channels (see `reference_rows`).

    Notes
    -----
    Sharding applies the same steps block by block, to recordings of any length. This function processes the recording
    as a single block.
    """
    if data_uv.ndim != 2 or not data_uv.size:
        raise ValueError(f"the signal must be an array of channels x time points, but its shape is {data_uv.shape}")
    if not np.isfinite(data_uv).all():
        raise ValueError("the signal has NaN or infinite values")
    # Subtract the first value of each channel, because a large offset (hundreds of millivolts) reduces the precision of
    # float32.
    x = data_uv - np.asarray(data_uv[:, :1], np.float64)
    # Resample before filtering: the filters then run at the lower rate.
    y = resample(x, sfreq, spec.sfreq, band_of(sfreq, spec)[1]).astype(np.float32)
    rows = reference_rows(len(y), spec, bads or [], names)
    blocks = clean_blocks(
        lambda start, stop: y[:, start:stop],
        y.shape[1],
        sfreq,
        spec,
        line_freq=line_freq,
        reference=rows,
        block=y.shape[1],
    )
    return np.concatenate(list(blocks), axis=1).astype(np.float32)


def window_starts(n_samples: int, spec: PreprocessSpec) -> np.ndarray:
    """Return where the windows of a recording begin.

    Parameters
    ----------
    n_samples : int
        Length of the recording, in samples at the target rate.
    spec : PreprocessSpec
        Window and stride.

    Returns
    -------
    ndarray of int, shape (n_windows,)
        Index of the first sample of each window; empty if the recording is shorter than a window.
    """
    return np.arange(0, n_samples - spec.window + 1, spec.stride) if n_samples >= spec.window else np.arange(0)
