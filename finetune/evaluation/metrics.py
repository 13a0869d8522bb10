"""Metrics of whole sets of images, metrics of classifications, and tests of statistical significance.

All functions take NumPy arrays. The functions accept features and probabilities of any network. Features are read in
blocks, so no function needs a copy of all features in double precision.

Array shapes: B images, D feature width, K classes, N trials, M different images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
JUDGE = "dataset-classifier"
"""Name of this project's image classifier in the results. A Fréchet distance of this classifier's features must not be
called FID, because the FID uses features of Inception-V3."""
BLOCK_ROWS, BLOCK_VALUES = 1024, 2**22
"""Largest number of rows, and of values, that are converted to double precision at once."""


def check_numbers(values: Any, name: str) -> None:
    """Raise a ValueError if an array holds NaN or infinity; `name` is the array's name in the message."""
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ValueError(f"{name}: row {row} holds {np.asarray(values)[bad][0]}; give finite numbers")


def iterate_blocks(features_BD: Floats, name: str) -> Iterator[NDArray[np.float64]]:
    """Iterate over blocks of rows in double precision, and raise a ValueError for NaN and infinity."""
    rows = max(1, min(BLOCK_ROWS, BLOCK_VALUES // max(1, features_BD.shape[1])))
    for start in range(0, len(features_BD), rows):
        block = np.asarray(features_BD[start : start + rows], np.float64)
        check_numbers(block, f"{name} from row {start} on")
        yield block


def _check_features(real_BD: Floats, generated_BD: Floats) -> None:
    shapes = np.shape(real_BD), np.shape(generated_BD)
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"need features of equal width for two or more images in each set, not {shapes[0]} and {shapes[1]}"
        )


class RunningGaussian:
    """Mean and covariance of features that are added block by block.

    Attributes
    ----------
    count : int
        Number of rows so far.
    mean_D : ndarray
        Mean of all rows that were added so far.

    References
    ----------
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_D: NDArray[np.float64] = np.zeros(0)
        self._scatter_DD: NDArray[np.float64] = np.zeros((0, 0))

    def add(self, block_BD: Floats) -> None:
        """Add any number of rows of features [B, D]."""
        block = np.asarray(block_BD, np.float64)
        if not len(block):
            return
        mean_D = block.mean(axis=0)
        centred = block - mean_D
        scatter_DD = centred.T @ centred
        if not self.count:
            self.count, self.mean_D, self._scatter_DD = len(block), mean_D, scatter_DD
            return
        total = self.count + len(block)
        shift_D = mean_D - self.mean_D
        self._scatter_DD += scatter_DD + np.outer(shift_D, shift_D) * (self.count * len(block) / total)
        self.mean_D = self.mean_D + shift_D * (len(block) / total)
        self.count = total

    @property
    def covariance_DD(self) -> NDArray[np.float64]:
        """Unbiased covariance of all rows so far; at least two rows must have been added."""
        return self._scatter_DD / (self.count - 1)


def _compare_few(real_BD: NDArray[np.float64], generated_BD: NDArray[np.float64]) -> float:
    """Compute the Fréchet distance of features with fewer rows than columns, without a (columns x columns) matrix."""
    means = real_BD.mean(axis=0), generated_BD.mean(axis=0)
    a, b = (
        (rows_BD - mean_D) / np.sqrt(len(rows_BD) - 1)
        for rows_BD, mean_D in zip((real_BD, generated_BD), means, strict=True)
    )
    # With S_r = a'a and S_g = b'b, the trace of (S_r S_g)^(1/2) is the sum of the singular values of a b'.
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    mean = np.square(means[0] - means[1]).sum()
    return float(max(0.0, mean + np.square(a).sum() + np.square(b).sum() - 2 * cross))


def _compare_gaussians(real: RunningGaussian, generated: RunningGaussian) -> float:
    """Compute the Fréchet distance between two Gaussian distributions."""
    cov_r, cov_g = real.covariance_DD, generated.covariance_DD
    # Tr (S_r S_g)^(1/2) is computed as the trace of the square root of S_r^(1/2) S_g S_r^(1/2): the two traces are
    # equal, and the second matrix is symmetric, so that its square root has no complex numbers.
    values, vectors = np.linalg.eigh(cov_r)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_g @ root).clip(0)).sum()
    mean = np.square(real.mean_D - generated.mean_D).sum()
    return float(max(0.0, mean + np.trace(cov_r) + np.trace(cov_g) - 2 * cross))


def frechet_distance(real_BD: Floats, generated_BD: Floats) -> float:
    """Compute the Fréchet distance between two sets of features, each treated as Gaussian.

    With features of Inception-V3, the Fréchet distance is the FID.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features of real and generated images. Each array needs two rows or more; the numbers of rows may differ.

    Returns
    -------
    float
        ``|mu_r - mu_g|^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2))``. If there are few images, the Fréchet distance is
        overestimated.

    Raises
    ------
    ValueError
        If an array has fewer than two rows, the two feature widths differ, or a feature is NaN or infinite.

    References
    ----------
    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017.
    """
    _check_features(real_BD, generated_BD)
    if max(len(real_BD), len(generated_BD)) <= min(BLOCK_ROWS, np.shape(real_BD)[1]):
        real_rows_BD = np.concatenate([*iterate_blocks(real_BD, "real_BD")])
        return _compare_few(real_rows_BD, np.concatenate([*iterate_blocks(generated_BD, "generated_BD")]))
    real, generated = RunningGaussian(), RunningGaussian()
    for gaussian, features_BD, name in ((real, real_BD, "real_BD"), (generated, generated_BD, "generated_BD")):
        for block in iterate_blocks(features_BD, name):
            gaussian.add(block)
    return _compare_gaussians(real, generated)


def _mean_kernel(
    x_BD: Floats, y_BD: Floats, same: Callable[[NDArray[np.integer], NDArray[np.integer]], NDArray[np.bool_]]
) -> float:
    """Compute the mean of the cubic kernel in blocks, over all pairs of rows except the pairs that `same` selects."""
    total, count, width = 0.0, 0, x_BD.shape[1]
    first = 0
    for x in iterate_blocks(x_BD, "features"):
        second = 0
        for y in iterate_blocks(y_BD, "features"):
            used = ~same(np.arange(first, first + len(x)), np.arange(second, second + len(y)))
            total += float(((x @ y.T / width + 1) ** 3)[used].sum())
            count += int(used.sum())
            second += len(y)
        first += len(x)
    if not count:
        raise ValueError("need features of two different images or more in each set")
    return total / count


def kernel_distance(
    real_BD: Floats,
    generated_BD: Floats,
    *,
    real_ids: Sequence[str] | None = None,
    generated_ids: Sequence[str] | None = None,
) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the cubic kernel.

    With features of Inception-V3, the squared maximum mean discrepancy is the KID. The estimate is unbiased only if the
    two rows of every compared pair are independent. Several trials may show the same image, and then their rows are not
    independent. If ids are given, only one row of each real image is used, and pairs of rows with the same id are left
    out, even if one row belongs to a real image and the other row to a generated image.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features of real and generated images. Each array needs two rows or more.
    real_ids, generated_ids : sequence of str, optional
        Id of the image that the person saw, for each row. Without ids, all rows are treated as independent.

    Returns
    -------
    float
        Discrepancy, which may be negative. If both sets come from the same distribution, the expected discrepancy is
        zero for any number of images.

    Raises
    ------
    ValueError
        If an array has fewer than two rows or two different images, the feature widths differ, a feature is NaN or
        infinite, or only one array has ids.

    References
    ----------
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    _check_features(real_BD, generated_BD)
    if real_ids is None or generated_ids is None:
        if real_ids is not generated_ids:
            raise ValueError("give both real_ids and generated_ids, or neither of the two")
        return (
            _mean_kernel(real_BD, real_BD, lambda i, j: i[:, None] == j[None, :])
            + _mean_kernel(generated_BD, generated_BD, lambda i, j: i[:, None] == j[None, :])
            - 2 * _mean_kernel(real_BD, generated_BD, lambda i, j: np.zeros((len(i), len(j)), bool))
        )
    if (len(real_ids), len(generated_ids)) != (len(real_BD), len(generated_BD)):
        raise ValueError(
            f"need one id for each row, not {len(real_ids)} ids for {len(real_BD)} real rows and {len(generated_ids)} "
            f"ids for {len(generated_BD)} generated rows"
        )
    real_M, rows_M = np.unique(np.asarray(real_ids), return_index=True)
    own_B, once_MD = np.asarray(generated_ids), np.asarray(real_BD)[rows_M]
    return (
        _mean_kernel(once_MD, once_MD, lambda i, j: real_M[i][:, None] == real_M[j][None, :])
        + _mean_kernel(generated_BD, generated_BD, lambda i, j: own_B[i][:, None] == own_B[j][None, :])
        - 2 * _mean_kernel(once_MD, generated_BD, lambda i, j: real_M[i][:, None] == own_B[j][None, :])
    )


def inception_score(probabilities_BK: Floats) -> float:
    """Compute ``exp(mean KL(p(y|x) || p(y)))`` of a classifier's probabilities.

    With probabilities of Inception-V3, the result is the Inception Score.

    Parameters
    ----------
    probabilities_BK : ndarray, shape (B, K)
        Class probabilities of each image; every row sums to one.

    Returns
    -------
    float
        A value from 1 (all images have the same probabilities) to K.

    Raises
    ------
    ValueError
        If a probability is NaN or infinite.
    """
    p = np.asarray(probabilities_BK, np.float64)
    check_numbers(p, "probabilities_BK")
    marginal = p.mean(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def n_way_scores(scores_NK: Floats, labels_N: NDArray[np.integer], *, n: int, k: int = 1) -> NDArray[np.float64]:
    """Compute, for each trial, how often the true class wins against n - 1 random other classes.

    The result is the exact mean over all possible draws of the other classes, so no classes are drawn. Classes with
    equal scores are ordered at random, so a classifier that always gives equal scores has the value k / n.

    Parameters
    ----------
    scores_NK : ndarray, shape (N, K)
        Class probabilities of the generated images, or other scores that are higher for more likely classes.
    labels_N : ndarray of int, shape (N,)
        True class of each trial.
    n : int
        Number of compared classes, including the true class; from 2 to K.
    k : int
        A trial is correct if the true class is among the `k` best of the `n` compared classes.

    Returns
    -------
    ndarray, shape (N,)
        Probability that the trial is correct, from 0 to 1.

    Raises
    ------
    ValueError
        If `n`, `k` or a label is out of range, or if a score is NaN or infinite.
    """
    better_N, tied_N = _rank_true_class(scores_NK, labels_N, n, k)
    # With ties in random order, all ranks of the true class from `better` to `better + tied` are equally likely. The
    # sum of the probabilities over these ranks is a difference of two cumulative sums.
    summed = np.concatenate([[0.0], np.cumsum(_hit_by_rank(np.shape(scores_NK)[1], n, k))])
    return (summed[better_N + tied_N + 1] - summed[better_N]) / (tied_N + 1)


def _rank_true_class(
    scores_NK: Floats, labels_N: NDArray[np.integer], n: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the classes with a higher score than the true class, and the other classes with the same score."""
    scores, labels = np.asarray(scores_NK), np.asarray(labels_N)
    trials, classes = scores.shape
    if not 2 <= n <= classes or not 1 <= k < n:
        raise ValueError(f"need 2 <= n <= {classes} classes and 1 <= k < n, got n={n}, k={k}")
    if not trials or labels.shape != (trials,) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"need one label from 0 to {classes - 1} for each of one or more trials, got {labels.shape}")
    check_numbers(scores, "scores_NK")
    own = scores[np.arange(trials), labels][:, None]
    return (scores > own).sum(axis=1), (scores == own).sum(axis=1) - 1


def _hit_by_rank(classes: int, n: int, k: int) -> NDArray[np.float64]:
    """Return the probability of a correct trial for each number of classes that score higher than the true class."""
    from scipy.stats import hypergeom

    # A trial is correct if fewer than k of the n - 1 drawn classes have a higher score than the true class. The classes
    # are drawn from the K - 1 classes that are not the true class.
    return hypergeom.cdf(k - 1, classes - 1, np.arange(classes), n - 1)


def n_way_top_k(
    scores_NK: Floats, labels_N: NDArray[np.integer], *, n: int, k: int = 1, draws: int = 100, seed: int = 0
) -> dict[str, float]:
    """Compute the n-way top-k accuracy: how often the true class wins against n - 1 random other classes.

    Parameters
    ----------
    scores_NK, labels_N, n, k
        The arguments of `n_way_scores`.
    draws : int
        Number of times that n - 1 other classes are drawn for each trial, to compute ``std``.
    seed : int
        Seed for drawing the other classes.

    Returns
    -------
    dict
        ``accuracy``: mean of `n_way_scores`, which is the accuracy over all possible draws. ``std``: standard deviation
        of the accuracy over `draws` random draws, as in papers. ``chance``: k / n, the accuracy of a classifier that
        guesses. ``constant``: accuracy of the best classifier that predicts the same for every trial. If some labels
        are more frequent than others, ``constant`` is higher than ``chance``.

    Raises
    ------
    ValueError
        If `n`, `k` or a label is out of range, or if a score is NaN or infinite.

    References
    ----------
    Bai et al., "DreamDiffusion", arXiv 2306.16934, section 4.2; Chen et al., "Seeing beyond the brain", CVPR 2023.
    """
    hits_N = n_way_scores(scores_NK, labels_N, n=n, k=k)
    better_N, tied_N = _rank_true_class(scores_NK, labels_N, n, k)
    classes, rng = np.shape(scores_NK)[1], np.random.default_rng(seed)
    drawn = np.empty(draws)
    for draw in range(draws):
        ahead_N = better_N + rng.integers(0, tied_N + 1)
        drawn[draw] = (rng.hypergeometric(ahead_N, classes - 1 - ahead_N, n - 1) < k).mean()
    # The best constant prediction ranks the classes by their frequency among the labels.
    share_K = np.sort(np.bincount(labels_N, minlength=classes))[::-1] / len(labels_N)
    return {
        "accuracy": float(hits_N.mean()),
        "std": float(drawn.std()),
        "chance": k / n,
        "constant": float(share_K @ _hit_by_rank(classes, n, k)),
    }


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval for the success rate of n attempts."""
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def accuracy_with_p_value(
    predicted_N: NDArray[np.integer],
    labels_N: NDArray[np.integer],
    image_ids: list[str],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the classification accuracy and a p-value from shuffled labels.

    Trials of the same image are not independent. Therefore labels are shuffled between images, and all trials of an
    image get the same new label. The p-value would be too small if each trial got a new label of its own.

    Parameters
    ----------
    predicted_N, labels_N : ndarray of int, shape (N,)
        Predicted and true class of each trial.
    image_ids : list of str
        Id of the image of each trial. All trials of an image must have the same label.
    permutations : int
        Largest number of times that the labels are shuffled.
    seed : int
        Seed for shuffling the labels.

    Returns
    -------
    dict
        ``accuracy``: accuracy with the true labels. ``chance``: mean accuracy over all possible shuffles. ``constant``:
        accuracy of a classifier that always predicts the most frequent label. ``uniform``: 1 / (number of different
        labels in `labels_N`). ``n``: number of trials. ``images``: number of images. ``p_value``: (1 + k) / (1 + number
        of shuffles), where k is the number of shuffles whose accuracy is at least ``accuracy``. For few images, all
        possible shuffles are tried, and ``p_value`` is the exact share of shuffles whose accuracy is at least
        ``accuracy``. ``interval``: Wilson's 95 % confidence interval of the accuracy, which assumes independent trials.

    Raises
    ------
    ValueError
        If there is no trial, the lengths differ, or an image has two labels.
    """
    from scipy.stats import permutation_test

    predicted, labels = np.asarray(predicted_N), np.asarray(labels_N)
    if not len(predicted) or not len(predicted) == len(labels) == len(image_ids):
        raise ValueError(
            f"need the same number of predictions, labels and image ids, and at least 1 of each, got {len(predicted)}, "
            f"{len(labels)} and {len(image_ids)}"
        )
    names, row = np.unique(np.asarray(image_ids), return_inverse=True)
    label_of = np.zeros(len(names), np.int64)
    label_of[row] = labels
    if (label_of[row] != labels).any():
        raise ValueError(f"image {image_ids[int(np.argmax(label_of[row] != labels))]} has two labels")
    classes = int(max(predicted.max(), labels.max())) + 1
    votes_MK = np.zeros((len(names), classes), np.int64)
    np.add.at(votes_MK, (row, predicted), 1)
    own = int(votes_MK[np.arange(len(names)), label_of].sum())
    share_K = np.bincount(label_of, minlength=classes) / len(names)

    def count_right(labels_M: NDArray[np.integer], axis: int) -> NDArray[np.integer]:
        """Count the rightly predicted trials if the images have the labels `labels_M`, whose last axis is the image."""
        assert axis == -1
        return votes_MK[np.arange(len(names)), labels_M].sum(axis=-1)

    # With a single image, labels cannot be shuffled, so the p-value is 1.
    p_value = 1.0
    if len(names) > 1:
        found = permutation_test(
            (label_of,),
            count_right,
            permutation_type="pairings",
            vectorized=True,
            n_resamples=permutations,
            # Work in blocks of shuffles, to limit the memory that one call of `count_right` needs.
            batch=max(1, 2_000_000 // len(names)),
            alternative="greater",
            axis=-1,
            rng=np.random.default_rng(seed),
        )
        p_value = float(found.pvalue)
    return {
        "accuracy": own / len(labels),
        "chance": float((votes_MK.sum(axis=0) * share_K).sum() / len(labels)),
        "constant": float(np.bincount(labels).max() / len(labels)),
        "uniform": 1 / len(np.unique(labels)),
        "n": len(labels),
        "images": len(names),
        "p_value": p_value,
        "interval": list(wilson_interval(own, len(labels))),
    }


@dataclass(frozen=True, kw_only=True)
class JudgedImages:
    """Outputs of one network for generated images and for real images."""

    features_BD: Floats
    """Features of the generated images."""
    real_features_BD: Floats
    """Features of the real images."""
    ids: Sequence[str]
    """Id of the image that the person saw, for each generated image."""
    real_ids: Sequence[str]
    """Id of each real image."""
    probabilities_BK: Floats | None
    """Class probabilities of each generated image; None if the network is not a classifier."""


FEW_IMAGES = "not computed: fewer than two different images"
NO_CLASSES = "not computed: the network is not a classifier"


def _has_two(judged: JudgedImages) -> bool:
    return min(len(set(judged.ids)), len(set(judged.real_ids))) >= 2


def _compute_frechet(judged: JudgedImages) -> float | str:
    return frechet_distance(judged.real_features_BD, judged.features_BD) if _has_two(judged) else FEW_IMAGES


def _compute_kernel(judged: JudgedImages) -> float | str:
    if not _has_two(judged):
        return FEW_IMAGES
    return kernel_distance(
        judged.real_features_BD, judged.features_BD, real_ids=judged.real_ids, generated_ids=judged.ids
    )


def _compute_inception_score(judged: JudgedImages) -> float | str:
    return NO_CLASSES if judged.probabilities_BK is None else inception_score(judged.probabilities_BK)


METRICS: dict[str, Callable[[JudgedImages], float | str]] = {
    "frechet_distance": _compute_frechet,
    "kernel_distance": _compute_kernel,
    "inception_score": _compute_inception_score,
}
"""Maps the name of a metric of a whole set of images to the function that computes the metric.

Each function of `METRICS` returns a number, or a text that says why the metric was not computed.
`networks.judges.measure_sets` calls every function of `METRICS` for each network. `networks.judges.name_metrics` adds
the name of the network in brackets to the name of the metric.
"""
