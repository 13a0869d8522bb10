"""Load the targets that a config chooses: embeddings of the images, of their texts, or both.

Tensor shapes: M different images, K targets of an image (image, text, or both), P width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from finetune.images import ImageTable
from finetune.targets.config import TargetConfig
from finetune.targets.images import embed_images
from finetune.targets.text import embed_texts
from pretrain.runs.distributed import World


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of the images of a split."""

    embeds: list[Tensor]
    """For each of the K targets, its embeddings [M, P] of unit length."""
    groups: list[Tensor]
    """For each target, int64 [M]: images with the same number have the same target."""
    weights: list[float]
    """Weight of the loss of each target."""

    @property
    def width(self) -> int:
        """Width P of the embeddings."""
        return int(self.embeds[0].shape[1])

    @property
    def first(self) -> Tensor:
        """Embeddings [M, P] of the first target, which the evaluation on the val split uses."""
        return self.embeds[0]

    def choose(self, rows: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings [b, K, P] and the groups [b, K] of some rows."""
        chosen = torch.as_tensor(rows)
        return (
            torch.stack([target[chosen] for target in self.embeds], 1),
            torch.stack([group[chosen] for group in self.groups], 1),
        )


def load_targets(config: TargetConfig, table: ImageTable, world: World | None = None) -> Targets:
    """Compute the targets of the images of a split, or read them from the cache.

    Parameters
    ----------
    config : TargetConfig
        The targets.
    table : ImageTable
        Images of the split.
    world : World, optional
        The processes of the run; all processes must call this function. By default, this process alone, on the CPU.

    Returns
    -------
    Targets
        The targets; the image comes before the text.

    Raises
    ------
    RequestError
        If the model cannot be loaded, or cannot embed what the config asks for.
    """
    embeds, groups, weights = [], [], []
    if config.image_weight:
        embeds.append(embed_images(table, config.model, layer=config.layer, world=world))
        groups.append(torch.arange(len(table)))
        weights.append(config.image_weight)
    if config.text_weight:
        data = table.dataset
        texts = table.captions if config.text == "captions" else table.label_names
        embeds.append(embed_texts(texts, config.model, data.path, what=f"{data.split} {config.text}", world=world))
        groups.append(torch.as_tensor(np.unique(texts, return_inverse=True)[1]))
        weights.append(config.text_weight)
    if len({target.shape[1] for target in embeds}) > 1:
        raise RequestError(f"{config.model}: its embeddings of images and of texts differ in width; give another model")
    return Targets(embeds=embeds, groups=groups, weights=weights)
