"""Ridge regression with several penalties at once.

The docstring of `pretrain.model` explains letters such as BCT in `x_BCT`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

STRENGTHS = np.logspace(-3, 3, 13)
"""Ridge penalties to choose from, as multiples of the mean eigenvalue of the features' covariance."""


def ridge_scores(x_nF: np.ndarray, y_nL: np.ndarray, new_mF: np.ndarray) -> Iterator[np.ndarray]:
    """Fit a ridge regression with each penalty and score new trials.

    Parameters
    ----------
    x_nF, y_nL : ndarray
        Features and targets of the n training trials.
    new_mF : ndarray
        Features of the m new trials.

    Yields
    ------
    ndarray, [m, L]
        Scores of the new trials for one penalty of `STRENGTHS`, in the order of `STRENGTHS`.
    """
    mean_F, mean_L = x_nF.mean(axis=0), y_nL.mean(axis=0)
    x_nF, new_mF, y_nL = x_nF - mean_F, new_mF - mean_F, y_nL - mean_L
    # For the matrix X of the features, X'X and XX' have the same eigenvalues above 0. Decompose the smaller of X'X and
    # XX', once for all penalties.
    if x_nF.shape[1] < len(x_nF):
        value, vector = np.linalg.eigh(x_nF.T @ x_nF)
        weights, basis = vector.T @ (x_nF.T @ y_nL), new_mF @ vector
    else:
        value, vector = np.linalg.eigh(x_nF @ x_nF.T)
        weights, basis = vector.T @ y_nL, new_mF @ (x_nF.T @ vector)
    value = np.maximum(value, 0)
    unit = value.mean() or 1.0
    for strength in STRENGTHS:
        yield basis @ (weights / (value + strength * unit)[:, None]) + mean_L
