"""Frozen image generators that make images from a CLIP image embedding: IP-Adapter and unCLIP.

Tensor shapes: B trials, P width of the embeddings, L condition tokens of width W, h rows and w columns of a latent, H
rows and W columns of an image.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_sharding.common.errors import RequestError
from finetune.base_models.conditions import embed_nothing, embed_texts, find_image_size, make_sizes
from finetune.base_models.load import load_base
from finetune.diffusion import FEW_STEP, Condition, SamplerName, Sampling, choose_sampling, make_scheduler, sample
from finetune.frozen_decoder.adapter import install_adapter
from finetune.frozen_decoder.config import DecoderConfig
from finetune.frozen_decoder.unclip import UnCLIP, load_unclip
from finetune.stable_diffusion.portable.pipeline import DECODE_PIXELS, choose_sampler
from finetune.targets.digest import digest_weights

Texts = tuple[Tensor, Tensor | None]
"""Cross-attention states [B, L, W] and, for SDXL, pooled embeddings of texts."""
GUIDANCE = {"ip_adapter": 5.0, "unclip": 10.0, "vae": 1.0}
"""Default scale of the classifier-free guidance."""


class Decoder:
    """Frozen image generator that makes images from an image embedding.

    Parameters
    ----------
    pipeline : diffusers pipeline
        The base model.
    config : DecoderConfig
        Settings of the generator.
    width : int
        Width of the image embeddings that the generator reads; 0 if it reads none (kind vae).
    """

    def __init__(self, pipeline: Any, config: DecoderConfig, width: int) -> None:
        self.pipeline, self.config, self.width = pipeline, config, width
        self.unet, self.vae = pipeline.unet, pipeline.vae

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.unet.device

    @property
    def image_size(self) -> int:
        """Width and height of the generated images in pixels."""
        return find_image_size(self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent of an image."""
        return int(self.unet.config.in_channels), self.unet.config.sample_size, self.unet.config.sample_size

    def count_latent(self, size: int) -> int:
        """Return the number of values in the latent of an image of `size` x `size` pixels."""
        return int(self.vae.config.latent_channels) * (size // self.pipeline.vae_scale_factor) ** 2

    def to(self, device: Any) -> Decoder:
        """Move the networks to a device."""
        self.unet.to(device)
        self.vae.to(device)
        return self

    def digest(self) -> dict[str, str]:
        """Return digests of the frozen weights, which must be on the CPU. A package recognises the weights by them."""
        return {"unet": digest_weights(self.unet), "vae": digest_weights(self.vae)}

    def choose_sampling(
        self, *, sampler: SamplerName | None, steps: int | None, guidance_scale: float | None
    ) -> Sampling:
        """Replace the settings that are None with those of the config, or else with defaults of the generator.

        Raises
        ------
        ValueError
            If the settings do not fit the generator.
        """
        sampler = sampler or self.config.sampler or choose_sampler(self.pipeline.scheduler)
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if guidance is None:
            guidance = 1.0 if sampler in FEW_STEP else GUIDANCE[self.config.kind]
        return choose_sampling(
            self.pipeline.scheduler.config,
            sampler=sampler,
            steps=steps or self.config.steps,
            guidance_scale=guidance,
            dropped=True,
            has_null=True,
        )

    def embed(self, embeds_BP: Tensor, noise_BP: Tensor) -> Condition:
        """Return the condition of image embeddings, which have the norm that CLIP computes."""
        raise NotImplementedError

    def embed_captions(self, captions: list[str]) -> Condition:
        """Return the condition of captions, without an image embedding."""
        raise NotImplementedError

    def embed_nothing(self, batch: int) -> Condition:
        """Return the condition without text and without image embedding."""
        raise NotImplementedError

    def denoise(self, x_B4hw: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net on noisy latents."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        noise_B4hw: Tensor,
        sampling: Sampling,
        generators: list[torch.Generator],
        *,
        start_B3HW: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Generate images.

        Parameters
        ----------
        condition : tuple of Tensor
            Condition of the trials.
        noise_B4hw : Tensor, [B, 4, h, w]
            Standard normal noise, from which the denoising starts.
        sampling : Sampling
            Sampler, number of steps and guidance.
        generators : list of torch.Generator
            Generator of each trial.
        start_B3HW : Tensor, [B, 3, H, W], optional
            Images of any size, with values from -1 to 1, from which the denoising starts.
        strength : float
            Share of the denoising steps that are done if `start_B3HW` is given.

        Returns
        -------
        Tensor of float32, shape (B, 3, H, W)
            Images with values from about -1 to 1.
        """
        start = None if start_B3HW is None else self.encode(self.resize(start_B3HW))
        z_B4hw = sample(
            self.denoise,
            # Latents may have values outside -1 to 1, the range of pixels, so the scheduler must not clip them.
            make_scheduler(sampling.sampler, self.pipeline.scheduler.config, clip_sample=False),
            noise_B4hw,
            condition,
            self.embed_nothing(len(noise_B4hw)),
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generators=generators,
            start=start,
            strength=strength,
        )
        return self.decode(z_B4hw)

    def resize(self, x_B3HW: Tensor) -> Tensor:
        """Resize images to the size of the generator."""
        size = (self.image_size, self.image_size)
        return F.interpolate(x_B3HW, size, mode="bilinear", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x_B3HW: Tensor) -> Tensor:
        """Encode images to scaled latents [B, 4, h, w]."""
        parts = x_B3HW.to(self.vae.dtype).split(max(1, DECODE_PIXELS // x_B3HW.shape[-1] ** 2))
        means = [self.vae.encode(part).latent_dist.mean.float() for part in parts]
        return torch.cat(means) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z_B4hw: Tensor) -> Tensor:
        """Decode scaled latents to images [B, 3, H, W]."""
        side = z_B4hw.shape[-1] * self.pipeline.vae_scale_factor
        latents = (z_B4hw / self.vae.config.scaling_factor).to(self.vae.dtype)
        parts = latents.split(max(1, DECODE_PIXELS // side**2))
        return torch.cat([self.vae.decode(part).sample.float() for part in parts])

    @functools.cached_property
    def _prompt(self) -> Texts:
        return embed_texts(self.pipeline, [self.config.prompt])

    @functools.cached_property
    def _nothing(self) -> Texts:
        return embed_nothing(self.pipeline)

    def _repeat(self, texts: Texts, batch: int) -> Texts:
        """Repeat the states and the pooled embedding of one text for all trials of a batch."""
        states_1LW, pooled_1P = texts
        states_BLW = states_1LW.to(self.device).expand(batch, -1, -1)
        return states_BLW, None if pooled_1P is None else pooled_1P.to(self.device).expand(batch, -1)


class IPAdapterDecoder(Decoder):
    """Stable Diffusion or SDXL with an IP-Adapter. A condition is (states, image embeddings, pooled text, sizes)."""

    def _fill(self, texts: Texts, embeds_BP: Tensor) -> Condition:
        states_BLW, pooled_BP = texts
        sizes = None if pooled_BP is None else make_sizes(self.image_size).to(self.device).expand(len(embeds_BP), -1)
        return states_BLW, embeds_BP.to(self.device)[:, None], pooled_BP, sizes

    def embed(self, embeds_BP: Tensor, noise_BP: Tensor) -> Condition:
        """Return the condition of image embeddings; the noise is not used."""
        del noise_BP
        return self._fill(self._repeat(self._prompt, len(embeds_BP)), embeds_BP)

    def embed_captions(self, captions: list[str]) -> Condition:
        """Return the condition of captions, without an image embedding."""
        return self._fill(embed_texts(self.pipeline, captions, self.device), torch.zeros(len(captions), self.width))

    def embed_nothing(self, batch: int) -> Condition:
        """Return the condition without text and without image embedding, with which IP-Adapters are trained."""
        return self._fill(self._repeat(self._nothing, batch), torch.zeros(batch, self.width))

    def denoise(self, x_B4hw: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net on noisy latents."""
        states, image, pooled, sizes = (None if part is None else part.to(self.unet.dtype) for part in condition)
        added = {"image_embeds": [image]} | ({} if pooled is None else {"text_embeds": pooled, "time_ids": sizes})
        x = x_B4hw.to(self.unet.dtype)
        return self.unet(x, time, states, added_cond_kwargs=added).sample.float()


class UnCLIPDecoder(Decoder):
    """Stable unCLIP. A condition is (states, image embeddings with their noise level)."""

    def __init__(self, unclip: UnCLIP, config: DecoderConfig) -> None:
        super().__init__(unclip.pipeline, config, unclip.mean_1P.shape[1])
        self.unclip = unclip

    def embed(self, embeds_BP: Tensor, noise_BP: Tensor) -> Condition:
        """Return the condition of image embeddings, to which noise of the level in the config is added."""
        states_BLW, _ = self._repeat(self._prompt, len(embeds_BP))
        embeds_BP, noise_BP = embeds_BP.to(self.device), noise_BP.to(self.device)
        return states_BLW, self.unclip.add_noise(embeds_BP, noise_BP, self.config.noise_level)

    def embed_captions(self, captions: list[str]) -> Condition:
        """Return the condition of captions, without an image embedding."""
        return embed_texts(self.pipeline, captions, self.device)[0], torch.zeros(
            len(captions), 2 * self.width, device=self.device
        )

    def embed_nothing(self, batch: int) -> Condition:
        """Return the condition without text and without image embedding."""
        return self._repeat(self._nothing, batch)[0], torch.zeros(batch, 2 * self.width, device=self.device)

    def denoise(self, x_B4hw: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net on noisy latents."""
        states, image = (None if part is None else part.to(self.unet.dtype) for part in condition)
        return self.unet(x_B4hw.to(self.unet.dtype), time, states, class_labels=image).sample.float()


def load_decoder(config: DecoderConfig) -> Decoder:
    """Load a frozen image generator.

    Parameters
    ----------
    config : DecoderConfig
        Kind and files of the generator.

    Returns
    -------
    Decoder
        The generator on the CPU, in fp32.

    Raises
    ------
    RequestError
        If a file is missing or damaged, or if the parts do not fit each other.
    """
    if config.kind == "unclip":
        decoder: Decoder = UnCLIPDecoder(load_unclip(config.base), config)
        most = int(decoder.unclip.noising.config.num_train_timesteps) - 1  # type: ignore[attr-defined]
        if config.noise_level > most:
            raise RequestError(
                f"decoder.noise_level is {config.noise_level}, but must be at most {most} for {config.base}"
            )
        return decoder
    pipeline = load_base(Path(config.base) if Path(config.base).exists() else config.base, config.base_config)
    if config.kind == "vae":
        return Decoder(pipeline, config, 0)
    assert config.adapter is not None
    return IPAdapterDecoder(pipeline, config, install_adapter(pipeline, config.adapter, config.scale))
