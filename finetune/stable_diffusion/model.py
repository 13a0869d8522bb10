"""Stable Diffusion conditioned on EEG: parts, loss, package on disk, and generation of images.

Shapes: B trials, C channels, T samples, N tokens of width D, L condition tokens of width W, h, w latent pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.files import atomic_directory, read_json, write_json
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.clip_head import ClipHead
from finetune.clip_images import is_local
from finetune.diffusion import Condition, denoising_errors, draw_noise, sample
from finetune.eeg import scale_eeg
from finetune.images import to_pixels
from finetune.stable_diffusion.conditioner import Conditioner
from pretrain.encoder.encoder import EEGEncoder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

KIND = "stable_diffusion"
SCHEMA = 1
Tune = Literal["E+A", "E", "A"]


def load_base(base: str | Path) -> StableDiffusionPipeline:
    """Load a Stable Diffusion pipeline from a directory or the hub.

    Parameters
    ----------
    base : str or Path
        Directory in diffusers' layout, or a hub id such as ``stable-diffusion-v1-5/stable-diffusion-v1-5``.

    Returns
    -------
    StableDiffusionPipeline
        In fp32, frozen, on the CPU, without a safety checker.

    Raises
    ------
    RequestError
        If it is not a Stable Diffusion pipeline, or cannot be loaded.
    """
    from diffusers import StableDiffusionPipeline

    local = is_local(base)
    if local:
        index = Path(base) / "model_index.json"
        if not index.is_file():
            raise RequestError(f"{base}: not a diffusers pipeline (no model_index.json); give the pipeline's directory")
        if (name := read_json(index).get("_class_name")) != "StableDiffusionPipeline":
            raise RequestError(f"{base}: holds a {name}, not a StableDiffusionPipeline; choose another base")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(base), local_files_only=local, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise RequestError(f"{base}: cannot be loaded as Stable Diffusion ({one_line(error)[:200]})") from None
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


def open_time_path(unet: UNet2DConditionModel) -> int:
    """Give a U-Net a second input: a vector that is added to its time embedding.

    Parameters
    ----------
    unet : UNet2DConditionModel
        Changed in place. The input is diffusers' own ``class_embed_type: identity``, so it is kept when the U-Net is
        saved.

    Returns
    -------
    int
        Width of the time embedding.

    Raises
    ------
    RequestError
        If the base model uses this input for classes.
    """
    kind = unet.config.class_embed_type
    if kind not in (None, "identity") or unet.config.num_class_embeds is not None:
        raise RequestError("the base model is conditioned on classes; set time_path: false, or choose another base")
    unet.class_embedding = nn.Identity()
    unet.register_to_config(class_embed_type="identity")
    return int(unet.time_embedding.linear_2.out_features)


def find_cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters of the cross-attentions and of their norms: the "A" of DreamDiffusion.

    Parameters
    ----------
    unet : Module
        A U-Net of diffusers.

    Returns
    -------
    dict
        Name in the U-Net to parameter.
    """
    from diffusers.models.attention import BasicTransformerBlock

    # The class of the block decides, not the name: residual blocks have a "norm2" as well.
    found = {}
    for block_name, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None:
            for part in ("attn2", "norm2"):
                for name, parameter in getattr(block, part).named_parameters():
                    found[f"{block_name}.{part}.{name}"] = parameter
    return found


class EEGDiffusion(nn.Module):
    """Everything that gradients pass through: encoder, conditioner, U-Net and, in joint training, the CLIP head.

    Parameters
    ----------
    encoder : EEGEncoder
        EEG to tokens.
    conditioner : Conditioner
        Tokens to the condition.
    unet : UNet2DConditionModel
        The base model's U-Net.
    noising : DDPMScheduler
        The base model's forward process.
    head : ClipHead, optional
        Projects tokens into CLIP's image space, for the CLIP loss.
    clip_weight : float
        Weight of the CLIP loss.
    """

    def __init__(
        self,
        encoder: EEGEncoder,
        conditioner: Conditioner,
        unet: Any,
        noising: Any,
        head: ClipHead | None = None,
        clip_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.conditioner, self.unet, self.head = encoder, conditioner, unet, head
        self.noising, self.clip_weight = noising, clip_weight

    def choose_trainables(self, tune: Tune) -> None:
        """Choose the parts that train; the others are frozen.

        Parameters
        ----------
        tune : str
            E: encoder and conditioner; A: the U-Net's cross-attentions and their norms; E+A: both. A CLIP head always
            trains.
        """
        self.requires_grad_(False)
        if "E" in tune:
            self.encoder.requires_grad_(True)
            self.conditioner.requires_grad_(True)
        if "A" in tune:
            for parameter in find_cross_attention(self.unet).values():
                parameter.requires_grad_(True)
        if self.head is not None:
            self.head.requires_grad_(True)

    def predict(self, noisy_B4hw: Tensor, time_B: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net on noisy latents under a condition that the conditioner made."""
        states_BLW, time_BE = condition
        return self.unet(noisy_B4hw, time_B, states_BLW, class_labels=time_BE).sample

    def features(self, eeg: Tensor) -> Tensor:
        """Encode EEG in model units: [B, 128, T] to tokens [B, N, D]."""
        return self.encoder(eeg)

    def errors(
        self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Measure the squared error of the denoiser.

        Parameters
        ----------
        features : Tensor, [B, N, D]
            The encoder's tokens.
        clean, noise : Tensor, [B, 4, h, w]
            Scaled latents of the images, and noise.
        time : Tensor of int, [B]
            Step of the forward process.
        keep : Tensor of bool, [B], optional
            False where the condition is dropped; by default every condition is kept.

        Returns
        -------
        Tensor, [B]
            Mean over the values of each latent.
        """
        return denoising_errors(self.predict, self.noising, clean, noise, time, self.conditioner(features, keep))

    def forward(
        self, x: Tensor, latent: Tensor, noise: Tensor, time: Tensor, keep: Tensor, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Parameters
        ----------
        x : Tensor, [B, 128, T]
            EEG in model units.
        latent, noise : Tensor, [B, 4, h, w]
            Scaled latents of the images, and noise.
        time : Tensor of int, [B]
            Step of the forward process.
        keep : Tensor of bool, [B]
            False where the condition is dropped.
        target : Tensor, [B, P], optional
            CLIP embeddings of the images, unit length, in joint training.

        Returns
        -------
        dict
            loss, denoise and, in joint training, cosine (1 - cosine).
        """
        tokens_BND = self.encoder(x)
        denoise = self.errors(tokens_BND, latent, noise, time, keep).mean()
        out = {"loss": denoise, "denoise": denoise.detach()}
        if self.head is not None:
            assert target is not None
            cosine = 1 - F.cosine_similarity(self.head(tokens_BND).float(), target, dim=-1).mean()
            out["loss"] = denoise + self.clip_weight * cosine
            out["cosine"] = cosine.detach()
        return out


def save_model(folder: Path, model: EEGDiffusion, pipeline: Any, extra: dict[str, Any]) -> None:
    """Write the package of a fine-tuned model; the folder appears only when the package is complete.

    Parameters
    ----------
    folder : Path
        ``<run>/model``.
    model : EEGDiffusion
        The trained model.
    pipeline : StableDiffusionPipeline
        The base pipeline, which holds the model's U-Net.
    extra : dict
        Origin of the model, for dreamscale.json.
    """
    assert pipeline.unet is model.unet
    with atomic_directory(folder) as root:
        pipeline.save_pretrained(root / "pipeline")
        model.encoder.save_pretrained(root / "encoder")
        model.conditioner.save_pretrained(root / "conditioner")
        write_json(root / "dreamscale.json", {"kind": KIND, "schema": SCHEMA, **extra})


class StableDiffusionGenerator:
    """Makes images of EEG trials with a fine-tuned Stable Diffusion.

    Parameters
    ----------
    folder : str or Path
        ``<run>/model``.
    device : str
        cpu or cuda.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    kind : str
        ``stable_diffusion``.
    """

    kind = KIND

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        folder = Path(folder)
        values = read_json(folder / "dreamscale.json")
        if values.get("kind") != KIND or values.get("schema") != SCHEMA:
            raise RequestError(
                f"{folder}: not a '{KIND}' model of this version; train it again with 'dreamscale finetune CONFIG'"
            )
        self.device = torch.device(device)
        self.pipeline = load_base(folder / "pipeline")
        self.encoder = EEGEncoder.from_pretrained(folder / "encoder").requires_grad_(False).to(self.device)
        self.conditioner = Conditioner.from_pretrained(folder / "conditioner").requires_grad_(False).to(self.device)
        self.unet, self.vae = self.pipeline.unet.to(self.device), self.pipeline.vae.to(self.device)
        config = self.pipeline.scheduler.config
        # DPM-Solver++ needs a tenth of DDIM's steps, but it diverges on the cosine noise schedule.
        if config.beta_schedule == "squaredcos_cap_v2":
            self.scheduler: Any = DDIMScheduler.from_config(config, clip_sample=False)
        else:
            self.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing that the EEG must have."""
        return self.encoder.spec

    @torch.no_grad()
    def generate(
        self, eeg_B128T: Tensor, *, steps: int = 25, guidance_scale: float = 2.0, seeds: list[int]
    ) -> np.ndarray:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg_B128T : Tensor, [B, 128, T]
            Microvolts, preprocessed by `spec`, padded by replication.
        steps : int
            Denoising steps.
        guidance_scale : float
            1: the prediction under the condition; above 1: classifier-free guidance.
        seeds : list of int
            One seed a trial. A trial's noise depends on its own seed alone.

        Returns
        -------
        ndarray of uint8, [B, H, W, 3]
            RGB.
        """
        assert len(eeg_B128T) == len(seeds)
        size = self.unet.config.sample_size
        z_B4hw = sample(
            lambda x, time, states: self.unet(x, time, states[0], class_labels=states[1]).sample,
            self.scheduler,
            draw_noise((self.unet.config.in_channels, size, size), seeds, self.device),
            self.conditioner(self.encoder(scale_eeg(eeg_B128T, self.encoder, self.device))),
            self.conditioner.null(len(seeds)),
            steps=steps,
            guidance_scale=guidance_scale,
        )
        return to_pixels(self.vae.decode(z_B4hw / self.vae.config.scaling_factor).sample)
