"""Compute the embeddings of a split's images with a frozen CLIP or DINOv2 model, and keep them in a cache.

Tensor shapes: M different images, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError, show
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


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of image model: CLIP or DINOv2."""

    what: str
    """Name of the kind in messages."""
    classes: Callable[[], tuple[Any, Any]]
    """Function that imports the class of the model and the class of its image processor."""


def _clip_classes() -> tuple[Any, Any]:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPVisionModelWithProjection, CLIPImageProcessorPil


def _dinov2_classes() -> tuple[Any, Any]:
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return Dinov2Model, BitImageProcessorPil


_KINDS = {
    "clip": _Kind(what="a CLIP model", classes=_clip_classes),
    "dinov2": _Kind(what="a DINOv2 model", classes=_dinov2_classes),
}


def load_clip(clip: str | Path) -> tuple[Any, Any]:
    """Check the files of a CLIP model, and load its image encoder.

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
        If `clip` is not a CLIP model, cannot be loaded, or has a config that describes a larger network than the one in
        the weight files.
    """
    return _load(clip, find_model_folder(clip, _KINDS["clip"].what), _KINDS["clip"])


def load_dinov2(dinov2: str | Path) -> tuple[Any, Any]:
    """Load a DINOv2 model and its image processor; arguments and results as in `load_clip`."""
    return _load(dinov2, find_model_folder(dinov2, _KINDS["dinov2"].what), _KINDS["dinov2"])


def load_image_model(model: str | Path) -> tuple[Any, Any]:
    """Load a frozen image model: the image encoder of CLIP, or DINOv2; arguments and results as in `load_clip`."""
    folder = find_model_folder(model, "a CLIP or DINOv2 model")
    kind = str(read_model_config(folder / "config.json").get("model_type", "")).removesuffix("_vision_model")
    if kind not in _KINDS:
        raise RequestError(
            f"{model}: config.json names the model type {show(kind)}; give a model of type {' or '.join(_KINDS)}"
        )
    return _load(model, folder, _KINDS[kind])


def find_model_folder(model: str | Path, what: str) -> Path:
    """Return the folder of a model of transformers, and download the model if a hub id is given.

    Parameters
    ----------
    model : str or Path
        Directory or hub id of the model.
    what : str
        Kind of the model, such as "a DINOv2 model", for error messages.

    Returns
    -------
    Path
        Folder with config.json, preprocessor_config.json and weights.

    Raises
    ------
    RequestError
        If the folder does not exist or is not complete, or if the model cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    folder = Path(model)
    if not is_local(model):
        # Download the files first, so that they can be checked before the model is built.
        folder = Path(load_with_library(lambda: snapshot_download(str(model), allow_patterns=_FILES), model, what))
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise RequestError(
                f"{model}: not {what} (the file {name} is missing); give the directory that save_pretrained wrote"
            )
    return folder


def _load(name: str | Path, folder: Path, kind: _Kind) -> tuple[Any, Any]:
    model_class, processor_class = kind.classes()
    check_transformers_model(model_class, folder)
    read_model_config(folder / "preprocessor_config.json")

    def load() -> tuple[Any, Any]:
        words: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        model = model_class.from_pretrained(str(folder), **words)
        return model, processor_class.from_pretrained(str(folder), local_files_only=True)

    model, processor = load_with_library(load, name, kind.what)
    check_count(model.config.image_size, str(folder / "config.json"), "image_size", least=1, most=MAX_SIDE)
    for field in ("size", "crop_size"):
        for key, value in (dict(getattr(processor, field) or {})).items():
            if value is not None:
                where = str(folder / "preprocessor_config.json")
                check_count(value, where, f"{field}.{key}", least=1, most=MAX_SIDE)
    # Run the image processor once, because values of a wrong type in its config cause an error only when it processes
    # an image.
    black = np.zeros((32, 32, 3), np.uint8)
    load_with_library(lambda: processor(images=[black], return_tensors="pt")["pixel_values"].float(), name, kind.what)
    return model.requires_grad_(False).eval(), processor


def embed_images(
    table: ImageTable,
    clip: str | Path,
    *,
    layer: int | None = None,
    device: Any = "cpu",
    cache: str | Path | None = None,
    write: bool = True,
) -> Tensor:
    """Compute the embedding of every image of a split with a frozen image model.

    Parameters
    ----------
    table : ImageTable
        Images of the split.
    clip : str or Path
        Directory of a CLIP or DINOv2 model with its image processor, or its hub id, e.g.
        ``openai/clip-vit-large-patch14``.
    layer : int, optional
        Hidden layer whose class token is the embedding: 0 is the input of the first layer, -1 the output of the last
        layer. By default, the model's final embedding: CLIP's projection, or DINOv2's normalised class token.
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
        If `clip` is not a CLIP or DINOv2 model, cannot be loaded, or has no such layer.
    """
    model, processor = load_image_model(clip)
    model = model.to(device)
    layers = int(model.config.num_hidden_layers)
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise RequestError(f"layer is {layer}, but {clip} has {layers} hidden layers; give 0 to {layers}, or -1")

    def compute(images: list[np.ndarray]) -> Tensor:
        # The images still have their original size. The model's image processor resizes the images, as in the
        # publication of the model.
        values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        with torch.no_grad():
            out = model(pixel_values=values, output_hidden_states=layer is not None)
        if layer is not None:
            embeds_BP = out.hidden_states[layer][:, 0].float()
        else:
            embeds_BP = (out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output).float()
        return torch.nn.functional.normalize(embeds_BP, dim=-1)

    key = {"what": "embeddings", "weights": digest_weights(model), "layer": layer}
    return table.features(compute, size=None, key=key, cache=cache, write=write)


def digest_weights(model: torch.nn.Module) -> list[float]:
    """Compute a short digest of a frozen model's weights, for the keys of caches.

    Parameters
    ----------
    model : Module
        Frozen model.

    Returns
    -------
    list of float
        Sums of a few weight tensors. In practice, two models with different weights have different sums.
    """
    parameters = list(model.parameters())
    picked = [*parameters[:: max(1, len(parameters) // 8)], parameters[-1]]
    return [round(float(p.detach().double().sum()), 6) for p in picked]
