"""Scale EEG windows from microvolts to the input of the models.

Letters in array shapes: B windows per batch, C channels, T samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def scale_windows(x_uv: Any, *, scaling: str, scale_uv: float, clip: float, channels: Any = None) -> Any:
    """Scale microvolts to model input. `PreprocessSpec` explains `scaling`, `scale_uv` and `clip`.

    Parameters
    ----------
    x_uv : ndarray or Tensor, shape (..., C, T)
        Windows in microvolts, float32 or float64.
    scaling : str
        window: divide each window by its own standard deviation. constant: divide each window by `scale_uv`.
    scale_uv : float
        Divisor of the constant scaling.
    clip : float
        Largest absolute value of the result; 0 means no clipping.
    channels : int, or sequence or Tensor of int, [B], optional
        Number of recorded channels, as in `standard_deviation`.

    Returns
    -------
    ndarray or Tensor, shape (..., C, T)
        Scaled windows. A window of zeros stays zero.
    """
    scaled = x_uv / (scale_uv if scaling == "constant" else standard_deviation(x_uv, channels))
    return scaled.clip(-clip, clip) if clip else scaled


def standard_deviation(x_uv: Any, channels: Any = None) -> Any:
    """Compute the standard deviation of each window: a single value for all its channels, at least 0.001.

    Parameters
    ----------
    x_uv : ndarray or Tensor, shape (..., C, T)
        Windows in microvolts, float32 or float64.
    channels : int, or sequence or Tensor of int, [B], optional
        Number of recorded channels: an integer for all windows, or one integer for each window. All further rows are
        padding and are ignored. By default, all rows are used.

    Returns
    -------
    ndarray or Tensor, shape (..., 1, 1)
        Standard deviations. Because all channels of a window are divided by the same value, their relative amplitudes
        do not change.

    Notes
    -----
    Padding rows repeat the recorded channels. Without `channels`, the padding rows are used too, so a channel that is
    repeated more often has a larger weight.
    """
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
