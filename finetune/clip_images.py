"""Compute the CLIP embeddings of a split's images once, with a frozen CLIP model.

Tensor shapes: M different images, P width of CLIP's projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line
from finetune.images import ImageTable


def is_local(model: str | Path) -> bool:
    """Return True if a model is given as a directory, and False if the model is given as a hub id.

    Parameters
    ----------
    model : str or Path
        Directory or hub id from the config.

    Returns
    -------
    bool
        True if the model is a directory, False if the model is a hub id.

    Raises
    ------
    RequestError
        If the value looks like a path, but the directory does not exist.
    """
    text = str(model)
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") != 1
    if Path(text).is_dir():
        return True
    if looks_like_path:
        raise RequestError(f"{text}: no such directory, and not a hub id ('owner/name') either")
    return False


def embed_images(
    table: ImageTable, clip: str | Path, *, device: Any = "cpu", cache: str | Path | None = None, write: bool = True
) -> Tensor:
    """Compute the CLIP embedding of every image of a split.

    Parameters
    ----------
    table : ImageTable
        Images of the split.
    clip : str or Path
        Directory of a CLIP model with its image processor, or its hub id, e.g. ``openai/clip-vit-large-patch14``.
    device : torch.device
        Device of the computation.
    cache : str or Path, optional
        Directory in which the embeddings are stored; None stores nothing.
    write : bool
        True if this process may write to the cache directory; only rank 0 should write.

    Returns
    -------
    Tensor of float32, shape (M, P)
        Embeddings of unit length, on the CPU.

    Raises
    ------
    RequestError
        If `clip` is not a CLIP model, or cannot be loaded.
    """
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    local = is_local(clip)
    if local and not (Path(clip) / "config.json").is_file():
        raise RequestError(f"{clip}: not a CLIP model (no config.json); give the directory that save_pretrained wrote")
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(str(clip), local_files_only=local)
        processor = CLIPImageProcessorPil.from_pretrained(str(clip), local_files_only=local)
    except (OSError, ValueError) as error:
        raise RequestError(f"{clip}: cannot be loaded as a CLIP model ({one_line(error)[:200]})") from None
    model = model.requires_grad_(False).eval().to(device)

    def compute(pixels_BHW3: np.ndarray) -> Tensor:
        values = processor(images=list(pixels_BHW3), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embeds_BP = model(pixel_values=values.to(device)).image_embeds.float()
        return torch.nn.functional.normalize(embeds_BP, dim=-1)

    # Resize images before CLIP's processor resizes them again, because all images of a batch must have the same size.
    size = int(model.config.image_size)  # pyright: ignore[reportArgumentType] - the size is a number in every CLIP model
    key = {"what": "clip", "weights": digest_weights(model)}
    return table.features(compute, size=size, key=key, cache=cache, write=write)


def digest_weights(model: torch.nn.Module) -> list[float]:
    """Compute a short digest of a frozen model's weights, which is used in the keys of caches.

    Parameters
    ----------
    model : Module
        Frozen model.

    Returns
    -------
    list of float
        Sums of a few weight tensors. Different models have different sums.
    """
    parameters = list(model.parameters())
    picked = [*parameters[:: max(1, len(parameters) // 8)], parameters[-1]]
    return [round(float(p.detach().double().sum()), 6) for p in picked]
