"""Config of ``dreamscale decode``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finetune.eeg import EEGConfig
from finetune.linear.ridge import Fit
from finetune.training.config import TrainingConfig
from pretrain.runs.tracking import TrackerConfig

DecoderKind = Literal["ip_adapter", "unclip", "vae"]
Sampler = Literal["ddpm", "ddim", "dpmsolver++", "plms", "euler", "lcm"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Frozen image generator, and how it makes images from an embedding."""

    kind: DecoderKind = "ip_adapter"
    """ip_adapter: Stable Diffusion or SDXL with the weights of an IP-Adapter. unclip: Stable unCLIP. vae: no diffusion;
    the autoencoder of the base model decodes a latent that is predicted from the EEG, which gives blurred images."""
    base: str
    """Base model in the layout of diffusers: a directory or a hub id, such as stabilityai/sdxl-turbo (ip_adapter, vae)
    or stabilityai/stable-diffusion-2-1-unclip (unclip). For ip_adapter and vae, also a single .safetensors file."""
    base_config: str | None = None
    """For a base in a single file: directory or hub id of a pipeline of the same kind, whose configs are used."""
    adapter: str | None = None
    """IP-Adapter weights for the kind ip_adapter: a .safetensors file, or a hub id and the path of the file, such as
    h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors. The adapter must be one of the plain kind, which reads
    one embedding of an image."""
    scale: float = 1.0
    """Weight of the image embedding in the cross-attentions (ip_adapter)."""
    prompt: str = ""
    """Text that is given to the base model together with the image embedding, for all trials."""
    noise_level: int = 0
    """Noise that is added to the image embedding (unclip): 0 adds almost none. Embeddings that are predicted badly may
    give better images with more noise."""
    sampler: Sampler | None = None
    """Default sampler of `dreamscale generate`. Empty: euler for a base model that was distilled to 1 to 4 steps, such
    as SDXL-Turbo, otherwise a sampler that fits the noise schedule of the base model."""
    steps: int | None = None
    """Default number of denoising steps. Empty: a number that fits the sampler."""
    guidance_scale: float | None = None
    """Default scale of the classifier-free guidance. Empty: 5 for ip_adapter, 10 for unclip, and 1 for the samplers
    euler and lcm."""

    def __post_init__(self) -> None:
        if self.kind == "ip_adapter" and self.adapter is None:
            raise ValueError("'decoder.kind: ip_adapter' needs the key 'decoder.adapter': the weights of an IP-Adapter")
        if self.kind != "ip_adapter" and self.adapter is not None:
            raise ValueError(f"'decoder.adapter' is only for the kind ip_adapter, not for {self.kind}; remove this key")
        if self.kind == "unclip" and self.base_config is not None:
            raise ValueError("'decoder.base_config' is not for the kind unclip; remove this key")
        if not self.scale >= 0 or self.noise_level < 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(
                "'decoder.scale' and 'decoder.noise_level' must be at least 0, and 'decoder.steps' at least 1, got "
                f"{self.scale}, {self.noise_level} and {self.steps}"
            )


@dataclass(frozen=True, kw_only=True)
class RidgeConfig:
    """Ridge regressions from the time courses of the EEG."""

    bins: int = 25
    """Number of time bins. The EEG of a channel is averaged over each time bin."""
    fit: Fit = "pooled"
    """pooled: one regression for all people. each: one regression for each person of the train split; images can then
    be generated only for these people."""

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"ridge.bins must be at least 1, got {self.bins}")


@dataclass(frozen=True, kw_only=True)
class LowLevelConfig:
    """Low-level path: a coarse image is predicted from the EEG by way of its latent, and the denoising starts there."""

    strength: float = 1.0
    """Share of the denoising steps that are done, starting from the coarse image with noise. 1 switches the low-level
    path off: the denoising then starts from noise alone. The kind vae always uses the low-level path."""
    size: int = 128
    """Width and height of the coarse image in pixels; a multiple of 8. The number of regression weights grows with the
    square of the size."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1 or self.size < 8 or self.size % 8:
            raise ValueError(
                "'low_level.strength' must be above 0 and at most 1, and 'low_level.size' a multiple of 8, got "
                f"{self.strength} and {self.size}"
            )


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Diffusion prior: a small network that samples an image embedding from the embedding predicted from the EEG."""

    enabled: bool = False
    """True: train a prior, and give its embeddings to the decoder. False: give the predicted embeddings to the decoder,
    with the mean and the norm of the embeddings of images."""
    width: int = 1024
    """Width of the network's layers."""
    depth: int = 4
    """Number of residual blocks."""
    drop: float = 0.1
    """Fraction of training trials whose predicted embedding is dropped, which guidance needs."""
    steps: int = 25
    """Number of denoising steps for an embedding."""
    guidance_scale: float = 2.0
    """Scale of the classifier-free guidance for an embedding; 1 switches guidance off."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=5000, batch_size=256, ema=0.999))
    """Settings of the training."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or self.steps < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                "'prior.width', 'prior.depth' and 'prior.steps' must be at least 1, and 'prior.drop' at least 0 and "
                f"below 1, got {self.width}, {self.depth}, {self.steps} and {self.drop}"
            )
        if self.guidance_scale != 1 and not self.drop:
            raise ValueError("'prior.guidance_scale' other than 1 needs 'prior.drop' above 0")


@dataclass(frozen=True, kw_only=True)
class FrozenDecoderConfig:
    """Predict image embeddings from EEG for a frozen image generator."""

    dataset: str
    """Path of the EEG-image dataset, which must have train and val splits."""
    output: str
    """Run directory, with the model in the subdirectory `model/`."""
    predictor: str = "ridge"
    """How embeddings are predicted from EEG: the word ridge for a ridge regression from time courses, or an alignment
    run (the output of `dreamscale align`), whose encoder predicts them."""
    clip: str | None = None
    """CLIP model whose image embeddings the decoder reads: a directory or a hub id. It must be the model with which the
    decoder was trained, such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and an alignment run must have been aligned with
    it. The kind vae needs none."""
    decoder: DecoderConfig
    """Frozen image generator."""
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    """Settings of the ridge regressions: to the embedding if `predictor` is ridge, and to the latent of the low-level
    path."""
    low_level: LowLevelConfig = field(default_factory=LowLevelConfig)
    """Low-level path."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Diffusion prior."""
    eeg: EEGConfig = field(default_factory=EEGConfig)
    """Part of each trial that the model reads, and how repeated presentations are averaged in the evaluation. With an
    alignment run, the part of the run is used."""
    seed: int = 0
    """Seed of the training of the prior."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracker to which metrics are sent, in addition to the file metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.decoder.kind == "vae" and (self.predictor != "ridge" or self.clip is not None or self.prior.enabled):
            raise ValueError(
                "'decoder.kind: vae' reads no image embedding, so set 'predictor: ridge', and remove the keys 'clip' "
                "and 'prior'"
            )
        if self.decoder.kind != "vae" and self.clip is None:
            raise ValueError(
                f"'decoder.kind: {self.decoder.kind}' needs the key 'clip': the CLIP model whose image embeddings the "
                "decoder reads"
            )
