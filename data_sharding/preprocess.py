"""The one preprocessing of sharding, training and encoding: rate, band, line noise, reference, scale.

Shapes: C channels, S samples at the recording's rate, T samples at the target rate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from data_sharding.files import digest_of


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
    notch: Literal["auto", "off"] = "auto"
    """auto: a notch at the recording's line frequency and its harmonics inside the band; off: none."""
    reference: Literal["average", "keep"] = "average"
    """average: subtract the mean over good channels; keep: as recorded."""
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

    @property
    def window_s(self) -> float:
        """Length of a window in seconds."""
        return self.window / self.sfreq

    def to_dict(self) -> dict[str, Any]:
        """Fields as a plain dictionary."""
        return dataclasses.asdict(self)

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

    def scale_for_model(self, x_uv: Any) -> Any:
        """Bring microvolts to what models see.

        Parameters
        ----------
        x_uv : ndarray or Tensor, shape (..., C, T)
            Windows in microvolts, float32 or float64.

        Returns
        -------
        ndarray or Tensor, shape (..., C, T)
            Scaled, and limited to +-`clip`. A window that is zero everywhere stays zero.

        Notes
        -----
        The window's standard deviation is taken over all channels at once: relative amplitudes between channels stay.
        Padding by replication weighs the first channels slightly more; it is part of the definition, since models see
        padded windows.
        """
        if self.scaling == "constant":
            scaled = x_uv / self.scale_uv
        elif isinstance(x_uv, np.ndarray):
            scaled = x_uv / np.maximum(x_uv.std(axis=(-2, -1), keepdims=True), 1e-3)
        else:
            scaled = x_uv / x_uv.std(dim=(-2, -1), keepdim=True, correction=0).clamp_min(1e-3)
        return scaled.clip(-self.clip, self.clip) if self.clip else scaled


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


def resample(x: np.ndarray, sfreq: float, target: float) -> np.ndarray:
    """Polyphase resampling along the last axis, with its anti-aliasing filter.

    Parameters
    ----------
    x : ndarray, shape (..., S)
        Signal.
    sfreq, target : float
        Rates in Hz.

    Returns
    -------
    ndarray, shape (..., T)
        Signal at the target rate, T = ceil(S * target / sfreq).
    """
    from scipy.signal import resample_poly

    ratio = Fraction(target / sfreq).limit_denominator(10_000)
    if ratio == 1:
        return x
    return resample_poly(x, ratio.numerator, ratio.denominator, axis=-1, padtype="line")


def preprocess(
    data_uv: np.ndarray,
    sfreq: float,
    spec: PreprocessSpec,
    *,
    line_freq: float | None = None,
    bads: list[int] | None = None,
) -> np.ndarray:
    """Bring a continuous recording to the spec's rate, band and reference.

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

    Returns
    -------
    ndarray, shape (C, T), float32
        Microvolts at `spec.sfreq`. Scaling for models is `PreprocessSpec.scale_for_model`.

    Raises
    ------
    ValueError
        If the array is not two-dimensional, holds NaN or infinities, or no channel is good.
    """
    from scipy.signal import butter, iirnotch, sosfiltfilt, tf2sos

    if data_uv.ndim != 2 or not data_uv.size:
        raise ValueError(f"need an array of channels x samples, got shape {data_uv.shape}")
    # DC offsets of hundreds of millivolts would cost float32 its precision: take them away before anything else.
    x = data_uv - np.mean(data_uv, axis=-1, keepdims=True, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the signal holds NaN or infinite values")
    # Polyphase first: the filters then run at the lower rate.
    x = resample(x, sfreq, spec.sfreq)
    low, high = band_of(sfreq, spec)
    sections: list[np.ndarray] = [np.asarray(butter(4, [low, high], btype="bandpass", fs=spec.sfreq, output="sos"))]
    if spec.notch == "auto" and line_freq:
        sections += [
            np.asarray(tf2sos(*iirnotch(f, 30.0, fs=spec.sfreq)))
            for f in np.arange(line_freq, high, line_freq)
            if f < 0.5 * spec.sfreq
        ]
    sos = np.concatenate(sections)
    # Reflect two periods of the slowest frequency, as far as the recording is long enough for that.
    pad = min(x.shape[-1] - 1, int(2 * spec.sfreq / low))
    x = sosfiltfilt(sos, x, axis=-1, padtype="odd", padlen=pad)
    if spec.reference == "average":
        good = np.setdiff1d(np.arange(len(x)), bads or [])
        if not len(good):
            raise ValueError("no good channel is left for the average reference")
        if len(good) > 1:
            x = x - x[good].mean(axis=0, keepdims=True)
    return x.astype(np.float32)


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
