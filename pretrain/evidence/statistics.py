"""Confidence intervals, significance tests and noise ceilings for the scores of trials.

Trials of one image are not independent of each other, and neither are trials of one subject. Each interval and each
test therefore treats all trials of an image, or all trials of a subject, as one unit (a cluster).

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters. In
this file, V is the number of sets of values, R of resamples, S of people, I of images, and P of permutations.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from data_sharding.common.errors import RequestError

_EXACT = 14
"""Largest number of clusters for which the permutation test tries all combinations of signs, at most 2 ** 14
combinations."""
FEWEST_SUBJECTS = 6
"""Smallest number of subjects for which a permutation test over subjects can reach p < 0.05. With fewer subjects, a
verdict makes no claim about people."""
FEWEST_IMAGES = 10
"""Smallest number of images with which a bootstrap over images may decide a verdict."""
_CELLS = 4_000_000
"""Largest number of elements in an array of resamples, to limit the memory."""


def accuracy_interval(hits_n: np.ndarray, images_n: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % confidence interval of an accuracy. Trials of one image may depend on each other.

    Parameters
    ----------
    hits_n : ndarray, [n]
        For each trial, 1 for a right answer and 0 for a wrong answer; for several classifiers, the share of right
        answers.
    images_n : ndarray, [n]
        Image of each trial.

    Returns
    -------
    low, high : float
        Bounds of Wilson's interval, with the effective number of trials as the sample size. The effective number is the
        number of independent trials whose mean would have the same variance as the mean of the clustered trials.
    """
    check_finite(hits_n, "the hits")
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=hits_n), np.bincount(image_n)
    n, images, share = len(hits_n), len(sums), float(hits_n.mean())
    # The variance between images cannot be estimated if all answers are right, if all are wrong, or if all trials are
    # of one image. Each image then counts as one trial.
    effect = n / images
    if 0 < share < 1 and images > 1:
        clustered = ((sums - share * counts) ** 2).sum() / n**2 * images / (images - 1)
        effect = max(1.0, clustered / (share * (1 - share) / n))
    # Wilson's formula is written out here, because SciPy's binomtest(...).proportion_ci takes only whole numbers of
    # trials. For whole numbers of trials, a unit test compares the results with SciPy's results.
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
    check_finite(more_n, "the differences")
    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums, counts = np.bincount(cluster_n, weights=more_n), np.bincount(cluster_n)
    rng, size = np.random.default_rng(seed), max(1, _CELLS // len(sums))
    means = np.empty(resamples)
    for start in range(0, resamples, size):
        part = means[start : start + size]
        drawn = rng.integers(len(sums), size=(len(part), len(sums)))
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def crossed_interval(
    values_n: np.ndarray, subjects_n: np.ndarray, images_n: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a mean, by resampling subjects and images at the same time.

    Several subjects see the same images, so neither subjects nor images alone are independent units. The bootstrap
    draws subjects and images with replacement. The weight of a trial is the product of two numbers: how often its
    subject was drawn, and how often its image was drawn. The interval is more often too wide than too narrow (Owen, The
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
    (means_R,) = resample_crossed(np.asarray(values_n)[None], subjects_n, images_n, resamples, seed)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def resample_crossed(
    values_Vn: np.ndarray, subjects_n: np.ndarray, images_n: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Compute the means of resamples in which subjects and images are drawn at the same time; see `crossed_interval`.

    Parameters
    ----------
    values_Vn : ndarray, [V, n]
        V sets of values, each with one value for each of the n trials. The same resamples are used for all sets.
    subjects_n, images_n : ndarray, [n]
        Subject and image of each trial.
    resamples : int
        Number of resamples.
    seed : int
        Seed of the random numbers for the resampling.

    Returns
    -------
    ndarray, [V, R]
        Mean of each set in each resample.

    Raises
    ------
    RequestError
        If a value is NaN or infinite.
    """
    check_finite(values_Vn, "the values of the trials")
    subjects, subject_n = np.unique(subjects_n, return_inverse=True)
    images, image_n = np.unique(images_n, return_inverse=True)
    people, pictures = len(subjects), len(images)
    cell_n = subject_n * pictures + image_n
    sums_VSI = np.stack([np.bincount(cell_n, weights=values_n, minlength=people * pictures) for values_n in values_Vn])
    sums_VSI = sums_VSI.reshape(-1, people, pictures)
    counts_SI = np.bincount(cell_n, minlength=people * pictures).reshape(people, pictures).astype(float)
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    while (missing := resamples - sum(part.shape[1] for part in parts)) > 0:
        size = min(missing, max(1, _CELLS // pictures))
        # Count how often each subject and each image is drawn.
        drawn_RS = rng.multinomial(people, np.full(people, 1 / people), size=size).astype(float)
        drawn_RI = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=size).astype(float)
        total_R = ((drawn_RS @ counts_SI) * drawn_RI).sum(axis=1)
        # With few subjects and images, a bootstrap resample can give every trial the weight 0. A resample without any
        # weight is drawn again.
        good_R = total_R > 0
        sums_VR = np.stack([((drawn_RS @ sums_SI) * drawn_RI).sum(axis=1) for sums_SI in sums_VSI])
        parts.append(sums_VR[:, good_R] / total_R[good_R])
    return np.concatenate(parts, axis=1)


def flip_test(more_n: np.ndarray, clusters_n: np.ndarray, permutations: int, seed: int) -> float:
    """Compute the two-sided p-value of a mean difference between two methods on the same trials.

    If both methods are equally good, the difference of a cluster is positive or negative with equal probability. The
    test therefore flips the signs of whole clusters.

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
        The p-value: the share of combinations of signs for which the sum of the differences is, without its sign, at
        least as large as the observed sum. The observed combination is included, so the p-value is above 0.
    """
    from scipy.stats import permutation_test

    check_finite(more_n, "the differences")
    _, cluster_n = np.unique(clusters_n, return_inverse=True)
    sums = np.bincount(cluster_n, weights=more_n)
    # Leave out differences of zero, because a change of sign does not change zero.
    sums = sums[sums != 0]
    if len(sums) < 2:
        # With fewer than two differences, p is 1, because a change of the sign does not change the absolute value of
        # the sum. SciPy's test needs at least two differences.
        return 1.0

    def total(sums: np.ndarray, axis: int = -1) -> np.ndarray:
        # If the same fractions are added in another order, the sums can differ in their last digits. Round the sums, so
        # that equal sums count as equal.
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


def check_finite(values: ArrayLike, what: str) -> None:
    """Raise a `RequestError` if a value is NaN or infinite. The error message calls the values `what`."""
    array = np.asarray(values, float)
    if bad := int((~np.isfinite(array)).sum()):
        raise RequestError(f"{what}: {bad} of {array.size} values are NaN or infinite; give only finite values")


def holm(p_values: ArrayLike) -> np.ndarray:
    """Correct several p-values, so that the probability of any false finding is at most the level of significance.

    Parameters
    ----------
    p_values : array, [m]
        The p-values of all tests that are corrected together.

    Returns
    -------
    ndarray, [m]
        Corrected p-values, at most 1. The smallest p-value is multiplied by m, the second smallest p-value by m - 1,
        and so on. Corrected p-values keep the order of the p-values: a larger p-value never gets a smaller corrected
        value.

    References
    ----------
    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, float)
    check_finite(p, "the p-values")
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return corrected


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean difference between two methods on the same trials, with its intervals and tests."""

    mean: float
    """Mean difference over all trials."""
    over_images: tuple[float, float] | None
    """95 % interval of a bootstrap that draws images, with the same people in every resample; None for fewer than two
    images."""
    over_people: tuple[float, float] | None
    """95 % interval over people; None if there are fewer than `FEWEST_SUBJECTS` people, or if the question is only
    about these people."""
    decides: str
    """What the bootstrap of `interval` draws: "people and images", "people" or "images"."""
    interval: tuple[float, float]
    """The 95 % interval that decides whether a comparison holds."""
    p: float
    """Two-sided p-value from the bootstrap resamples of `interval`."""
    p_people: float | None
    """Two-sided p-value of `flip_test` over people; None if `over_people` is None."""


def compare_paired(
    more_Vn: np.ndarray,
    images_n: np.ndarray,
    subjects_n: np.ndarray,
    *,
    same_people: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> list[PairedDifference]:
    """Compute intervals and tests of paired differences, over images, over people, and over both.

    Parameters
    ----------
    more_Vn : ndarray, [V, n]
        Sets of differences in the same n trials, for example between a model and each of several controls.
    images_n, subjects_n : ndarray, [n]
        Image and subject of each trial.
    same_people : bool
        True if the result is claimed only for the people in the data. The bootstrap of `interval` then keeps these
        people and draws only images.
    resamples : int
        Number of bootstrap resamples, and of random permutations.
    seed : int
        Seed of the random numbers.

    Returns
    -------
    list of PairedDifference
        One result for each set of differences. With at least `FEWEST_SUBJECTS` people and `FEWEST_IMAGES` images,
        `interval` comes from a bootstrap that draws people and images. With fewer people, or if `same_people` is true,
        the bootstrap draws only images, and the result holds only for these people. With fewer images, the bootstrap
        draws only people, and the result holds only for these images.

    Raises
    ------
    RequestError
        If a difference is NaN or infinite, or if there are too few people and too few images.
    """
    check_finite(more_Vn, "the differences")
    people, images = len(np.unique(subjects_n)), len(np.unique(images_n))
    enough_people, enough_images = people >= FEWEST_SUBJECTS and not same_people, images >= FEWEST_IMAGES
    if not enough_people and not enough_images:
        raise RequestError(
            f"{people} people and {images} images are too few for an interval; give trials of at least "
            f"{FEWEST_SUBJECTS} people or of at least {FEWEST_IMAGES} images"
        )
    one_n = np.zeros(len(images_n), int)
    decides = " and ".join(["people"] * enough_people + ["images"] * enough_images)
    drawn = (subjects_n if enough_people else one_n, images_n if enough_images else one_n)
    means_VR = resample_crossed(more_Vn, *drawn, resamples, seed)
    found = []
    for more_n, means_R in zip(more_Vn, means_VR, strict=True):
        low, high = np.percentile(means_R, [2.5, 97.5])
        tail = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
        by_people = (more_n, subjects_n, resamples, seed)
        found.append(
            PairedDifference(
                mean=float(more_n.mean()),
                over_images=difference_interval(more_n, images_n, resamples, seed) if images > 1 else None,
                over_people=difference_interval(*by_people) if enough_people else None,
                decides=decides,
                interval=(float(low), float(high)),
                p=min(1.0, 2 * (1 + tail) / (1 + resamples)),
                p_people=flip_test(*by_people) if enough_people else None,
            )
        )
    return found


def permute_labels(
    labels_n: np.ndarray, blocks_n: np.ndarray, images_n: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    """Shuffle labels within blocks. All repeats of an image in a block get the same new label.

    Parameters
    ----------
    labels_n : ndarray, [n]
        Label of each trial. All trials of an image have the same label.
    blocks_n : ndarray, [n]
        Block of each trial, for example from `pretrain.evidence.trials.find_neighbourhoods`.
    images_n : ndarray, [n]
        Image of each trial.
    permutations : int
        Number of shuffles.
    seed : int
        Seed of the random numbers.

    Returns
    -------
    ndarray, [P, n]
        Shuffled labels. In each block, the labels of the different images are exchanged between these images.

    Raises
    ------
    RequestError
        If trials of one image have different labels.
    """
    (_, block_n), (_, image_n) = (np.unique(names, return_inverse=True) for names in (blocks_n, images_n))
    label_n = np.unique(labels_n, return_inverse=True)[1]
    if np.unique(np.stack([image_n, label_n]), axis=1).shape[1] > image_n.max() + 1:
        raise RequestError("trials of one image have different labels; give each image one label")
    _, first, unit_n = np.unique(block_n * (image_n.max() + 1) + image_n, return_index=True, return_inverse=True)
    # A unit is an image in a block (U counts units). `np.unique` sorts the units by block, so the units of a block are
    # neighbours in `label_U` and `block_U`.
    label_U, block_U = np.asarray(labels_n)[first], block_n[first]
    rng = np.random.default_rng(seed)
    shuffled = [label_U[np.lexsort((rng.random(len(first)), block_U))][unit_n] for _ in range(permutations)]
    return np.stack(shuffled)


def split_half_reliability(values_nF: np.ndarray, images_n: np.ndarray, *, splits: int = 100, seed: int = 0) -> float:
    """Compute the noise ceiling of responses to images: compare two halves of the repeats of each image.

    Parameters
    ----------
    values_nF : ndarray, [n, F]
        Values of each trial, such as features of the EEG or an embedding that is predicted from the EEG.
    images_n : ndarray, [n]
        Image of each trial. To measure the reliability within each person, give each pair of person and image a name of
        its own.
    splits : int
        Number of random splits.
    seed : int
        Seed of the random splits.

    Returns
    -------
    float
        Correlation over images between the mean of one half of the repeats and the mean of the other half. The
        correlation r is averaged over features and splits. The formula of Spearman and Brown, 2 r / (1 + r), then
        estimates the correlation for all repeats from the correlation for half of the repeats. No model can correlate
        much better with the mean of all repeats than the square root of this value, even if the model knows the
        response without noise.

    Raises
    ------
    RequestError
        If a value is NaN or infinite, if fewer than three images have two trials, or if no feature varies.
    """
    check_finite(values_nF, "the values of the trials")
    values_nF = np.asarray(values_nF, float)
    _, image_n, count_n = np.unique(images_n, return_inverse=True, return_counts=True)
    kept = count_n[image_n] >= 2
    if (count_n >= 2).sum() < 3:
        raise RequestError("fewer than three images have repeats; the noise ceiling needs repeats of at least 3 images")
    x_nF, image_n = values_nF[kept], np.unique(image_n[kept], return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    found = [_correlate_halves(x_nF, image_n, rng) for _ in range(splits)]
    if not np.isfinite(found).any():
        raise RequestError("no feature varies between images, so there is no correlation; give features that vary")
    r = float(np.nanmean(found))
    return 2 * r / (1 + r) if r > -1 else -1.0


def _correlate_halves(x_nF: np.ndarray, image_n: np.ndarray, rng: np.random.Generator) -> float:
    """Split the repeats of each image into two halves, and correlate the means of the halves over images."""
    order = np.lexsort((rng.random(len(image_n)), image_n))
    begin_I = np.flatnonzero(np.diff(image_n[order], prepend=-1))
    place_n = np.arange(len(order)) - np.repeat(begin_I, np.diff(begin_I, append=len(order)))
    halves = []
    for half in (0, 1):
        rows = order[place_n % 2 == half]
        sums_IF = np.zeros((len(begin_I), x_nF.shape[1]))
        np.add.at(sums_IF, image_n[rows], x_nF[rows])
        halves.append(sums_IF / np.bincount(image_n[rows])[:, None])
    first_IF, other_IF = (half - half.mean(axis=0) for half in halves)
    scale_F = np.sqrt((first_IF**2).sum(axis=0) * (other_IF**2).sum(axis=0))
    good = scale_F > 1e-12
    return float(((first_IF * other_IF).sum(axis=0)[good] / scale_F[good]).mean()) if good.any() else np.nan


def repeat_agreement(predicted_n: np.ndarray, images_n: np.ndarray) -> float:
    """Compute how often two repeats of an image get the same predicted label.

    Parameters
    ----------
    predicted_n : ndarray, [n]
        Predicted label of each trial.
    images_n : ndarray, [n]
        Image of each trial. To measure the agreement within each person, give each pair of person and image a name of
        its own.

    Returns
    -------
    float
        Share of pairs of repeats with the same prediction; each image has the same weight. Predictions that differ
        between repeats of an image cannot all be right. If repeats are independent, the expected accuracy of single
        trials is at most the square root of the agreement.

    Raises
    ------
    RequestError
        If no image has two trials.
    """
    _, image_n, count_I = np.unique(images_n, return_inverse=True, return_counts=True)
    labels, label_n = np.unique(predicted_n, return_inverse=True)
    if not (count_I >= 2).any():
        raise RequestError("no image has two trials; the agreement of repeats needs repeated images")
    votes_IL = np.zeros((len(count_I), len(labels)))
    np.add.at(votes_IL, (image_n, label_n), 1)
    kept = count_I >= 2
    pairs_I = (votes_IL * (votes_IL - 1)).sum(axis=1)[kept] / (count_I * (count_I - 1))[kept]
    return float(pairs_I.mean())
