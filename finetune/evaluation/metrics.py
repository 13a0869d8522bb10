"""Metrics of reconstructed images as papers report them, and tests of their significance.

All functions take NumPy arrays. They do not depend on the network that computed the features or probabilities.

Shapes: B images, H rows, W columns, D feature width, K classes, N trials.
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
"""Name of this project's classifier in the results. A Fréchet distance of its features is not the FID."""
TOO_SMALL = "not computed: the images are smaller than 11 pixels"


def _pairs(a_BHW3: Images, b_BHW3: Images) -> tuple[Floats, Floats]:
    if a_BHW3.dtype != np.uint8 or b_BHW3.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {a_BHW3.dtype} and {b_BHW3.dtype}")
    if a_BHW3.shape != b_BHW3.shape or a_BHW3.ndim != 4:
        raise ValueError(f"images must be two equal [B, H, W, 3] arrays, not {a_BHW3.shape} and {b_BHW3.shape}")
    return a_BHW3.astype(np.float64), b_BHW3.astype(np.float64)


def psnr(a_BHW3: Images, b_BHW3: Images) -> Floats:
    """Compute the peak signal-to-noise ratio of each pair, 10 log10(255^2 / MSE).

    Parameters
    ----------
    a_BHW3, b_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        Images.

    Returns
    -------
    ndarray, shape (B,)
        Decibels; infinite for equal images.

    Raises
    ------
    ValueError
        If the arrays are not uint8 images of one shape.
    """
    a, b = _pairs(a_BHW3, b_BHW3)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.square(a - b).mean(axis=(1, 2, 3)))


def ssim(a_BHW3: Images, b_BHW3: Images, *, window: int = 11, sigma: float = 1.5) -> Floats:
    """Compute the structural similarity of each pair, with a Gaussian window.

    The result is the mean over the colours and over all pixels around which the window fits into the image.

    Parameters
    ----------
    a_BHW3, b_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        Images, at least `window` pixels wide and high.
    window : int
        Width of the window in pixels, an odd number.
    sigma : float
        Standard deviation of the window in pixels.

    Returns
    -------
    ndarray, shape (B,)
        From -1 to 1.

    Raises
    ------
    ValueError
        If the arrays are not uint8 images of one shape, or are smaller than the window.

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
    """Compute the Fréchet distance of two sets of features, as if they were Gaussian.

    With features of Inception-V3 it is the FID.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features, at least two rows each; the numbers of rows may differ.

    Returns
    -------
    float
        ``|mu_r - mu_g|^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2))``. With few images, the value is too large.

    Raises
    ------
    ValueError
        If a set has fewer than two rows or the widths differ.
    """
    real, generated = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(real), len(generated)) < 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"need two or more features of one width in each set, not {real.shape} and {generated.shape}")
    cov_r, cov_g = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, generated))
    # Tr (S_r S_g)^(1/2) equals the trace of the root of S_r^(1/2) S_g S_r^(1/2). This matrix is symmetric, so its root
    # has no complex numbers.
    values, vectors = np.linalg.eigh(cov_r)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_g @ root).clip(0)).sum()
    mean = np.square(real.mean(0) - generated.mean(0)).sum()
    return float(max(0.0, mean + np.trace(cov_r) + np.trace(cov_g) - 2 * cross))


def kernel_distance(real_BD: Floats, generated_BD: Floats) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the cubic kernel.

    With features of Inception-V3 it is the KID.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features, at least two rows each.

    Returns
    -------
    float
        For two sets of the same distribution the mean is zero, whatever their sizes. The value may be negative.

    References
    ----------
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    x, y = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"need two or more features of one width in each set, not {x.shape} and {y.shape}")

    def kernel(p: Floats, q: Floats) -> Floats:
        return (p @ q.T / p.shape[1] + 1) ** 3

    def within(p: Floats) -> float:
        k = kernel(p, p)
        return float((k.sum() - np.trace(k)) / (len(p) * (len(p) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def inception_score(probabilities_BK: Floats) -> float:
    """Compute ``exp(mean KL(p(y|x) || p(y)))`` of a classifier's probabilities.

    With probabilities of Inception-V3 it is the Inception Score.

    Parameters
    ----------
    probabilities_BK : ndarray, shape (B, K)
        Rows sum to one.

    Returns
    -------
    float
        From 1 (all images have the same probabilities) to K.
    """
    p = np.asarray(probabilities_BK, np.float64)
    marginal = p.mean(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def n_way_top_k(
    probabilities_NK: Floats, labels_N: NDArray[np.integer], *, n: int, k: int = 1, repeats: int = 100, seed: int = 0
) -> dict[str, float]:
    """Compute the n-way top-k accuracy: the true class among n - 1 random other classes.

    The other classes are drawn anew for each trial and each repeat.

    Parameters
    ----------
    probabilities_NK : ndarray, shape (N, K)
        Class probabilities of the generated images.
    labels_N : ndarray of int, shape (N,)
        True classes.
    n : int
        Number of classes, the true class included; from 2 to K.
    k : int
        A trial is right if the true class is among the k most likely of the n classes.
    repeats : int
        Number of draws of the other classes.
    seed : int
        Seed for the draws.

    Returns
    -------
    dict
        ``accuracy``, its standard deviation over the draws ``std``, and ``chance`` = k / n.

    Raises
    ------
    ValueError
        If n or k is out of range.

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
    # Equal probabilities count against the trial, so that a constant classifier has an accuracy of zero.
    beats = (p >= own).astype(np.int64)
    hits = np.empty(repeats)
    for draw in range(repeats):
        order = rng.random((trials, classes))
        order[rows, labels_N] = np.inf
        others = np.argpartition(order, n - 2, axis=1)[:, : n - 1]
        hits[draw] = (np.take_along_axis(beats, others, axis=1).sum(axis=1) < k).mean()
    return {"accuracy": float(hits.mean()), "std": float(hits.std()), "chance": k / n}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of the share of successes among n attempts."""
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
    """Compute the accuracy, and how often shuffled labels would be as accurate.

    Trials of the same image are not independent. Therefore labels are shuffled between images, and all trials of an
    image get the same new label. A shuffle between trials would give p-values that are too small.

    Parameters
    ----------
    predicted_N, labels_N : ndarray of int, shape (N,)
        Predicted and true class of each trial.
    image_ids : list of str
        Id of the image of each trial. All trials of an image must have the same label.
    permutations : int
        Largest number of shuffles.
    seed : int
        Seed for the shuffles.

    Returns
    -------
    dict
        ``accuracy``; ``chance``: mean accuracy over all shuffles; ``n`` and ``images``: numbers of trials and images;
        ``p_value``: (1 + k) / (1 + shuffles), where k shuffles were as accurate or more; with few images, the exact
        share of such shuffles; ``interval``: Wilson's 95 % confidence interval, as if trials were independent.

    Raises
    ------
    ValueError
        If there is no trial, the lengths differ, or an image has two labels.
    """
    from scipy.stats import permutation_test

    predicted, labels = np.asarray(predicted_N), np.asarray(labels_N)
    if not len(predicted) or not len(predicted) == len(labels) == len(image_ids):
        raise ValueError(
            f"need as many labels and image ids as predictions, at least 1, got {len(labels)} and {len(image_ids)}"
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
        """Count the trials that are right under given labels of the images, which are on the last axis."""
        assert axis == -1
        return votes_MK[np.arange(len(names)), labels_M].sum(axis=-1)

    # A single image has nothing to be shuffled with.
    p_value = 1.0
    if len(names) > 1:
        found = permutation_test(
            (label_of,),
            count_right,
            permutation_type="pairings",
            vectorized=True,
            n_resamples=permutations,
            # Limits the memory of one call of the function above.
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
    """Generated images and the images that were seen, with the outputs of the dataset's classifier for both."""

    images_BHW3: Images
    """Generated images."""
    real_BHW3: Images
    """The images that were seen, in the same order."""
    features_BD: Floats
    """Features of the generated images."""
    real_features_BD: Floats
    """Features of the images that were seen."""
    probabilities_BK: Floats
    """Probability of each category, for the generated images."""


def _ssim_of_pairs(images_BHW3: Images, real_BHW3: Images) -> Floats | str:
    return TOO_SMALL if min(images_BHW3.shape[1:3]) < 11 else ssim(images_BHW3, real_BHW3)


PAIRED_METRICS: dict[str, Callable[[Images, Images], Floats | str]] = {"psnr": psnr, "ssim": _ssim_of_pairs}
"""Name of a metric -> function that compares each generated image with one other image.

The function takes two arrays of images and returns one number for each pair, or a text that says why the metric was not
computed. A metric of this table also gets the control with the images of random other trials.
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
"""Name of a metric in metrics.json and in the report -> function that computes the metric.

The function returns a number, or a text that says why the metric was not computed. `evaluate.measure` calls every
function of this table, for the generated images and for their controls.
"""
