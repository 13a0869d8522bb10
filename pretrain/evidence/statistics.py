"""Confidence intervals and significance tests for the accuracies of a probe.

Trials of one image are not independent of each other, and neither are trials of one subject. Each interval and each
test therefore treats all trials of an image, or all trials of a subject, as one unit (a cluster).

The docstring of `pretrain.model` explains letters such as BCT in `x_BCT`.
"""

from __future__ import annotations

import numpy as np

_EXACT = 14
"""Up to this number of clusters, the permutation test tries all combinations of signs (at most 2 ** 14
combinations)."""
FEWEST_SUBJECTS = 6
"""Smallest number of subjects for which a permutation test over subjects can reach p < 0.05."""


def accuracy_interval(hits_n: np.ndarray, images_n: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % confidence interval of an accuracy. Trials of one image are not assumed to be independent.

    Parameters
    ----------
    hits_n : ndarray, [n]
        For each trial, 1 for a right answer and 0 for a wrong one; for several classifiers, the share of right answers.
    images_n : ndarray, [n]
        Image of each trial.

    Returns
    -------
    low, high : float
        Wilson's interval for the effective number of trials. The effective number is the number of independent trials
        whose mean would have the same variance as the mean of the clustered trials.
    """
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=hits_n), np.bincount(image_n)
    n, images, share = len(hits_n), len(sums), float(hits_n.mean())
    # If the variance between images cannot be estimated, because all answers are right, all are wrong, or all trials
    # are of one image, each image is treated as one trial.
    effect = n / images
    if 0 < share < 1 and images > 1:
        clustered = ((sums - share * counts) ** 2).sum() / n**2 * images / (images - 1)
        effect = max(1.0, clustered / (share * (1 - share) / n))
    # Wilson's formula is written out here, because SciPy's binomtest(...).proportion_ci takes only whole numbers of
    # trials. A unit test compares the results with SciPy's results for whole numbers.
    effective, z = n / effect, 1.959964
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def difference_interval(more_n: np.ndarray, clusters_n: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a mean difference, by resampling whole clusters.

    Parameters
    ----------
    more_n : ndarray, [n]
        Difference between the two methods in each trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    resamples : int
        Number of resamples.
    seed : int
        Seed of the random numbers for the resampling.

    Returns
    -------
    low, high : float
        Lower and upper end of the interval.
    """
    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums, counts = np.bincount(cluster_n, weights=more_n), np.bincount(cluster_n)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def crossed_interval(
    values_n: np.ndarray, subjects_n: np.ndarray, images_n: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a mean, by resampling subjects and images at the same time.

    Several subjects see the same images, so neither subjects nor images alone are independent units. The bootstrap
    draws subjects and images with replacement. The weight of a trial is the product of two numbers: how often its
    subject was drawn, and how often its image was drawn. The interval is rather too wide than too narrow (Owen, The
    pigeonhole bootstrap, 2007).

    Parameters
    ----------
    values_n : ndarray, [n]
        Value of each trial, for example the difference between two methods.
    subjects_n, images_n : ndarray, [n]
        Subject and image of each trial.
    resamples : int
        Number of resamples.
    seed : int
        Seed of the random numbers for the resampling.

    Returns
    -------
    low, high : float
        Lower and upper end of the interval.
    """
    rng = np.random.default_rng(seed)
    means = []
    drawn_n = [np.unique(names, return_inverse=True)[1] for names in (subjects_n, images_n)]
    sizes = [int(number.max()) + 1 for number in drawn_n]
    while len(means) < resamples:
        weight_n = np.ones(len(values_n))
        for number, size in zip(drawn_n, sizes, strict=True):
            weight_n *= np.bincount(rng.integers(size, size=size), minlength=size)[number]
        if total := weight_n.sum():  # With few subjects and images, the weights of all trials can be 0.
            means.append(float((values_n * weight_n).sum() / total))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def flip_test(more_n: np.ndarray, clusters_n: np.ndarray, permutations: int, seed: int) -> float:
    """Compute the two-sided p-value of a mean difference between two methods on the same trials.

    If both methods are equally good, the difference of each cluster has either sign with equal probability. The test
    therefore flips the signs of whole clusters.

    Parameters
    ----------
    more_n : ndarray, [n]
        Difference between the two methods in each trial.
    clusters_n : ndarray, [n]
        The image, or the subject, of each trial.
    permutations : int
        Number of random combinations of signs, if there are too many clusters to try all combinations.
    seed : int
        Seed of the random numbers for the signs.

    Returns
    -------
    float
        The p-value: the share of combinations of signs whose total difference is at least as large as the observed
        difference. The observed combination of signs is included.
    """
    from scipy.stats import permutation_test

    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums = np.bincount(cluster_n, weights=more_n)
    # Leave out differences of zero, because a change of sign has no effect on them.
    sums = sums[sums != 0]
    if len(sums) < 2:
        # With fewer than two differences, p is 1, because a change of sign does not change the absolute value. SciPy's
        # test needs at least two differences.
        return 1.0

    def total(sums: np.ndarray, axis: int = -1) -> np.ndarray:
        # Round the sums, because sums of the same fractions in a different order differ in their last digits, but must
        # be treated as equal.
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
