"""Intervals and tests for the accuracies of a probe.

Trials of one image are not independent, and neither are trials of one subject. Each interval and each test therefore
treats all trials of an image, or all trials of a subject, as one unit (a cluster).

Letters of shapes: see `pretrain.model`.
"""

from __future__ import annotations

import numpy as np

_EXACT = 14
"""Up to this many clusters all combinations of signs are tried (2 ** 14 of them)."""
FEWEST_SUBJECTS = 6
"""With fewer subjects than this, no test over subjects can reach p = 0.05."""


def accuracy_interval(hits_n: np.ndarray, images_n: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % interval of an accuracy, allowing for trials of one image that are not independent.

    Parameters
    ----------
    hits_n : ndarray, [n]
        1 for a right answer, 0 for a wrong one; or the share of right answers among several classifiers.
    images_n : ndarray, [n]
        Image of each trial.

    Returns
    -------
    low, high : float
        Wilson's interval for the effective number of trials. This is the number of independent trials whose mean would
        vary as much as the mean of the clustered trials does.
    """
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=hits_n), np.bincount(image_n)
    n, images, share = len(hits_n), len(sums), float(hits_n.mean())
    # If all answers are right, or all wrong, nothing scatters: count each image as one trial.
    effect = n / images
    if 0 < share < 1 and images > 1:
        clustered = ((sums - share * counts) ** 2).sum() / n**2 * images / (images - 1)
        effect = max(1.0, clustered / (share * (1 - share) / n))
    # Written out, because SciPy's binomtest(...).proportion_ci takes whole numbers of trials and hits only. For whole
    # numbers a test compares the two.
    effective, z = n / effect, 1.959964
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def difference_interval(more_n: np.ndarray, clusters_n: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a mean difference; whole clusters are resampled.

    Parameters
    ----------
    more_n : ndarray, [n]
        Difference of each trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    resamples : int
        Number of resamples.
    seed : int
        Seed for the resampling.

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
    """Compute the two-sided p-value of a mean difference between two methods on the same trials.

    If neither method is better, the difference of each cluster could as well have the opposite sign. The test
    therefore flips the signs of whole clusters.

    Parameters
    ----------
    more_n : ndarray, [n]
        Difference of each trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    permutations : int
        Number of random combinations of signs, if there are too many clusters to try all combinations.
    seed : int
        Seed for the random signs.

    Returns
    -------
    float
        Share of the combinations of signs, the observed one included, whose total difference is at least as large.
    """
    from scipy.stats import permutation_test

    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums = np.bincount(cluster_n, weights=more_n)
    # Flipping a zero changes nothing.
    sums = sums[sums != 0]
    if len(sums) < 2:
        # Both signs of a single difference are equally large, and SciPy wants at least two.
        return 1.0

    def total(sums: np.ndarray, axis: int = -1) -> np.ndarray:
        # Rounded: the same fractions added in another order differ in their last digits, and must count as equal.
        return np.round(np.abs(sums.sum(axis=axis)), 9)

    exact = len(sums) <= _EXACT
    found = permutation_test(
        (sums,),
        total,
        permutation_type="samples",
        n_resamples=2 ** len(sums) if exact else permutations,
        batch=max(1, 4_000_000 // len(sums)),
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
