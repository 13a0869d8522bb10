"""Scores of retrieval: ranks, top-k rates among n images, bipartite matching, and hubness.

Array shapes: B trials, M images, P width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from finetune.evaluation.identification import top_k_hits

Floats = NDArray[np.float64]
_PART = 2**24
"""Largest number of similarities that are held in memory at once."""


def _normalise(x: NDArray[Any], what: str) -> Floats:
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.isfinite(norm).all():
        raise RequestError(f"the {what} hold values that are not finite; train the model again")
    return x / np.maximum(norm, 1e-12)


def top_k(
    better_B: NDArray[np.integer], tied_B: NDArray[np.integer], *, images: int, n: int | None = None, k: int = 1
) -> Floats:
    """Compute the probability that a trial's own image is among the k most similar of n images.

    The other n - 1 images are a random choice of all other images. The probability is exact (hypergeometric), so no
    images need to be drawn. Among images with the same similarity, every order is equally likely.

    Parameters
    ----------
    better_B, tied_B : ndarray of int, shape (B,)
        Results of `rank_true_images`.
    images : int
        Number of images, M.
    n : int, optional
        Number of compared images, including the trial's own image; by default, all images.
    k : int
        The search is successful if the trial's own image is among the `k` most similar images.

    Returns
    -------
    ndarray, shape (B,)
        Probability for each trial.
    """
    from scipy.stats import hypergeom

    n = images if n is None else n
    if not 1 <= k < n <= images:
        raise ValueError(f"need 1 <= k < n <= {images} images, got k={k} and n={n}")
    if n == images:
        return top_k_hits(better_B, tied_B, k)
    pairs, place = np.unique(np.stack([better_B, tied_B], axis=1), axis=0, return_inverse=True)
    found = np.array(
        [hypergeom.cdf(k - 1, images - 1, better + np.arange(tied + 1), n - 1).mean() for better, tied in pairs]
    )
    return found[place.ravel()]


def identify(better_B: NDArray[np.integer], tied_B: NDArray[np.integer], images: int) -> Floats:
    """Return the share of other images that are less similar to the trial than its own image (two-way identification).

    Chance is 0.5, also for embeddings that are all equal, because an image that is equally similar is counted as one
    half.
    """
    return 1 - (better_B + tied_B / 2) / (images - 1)


def match_images(embeds_BP: NDArray[Any], target_MP: NDArray[Any], row_B: NDArray[np.integer]) -> float:
    """Pair EEG embeddings and images one to one (bipartite matching), and return the share of right pairs.

    The EEG embeddings of all trials of an image are averaged first. A matching uses all test trials together (it is
    transductive), so the share cannot be compared with the scores of a retrieval that searches with each trial alone.
    """
    from scipy.optimize import linear_sum_assignment

    shown = np.unique(row_B)
    embeds = _normalise(embeds_BP, "EEG embeddings")
    means = np.stack([embeds[row_B == row].mean(axis=0) for row in shown])
    similarity = _normalise(means, "EEG embeddings") @ _normalise(target_MP[shown], "image embeddings").T
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float((rows == columns).mean())


def measure_hubness(embeds_BP: NDArray[Any], target_MP: NDArray[Any], k: int = 10) -> dict[str, float]:
    """Measure hubness: whether a few images (hubs) are among the nearest images of most trials.

    Parameters
    ----------
    embeds_BP, target_MP : ndarray
        Embeddings of the trials and of the images.
    k : int
        Number of images that are found for each trial: the `k` images nearest to its embedding.

    Returns
    -------
    dict
        For each image, the trials that have this image among their k nearest images are counted. ``k``: the number k.
        ``skewness``: skewness of these counts over the images. ``never``: share of images whose count is zero.
        ``largest``: largest count, divided by the number of trials.

    References
    ----------
    Radovanović et al., "Hubs in space", JMLR 11 (2010).
    """
    from scipy.stats import skew

    embeds, target = _normalise(embeds_BP, "EEG embeddings"), _normalise(target_MP, "image embeddings")
    k = min(k, len(target) - 1)
    counts = np.zeros(len(target), np.int64)
    size = max(1, _PART // len(target))
    for start in range(0, len(embeds), size):
        similarity_BM = embeds[start : start + size] @ target.T
        nearest = np.argpartition(-similarity_BM, k - 1, axis=1)[:, :k]
        counts += np.bincount(nearest.ravel(), minlength=len(target))
    spread = float(skew(counts)) if counts.std() else 0.0
    return {
        "k": k,
        "skewness": spread,
        "never": float((counts == 0).mean()),
        "largest": float(counts.max() / len(embeds)),
    }
