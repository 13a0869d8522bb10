"""Compute digests of frozen models and of the images of a split, for the keys of the cache."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from finetune.images import ImageTable

_NO_EFFECT = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype"})


def digest_weights(model: nn.Module) -> str:
    """Compute a SHA-256 over all weights of a frozen model.

    Parameters
    ----------
    model : Module
        Frozen model on the CPU.

    Returns
    -------
    str
        Hexadecimal SHA-256 over the names, shapes and values of all weights.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's config that can change its output."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _NO_EFFECT}


def describe_images(table: ImageTable) -> dict[str, Any]:
    """Return the entries of a cache key that stand for the images of a table.

    The checksums of the shards stand for the images, so no image has to be read.
    """
    data = table.dataset
    shards = [[shard.sha256, shard.withdrawn] for shard in data.manifest.splits[data.split]]
    own: dict[str, Any] = {"split": data.split, "shards": shards}
    if data.left_out:
        # An image is not in the table if all its trials are left out.
        own["images"] = table.ids
    return own
