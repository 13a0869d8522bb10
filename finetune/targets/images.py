"""Compute the embeddings of a split's images with a frozen image model, and keep them in the cache.

Tensor shapes: B images, M different images, P width of the embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from finetune.images import ImageTable
from finetune.targets.cache import Job, load_features
from finetune.targets.digest import describe_images, digest_weights, plain_config
from finetune.targets.models import load_image_model
from pretrain.runs.distributed import World


def embed_images(
    table: ImageTable, name: str | Path, *, layer: int | None = None, world: World | None = None
) -> Tensor:
    """Compute the embedding of every image of a split with a frozen image model.

    Parameters
    ----------
    table : ImageTable
        Images of the split.
    name : str or Path
        Directory of a model of one of the `KINDS` with its image processor, or its hub id, e.g.
        ``openai/clip-vit-large-patch14``.
    layer : int, optional
        Hidden layer that is the embedding: 0 is the input of the first layer, -1 the output of the last layer. The
        embedding is the class token, or the mean over all tokens for a model without class token. By default, the
        model's final embedding, such as CLIP's projection.
    world : World, optional
        The processes of the run and the device of the computation; all processes must call this function. By default,
        this process alone, on the CPU.

    Returns
    -------
    Tensor of float32, shape (M, P)
        Embeddings of unit length, on the CPU. The cache holds them, so do not change them in place.

    Raises
    ------
    RequestError
        If the model cannot be loaded, or has no such layer.
    """
    world = world or World()
    model, processor, kind = load_image_model(name)
    layers = int(model.config.num_hidden_layers)
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise RequestError(f"layer is {layer}, but {name} has {layers} hidden layers; give 0 to {layers}, or -1")
    index = None if layer is None else layer % (layers + 1)

    @torch.no_grad()
    def compute(rows: list[int]) -> Tensor:
        # The images still have their original size. The model's image processor resizes the images, as in the
        # publication of the model.
        values = processor(images=table.decode(rows), return_tensors="pt")["pixel_values"]
        out = model.to(world.device)(pixel_values=values.to(world.device), output_hidden_states=index is not None)
        embeds_BP = kind.embed(out) if index is None else kind.pool(out.hidden_states[index])
        return torch.nn.functional.normalize(embeds_BP.float(), dim=-1)

    key: dict[str, Any] = {
        "what": "embeddings of images",
        "weights": digest_weights(model),
        "config": plain_config(model.config.to_dict()),
        "processor": plain_config(processor.to_dict()),
        "layer": index,
        **describe_images(table),
    }
    job = Job(
        what=f"embeddings of the {table.dataset.split} images ({name})",
        key=key,
        rows=len(table),
        compute=compute,
        name_row=lambda row: f"image {table.ids[row]}",
    )
    return load_features(job, table.dataset.path, world)
