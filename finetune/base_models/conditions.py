"""What the U-Net of a base model gets besides the noisy latent: states from a text or from EEG, and vectors.

Tensor shapes: B trials, L condition tokens of width W, E width of the time embedding, P width of the pooled embedding.

A condition is a tuple ``(states_BLW, time_BE, pooled_BP, sizes_B6)``. The last three entries may be None. ``time_BE``
is added to the time embedding. ``pooled_BP`` and ``sizes_B6`` are the additional inputs of Stable Diffusion XL: the
pooled embedding of a text, and the sizes of the original image, of the upper left corner of the crop, and of the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_unet(unet: Any, noisy_B4hw: Tensor, time: Tensor, condition: tuple[Tensor | None, ...]) -> Tensor:
    """Run the U-Net of a base model.

    Parameters
    ----------
    unet : UNet2DConditionModel
        The U-Net.
    noisy_B4hw : Tensor, [B, 4, h, w]
        Noisy latents.
    time : Tensor of int, [B] or []
        Step of the forward process (the process that adds noise).
    condition : tuple of Tensor
        ``(states_BLW, time_BE, pooled_BP, sizes_B6)``.

    Returns
    -------
    Tensor, [B, 4, h, w]
        Prediction of the U-Net.
    """
    states_BLW, time_BE, pooled_BP, sizes_B6 = condition
    added = None if pooled_BP is None else {"text_embeds": pooled_BP, "time_ids": sizes_B6}
    return unet(noisy_B4hw, time, states_BLW, class_labels=time_BE, added_cond_kwargs=added).sample


def make_sizes(image_size: int) -> Tensor:
    """Return the size input of Stable Diffusion XL, shape [6], for square images that were not cropped."""
    return torch.tensor([image_size, image_size, 0, 0, image_size, image_size], dtype=torch.float32)


def find_image_size(pipeline: Any) -> int:
    """Return the width and height of a base model's images in pixels."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def has_pooled(pipeline: Any) -> bool:
    """Return True if the U-Net of a base model also reads a pooled embedding and sizes, as in Stable Diffusion XL."""
    return pipeline.unet.config.addition_embed_type == "text_time"


@torch.no_grad()
def embed_texts(pipeline: Any, texts: list[str], device: Any = "cpu") -> tuple[Tensor, Tensor | None]:
    """Encode texts with the text encoders of a base model.

    Parameters
    ----------
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The base model.
    texts : list of str
        The texts.
    device : torch.device
        Device of the computation, to which the text encoders are moved.

    Returns
    -------
    states_BLW : Tensor, [B, L, W]
        Cross-attention states.
    pooled_BP : Tensor, [B, P], or None
        Pooled embeddings of the second text encoder of Stable Diffusion XL.
    """
    if has_pooled(pipeline):
        pipeline.text_encoder.to(device)
        pipeline.text_encoder_2.to(device)
        states_BLW, _, pooled_BP, _ = pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
        return states_BLW.float(), pooled_BP.float()
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return pipeline.text_encoder.to(device)(ids.to(device))[0].float(), None


def embed_nothing(pipeline: Any) -> tuple[Tensor, Tensor | None]:
    """Return the condition without a text that the base model saw in its training, for one trial.

    The condition is the embedding of an empty text, or zeros if the base model was trained with zeros, as Stable
    Diffusion XL (``force_zeros_for_empty_prompt``).

    Parameters
    ----------
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The base model.

    Returns
    -------
    states_1LW : Tensor, [1, L, W]
        Cross-attention states.
    pooled_1P : Tensor, [1, P], or None
        Pooled embedding; None if the base model does not use it.
    """
    states_1LW, pooled_1P = embed_texts(pipeline, [""])
    if pooled_1P is not None and pipeline.config.force_zeros_for_empty_prompt:
        return torch.zeros_like(states_1LW), torch.zeros_like(pooled_1P)
    return states_1LW, pooled_1P
