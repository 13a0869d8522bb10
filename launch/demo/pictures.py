"""Draw the pictures that the demo's people see: simple shapes with known attributes."""

from __future__ import annotations

import colorsys
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_sharding.audit.fingerprints import ImageFingerprint, find_similar_images, fingerprint_image

CATEGORIES = ("disc", "cross", "stripes", "triangle")
"""Categories of the pictures. The shapes look different at 32 x 32 pixels, even in badly generated pictures."""
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.62}
SPLIT_SIZES = {"train": 60, "val": 12, "test": 14}
"""Number of pictures of each category, by split."""
NEW_IN_TEST = 6
"""In each category, number of test pictures with a colour that this category never has in training."""
PIXELS = 32


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The attributes of one picture; they determine every pixel."""

    image_id: str
    category: int
    split: str
    colour: str
    new_combination: bool
    """Whether no training picture has the same category and colour."""
    hue: float
    """Hue of the shape on the colour circle, 0 to 1."""
    background: float
    """Grey level of the background, 0 to 1."""
    size: float
    """Half the shape's width, in pixels."""
    x: float
    """Horizontal offset of the shape's centre from the middle, in pixels."""
    y: float
    """Vertical offset of the shape's centre from the middle, in pixels."""

    @property
    def caption(self) -> str:
        """Caption of the picture for a text encoder."""
        shade = "a dark" if self.background < 0.3 else "a light"
        return f"a {self.colour} {CATEGORIES[self.category]} on {shade} background"

    def to_dict(self) -> dict[str, Any]:
        """Return the picture's attributes, to store them in `truth.json`."""
        return {**asdict(self), "label_name": CATEGORIES[self.category], "caption": self.caption}


def is_new_combination(category: int, colour: int) -> bool:
    """Return whether no training picture has this combination of category and colour."""
    return category == colour


def make_pictures(seed: int) -> list[Picture]:
    """Choose the attributes of all pictures at random.

    Colours and backgrounds are balanced within each category and split. One colour of each category never occurs in the
    training pictures. No picture of one split is similar to a picture of another split, by the rule of ``dreamscale
    verify``.

    Parameters
    ----------
    seed : int
        Seed of the corpus.

    Returns
    -------
    list of Picture
        All pictures of all splits, in a fixed order.
    """
    rng = np.random.default_rng([seed, 1])
    pictures: list[Picture] = []
    prints: dict[str, list[ImageFingerprint]] = {split: [] for split in SPLIT_SIZES}
    for category, name in enumerate(CATEGORIES):
        number = 0
        new = [colour for colour in range(len(HUES)) if is_new_combination(category, colour)]
        trained = [colour for colour in range(len(HUES)) if colour not in new]
        for split, count in SPLIT_SIZES.items():
            n_new = NEW_IN_TEST if split == "test" else 0
            colours = rng.permutation(np.r_[np.resize(trained, count - n_new), np.resize(new, n_new)])
            shades = rng.permutation(np.arange(count) / max(count - 1, 1))
            others = [fingerprint for other, found in prints.items() if other != split for fingerprint in found]
            for colour, shade in zip(colours, shades, strict=True):
                number += 1
                while True:
                    picture = _draw_attributes(rng, f"{name}-{number:03d}", category, split, int(colour), float(shade))
                    fingerprint = fingerprint_image(encode_picture(picture))
                    if not find_similar_images([fingerprint], others):
                        break
                prints[split].append(fingerprint)
                pictures.append(picture)
    return pictures


def _draw_attributes(
    rng: np.random.Generator, image_id: str, category: int, split: str, colour: int, shade: float
) -> Picture:
    name = list(HUES)[colour]
    return Picture(
        image_id=image_id,
        category=category,
        split=split,
        colour=name,
        new_combination=is_new_combination(category, colour),
        hue=round(float((HUES[name] + rng.uniform(-0.02, 0.02)) % 1.0), 4),
        background=round(float(0.05 + 0.5 * shade), 4),
        size=round(float(rng.uniform(8.0, 11.5)), 3),
        x=round(float(rng.uniform(-3.0, 3.0)), 3),
        y=round(float(rng.uniform(-3.0, 3.0)), 3),
    )


def encode_picture(picture: Picture) -> bytes:
    """Draw a picture and return it as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(draw_picture(picture)).save(stream, "PNG")
    return stream.getvalue()


def draw_picture(picture: Picture) -> NDArray[np.uint8]:
    """Draw a picture with smooth edges.

    Parameters
    ----------
    picture : Picture
        Attributes of the picture.

    Returns
    -------
    ndarray of uint8, shape (32, 32, 3)
        RGB pixels.
    """
    # Draw at a higher resolution and average, so that edges are smooth, and small differences of position and size
    # remain visible.
    fine = 4
    axis = (np.arange(PIXELS * fine) + 0.5) / fine - PIXELS / 2
    x, y, half = axis[None, :] - picture.x, axis[:, None] - picture.y, picture.size
    name = CATEGORIES[picture.category]
    if name == "disc":
        mask = x**2 + y**2 <= half**2
    elif name == "cross":
        arm = half / 3
        mask = (np.maximum(abs(x), abs(y)) <= half) & (np.minimum(abs(x), abs(y)) <= arm)
    elif name == "stripes":
        mask = (np.maximum(abs(x), abs(y)) <= half) & (np.floor((y + half) / (2 * half / 5)) % 2 == 0)
    else:
        mask = (y <= 0.8 * half) & (abs(x) <= (y + half) * (half / (1.8 * half)))
    colour = np.array(colorsys.hsv_to_rgb(picture.hue, 0.9, 0.95))
    fine_rgb = np.where(np.broadcast_to(mask, (PIXELS * fine,) * 2)[..., None], colour, picture.background)
    rgb = fine_rgb.reshape(PIXELS, fine, PIXELS, fine, 3).mean(axis=(1, 3))
    return np.round(rgb * 255).astype(np.uint8)
