"""Give predicted embeddings the mean and the norm of the embeddings of real images.

Array shapes: B trials, M images, P width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from finetune.eeg import choose_evenly
from finetune.images import ImageTable
from finetune.linear.model import Floats
from pretrain.model.weights import read_tensors

NAME = "embeddings.safetensors"
_TINY = 1e-12


def normalise(x_BP: NDArray[Any]) -> Floats:
    """Return vectors of unit length."""
    return np.asarray(x_BP / np.maximum(np.linalg.norm(x_BP, axis=1, keepdims=True), _TINY), np.float32)


@dataclass(frozen=True, kw_only=True)
class EmbeddingScale:
    """Means and norms of the embeddings of the training images, and the mean of the predictions.

    A regression shrinks its predictions to their mean, and predictions of an aligned encoder lie in another part of the
    space than the embeddings of images. The decoder was trained with the embeddings of images, so predictions are moved
    to them before they are decoded.
    """

    mean_P: Floats
    """Mean of the images' embeddings, which have unit length."""
    predicted_P: Floats
    """Mean of the predictions for the training trials."""
    radius: float
    """Mean distance of the images' embeddings from their mean."""
    norm: float
    """Mean norm of the images' embeddings, as CLIP computes them."""

    @classmethod
    def measure(cls, target_MP: Floats, predicted_BP: Floats, norm: float) -> EmbeddingScale:
        """Measure the scale from embeddings of images and predictions for trials."""
        mean_P = target_MP.mean(axis=0)
        radius = float(np.linalg.norm(target_MP - mean_P, axis=1).mean())
        return cls(mean_P=mean_P, predicted_P=predicted_BP.mean(axis=0), radius=radius, norm=norm)

    def center(self, predicted_BP: Floats) -> Floats:
        """Return the directions [B, P] of predictions from their mean, as vectors of unit length."""
        return normalise(predicted_BP - self.predicted_P)

    def place(self, embeds_BP: NDArray[Any]) -> Floats:
        """Give embeddings the norm of CLIP's embeddings."""
        return normalise(embeds_BP) * np.float32(self.norm)

    def restore(self, predicted_BP: Floats) -> Floats:
        """Move predictions [B, P] to the embeddings of images: with their mean, their spread and their norm."""
        return self.place(self.mean_P + self.radius * self.center(predicted_BP))

    def save(self, folder: Path) -> None:
        """Write the file embeddings.safetensors."""
        from safetensors.numpy import save_file

        numbers = np.array([self.radius, self.norm], np.float32)
        save_file({"mean_P": self.mean_P, "predicted_P": self.predicted_P, "numbers": numbers}, folder / NAME)

    @classmethod
    def load(cls, folder: Path) -> EmbeddingScale:
        """Read the file that `save` wrote; raise `RequestError` if the file is missing or damaged."""
        found = {name: value.float().numpy() for name, value in read_tensors(folder / NAME).items()}
        shapes = {name: value.shape for name, value in found.items()}
        width = next(iter(shapes.get("mean_P", ())), 0)
        expected = {"mean_P": (width,), "predicted_P": (width,), "numbers": (2,)}
        if not width or shapes != expected or not all(np.isfinite(value).all() for value in found.values()):
            raise RequestError(f"{folder / NAME}: does not hold the scale of embeddings; train the model again")
        radius, norm = found["numbers"].tolist()
        return cls(mean_P=found["mean_P"], predicted_P=found["predicted_P"], radius=radius, norm=norm)


@torch.no_grad()
def measure_norm(table: ImageTable, model: Any, processor: Any, device: Any, *, images: int = 256) -> float:
    """Return the mean norm of the embeddings that CLIP computes for images.

    Parameters
    ----------
    table : ImageTable
        Images of the train split.
    model, processor : CLIPVisionModelWithProjection, CLIPImageProcessorPil
        The model.
    device : torch.device
        Device of the computation.
    images : int
        Largest number of images, which are spread evenly over the table.
    """
    norms = []
    model = model.to(device)
    for row in choose_evenly(len(table), images):
        values = processor(images=[table.pixels([row])[0]], return_tensors="pt")["pixel_values"].to(device)
        norms.append(float(model(pixel_values=values).image_embeds.float().norm()))
    return float(np.mean(norms))
