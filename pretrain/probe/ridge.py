"""The linear classifier of the probe: ridge regression on one-hot labels, with a penalty chosen on inner folds.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import numpy as np

from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.probe.folds import Fold


def choose_and_predict(
    x_nF: np.ndarray, labels_Sn: np.ndarray, fold: Fold, inner: list[tuple[np.ndarray, np.ndarray]], classes: int
) -> tuple[np.ndarray, float]:
    """Choose the penalty on the inner folds, train on the training trials and predict the labels of the test trials.

    Parameters
    ----------
    x_nF : ndarray, [n, F]
        Features of all trials.
    labels_Sn : ndarray, [S, n]
        S sets of labels for all trials: the true labels, and shuffled labels. A separate classifier is trained for each
        set. The labels of the test trials are not used.
    fold : Fold
        The training and test trials.
    inner : list of (ndarray, ndarray)
        One pair for each inner fold: the indices of its training trials, and of its held-out trials. The penalty with
        the best accuracy on held-out trials is chosen.
    classes : int
        Number of labels.

    Returns
    -------
    ndarray, [S, number of test trials]
        Predicted labels.
    float
        Penalty chosen for the first set of labels, as a multiple of the mean eigenvalue of the features' covariance.
    """
    sets = len(labels_Sn)

    def predict(fit: np.ndarray, new: np.ndarray) -> np.ndarray:
        targets = (labels_Sn[:, fit, None] == np.arange(classes)).astype(x_nF.dtype)
        scores = ridge_scores(x_nF[fit], np.concatenate(list(targets), axis=1), x_nF[new])
        return np.stack([each.reshape(-1, sets, classes).argmax(axis=-1).T for each in scores])

    hits = np.zeros((len(STRENGTHS), sets))
    for fit, held in inner:
        hits += (predict(fit, held) == labels_Sn[:, held]).sum(axis=-1)
    # If several penalties are equally good, use the strongest penalty. If there are no inner folds, use the middle
    # penalty.
    best = len(STRENGTHS) - 1 - hits[::-1].argmax(axis=0) if inner else np.full(sets, len(STRENGTHS) // 2)
    return predict(fold.train, fold.test)[best, np.arange(sets)], float(STRENGTHS[best[0]])
