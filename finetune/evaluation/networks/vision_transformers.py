"""Frozen CLIP and DINOv2 models in the layout of transformers, from a folder or from the hub.

Array shapes: B images, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of, sha256_file
from finetune.evaluation.networks.network import FrozenNetwork
from finetune.evaluation.pixel_metrics import Images
from finetune.foreign_models import load_with_library, read_model_config
from finetune.targets.models import find_model_folder, load_clip, load_dinov2


def _digest_weights(folder: Path) -> str:
    """Return the checksum of the file of weights, or a digest of the checksums of several files."""
    digests = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return next(iter(digests.values())) if len(digests) == 1 else digest_of(digests)


def _make_prepare(processor: Any, what: str, model: str | Path) -> Any:
    """Try a model's image processor once, and return a function that prepares images with this processor."""

    def prepare(images_BHW3: Images) -> Tensor:
        return torch.as_tensor(np.asarray(processor(images=list(images_BHW3), return_tensors="np")["pixel_values"]))

    load_with_library(lambda: prepare(np.zeros((1, 32, 32, 3), np.uint8)).float(), model, what)
    return prepare


def load_clip_network(clip: str | Path) -> FrozenNetwork:
    """Load the image encoder of a CLIP model. The embedding is the projection to the space that images and texts share.

    Parameters
    ----------
    clip : str or Path
        Directory or hub id of the model, e.g. ``openai/clip-vit-large-patch14``.

    Returns
    -------
    FrozenNetwork
        The network ``clip``. The model's own image processor resizes the original images.

    Raises
    ------
    RequestError
        If `clip` is not a CLIP model or cannot be loaded.
    """
    folder = find_model_folder(clip, "a CLIP model")
    model, processor = load_clip(folder)

    def compute(x_B3HW: Tensor) -> tuple[Tensor, None]:
        return model(pixel_values=x_B3HW.float()).image_embeds, None

    return FrozenNetwork(
        name="clip",
        file=str(clip),
        sha256=_digest_weights(folder),
        prepare=_make_prepare(processor, "a CLIP model", clip),
        compute=compute,
        batch=16,
    )


def load_dinov2_network(dinov2: str | Path) -> FrozenNetwork:
    """Load a DINOv2 model. The embedding is the class token after the last layer.

    Parameters
    ----------
    dinov2 : str or Path
        Directory or hub id of the model, e.g. ``facebook/dinov2-base``.

    Returns
    -------
    FrozenNetwork
        The network ``dinov2``. The model's own image processor resizes the original images.

    Raises
    ------
    RequestError
        If `dinov2` is not a DINOv2 model or cannot be loaded.
    """
    what = "a DINOv2 model"
    folder = find_model_folder(dinov2, what)
    if (kind := read_model_config(folder / "config.json").get("model_type")) != "dinov2":
        raise RequestError(f"{dinov2}: the model_type in config.json is '{kind}', not 'dinov2'; give {what}")
    model, processor = load_dinov2(folder)

    def compute(x_B3HW: Tensor) -> tuple[Tensor, None]:
        return model(pixel_values=x_B3HW.float()).last_hidden_state[:, 0], None

    return FrozenNetwork(
        name="dinov2",
        file=str(dinov2),
        sha256=_digest_weights(folder),
        prepare=_make_prepare(processor, what, dinov2),
        compute=compute,
        batch=16,
    )
