"""A frozen network that computes embeddings, and for classifiers also class probabilities, of images.

Array shapes: B images, H rows, W columns, D width of the embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sharding.common.errors import RequestError
from finetune.evaluation.networks.sharing import Sharing
from finetune.evaluation.pixel_metrics import Images, ImageSource

MAX_EMBEDDINGS = 2**29
"""Largest size in bytes of the embeddings of one set of images. A set whose embeddings need more memory is not
embedded."""
MOST_FOR_SETS = 4096
"""Largest width of an embedding for which the metrics of sets are computed, because one of these metrics, the Fréchet
distance, needs square matrices of this width."""


@dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """Outputs of a network for a set of images."""

    features_BD: NDArray[np.floating]
    """Embedding of each image."""
    probabilities_BK: NDArray[np.float64] | None
    """Probability of each class of the network for each image; None if the network is not a classifier."""


@dataclass(frozen=True, kw_only=True)
class FrozenNetwork:
    """A frozen network with its own preparation of images, and the origin of its weights."""

    name: str
    """Name of the network in the results."""
    file: str
    """File or folder of the weights, or hub id."""
    sha256: str
    """SHA-256 of the file of the weights, or one digest of the checksums of several files."""
    prepare: Callable[[Images], Tensor]
    """Turns original images of uint8 [B, H, W, 3] into the input of the network, with the network's own resizing."""
    compute: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Computes embeddings [B, D], and class scores [B, K] or None, from the prepared images."""
    batch: int = 32
    """Number of images in one forward pass."""
    sharing: Sharing = field(default_factory=Sharing)
    """Processes among which the batches of images are divided."""

    def describe(self) -> dict[str, str]:
        """Return the network's name, file and checksum, which the results of an evaluation contain."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}

    def judge(self, images_BHW3: ImageSource) -> NetworkOutput | str:
        """Compute the outputs for images, batch by batch.

        Parameters
        ----------
        images_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
            Original images of any size.

        Returns
        -------
        NetworkOutput or str
            The outputs, or a text that says why the images were not embedded.

        Raises
        ------
        RequestError
            If the network computes NaN or infinity.
        """
        features_BD: NDArray[np.float32] | None = None
        probabilities: list[NDArray[np.float64]] = []
        start = 0
        for values, scores in self.sharing.compute(self.task, self.judge_batch, images_BHW3, block=self.batch):
            self._check(values, start)
            if features_BD is None:
                if (size := 4 * len(images_BHW3) * values.shape[1]) > MAX_EMBEDDINGS:
                    return (
                        f"not computed: the embeddings of {len(images_BHW3)} images need {size / 2**30:.1f} GiB, more "
                        f"than the limit of {MAX_EMBEDDINGS / 2**30:.1f} GiB"
                    )
                features_BD = np.empty((len(images_BHW3), values.shape[1]), np.float32)
            features_BD[start : start + len(values)] = values
            if scores is not None:
                self._check(scores, start)
                probabilities.append(torch.from_numpy(scores).double().softmax(dim=1).numpy())
            start += len(values)
        if features_BD is None:
            return "not computed: there are no images"
        return NetworkOutput(
            features_BD=features_BD, probabilities_BK=np.concatenate(probabilities) if probabilities else None
        )

    @property
    def task(self) -> str:
        """Name of the task with which `Sharing` calls `judge_batch` on all processes."""
        return f"network {self.name}"

    def judge_batch(self, images_BHW3: Images) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Compute the embeddings [B, D], and the class scores [B, K] of a classifier, of one batch of images."""
        with torch.inference_mode():
            embeddings_BD, scores_BK = self.compute(self.prepare(images_BHW3))
        scores = None if scores_BK is None else scores_BK.float().cpu().numpy()
        return embeddings_BD.flatten(1).float().cpu().numpy(), scores

    def _check(self, values_BD: Any, start: int) -> None:
        bad_B = ~np.isfinite(values_BD).all(axis=1)
        if bad_B.any():
            number = start + int(bad_B.argmax())
            raise RequestError(
                f"{self.file}: the network {self.name} computes NaN or infinity for image {number}; give other weights"
            )


def to_unit_range(images_BHW3: Images) -> Tensor:
    """Convert images of uint8 [B, H, W, 3] to a tensor [B, 3, H, W] with values from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float().div(255)


def resize_with_pillow(image_HW3: Images, shorter_side: int, filter_name: str) -> Any:
    """Resize an image with Pillow, so that its shorter side has a given length in pixels; return a Pillow image."""
    from PIL import Image

    image = Image.fromarray(image_HW3)
    if min(image.size) == shorter_side:
        return image
    scale = shorter_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling[filter_name])


def crop_center(image: Any, side: int) -> Images:
    """Cut the central square out of a Pillow image, and return its pixels."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)), np.uint8)
