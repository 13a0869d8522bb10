"""Sampling of images with a fine-tuned Stable Diffusion, and the diffusers pipeline in the package of every model.

Tensor shapes: B trials, C channels, T time points, L condition tokens of width W, E width of the time embedding, H
rows, W columns. A condition is a tuple of four tensors (see `finetune.base_models.conditions`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from finetune.base_models.conditions import run_unet
from finetune.diffusion import (
    Condition,
    SamplerName,
    Sampling,
    choose_sampling,
    draw_noise,
    make_generators,
    make_scheduler,
    sample,
)
from finetune.images import to_pixels

DECODE_PIXELS = 2**20
"""Largest number of pixels that the VAE decodes at once: four images of 512 x 512."""


def choose_sampler(scheduler: Any) -> SamplerName:
    """Return the default sampler of a model.

    Parameters
    ----------
    scheduler : diffusers scheduler
        Scheduler of the base model.

    Returns
    -------
    str
        ddim for a cosine noise schedule, because DPM-Solver++ diverges with it. euler for a base model that was
        distilled to a few steps, such as SD-Turbo and SDXL-Turbo: its scheduler is one of Euler, starts at the last
        step, and predicts the noise. dpmsolver++ otherwise, because it needs fewer steps than ddim for equal quality.
    """
    config = scheduler.config
    if config["beta_schedule"] == "squaredcos_cap_v2":
        return "ddim"
    starts_last = config.get("timestep_spacing") == "trailing" and config["prediction_type"] == "epsilon"
    return "euler" if starts_last and type(scheduler).__name__.startswith("Euler") else "dpmsolver++"


@contextlib.contextmanager
def use_time_path(unet: Any, *, used: bool) -> Iterator[None]:
    """Let a U-Net add its input ``class_labels`` to its time embedding, if `used`.

    At the end of the ``with`` block, the U-Net is as before, so that the stock pipeline of diffusers can use the U-Net.
    """
    before = unet.class_embedding
    if used:
        unet.class_embedding = nn.Identity()
    try:
        yield
    finally:
        unet.class_embedding = before


@contextlib.contextmanager
def use_safe_format(vae: Any) -> Iterator[None]:
    """Let an autoencoder compute in fp32 if its weights are in fp16 and its numbers can be too large for fp16.

    The autoencoder of Stable Diffusion XL (``force_upcast``) otherwise returns black images.
    """
    upcast = vae.dtype == torch.float16 and bool(vae.config.force_upcast)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


@torch.no_grad()
def sample_images(
    unet: Any,
    vae: Any,
    noising_config: Any,
    condition: Condition,
    null: Condition,
    sampling: Sampling,
    seeds: list[int],
    *,
    decode_pixels: int = DECODE_PIXELS,
) -> Tensor:
    """Generate images from conditions.

    Parameters
    ----------
    unet, vae : Module
        U-Net and autoencoder of the model. The U-Net may have weights in bf16.
    noising_config : dict
        Config of the base model's noise scheduler.
    condition, null : tuple of Tensor
        Conditions of the U-Net: from the EEG, and without EEG.
    sampling : Sampling
        Sampler, number of steps and guidance.
    seeds : list of int
        One seed for each trial. A trial's noise depends only on the trial's seed.
    decode_pixels : int
        Largest number of pixels that the autoencoder decodes at once, but at least one image is decoded at once.

    Returns
    -------
    Tensor of float32, shape (B, 3, H, W)
        Images with values from about -1 to 1.
    """
    size, device, generators = unet.config.sample_size, unet.device, make_generators(seeds)

    def denoise(x: Tensor, time: Tensor, states: Condition) -> Tensor:
        given = tuple(None if part is None else part.to(unet.dtype) for part in states)
        return run_unet(unet, x.to(unet.dtype), time, given).float()

    with use_time_path(unet, used=condition[1] is not None):
        z_B4hw = sample(
            denoise,
            # Latents may have values outside -1 to 1, the range of pixels, so the scheduler must not clip them.
            make_scheduler(sampling.sampler, noising_config, clip_sample=False),
            draw_noise((unet.config.in_channels, size, size), generators, device),
            condition,
            null,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generators=generators,
        )
    side = size * 2 ** (len(vae.config.block_out_channels) - 1)
    parts = (z_B4hw / vae.config.scaling_factor).split(max(1, decode_pixels // side**2))
    with use_safe_format(vae):
        return torch.cat([vae.decode(part.to(vae.dtype)).sample.float() for part in parts])


class EEGStableDiffusionPipeline(DiffusionPipeline):
    """Generate images from EEG with a fine-tuned Stable Diffusion.

    Parameters
    ----------
    encoder : Module
        Network that computes tokens from EEG.
    conditioner : Module
        Network that computes the condition of the U-Net from the tokens.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        Stock pipeline of diffusers, with the fine-tuned U-Net.
    drop : float
        Fraction of trials whose EEG was dropped in training. If the fraction is 0, guidance is not possible.

    Examples
    --------
    >>> pipeline = DiffusionPipeline.from_pretrained("run/model", trust_remote_code=True)  # doctest: +SKIP
    >>> pipeline(eeg_BCT, seeds=[0, 1]).images[0].save("image.png")  # doctest: +SKIP
    """

    def __init__(self, encoder: Any, conditioner: Any, pipeline: Any, drop: float = 0.0):
        super().__init__()
        self.register_modules(encoder=encoder, conditioner=conditioner, pipeline=pipeline)
        self.register_to_config(drop=drop)

    def to(self, *args: Any, **kwargs: Any) -> EEGStableDiffusionPipeline:
        """Move all networks to a device, and the networks of the stock pipeline to a number format, if one is given.

        The arguments are those of `DiffusionPipeline.to`. Encoder and conditioner are small, and keep fp32 weights.
        """
        self.pipeline.to(*args, **kwargs)
        self.encoder.to(self.pipeline.unet.device)
        self.conditioner.to(self.pipeline.unet.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        eeg: Any,
        seeds: list[int] | None = None,
        *,
        positions: Any = None,
        sampler: SamplerName | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg : ndarray or Tensor, shape (B, C, T)
            EEG in microvolts, with up to 128 channels, preprocessed as the file ``encoder/preprocess.json`` of the
            package says.
        seeds : list of int, optional
            One seed for each trial; by default 0 to B - 1. The noise of a trial depends only on the trial's seed.
        positions : ndarray or Tensor, shape (C, 3), optional
            Positions of the electrodes in metres, for a model whose training data had several montages. By default,
            the positions in the package of the model, if the model reads positions.
        sampler : str, optional
            Name of the sampler: ddpm, ddim, dpmsolver++, plms, euler or lcm.
        num_inference_steps : int, optional
            Number of denoising steps; by default a number that fits the sampler.
        guidance_scale : float, optional
            Scale of the classifier-free guidance; by default 2, or 1 for a model that was trained without dropped
            conditions, and for the samplers of few steps, euler and lcm.
        output_type : str
            pil: images of Pillow. np: an array of uint8, shape (B, H, W, 3).

        Returns
        -------
        ImagePipelineOutput
            The images.

        Raises
        ------
        ValueError
            If the settings do not fit the model, or a trial has too many channels or another number of samples.
        """
        stock = self.pipeline
        eeg_BCT = torch.as_tensor(np.asarray(eeg) if not isinstance(eeg, Tensor) else eeg).to(stock.unet.device)
        seeds = list(range(len(eeg_BCT))) if seeds is None else seeds
        if len(seeds) != len(eeg_BCT) or output_type not in ("pil", "np"):
            raise ValueError("give one seed for each trial, and the output_type pil or np")
        sampling = choose_sampling(
            stock.scheduler.config,
            sampler=sampler or choose_sampler(stock.scheduler),
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dropped=self.config.drop > 0,
            has_null=self.config.drop > 0,
        )
        if positions is not None:
            self.encoder.positions_C3 = torch.as_tensor(positions, dtype=torch.float32)
        condition, null = self.conditioner(self.encoder(eeg_BCT)), self.conditioner.null(len(eeg_BCT))
        made = sample_images(stock.unet, stock.vae, stock.scheduler.config, condition, null, sampling, seeds)
        images = to_pixels(made)
        return ImagePipelineOutput(images=images if output_type == "np" else self.numpy_to_pil(images / 255.0))
