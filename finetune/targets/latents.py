"""Compute the latents of a split's images with the autoencoder of Stable Diffusion, and keep them in the cache.

Tensor shapes: M different images, V views of an image, h rows and w columns of a latent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.images import ImageTable, to_model_range
from finetune.targets.cache import BLOCK, Job, load_features
from finetune.targets.digest import describe_images, digest_weights, plain_config
from finetune.targets.views import ViewConfig, make_view
from pretrain.runs.distributed import World


def encode_images(
    table: ImageTable, vae: Any, size: int, *, views: ViewConfig | None = None, world: World | None = None
) -> Tensor:
    """Encode every image of a split to the mean and standard deviation of its latents.

    Parameters
    ----------
    table : ImageTable
        Images of the split.
    vae : AutoencoderKL
        Autoencoder of the base model, on the CPU.
    size : int
        Width and height, in pixels, to which images are resized.
    views : ViewConfig, optional
        Views of each image that are encoded; by default, only the central square of the image.
    world : World, optional
        The processes of the run and the device of the computation; all processes must call this function. By default,
        this process alone, on the CPU.

    Returns
    -------
    Tensor of float32, [M, 2, 4, h, w], or [M, V, 2, 4, h, w] if `views` asks for several views
        Mean and standard deviation of the latents, on the CPU, scaled as the U-Net needs them. The cache holds them, so
        do not change them in place.
    """
    world, views = world or World(), views or ViewConfig()

    @torch.no_grad()
    def encode(pixels_BHW3: np.ndarray) -> Tensor:
        posterior = vae.to(world.device).encode(to_model_range(pixels_BHW3).to(world.device)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor

    def compute(rows: list[int]) -> Tensor:
        if views.count == 1:
            return encode(table.pixels(rows, size))
        images = [(table.ids[row], image) for row, image in zip(rows, table.decode(rows), strict=True)]
        return torch.stack(
            [
                encode(np.stack([make_view(image, size, views, number, name) for name, image in images]))
                for number in range(views.count)
            ],
            1,
        )

    key = {
        "what": "latents",
        "weights": digest_weights(vae),
        "config": plain_config(dict(vae.config)),
        "size": size,
        **({"views": dataclasses.asdict(views)} if views.count > 1 else {}),
        **describe_images(table),
    }
    job = Job(
        what=f"latents of the {table.dataset.split} images",
        key=key,
        rows=len(table),
        compute=compute,
        name_row=lambda row: f"image {table.ids[row]}",
        # A batch has at most as many pixels as 64 images of 128 x 128, so that large images do not need more memory.
        batch_size=max(1, min(BLOCK, 64 * 128 * 128 // size**2)),
    )
    latents = load_features(job, table.dataset.path, world)
    vae.to("cpu")
    return latents
