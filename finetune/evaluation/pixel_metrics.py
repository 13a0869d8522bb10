"""Metrics that compare the pixels of each generated image with the pixels of one other image.

Every function reads one pair of images at a time, so the memory does not depend on the number of images. The images
can be an array, or any other object with a shape and rows, such as `ImageRows`.

Array shapes: B images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Floats = NDArray[np.float64]
SSIM_WINDOW = 11
"""Width in pixels of the Gaussian window of `ssim`."""
SSIM_SIGMA = 1.5
"""Standard deviation in pixels of the Gaussian window of `ssim`."""
SSIM_STRIP = 32
"""Number of rows of an image for which the structural similarity is computed at once."""
TOO_SMALL = f"not computed: the images are smaller than {SSIM_WINDOW} pixels"


class ImageSource(Protocol):
    """Images of equal size that can be read one by one: an array [B, H, W, 3] of uint8, or an object like it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers B, H, W and 3."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Images:
        """Return one image [H, W, 3] for a number, and images [B, H, W, 3] for a slice."""
        ...


class ImageRows:
    """A selection of images, in any order. An image is read only when its row is asked for.

    Parameters
    ----------
    images : ImageSource
        The images to choose from.
    rows : ndarray of int, shape (B,)
        For each row of the selection, the index of the chosen image; an image may be chosen several times.
    """

    def __init__(self, images: ImageSource, rows: NDArray[np.integer]) -> None:
        self.images, self.rows = images, np.asarray(rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers B, H, W and 3."""
        return len(self.rows), *self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any, /) -> Images:
        """Return one image for a number, and several images for a slice."""
        chosen = self.rows[rows]
        if chosen.ndim == 0:
            return self.images[int(chosen)]
        return np.stack([self.images[int(row)] for row in chosen])


def _compare_pairs(
    a_BHW3: ImageSource, b_BHW3: ImageSource, compare: Callable[[Images, Images], float]
) -> NDArray[np.float64]:
    """Call a function for each pair of images, after a check of the two images."""
    if a_BHW3.shape != b_BHW3.shape or len(a_BHW3.shape) != 4:
        raise ValueError(
            f"images must be two [B, H, W, 3] arrays of equal shape, not {a_BHW3.shape} and {b_BHW3.shape}"
        )
    values_B = np.empty(len(a_BHW3))
    for number in range(len(a_BHW3)):
        a, b = a_BHW3[number], b_BHW3[number]
        if a.dtype != np.uint8 or b.dtype != np.uint8:
            raise ValueError(f"images must be uint8, not {a.dtype} and {b.dtype}")
        values_B[number] = compare(a, b)
    return values_B


def psnr(a_BHW3: ImageSource, b_BHW3: ImageSource) -> Floats:
    """Compute the peak signal-to-noise ratio of each pair of images: 10 log10(255^2 / MSE).

    Parameters
    ----------
    a_BHW3, b_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
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

    def compare(a: Images, b: Images) -> float:
        error = float(np.square(a.astype(np.float64) - b).mean())
        return 10 * np.log10(255.0**2 / error) if error else np.inf

    return _compare_pairs(a_BHW3, b_BHW3, compare)


def ssim(a_BHW3: ImageSource, b_BHW3: ImageSource) -> Floats:
    """Compute the structural similarity (SSIM) of each pair of images, in the variant of Wang et al. (2004).

    The variant of Wang et al. has a Gaussian window of 11 pixels with a standard deviation of 1.5 pixels, population
    variances and covariances, and the constants K1 = 0.01 and K2 = 0.03. The similarity is averaged over the three
    colours and over all positions where the window lies inside the image.

    Parameters
    ----------
    a_BHW3, b_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        The two images of each pair, at least 11 pixels wide and high.

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
    if min(a_BHW3.shape[1:3]) < SSIM_WINDOW:
        height, width = a_BHW3.shape[1:3]
        raise ValueError(f"images of {height} x {width} pixels are smaller than the window of {SSIM_WINDOW} pixels")
    return _compare_pairs(a_BHW3, b_BHW3, _compute_ssim)


def _compute_ssim(a_HW3: Images, b_HW3: Images) -> float:
    """Compute the structural similarity of two images, colour by colour and in strips that fit into the CPU's cache."""
    rows, columns = (size - SSIM_WINDOW + 1 for size in a_HW3.shape[:2])
    total = 0.0
    for a_HW, b_HW in zip(np.moveaxis(a_HW3, -1, 0), np.moveaxis(b_HW3, -1, 0), strict=True):
        for start in range(0, rows, SSIM_STRIP):
            part = slice(start, min(start + SSIM_STRIP, rows) + SSIM_WINDOW - 1)
            total += float(_compute_ssim_map(a_HW[part].astype(np.float64), b_HW[part].astype(np.float64)).sum())
    return total / a_HW3.shape[-1] / (rows * columns)


def _compute_ssim_map(a_HW: Floats, b_HW: Floats) -> Floats:
    """Compute the structural similarity at every position where the window lies inside two images of one colour.

    The window is applied to the sum s and the difference d of the images, and not to the images a and b. The similarity
    then needs only the averages of s, d and their squares, because 4 cov(a, b) = var(s) - var(d), and 2 (var(a) +
    var(b)) = var(s) + var(d).
    """
    height, width = a_HW.shape
    values_4HW = np.empty((4, height, width))
    # Subtract 255 from the sum, because smaller values have smaller squares, and the variance then has smaller rounding
    # errors.
    np.add(a_HW, b_HW - 255, out=values_4HW[0])
    np.subtract(a_HW, b_HW, out=values_4HW[1])
    np.square(values_4HW[:2], out=values_4HW[2:])
    s_HW, d_HW, s2_HW, d2_HW = _blur(_blur(values_4HW, 1), 2)
    var_s_HW, var_d_HW = s2_HW - s_HW**2, d2_HW - d_HW**2
    s2_HW, d2_HW = (s_HW + 255) ** 2, d_HW**2
    c1, c2 = 2 * (0.01 * 255) ** 2, 2 * (0.03 * 255) ** 2
    return (s2_HW - d2_HW + c1) * (var_s_HW - var_d_HW + c2) / ((s2_HW + d2_HW + c1) * (var_s_HW + var_d_HW + c2))


def _blur(values_nHW: Floats, axis: int) -> Floats:
    """Average over the window of `ssim` along one axis, at every position where the window lies inside the image."""
    middle = SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (np.arange(-middle, middle + 1) / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    size = values_nHW.shape[axis] - 2 * middle

    def shift(by: int) -> Floats:
        return values_nHW[:, by : by + size] if axis == 1 else values_nHW[:, :, by : by + size]

    out_nHW = weights[middle] * shift(middle)
    pair_nHW = np.empty_like(out_nHW)
    # The window is symmetric, so two positions at the same distance from its middle have the same weight.
    for by in range(middle):
        np.add(shift(by), shift(2 * middle - by), out=pair_nHW)
        pair_nHW *= weights[by]
        out_nHW += pair_nHW
    return out_nHW


def pixel_correlation(a_BHW3: ImageSource, b_BHW3: ImageSource) -> Floats:
    """Compute the Pearson correlation between all pixel values of each pair of images.

    Parameters
    ----------
    a_BHW3, b_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        The two images of each pair.

    Returns
    -------
    ndarray, shape (B,)
        Correlation, from -1 to 1. The correlation is NaN if all values of an image are equal.

    Raises
    ------
    ValueError
        If the arrays are not uint8 images, or have different shapes.

    References
    ----------
    The metric is called PixCorr in Ozcelik & VanRullen, "Natural scene reconstruction from fMRI signals using
    generative latent diffusion", Scientific Reports 13 (2023).
    """

    def compare(a: Images, b: Images) -> float:
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        x -= x.mean()
        y -= y.mean()
        norm = np.sqrt((x @ x) * (y @ y))
        return float(np.clip(x @ y / norm, -1, 1)) if norm else np.nan

    return _compare_pairs(a_BHW3, b_BHW3, compare)


def _ssim_of_pairs(images_BHW3: ImageSource, real_BHW3: ImageSource) -> Floats | str:
    return TOO_SMALL if min(images_BHW3.shape[1:3]) < SSIM_WINDOW else ssim(images_BHW3, real_BHW3)


PairedMetric = Callable[[ImageSource, ImageSource], "Floats | str"]
PAIRED_METRICS: dict[str, PairedMetric] = {"psnr": psnr, "ssim": _ssim_of_pairs, "pixel_correlation": pixel_correlation}
"""Maps the name of a paired metric to the function that compares each generated image with one other image.

Each function of `PAIRED_METRICS` takes two sets of images of equal length. It returns one number for each pair, or a
text that says why the metric was not computed. Every metric of `PAIRED_METRICS` is also computed with the images of
random other trials, as a control.
"""
LEFT_OUT = {"psnr": "psnr_equal_pairs", "pixel_correlation": "pixel_correlation_constant_pairs"}
"""Maps a paired metric to a key of the results. The value of this key is the number of pairs that the metric's mean
leaves out.

The PSNR of two equal images is infinite, and the correlation with an image of one single colour is undefined.
"""


def average_pairs(name: str, values_B: Floats | str) -> dict[str, float | str]:
    """Compute the mean of a paired metric over the pairs whose value is finite, and count the other pairs.

    Parameters
    ----------
    name : str
        Name of the metric.
    values_B : ndarray, shape (B,), or str
        Value of each pair, or a text that says why the metric was not computed.

    Returns
    -------
    dict
        The mean under `name`, or a text that says why there is no mean. For a metric of `LEFT_OUT`, also the number of
        pairs without a finite value.
    """
    if isinstance(values_B, str):
        return {name: values_B}
    finite_B = np.isfinite(values_B)
    reason = "not computed: no pair of images has a finite value"
    found: dict[str, float | str] = {name: float(values_B[finite_B].mean()) if finite_B.any() else reason}
    if name in LEFT_OUT:
        found[LEFT_OUT[name]] = int((~finite_B).sum())
    return found
