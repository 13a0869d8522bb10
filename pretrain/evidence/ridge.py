"""Ridge regression with several penalties at once.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
        Scores of the new trials for one penalty. The penalties are used in the order of `STRENGTHS`.
    """
    mean_F, mean_L = x_nF.mean(axis=0), y_nL.mean(axis=0)
    x_nF, new_mF, y_nL = x_nF - mean_F, new_mF - mean_F, y_nL - mean_L
    # For the matrix X of the features, X'X and XX' have the same eigenvalues above 0. Decompose the smaller of the
    # matrices X'X and XX' once, and use the result for all penalties.
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


class RidgeSums:
    """Sums over training trials, from which ridge regressions are computed without all features in memory.

    The sums over the training trials are kept in float64. The sums hold F x F and F x L numbers, whatever the number of
    trials.

    Parameters
    ----------
    features, targets : int
        Number of features (F) and number of targets (L).
    """

    def __init__(self, features: int, targets: int) -> None:
        self.n = 0
        self.shift_F = np.zeros(features)
        self.xx_FF, self.xy_FL = np.zeros((features, features)), np.zeros((features, targets))
        self.x_F, self.y_L = np.zeros(features), np.zeros(targets)

    def add(self, x_nF: np.ndarray, y_nL: np.ndarray) -> None:
        """Add the features and targets of further trials to the sums."""
        if not len(x_nF):
            return
        if not self.n:
            # The mean over the trials of the first call is subtracted from all trials, so that a large common offset of
            # the features does not reduce the precision. The subtraction does not change the results of the regression.
            self.shift_F = np.asarray(x_nF, np.float64).mean(axis=0)
        x_nF, y_nL = np.asarray(x_nF, np.float64) - self.shift_F, np.asarray(y_nL, np.float64)
        self.n += len(x_nF)
        self.xx_FF += x_nF.T @ x_nF
        self.xy_FL += x_nF.T @ y_nL
        self.x_F += x_nF.sum(axis=0)
        self.y_L += y_nL.sum(axis=0)

    def __add__(self, other: RidgeSums) -> RidgeSums:
        """Add two sets of sums, and return the sums over the trials of both."""
        if not (self.n and other.n):
            return self if self.n else other
        found, more_F = RidgeSums(*self.xy_FL.shape), other.shift_F - self.shift_F
        found.n, found.shift_F = self.n + other.n, self.shift_F
        x_F = other.x_F + other.n * more_F
        cross_FF = np.outer(other.x_F, more_F)
        found.xx_FF = self.xx_FF + other.xx_FF + cross_FF + cross_FF.T + other.n * np.outer(more_F, more_F)
        found.xy_FL = self.xy_FL + other.xy_FL + np.outer(more_F, other.y_L)
        found.x_F, found.y_L = self.x_F + x_F, self.y_L + other.y_L
        return found

    @property
    def mean_F(self) -> np.ndarray:
        """Mean of each feature."""
        return self.x_F / self.n + self.shift_F

    def compute_scale(self, least: float | np.ndarray = 1e-6) -> np.ndarray:
        """Return each feature's standard deviation [F]; infinity for a constant feature, so that division gives 0."""
        variance_F = np.diag(self.xx_FF) / self.n - (self.x_F / self.n) ** 2
        std_F = np.sqrt(np.maximum(variance_F, 0))
        return np.where(std_F > least, std_F, np.inf)

    def fit(self, scale_F: np.ndarray) -> RidgeFit:
        """Fit ridge regressions to the features divided by `scale_F`, with each penalty of `STRENGTHS`.

        The results are those of `ridge_scores` for features that are divided by `scale_F`.
        """
        mean_F, mean_L = self.x_F / self.n, self.y_L / self.n
        xx_FF = (self.xx_FF - self.n * np.outer(mean_F, mean_F)) / scale_F / scale_F[:, None]
        xy_FL = (self.xy_FL - np.outer(self.x_F, mean_L)) / scale_F[:, None]
        value_F, vector_FF = np.linalg.eigh(xx_FF)
        value_F = np.maximum(value_F, 0)
        # `ridge_scores` takes the mean of the eigenvalues of the smaller matrix, X'X or XX'. Both matrices have the
        # same eigenvalues above 0, so their sum is divided by the size of the smaller matrix here, too.
        unit = value_F.sum() / min(len(value_F), self.n) or 1.0
        return RidgeFit(
            mean_F=self.mean_F,
            mean_L=mean_L,
            scale_F=scale_F,
            value_F=value_F,
            vector_FF=vector_FF,
            rotated_FL=vector_FF.T @ xy_FL,
            unit=float(unit),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeFit:
    """Ridge regressions with all penalties, from `RidgeSums.fit`."""

    mean_F: np.ndarray
    """Mean of each feature over the training trials."""
    mean_L: np.ndarray
    """Mean of each target over the training trials."""
    scale_F: np.ndarray
    """Divisor of each feature."""
    value_F: np.ndarray
    """Eigenvalues of X'X, where X holds the centred and divided features."""
    vector_FF: np.ndarray
    """Eigenvectors of X'X."""
    rotated_FL: np.ndarray
    """X'Y in the basis of the eigenvectors of X'X, where Y holds the centred targets."""
    unit: float
    """Mean of the eigenvalues of X'X or, if there are fewer trials than features, of XX'. Each penalty is a multiple of
    this number."""

    def compute_weights(self, number: int) -> np.ndarray:
        """Return the weights [F, L] for the penalty ``STRENGTHS[number]``.

        The scores of features x are ``(x - mean_F) @ weights + mean_L``.
        """
        shrunk_FL = self.rotated_FL / (self.value_F + STRENGTHS[number] * self.unit)[:, None]
        return (self.vector_FF @ shrunk_FL) / self.scale_F[:, None]
