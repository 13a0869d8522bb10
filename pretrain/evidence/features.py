"""Simple features of EEG that need no model: the power of each channel in frequency bands.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import numpy as np

BANDS = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 45)}
"""Lower and upper edge of each frequency band in Hz."""


def band_power(x_nCT: np.ndarray, sfreq: float) -> np.ndarray:
    """Compute the logarithm of the power of each channel in each frequency band.

    Parameters
    ----------
    x_nCT : ndarray, [n, C, T]
        EEG signal.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    ndarray, [n, C x bands]
        Features. A band is left out if it contains no frequency of the Fourier transform.
    """
    T = x_nCT.shape[-1]
    power = np.abs(np.fft.rfft(x_nCT * np.hanning(T), axis=-1)) ** 2
    frequency = np.fft.rfftfreq(T, 1 / sfreq)
    parts = []
    for low, high in BANDS.values():
        inside = (frequency >= low) & (frequency < high)
        if inside.any():
            parts.append(np.log10(power[..., inside].mean(axis=-1) + 1e-12))
    return np.stack(parts, axis=-1).reshape(len(x_nCT), -1)
