"""What a recording's amplitudes say: its unit, its bad channels, its mains frequency, and its fingerprint.

Shapes: n channels, S samples at the recording's rate, P points of the fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PLAUSIBLE_UV = (0.2, 500.0)
"""Robust amplitude between 1 and 40 Hz that EEG can have, in microvolts.

A factor of a thousand either way falls out.
"""
USABLE_UV = (0.1, 1000.0)
"""The same for one channel among plausible others."""
FLAT_SHARE = 0.9
"""Share of unchanged samples beyond which a channel is flat."""
CLIPPED_SHARE = 0.05
"""Share of samples at a rail beyond which a channel is clipped."""
MEASURE_HZ = 128.0
LINE_RATIO = 5.0
"""Power at a mains frequency over its neighbourhood from which it counts as present."""
FINGERPRINT_STEP_S = 0.1
FINGERPRINT_POINTS = 64


@dataclass(kw_only=True)
class Verdict:
    """What was measured."""

    amplitude_uv: float
    """Median over live channels of the robust amplitude between 1 and 40 Hz."""
    factor: float
    """Microvolts per microvolt as read: 1, or what the config says."""
    unit: str
    """plausible, configured, or unknown."""
    bads: dict[int, str] = field(default_factory=dict)
    """Rows that are flat, clipped or out of range, with the word for it."""
    fingerprint: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[n, P] points of the filtered signal, each row normalised; zeros for flat rows."""
    channel_uv: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[n] robust amplitudes."""


def measured(x_uv: np.ndarray, sfreq: float) -> tuple[np.ndarray, float]:
    """Bring a signal to the band in which amplitudes are compared.

    Parameters
    ----------
    x_uv : ndarray, shape (n, S)
        Microvolts.
    sfreq : float
        Rate in Hz.

    Returns
    -------
    y : ndarray, shape (n, S')
        1 to 40 Hz.
    rate : float
        Its rate in Hz.
    """
    from scipy.signal import butter, sosfiltfilt

    from data_sharding.preprocess import resample

    x = x_uv - x_uv.mean(axis=-1, keepdims=True)
    rate = min(sfreq, MEASURE_HZ)
    x = resample(x, sfreq, rate)
    sos = butter(2, [1.0, min(40.0, 0.45 * rate)], btype="bandpass", fs=rate, output="sos")
    return sosfiltfilt(sos, x, axis=-1, padlen=min(x.shape[-1] - 1, int(2 * rate))), rate


def assess(x_uv: np.ndarray, sfreq: float, *, factor: float | None = None) -> Verdict:
    """Judge unit and channels by amplitude.

    Parameters
    ----------
    x_uv : ndarray, shape (n, S)
        Signal in microvolts as read.
    sfreq : float
        Rate in Hz.
    factor : float, optional
        Known factor to microvolts; then the unit is not judged.

    Returns
    -------
    Verdict
        With `unit` "unknown" where the amplitudes are none that EEG has.
    """
    x = x_uv * (factor or 1.0)
    y, rate = measured(x, sfreq)
    robust = 1.4826 * np.median(np.abs(y - np.median(y, axis=-1, keepdims=True)), axis=-1)
    unchanged = (np.diff(x, axis=-1) == 0).mean(axis=-1)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    at_rail = np.maximum((x == low).mean(axis=-1), (x == high).mean(axis=-1))
    bads: dict[int, str] = {}
    for i in range(len(x)):
        if unchanged[i] > FLAT_SHARE or low[i, 0] == high[i, 0]:
            bads[i] = "flat"
        elif at_rail[i] > CLIPPED_SHARE:
            bads[i] = "clipped"
    live = np.array([i for i in range(len(x)) if i not in bads], int)
    amplitude = float(np.median(robust[live])) if len(live) else 0.0
    plausible = PLAUSIBLE_UV[0] <= amplitude <= PLAUSIBLE_UV[1]
    unit = "configured" if factor is not None else "plausible" if plausible else "unknown"
    if unit != "unknown":
        for i in live:
            if not USABLE_UV[0] <= robust[i] <= USABLE_UV[1]:
                bads[int(i)] = "too small" if robust[i] < USABLE_UV[0] else "too large"
    return Verdict(
        amplitude_uv=amplitude,
        factor=factor or 1.0,
        unit=unit,
        bads=dict(sorted(bads.items())),
        fingerprint=_fingerprint(y, rate),
        channel_uv=robust,
    )


def line_frequency(x_uv: np.ndarray, sfreq: float, bads: list[int] | None = None) -> float | None:
    """Find the mains in the spectrum.

    Parameters
    ----------
    x_uv : ndarray, shape (n, S)
        Signal.
    sfreq : float
        Rate in Hz.
    bads : list of int, optional
        Rows to leave out.

    Returns
    -------
    float or None
        50 or 60 Hz; None where neither stands out, the recording is shorter than two seconds, or the rate too low.
    """
    from scipy.signal import welch

    rows = [i for i in range(len(x_uv)) if i not in set(bads or [])]
    if not rows or x_uv.shape[-1] < 2 * sfreq:
        return None
    frequency, power = welch(x_uv[rows], sfreq, nperseg=int(min(4 * sfreq, x_uv.shape[-1])), axis=-1)
    power = np.median(power, axis=0)
    best, ratio = None, LINE_RATIO
    for line in (50.0, 60.0):
        distance = np.abs(frequency - line)
        around = power[(distance > 2) & (distance < 6)]
        if sfreq / 2 > line + 3 and around.size and np.median(around) > 0:
            here = power[distance <= 1].max() / np.median(around)
            if here > ratio:
                best, ratio = line, here
    return best


def _fingerprint(y: np.ndarray, rate: float) -> np.ndarray:
    """Points of the measured signal at fixed times: the same for the same signal, whatever the file's format."""
    n_points = min(FINGERPRINT_POINTS, int((y.shape[-1] - 1) / rate / FINGERPRINT_STEP_S))
    if n_points < 2:
        return np.zeros((len(y), 0), np.float32)
    at = np.round(np.arange(n_points) * FINGERPRINT_STEP_S * rate).astype(int)
    points = y[:, at]
    # Normalised by row: one of two formats may lie about the unit.
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    return np.where(norm > 1e-6, points / np.maximum(norm, 1e-12), 0.0).astype(np.float32)
