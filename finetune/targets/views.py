"""Views of an image for the training: the image itself, and random crops of it that may be mirrored.

Array shapes: H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_sharding.common.files import digest_of


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Views of each train image that are encoded once, before the training; a step uses a random view of each image."""

    count: int = 1
    """Number of views of an image. The first view is the central square of the image. The other views are made from
    this square with `flip` and `crop`. The cache and the encoding grow with this number."""
    flip: bool = False
    """True: every other view is mirrored, left to right. Mirrored images are no good targets if the position of an
    object matters."""
    crop: float = 1.0
    """Smallest side length of a view, as a fraction of the central square, e.g. 0.8: each view is a square with a
    random side length, cut out at a random place. 1 cuts nothing out."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.crop <= 1:
            raise ValueError(
                "views.count must be at least 1, and views.crop above 0 and at most 1, got "
                f"{self.count} and {self.crop}"
            )
        if (self.count > 1) != (self.flip or self.crop < 1):
            raise ValueError(
                "views.count above 1 needs views.flip or views.crop below 1, and these two need views.count above 1, "
                f"got count {self.count}, flip {self.flip} and crop {self.crop}"
            )


def make_view(image_HW3: np.ndarray, size: int, config: ViewConfig, number: int, image_id: str) -> np.ndarray:
    """Make one view of an image.

    Parameters
    ----------
    image_HW3 : ndarray of uint8, shape (H, W, 3)
        Decoded image.
    size : int
        Width and height of the view in pixels.
    config : ViewConfig
        How views are made.
    number : int
        Number of the view. View 0 is the central square of the image.
    image_id : str
        Id of the image. The place of a crop depends only on this id and on the number of the view.

    Returns
    -------
    ndarray of uint8, shape (size, size, 3)
        The view.
    """
    from PIL import Image

    height, width = image_HW3.shape[:2]
    side = float(min(height, width))
    left, top = (width - side) // 2, (height - side) // 2
    if number and config.crop < 1:
        rng = np.random.default_rng(int(digest_of({"image": image_id, "view": number})[:16], 16))
        part = side * rng.uniform(config.crop, 1)
        x, y = rng.uniform(0, side - part, 2)
        left, top, side = left + x, top + y, part
    image = Image.fromarray(image_HW3)
    if image.size != (size, size) or side != size:
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    view = np.asarray(image, np.uint8)
    return view[:, ::-1] if config.flip and number % 2 else view
