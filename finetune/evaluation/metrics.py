"""What papers print about reconstructed images, and whether it could be luck.

Everything here is plain NumPy on arrays; which network gave the features or probabilities is for the caller to name.

Legend of suffixes: B images, H rows, W columns, D feature width, K classes, N trials.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Floats = NDArray[np.float64]


def _pairs(a_BHW3: Images, b_BHW3: Images) -> tuple[Floats, Floats]:
    if a_BHW3.dtype != np.uint8 or b_BHW3.dtype != np.uint8:
        raise ValueError(f"images must be uint8, not {a_BHW3.dtype} and {b_BHW3.dtype}")
    if a_BHW3.shape != b_BHW3.shape or a_BHW3.ndim != 4:
        raise ValueError(f"images must be two equal [B, H, W, 3] arrays, not {a_BHW3.shape} and {b_BHW3.shape}")
    return a_BHW3.astype(np.float64), b_BHW3.astype(np.float64)


def psnr(a_BHW3: Images, b_BHW3: Images) -> Floats:
    """Peak signal-to-noise ratio of each pair, 10 log10(255^2 / MSE).

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
    """Structural similarity of each pair: Gaussian window, mean over the pixels it fits around and over the colours.

    Parameters
    ----------
    a_BHW3, b_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        Images, at least `window` pixels wide and high.
    window : int
        Width of the window in pixels; odd.
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
    """Fréchet distance of two sets of features taken as Gaussians; FID where the features are Inception-V3's.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features, two rows or more each; the numbers of rows may differ.

    Returns
    -------
    float
        ``|mu_r - mu_g|^2 + Tr(S_r + S_g - 2 (S_r S_g)^(1/2))``. Biased upwards for few images.

    Raises
    ------
    ValueError
        If a set has fewer than two rows or the widths differ.
    """
    real, generated = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(real), len(generated)) < 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"need two sets of two or more features of one width, not {real.shape} and {generated.shape}")
    cov_r, cov_g = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, generated))
    # Tr (S_r S_g)^(1/2) is the trace of the root of S_r^(1/2) S_g S_r^(1/2), which is symmetric: no complex roots.
    values, vectors = np.linalg.eigh(cov_r)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_g @ root).clip(0)).sum()
    mean = np.square(real.mean(0) - generated.mean(0)).sum()
    return float(max(0.0, mean + np.trace(cov_r) + np.trace(cov_g) - 2 * cross))


def kernel_distance(real_BD: Floats, generated_BD: Floats) -> float:
    """Squared maximum mean discrepancy with the cubic kernel, unbiased; KID where the features are Inception-V3's.

    Parameters
    ----------
    real_BD, generated_BD : ndarray, shape (B, D)
        Features, two rows or more each.

    Returns
    -------
    float
        Zero on average for two sets from one distribution, whatever their sizes; may be negative.

    References
    ----------
    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    x, y = np.asarray(real_BD, np.float64), np.asarray(generated_BD, np.float64)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"need two sets of two or more features of one width, not {x.shape} and {y.shape}")

    def kernel(p: Floats, q: Floats) -> Floats:
        return (p @ q.T / p.shape[1] + 1) ** 3

    def within(p: Floats) -> float:
        k = kernel(p, p)
        return float((k.sum() - np.trace(k)) / (len(p) * (len(p) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def inception_score(probabilities_BK: Floats) -> float:
    """``exp(mean KL(p(y|x) || p(y)))`` of a classifier's probabilities; the Inception Score where it is Inception-V3.

    Parameters
    ----------
    probabilities_BK : ndarray, shape (B, K)
        Rows sum to one.

    Returns
    -------
    float
        From 1 (every image alike, or none clear) to K.
    """
    p = np.asarray(probabilities_BK, np.float64)
    marginal = p.mean(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def n_way_top_k(
    probabilities_NK: Floats, labels_N: NDArray[np.integer], *, n: int, k: int = 1, repeats: int = 100, seed: int = 0
) -> dict[str, float]:
    """N-way top-k accuracy: the true class against n - 1 others drawn anew for every trial, many times over.

    Parameters
    ----------
    probabilities_NK : ndarray, shape (N, K)
        Class probabilities of the generated images.
    labels_N : ndarray of int, shape (N,)
        True classes.
    n : int
        Classes a trial is judged among, the true one included; from 2 to K.
    k : int
        The true class must be among the k most likely of them.
    repeats : int
        Draws of the other classes.
    seed : int
        Of the draws.

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
    # Ties count against the trial: a classifier that says nothing must not score.
    beats = (p >= own).astype(np.int64)
    hits = np.empty(repeats)
    for draw in range(repeats):
        order = rng.random((trials, classes))
        order[rows, labels_N] = np.inf
        others = np.argpartition(order, n - 2, axis=1)[:, : n - 1]
        hits[draw] = (np.take_along_axis(beats, others, axis=1).sum(axis=1) < k).mean()
    return {"accuracy": float(hits.mean()), "std": float(hits.std()), "chance": k / n}


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share.

    Parameters
    ----------
    successes, n : int
        How many of how many.
    z : float
        Standard normal quantile; 95 % by default.

    Returns
    -------
    tuple of float
        Lower and upper end.
    """
    share, weight = successes / n, z**2 / n
    middle = (share + weight / 2) / (1 + weight)
    half = z * np.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def accuracy_with_p_value(
    predicted_N: NDArray[np.integer],
    labels_N: NDArray[np.integer],
    image_ids: list[str],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, and how often labels shuffled between the images would do as well.

    Trials of one image share it, so they are not independent: what is shuffled is the label of each image, with all its
    trials, not the label of each trial.

    Parameters
    ----------
    predicted_N, labels_N : ndarray of int, shape (N,)
        Predicted and true class of each trial.
    image_ids : list of str
        The image of each trial; trials of one image must have one label.
    permutations : int
        Shuffles.
    seed : int
        Of the shuffles.

    Returns
    -------
    dict
        ``accuracy``; ``chance``, the mean over all shuffles; ``n`` trials; ``images``; ``p_value`` = (1 + k) /
        (1 + shuffles), with k the shuffles that did as well or better; ``interval``, Wilson's over trials, 95 %.

    Raises
    ------
    ValueError
        If there is no trial, lengths differ, or an image has two labels.
    """
    predicted, labels = np.asarray(predicted_N), np.asarray(labels_N)
    if not len(predicted) or not len(predicted) == len(labels) == len(image_ids):
        raise ValueError(f"need equal, positive numbers: {len(predicted)}, {len(labels)}, {len(image_ids)}")
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
    rng = np.random.default_rng(seed)
    as_good, done = 0, 0
    block = max(1, 2_000_000 // len(names))
    while done < permutations:
        count = min(block, permutations - done)
        shuffled = rng.permuted(np.broadcast_to(label_of, (count, len(names))), axis=1)
        as_good += int((votes_MK[np.arange(len(names)), shuffled].sum(axis=1) >= own).sum())
        done += count
    return {
        "accuracy": own / len(labels),
        "chance": float((votes_MK.sum(axis=0) * share_K).sum() / len(labels)),
        "n": len(labels),
        "images": len(names),
        "p_value": (1 + as_good) / (1 + permutations),
        "interval": list(wilson_interval(own, len(labels))),
    }
