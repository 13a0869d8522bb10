"""Compute the CLIP embeddings of a split's images once, with a frozen CLIP model.

Tensor shapes: M different images, P width of CLIP's projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from data_sharding.common.untrusted import check_count
from finetune.foreign_models import (
    MAX_SIDE,
    check_transformers_model,
    is_local,
    load_with_library,
    read_model_config,
)
from finetune.images import ImageTable

_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]
_WHAT = "a CLIP model"


def load_clip(clip: str | Path) -> tuple[Any, Any]:
    """Load the image side of a CLIP model, after a check of its files.

    Parameters
    ----------
    clip : str or Path
        Directory or hub id of the model.

    Returns
    -------
    model : CLIPVisionModelWithProjection
        The model on the CPU, in evaluation mode, with frozen weights.
    processor : CLIPImageProcessorPil
        The model's image processor.

    Raises
    ------
    RequestError
        If `clip` is not a CLIP model, cannot be loaded, or describes a network that is larger than its weights.
    """
    from huggingface_hub import snapshot_download
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = Path(clip)
    if not is_local(clip):
        # Download the files first, so that they can be checked before the model is built.
        folder = Path(load_with_library(lambda: snapshot_download(str(clip), allow_patterns=_FILES), clip, _WHAT))
    if not (folder / "config.json").is_file():
        raise RequestError(f"{clip}: not a CLIP model (no config.json); give the directory that save_pretrained wrote")
    check_transformers_model(CLIPVisionModelWithProjection, folder)
    read_model_config(folder / "preprocessor_config.json")

    def load() -> tuple[Any, Any]:
        words: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        model = CLIPVisionModelWithProjection.from_pretrained(str(folder), **words)
        return model, CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)

    model, processor = load_with_library(load, clip, _WHAT)
    check_count(model.config.image_size, str(folder / "config.json"), "image_size", least=1, most=MAX_SIDE)
    for name in ("size", "crop_size"):
        for key, value in (dict(getattr(processor, name) or {})).items():
            if value is not None:
                where = str(folder / "preprocessor_config.json")
                check_count(value, where, f"{name}.{key}", least=1, most=MAX_SIDE)
    # Try the processor once, because its config may hold values of any type.
    black = np.zeros((32, 32, 3), np.uint8)
    load_with_library(lambda: processor(images=[black], return_tensors="pt")["pixel_values"].float(), clip, _WHAT)
    return model.requires_grad_(False).eval(), processor


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
    model, processor = load_clip(clip)
    model, size = model.to(device), int(model.config.image_size)

    def compute(pixels_BHW3: np.ndarray) -> Tensor:
        values = processor(images=list(pixels_BHW3), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embeds_BP = model(pixel_values=values.to(device)).image_embeds.float()
        return torch.nn.functional.normalize(embeds_BP, dim=-1)

    # Resize images before CLIP's processor resizes them again, because all images of a batch must have the same size.
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
