"""How sure a probe's numbers are, where trials of one image or of one subject are not independent.

Letters in names: n trials.
"""

from __future__ import annotations

import numpy as np

_EXACT = 14
"""Clusters up to which every flip of signs is tried."""
FEWEST_SUBJECTS = 6
"""Below, no flip of whole subjects' signs can reach p = 0.05."""


def accuracy_interval(hits_n: np.ndarray, images_n: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy, where trials of one image are not independent.

    Parameters
    ----------
    hits_n : ndarray, [n]
        1 for a right answer, else 0; or a share, of several classifiers.
    images_n : ndarray, [n]
        The image of each trial.

    Returns
    -------
    low, high : float
        Wilson's interval for the number of independent trials that the scatter between images leaves.
    """
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=hits_n), np.bincount(image_n)
    n, images, share = len(hits_n), len(sums), float(hits_n.mean())
    # All right or all wrong shows no scatter: count each image once.
    effect = n / images
    if 0 < share < 1 and images > 1:
        clustered = ((sums - share * counts) ** 2).sum() / n**2 * images / (images - 1)
        effect = max(1.0, clustered / (share * (1 - share) / n))
    effective, z = n / effect, 1.959964
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def difference_interval(more_n: np.ndarray, clusters_n: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean difference, resampling whole clusters.

    Parameters
    ----------
    more_n : ndarray, [n]
        A number a trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    resamples : int
        Number of resamples.
    seed : int
        Of the resampling.

    Returns
    -------
    low, high : float
        The interval.
    """
    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums, counts = np.bincount(cluster_n, weights=more_n), np.bincount(cluster_n)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def flip_test(more_n: np.ndarray, clusters_n: np.ndarray, permutations: int, seed: int) -> float:
    """Two-sided p-value of a mean difference between two methods on the same trials.

    If neither method is better, each cluster's difference could as well have had the other sign.

    Parameters
    ----------
    more_n : ndarray, [n]
        Difference of each trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    permutations : int
        Random flips, where there are too many clusters to try them all.
    seed : int
        Of the flips.

    Returns
    -------
    float
        Share of the flips, the observed one among them, that give as large a difference.
    """
    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums = np.bincount(cluster_n, weights=more_n)
    sums = sums[sums != 0]
    # A hair's breadth: sums of fractions in another order.
    observed = abs(sums.sum()) - 1e-9
    if len(sums) <= _EXACT:
        flips = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float((abs(flips @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    as_large, done = 0, 0
    block = max(1, 4_000_000 // len(sums))
    while done < permutations:
        count = min(block, permutations - done)
        flips = 1 - 2 * rng.integers(0, 2, size=(count, len(sums)), dtype=np.int8)
        as_large += int((abs(flips @ sums) >= observed).sum())
        done += count
    return (1 + as_large) / (1 + permutations)
