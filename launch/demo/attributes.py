"""Score generated pictures: measure the colour of the shape, and test whether the picture identifies the seen picture.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from launch.demo.pictures import HUES

Images = NDArray[np.uint8]
SMOOTH = 1.0
"""Standard deviation, in pixels, of the Gaussian filter that smooths a picture before its colour is measured."""


def measure_colour(image_HW3: Images) -> str:
    """Measure the colour of the shape in a picture.

    The background of the demo's pictures is grey, so the chroma of a pixel shows whether the pixel belongs to the
    shape. The chroma is the difference between the largest and the smallest colour channel of the pixel.

    Parameters
    ----------
    image_HW3 : ndarray of uint8, shape (H, W, 3)
        A picture in RGB.

    Returns
    -------
    str
        The key of `HUES` that is nearest to the mean colour of the shape.
    """
    rgb = gaussian_filter(image_HW3.astype(float) / 255, (SMOOTH, SMOOTH, 0))
    weight = (rgb.max(axis=2) - rgb.min(axis=2)) ** 2 + 1e-12
    hue = colorsys.rgb_to_hsv(*(rgb * weight[..., None]).sum(axis=(0, 1)) / weight.sum())[0]
    return min(HUES, key=lambda name: abs((HUES[name] - hue + 0.5) % 1 - 0.5))


def identify(images_BHW3: Images, real_BHW3: Images, image_ids: list[str], groups: list[Any]) -> NDArray[np.float64]:
    """Score how well each generated picture identifies the seen picture among all seen pictures of the same group.

    Parameters
    ----------
    images_BHW3, real_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        Generated pictures, and the pictures that were seen in the same trials.
    image_ids : list of str
        Id of the seen picture of each trial.
    groups : list
        Group of each trial, for example its category. A picture is compared only with pictures of its group.

    Returns
    -------
    ndarray, shape (B,)
        Share of the other pictures of the group that are less similar to the generated picture than the seen picture
        is. The similarity is the correlation of the pixels; equal similarities count one half. Chance is 0.5. NaN if
        the group has no other picture.
    """

    def standardise(x: Images) -> NDArray[np.float64]:
        flat = x.reshape(len(x), -1).astype(float)
        flat -= flat.mean(axis=1, keepdims=True)
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    _, first = np.unique(np.asarray(image_ids), return_index=True)
    # Round the similarities, because for equal pictures, they may differ in their last digits.
    similarity = np.round(standardise(images_BHW3) @ standardise(real_BHW3[first]).T, 9)
    names = [image_ids[i] for i in first]
    out = np.full(len(images_BHW3), np.nan)
    for trial in range(len(out)):
        own = similarity[trial, names.index(image_ids[trial])]
        others = [
            similarity[trial, column]
            for column, i in enumerate(first)
            if groups[i] == groups[trial] and names[column] != image_ids[trial]
        ]
        if others:
            out[trial] = np.mean([(own > other) + (own == other) / 2 for other in others])
    return out
