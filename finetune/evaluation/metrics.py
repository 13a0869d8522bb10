"""Metrics of reconstructed images that papers report, and tests of statistical significance.

All functions take NumPy arrays. The functions accept features and probabilities of any network.

Array shapes: B images, H rows, W columns, D feature width, K classes, N trials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Floats = NDArray[np.float64]
JUDGE = "dataset-classifier"
"""Name of this project's image classifier in the results. A Fréchet distance of this classifier's features must not be
called FID, because the FID uses features of Inception-V3."""
TOO_SMALL = "not computed: the images are smaller than 11 pixels"


def _pairs(a_BHW3: Images, b_BHW3: Images) -> tuple[Floats, Floats]:
    if a_BHW3.dtype != np.uint8 or b_BHW3.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {a_BHW3.dtype} and {b_BHW3.dtype}")
    if a_BHW3.shape != b_BHW3.shape or a_BHW3.ndim != 4:
        raise ValueError(
            f"images must be two [B, H, W, 3] arrays of equal shape, not {a_BHW3.shape} and {b_BHW3.shape}"
        )
    return a_BHW3.astype(np.float64), b_BHW3.astype(np.float64)


def psnr(a_BHW3: Images, b_BHW3: Images) -> Floats:
    """Compute the peak signal-to-noise ratio of each pair of images: 10 log10(255^2 / MSE).

    Parameters
    ----------
    a_BHW3, b_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        The two images of each pair.

    Returns
    -------
    ndarray, shape (B,)
        Ratio in decibels; infinite for two equal images.

    Raises
    ------
    ValueError
        If the arrays are not uint8 images, or have different shapes.
    """
    a, b = _pairs(a_BHW3, b_BHW3)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.square(a - b).mean(axis=(1, 2, 3)))


def ssim(a_BHW3: Images, b_BHW3: Images, *, window: int = 11, sigma: float = 1.5) -> Floats:
    """Compute the structural similarity (SSIM) of each pair of images, with a Gaussian window.

    The similarity is averaged over the colours and over all positions where the window lies inside the image.

    Parameters
    ----------
    a_BHW3, b_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        The two images of each pair, at least `window` pixels wide and high.
    window : int
        Width of the window in pixels, an odd number.
    sigma : float
        Standard deviation of the window in pixels.

    Returns
    -------
    ndarray, shape (B,)
        Structural similarity, from -1 to 1.

    Raises
    ------
    ValueError
        If the arrays are not uint8 images, have different shapes, or have images smaller than the window.

    References
    ----------
    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13 (2004).
    """
    from scipy.ndimage import correlate1d

    a, b = _pairs(a_BHW3, b_BHW3)
    if min(a.shape[1:3]) < window:
        raise ValueError(f"images of {a.shape[1]} x {a.shape[2]} pixels are smaller than the window of {window}")
    taps = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    inside = slice(window // 2, -(window // 2) or None)

    def blur(x: Floats) -> Floats:
        return correlate1d(correlate1d(x, taps, axis=1), taps, axis=2)[:, inside, inside]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


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
        ``|mu_r - mu_g|^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2))``. For few images, the distance is overestimated.

    Raises
    ------
    ValueError
        If an array has fewer than two rows, or the two feature widths differ.
    """
    real, generated = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(real), len(generated)) < 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"need features of equal width for two or more images in each set, not {real.shape} and {generated.shape}"
        )
    cov_r, cov_g = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, generated))
    # Tr (S_r S_g)^(1/2) is computed as the trace of the square root of S_r^(1/2) S_g S_r^(1/2): the two traces are
    # equal, and the second matrix is symmetric, so that its square root has no complex numbers.
    values, vectors = np.linalg.eigh(cov_r)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_g @ root).clip(0)).sum()
    mean = np.square(real.mean(0) - generated.mean(0)).sum()
    return float(max(0.0, mean + np.trace(cov_r) + np.trace(cov_g) - 2 * cross))


def kernel_distance(real_BD: Floats, generated_BD: Floats) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the cubic kernel.

    With features of Inception-V3, the squared maximum mean discrepancy is the KID.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features of real and generated images. Each array needs two rows or more.

    Returns
    -------
    float
        Discrepancy, which may be negative. If both sets come from the same distribution, the expected discrepancy is
        zero for any number of images.

    References
    ----------
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    x, y = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"need features of equal width for two or more images in each set, not {x.shape} and {y.shape}"
        )

    def kernel(p: Floats, q: Floats) -> Floats:
        return (p @ q.T / p.shape[1] + 1) ** 3

    def within(p: Floats) -> float:
        k = kernel(p, p)
        return float((k.sum() - np.trace(k)) / (len(p) * (len(p) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


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
    """
    p = np.asarray(probabilities_BK, np.float64)
    marginal = p.mean(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def n_way_top_k(
    probabilities_NK: Floats, labels_N: NDArray[np.integer], *, n: int, k: int = 1, repeats: int = 100, seed: int = 0
) -> dict[str, float]:
    """Compute the n-way top-k accuracy: how often the true class wins against n - 1 random other classes.

    For each trial and each repeat, the other classes are drawn again.

    Parameters
    ----------
    probabilities_NK : ndarray, shape (N, K)
        Class probabilities of the generated images.
    labels_N : ndarray of int, shape (N,)
        True class of each trial.
    n : int
        Number of compared classes, including the true class; from 2 to K.
    k : int
        A trial is correct if the true class is among the `k` most likely of the `n` compared classes.
    repeats : int
        How often the other classes are drawn for each trial.
    seed : int
        Seed for drawing the other classes.

    Returns
    -------
    dict
        ``accuracy``: mean accuracy over the repeats; ``std``: standard deviation of the accuracy over the repeats;
        ``chance``: k / n.

    Raises
    ------
    ValueError
        If `n` or `k` is out of range.

    References
    ----------
    Bai et al., "DreamDiffusion", arXiv 2306.16934, section 4.2; Chen et al., "Seeing beyond the brain", CVPR 2023.
    """
    p = np.asarray(probabilities_NK, np.float64)
    trials, classes = p.shape
    if not 2 <= n <= classes or not 1 <= k < n:
        raise ValueError(f"need 2 <= n <= {classes} classes and 1 <= k < n, got n={n}, k={k}")
    rng = np.random.default_rng(seed)
    rows = np.arange(trials)
    own = p[rows, labels_N][:, None]
    # A class as likely as the true class ranks before the true class, so a constant classifier has an accuracy of zero.
    beats = (p >= own).astype(np.int64)
    hits = np.empty(repeats)
    for draw in range(repeats):
        order = rng.random((trials, classes))
        order[rows, labels_N] = np.inf
        others = np.argpartition(order, n - 2, axis=1)[:, : n - 1]
        hits[draw] = (np.take_along_axis(beats, others, axis=1).sum(axis=1) < k).mean()
    return {"accuracy": float(hits.mean()), "std": float(hits.std()), "chance": k / n}


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
    image get the same new label. If labels were shuffled between trials, the p-value would be too small.

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
        ``accuracy``: accuracy with the true labels; ``chance``: mean accuracy over all possible shuffles; ``n``: number
        of trials; ``images``: number of images; ``p_value``: (1 + k) / (1 + number of shuffles), where k is the number
        of shuffles with at least the true accuracy. For few images, all possible shuffles are tried, and ``p_value`` is
        exactly the fraction with at least the true accuracy. ``interval``: Wilson's 95 % confidence interval of the
        accuracy, which assumes independent trials.

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
        """Count the correctly classified trials for given labels; the last axis of the labels is the image."""
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
        "n": len(labels),
        "images": len(names),
        "p_value": p_value,
        "interval": list(wilson_interval(own, len(labels))),
    }


@dataclass(frozen=True, kw_only=True)
class JudgedImages:
    """Generated images and the images that the person saw, with the classifier's outputs for both sets of images."""

    images_BHW3: Images
    """Pixels of the generated images."""
    real_BHW3: Images
    """Pixels of the images that the person saw, in the order of the generated images."""
    features_BD: Floats
    """Classifier features of the generated images."""
    real_features_BD: Floats
    """Classifier features of the images that the person saw."""
    probabilities_BK: Floats
    """Probability of each category for each generated image."""


def _ssim_of_pairs(images_BHW3: Images, real_BHW3: Images) -> Floats | str:
    return TOO_SMALL if min(images_BHW3.shape[1:3]) < 11 else ssim(images_BHW3, real_BHW3)


PAIRED_METRICS: dict[str, Callable[[Images, Images], Floats | str]] = {"psnr": psnr, "ssim": _ssim_of_pairs}
"""Maps the name of a paired metric to the function that compares each generated image with one other image.

Each function of the table takes two arrays of images and returns one number for each pair, or a text that says why the
metric was not computed. Every metric of `PAIRED_METRICS` is also computed with the images of random other trials, as a
control.
"""


def _average_pairs(compare: Callable[[Images, Images], Floats | str]) -> Callable[[JudgedImages], float | str]:
    def compute(judged: JudgedImages) -> float | str:
        values = compare(judged.images_BHW3, judged.real_BHW3)
        if isinstance(values, str):
            return values
        return float(values.mean()) if np.isfinite(values).all() else "infinite: equal to the real images"

    return compute


def _compare_features(distance: Callable[[Floats, Floats], float]) -> Callable[[JudgedImages], float | str]:
    def compute(judged: JudgedImages) -> float | str:
        if min(len(judged.images_BHW3), len(judged.real_BHW3)) < 2:
            return "not computed: fewer than two images"
        return distance(judged.real_features_BD, judged.features_BD)

    return compute


METRICS: dict[str, Callable[[JudgedImages], float | str]] = {
    **{name: _average_pairs(compare) for name, compare in PAIRED_METRICS.items()},
    f"frechet_distance[{JUDGE}]": _compare_features(frechet_distance),
    f"kernel_distance[{JUDGE}]": _compare_features(kernel_distance),
    f"inception_score[{JUDGE}]": lambda judged: inception_score(judged.probabilities_BK),
}
"""Maps the name of a metric in metrics.json and in the report to the function that computes the metric.

Each function of the table returns a number, or a text that says why a metric was not computed. `evaluate.measure` calls
every function of `METRICS`, for the generated images, the control images and the real images.
"""
