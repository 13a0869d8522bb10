"""The one preprocessing of sharding, training and encoding: rate, band, line noise, reference, scale.

Shapes: C channels, S samples at the recording's rate, T samples at the target rate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_sharding.common.files import digest_of
from data_sharding.processing.streaming import resample, zero_phase

FILTER_BYTES = 8 * 2**20
"""Size of a block in the filters, as float64."""


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How a recording becomes windows; hashed into the dataset id and kept in the encoder package.

    References
    ----------
    The defaults are DreamDiffusion's (Bai et al., arXiv 2306.16934): 5 to 95 Hz, windows of 512 samples.
    Rate, reference and scaling are not fixed there; these are the field's usual ones.
    """

    sfreq: float = 256.0
    """Target sampling rate in Hz."""
    highpass: float = 5.0
    """Lower edge of the band in Hz."""
    lowpass: float = 95.0
    """Upper edge of the band in Hz; lowered to 0.45 of a recording's own rate where that is less."""
    notch: Literal["auto", "off"] | float | bool = "auto"
    """auto: a notch at the recording's line frequency and its harmonics inside the band; off (or no): none; a number:
    at that frequency in Hz and its harmonics, whatever the recording says."""
    reference: str | list[str] = "average"
    """average: subtract the mean over good channels; keep: as recorded; names of channels (Cz, or [M1, M2]): subtract
    their mean. A recording without one of them is set aside."""
    window: int = 512
    """Length of a window in samples at the target rate."""
    stride: int = 512
    """Distance between the starts of two windows in samples at the target rate."""
    scaling: Literal["window", "constant"] = "window"
    """What models see. window: microvolts over the window's own standard deviation; constant: over `scale_uv`."""
    scale_uv: float = 10.0
    """Divisor in microvolts of the constant scaling."""
    clip: float = 20.0
    """Model units beyond which values are limited, in model input only; 0 for no limit."""
    reject_uv: float = 0.0
    """Peak-to-peak microvolts in any good channel from which a window is left out, and counted; 0: none is."""

    def __post_init__(self) -> None:
        if not self.sfreq > 0:
            raise ValueError(f"preprocess.sfreq must be positive, got {self.sfreq}")
        if not 0 < self.highpass < self.lowpass:
            raise ValueError(f"preprocess: need 0 < highpass < lowpass, got {self.highpass} and {self.lowpass}")
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
            # YAML reads a bare off as false.
            object.__setattr__(self, "notch", "auto" if self.notch else "off")
        if not isinstance(self.notch, str) and not 0 < self.notch < 0.5 * self.sfreq:
            raise ValueError(
                f"preprocess.notch {self.notch} is not between 0 and half of sfreq; use auto, off, or the mains in Hz"
            )
        if isinstance(self.notch, str) and self.notch not in ("auto", "off"):
            raise ValueError(f"preprocess.notch '{self.notch}' is none of auto, off, or a frequency in Hz")
        if not self.reference or not all(self.reference):
            raise ValueError("preprocess.reference is empty; use average, keep, or names of channels")
        # One spelling of one thing, or its checksum would differ.
        if not isinstance(self.notch, str):
            object.__setattr__(self, "notch", float(self.notch))
        if self.reference not in ("average", "keep"):
            object.__setattr__(self, "reference", self.reference_channels)

    @property
    def reference_channels(self) -> list[str]:
        """Channels whose mean is subtracted, by name; empty for average and keep."""
        if isinstance(self.reference, str):
            return [] if self.reference in ("average", "keep") else [self.reference]
        return list(self.reference)

    @property
    def reference_name(self) -> str:
        """What a sample's metadata says of its reference."""
        if names := self.reference_channels:
            return "+".join(names)
        return "average" if self.reference == "average" else "recorded"

    @property
    def window_s(self) -> float:
        """Length of a window in seconds."""
        return self.window / self.sfreq

    def to_dict(self) -> dict[str, Any]:
        """Fields as a plain dictionary.

        `reject_uv` is in it only where it is set, so that specs of before it was there keep their checksum.
        """
        values = dataclasses.asdict(self)
        if not self.reject_uv:
            values.pop("reject_uv")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessSpec:
        """Build from a plain dictionary.

        Parameters
        ----------
        values : dict
            What `to_dict` gave.

        Returns
        -------
        PreprocessSpec
            The spec.
        """
        return cls(**values)

    def digest(self) -> str:
        """Checksum of the spec, hexadecimal."""
        return digest_of(self.to_dict())

    def differences(self, other: PreprocessSpec) -> dict[str, str]:
        """Name what two specs do not have in common.

        Parameters
        ----------
        other : PreprocessSpec
            Another one.

        Returns
        -------
        dict of str to str
            For each key that differs ``preprocess.KEY OURS against THEIRS``, in the order of the fields.
        """
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {
            key: f"preprocess.{key} {value} against {theirs[key]}"
            for key, value in ours.items()
            if value != theirs[key]
        }

    def scale_for_model(self, x_uv: Any, channels: Any = None) -> Any:
        """Bring microvolts to what models see.

        Parameters
        ----------
        x_uv : ndarray or Tensor, shape (..., C, T)
            Windows in microvolts, float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            As for `divisor`.

        Returns
        -------
        ndarray or Tensor, shape (..., C, T)
            Scaled, and limited to +-`clip`. A window that is zero everywhere stays zero.
        """
        scaled = x_uv / self.divisor(x_uv, channels)
        return scaled.clip(-self.clip, self.clip) if self.clip else scaled

    def divisor(self, x_uv: Any, channels: Any = None) -> Any:
        """Microvolts that are one model unit.

        Parameters
        ----------
        x_uv : ndarray or Tensor, shape (..., C, T)
            Windows in microvolts, float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            The window's scale is taken over so many first rows, which are the true channels of a padded window: for
            models on which neither padding nor the order of the channels must have an effect. All rows by default.

        Returns
        -------
        float, or ndarray or Tensor, shape (..., 1, 1)
            `scale_uv` for the constant scaling; else each window's standard deviation, at least 0.001.

        Notes
        -----
        The standard deviation is taken over all channels at once: relative amplitudes between channels stay. Without
        `channels`, padding by replication weighs the first channels slightly more where their number does not divide
        that of the rows.
        """
        if self.scaling == "constant":
            return self.scale_uv
        if channels is None or isinstance(channels, int):
            rows = x_uv if channels is None else x_uv[..., :channels, :]
            if isinstance(rows, np.ndarray):
                return rows.std(axis=(-2, -1), keepdims=True).clip(1e-3)
            return rows.std(dim=(-2, -1), keepdim=True, correction=0).clip(1e-3)
        if isinstance(x_uv, np.ndarray):
            count_B11 = np.asarray(channels, x_uv.dtype)[:, None, None]
            row_C1 = np.arange(x_uv.shape[-2])[:, None]
        else:
            import torch

            count_B11 = torch.as_tensor(channels, device=x_uv.device)[:, None, None]
            row_C1 = torch.arange(x_uv.shape[-2], device=x_uv.device)[:, None]
        true_BC1, values_B11 = row_C1 < count_B11, count_B11 * x_uv.shape[-1]
        mean_B11 = (x_uv * true_BC1).sum((-2, -1), keepdims=True) / values_B11
        variance_B11 = (((x_uv - mean_B11) * true_BC1) ** 2).sum((-2, -1), keepdims=True) / values_B11
        return (variance_B11**0.5).clip(1e-3)


def band_of(sfreq: float, spec: PreprocessSpec) -> tuple[float, float]:
    """Band that a recording of this rate really gets.

    Parameters
    ----------
    sfreq : float
        The recording's rate in Hz.
    spec : PreprocessSpec
        The preprocessing asked for.

    Returns
    -------
    tuple of float
        Lower and upper edge in Hz.
    """
    return spec.highpass, min(spec.lowpass, 0.45 * sfreq)


def filters(sfreq: float, spec: PreprocessSpec, line_freq: float | None) -> np.ndarray:
    """Band-pass and notches at the target rate.

    Parameters
    ----------
    sfreq : float
        The recording's rate in Hz.
    spec : PreprocessSpec
        What to do.
    line_freq : float or None
        Mains frequency in Hz; None where it is unknown or absent, and then only a spec that names one has a notch.

    Returns
    -------
    ndarray, shape (n_sections, 6)
        Second-order sections, to be run forward and backward.
    """
    low, high = band_of(sfreq, spec)
    line = line_freq if spec.notch == "auto" else None if isinstance(spec.notch, str) else spec.notch
    return _sections(low, high, spec.sfreq, line or None).copy()


@functools.lru_cache(maxsize=16)
def _sections(low: float, high: float, sfreq: float, line: float | None) -> np.ndarray:
    from scipy.signal import butter, iirnotch, tf2sos

    sections = [np.asarray(butter(4, [low, high], btype="bandpass", fs=sfreq, output="sos"))]
    if line:
        sections += [
            np.asarray(tf2sos(*iirnotch(f, 30.0, fs=sfreq))) for f in np.arange(line, high, line) if f < 0.5 * sfreq
        ]
    return np.concatenate(sections)


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
    """Filter and re-reference one segment that is at the target rate already.

    Parameters
    ----------
    read : callable
        (start, stop) to microvolts of shape (C, stop - start).
    n_samples : int
        Length of the segment at the target rate.
    sfreq : float
        Rate of the recording in Hz, which limits the band.
    spec : PreprocessSpec
        What to do.
    line_freq : float or None
        Mains frequency in Hz, as for `filters`.
    reference : sequence of int
        Rows whose mean is subtracted; none where it is empty.
    block : int, optional
        Samples at a time; as many as fit into `FILTER_BYTES` by default.

    Yields
    ------
    ndarray, shape (C, b), float32
        Microvolts, block after block.
    """
    sos = filters(sfreq, spec, line_freq)
    # Two periods of the slowest frequency on either side, as far as the segment is long enough for that.
    pad = int(2 * spec.sfreq / spec.highpass)
    if block is None:
        block = FILTER_BYTES // (8 * max(1, read(0, 1).shape[0]))
    rows = list(reference)
    for x in zero_phase(read, n_samples, sos, pad, block):
        # numpy's mean over rows picked by a list would copy them all: a product with weights does not.
        if rows:
            weights = np.zeros(len(x))
            weights[rows] = 1 / len(rows)
            x = x - weights @ x
        yield x.astype(np.float32)


def reference_rows(n_channels: int, spec: PreprocessSpec, bads: Sequence[int], names: Sequence[str]) -> list[int]:
    """Rows whose mean becomes the reference.

    Parameters
    ----------
    n_channels : int
        Rows of the signal.
    spec : PreprocessSpec
        What to do.
    bads : sequence of int
        Rows that take no part in an average reference.
    names : sequence of str
        Names of the rows, needed where the spec names reference channels.

    Returns
    -------
    list of int
        Rows; empty for a signal that stays as recorded.

    Raises
    ------
    ValueError
        If no channel is good, or a reference channel is missing or bad.
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
    """Bring a recording without interruption to the spec's rate, band and reference.

    Parameters
    ----------
    data_uv : ndarray, shape (C, S)
        Signal in microvolts.
    sfreq : float
        Its rate in Hz.
    spec : PreprocessSpec
        What to do.
    line_freq : float, optional
        Mains frequency in Hz; None where it is unknown or absent, and then no notch is applied.
    bads : list of int, optional
        Channels left out of the average reference; they are still referenced and kept.
    names : sequence of str, optional
        Names of the channels, for a spec that names reference channels.

    Returns
    -------
    ndarray, shape (C, T), float32
        Microvolts at `spec.sfreq`. Scaling for models is `PreprocessSpec.scale_for_model`.

    Raises
    ------
    ValueError
        If the array is not two-dimensional, holds NaN or infinities, no channel is good, or a reference channel is
        missing.

    Notes
    -----
    What sharding does with a recording of any length, with everything in one block.
    """
    if data_uv.ndim != 2 or not data_uv.size:
        raise ValueError(f"need an array of channels x samples, got shape {data_uv.shape}")
    if not np.isfinite(data_uv).all():
        raise ValueError("the signal holds NaN or infinite values")
    # DC offsets of hundreds of millivolts would cost float32 its precision: take them away before anything else.
    x = data_uv - np.asarray(data_uv[:, :1], np.float64)
    # Polyphase first: the filters then run at the lower rate.
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
    return np.concatenate(list(blocks), axis=1)


def window_starts(n_samples: int, spec: PreprocessSpec) -> np.ndarray:
    """First samples of the whole windows of a recording.

    Parameters
    ----------
    n_samples : int
        Length of the recording in samples at the target rate.
    spec : PreprocessSpec
        Window and stride.

    Returns
    -------
    ndarray of int, shape (n_windows,)
        Starts; empty where the recording is shorter than a window.
    """
    return np.arange(0, n_samples - spec.window + 1, spec.stride) if n_samples >= spec.window else np.arange(0)
