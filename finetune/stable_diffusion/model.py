"""Stable Diffusion conditioned on EEG: the model, its loss, its package on disk, and the generation of images.

Tensor shapes: B trials, C channels, T time points, N tokens of width D, L condition tokens of width W, h rows and w
columns of a latent, E width of the U-Net's time embedding, P width of CLIP's projection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.untrusted import check_number
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.base_models.conditions import embed_texts, find_image_size, run_unet
from finetune.base_models.load import load_base
from finetune.clip_head import ClipHead
from finetune.diffusion import FEW_STEP, Condition, SamplerName, Sampling, choose_sampling
from finetune.eeg import scale_eeg
from finetune.electrodes import EncoderInput, find_places
from finetune.generators import SCHEMA, Source, read_part
from finetune.images import check_finite, read_caption, to_pixels
from finetune.objective import denoising_errors, weigh_steps
from finetune.stable_diffusion.conditioner import Conditioner
from finetune.stable_diffusion.lora import LoRAConfig, add_adapters, find_adapters, save_and_merge_adapters
from finetune.stable_diffusion.portable.pipeline import choose_sampler, sample_images
from finetune.stable_diffusion.portable.write import write_portable_files
from pretrain.encoder.encoder import EEGEncoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

KIND = "stable_diffusion"
Tune = Literal["E+A", "E", "A"]


def check_time_path(unet: UNet2DConditionModel) -> None:
    """Raise a `RequestError` if a base model already uses its input ``class_labels`` for classes."""
    if unet.config.class_embed_type not in (None, "identity") or unet.config.num_class_embeds is not None:
        raise RequestError(
            "the base model is conditioned on classes, so its class input cannot take EEG; set 'time_path: false', or "
            "choose another base"
        )


def open_time_path(unet: UNet2DConditionModel) -> int:
    """Give a U-Net a second input: a vector that is added to its time embedding.

    Parameters
    ----------
    unet : UNet2DConditionModel
        The U-Net to change in place. The option ``class_embed_type: identity`` of diffusers adds the second input.

    Returns
    -------
    int
        Width of the time embedding.

    Raises
    ------
    RequestError
        If the base model already uses its input ``class_labels`` for classes.
    """
    check_time_path(unet)
    unet.class_embedding = nn.Identity()
    unet.register_to_config(class_embed_type="identity")
    return int(unet.time_embedding.linear_2.out_features)


def find_cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters of the cross-attentions and of the norms before them, called "A" in DreamDiffusion.

    Parameters
    ----------
    unet : Module
        A U-Net of the library diffusers.

    Returns
    -------
    dict
        Maps each parameter's name in the U-Net to the parameter.
    """
    from diffusers.models.attention import BasicTransformerBlock

    # Search only in transformer blocks, because residual blocks also have a layer with the name "norm2".
    found = {}
    for block_name, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None:
            for part in ("attn2", "norm2"):
                for name, parameter in getattr(block, part).named_parameters():
                    found[f"{block_name}.{part}.{name}"] = parameter
    return found


class EEGDiffusion(nn.Module):
    """All networks through which gradients flow: encoder, conditioner, U-Net and, in joint training, the CLIP head.

    Parameters
    ----------
    encoder : EEGEncoder
        Network that computes tokens from EEG.
    conditioner : Conditioner
        Network that computes the condition from the tokens.
    unet : UNet2DConditionModel
        The base model's U-Net.
    noising : DDPMScheduler
        Noise scheduler of the training, which adds the noise (see `finetune.objective.make_noising`).
    head : ClipHead, optional
        Network that maps tokens to CLIP's image space, for the CLIP loss.
    clip_weight : float
        Weight of the CLIP loss.
    target_weights : sequence of float
        Weight of each of the K targets within the CLIP loss.
    min_snr : float
        Gamma of the weights of the noise steps (see `finetune.objective.weigh_steps`); 0 gives equal weights.
    """

    def __init__(
        self,
        encoder: EEGEncoder,
        conditioner: Conditioner,
        unet: Any,
        noising: Any,
        head: ClipHead | None = None,
        clip_weight: float = 0.0,
        target_weights: Sequence[float] = (1.0,),
        min_snr: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.conditioner, self.unet, self.head = encoder, conditioner, unet, head
        self.noising, self.clip_weight, self.min_snr = noising, clip_weight, min_snr
        self.target_weights = tuple(target_weights)

    def choose_trainables(self, tune: Tune, lora: LoRAConfig | None = None) -> None:
        """Choose the parts of the model that are trained, and freeze the other parts.

        Parameters
        ----------
        tune : str
            E: train encoder and conditioner; A: train the U-Net's cross-attentions and their norms; E+A: train all of
            these parts. A CLIP head is always trained.
        lora : LoRAConfig, optional
            Adapters that are added to the cross-attentions and trained in place of A, if their rank is above 0.
        """
        self.requires_grad_(False)
        if "E" in tune:
            self.encoder.requires_grad_(True)
            self.conditioner.requires_grad_(True)
        if "A" in tune:
            if lora is not None and lora.rank:
                add_adapters(self.unet, lora)
            for parameter in (find_adapters(self.unet) or find_cross_attention(self.unet)).values():
                parameter.requires_grad_(True)
        if self.head is not None:
            self.head.requires_grad_(True)

    def predict(self, noisy_B4hw: Tensor, time_B: Tensor, condition: Condition) -> Tensor:
        """Run the U-Net on noisy latents, with a condition that the conditioner computed."""
        return run_unet(self.unet, noisy_B4hw, time_B, condition)

    def features(self, eeg: EncoderInput) -> Tensor:
        """Encode scaled EEG to tokens [B, N, D]."""
        return self.encoder(eeg.x, **eeg.places)

    def errors(
        self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Compute the squared error of the denoiser for each trial.

        Parameters
        ----------
        features : Tensor, [B, N, D]
            Tokens that the encoder computed from the EEG.
        clean, noise : Tensor, [B, 4, h, w]
            Scaled latents of the images, and the noise that is added to them.
        time : Tensor of int, [B]
            Step of the forward process (the process that adds noise) for each trial.
        keep : Tensor of bool, [B], optional
            False for trials whose EEG condition is dropped; by default all conditions are kept.

        Returns
        -------
        Tensor, [B]
            Squared error, averaged over the values of each trial's latent.
        """
        return denoising_errors(self.predict, self.noising, clean, noise, time, self.conditioner(features, keep))

    def forward(
        self,
        x: Tensor,
        latent: Tensor,
        noise: Tensor,
        time: Tensor,
        keep: Tensor,
        target: Tensor | None = None,
        **places: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the training loss of a batch.

        Parameters
        ----------
        x : Tensor, [B, 128, T]
            EEG, scaled for the encoder.
        latent, noise : Tensor, [B, 4, h, w]
            Scaled latents of the images, and the noise that is added to them.
        time : Tensor of int, [B]
            Step of the forward process (the process that adds noise) for each trial.
        keep : Tensor of bool, [B]
            False for trials whose EEG condition is dropped.
        target : Tensor, [B, K, P], optional
            Targets of each trial, of unit length; only in joint training.
        **places : Tensor
            Electrode positions of the trials (see `finetune.electrodes`).

        Returns
        -------
        dict
            ``loss``, ``denoise`` (the squared error without weights) and, in joint training, ``cosine`` (1 - cosine
            similarity to the targets, summed over the targets with their weights).
        """
        tokens_BND = self.encoder(x, **places)
        error_B = self.errors(tokens_BND, latent, noise, time, keep)
        loss = (error_B * weigh_steps(self.noising, time, self.min_snr)).mean()
        out = {"loss": loss, "denoise": error_B.detach().mean()}
        if self.head is not None:
            assert target is not None
            embeds_B1P = self.head(tokens_BND).float().unsqueeze(1)
            cosine_BK = 1 - F.cosine_similarity(embeds_B1P, target, dim=-1)
            cosine = (cosine_BK * cosine_BK.new_tensor(self.target_weights)).sum(-1).mean()
            out["loss"] = loss + self.clip_weight * cosine
            out["cosine"] = cosine.detach()
        return out


def save_model(folder: Path, model: EEGDiffusion, pipeline: Any, extra: dict[str, Any], card: dict[str, Any]) -> None:
    """Write all files of a fine-tuned model to its package folder, which appears only when it is complete.

    Parameters
    ----------
    folder : Path
        The package folder to write, ``<run>/model``.
    model : EEGDiffusion
        The trained model.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The base pipeline; its U-Net is the U-Net of `model`.
    extra : dict
        Information on the origin of the model, to be stored in dreamscale.json, with the entry `drop`.
    card : dict
        Values for the model card (see `write_portable_files`).
    """
    assert pipeline.unet is model.unet
    unet, time_path = model.unet, bool(model.conditioner.config.time_dim)
    # Safetensors files hold only contiguous tensors, but convolutions may be stored channels-last.
    unet.to(memory_format=torch.contiguous_format)
    with atomic_directory(folder) as root:
        if time_path:
            # The second input has no weights. Without the option, the stock pipeline of diffusers can use the U-Net.
            unet.register_to_config(class_embed_type=None)
        if find_adapters(unet):
            save_and_merge_adapters(unet, root / "lora")
        pipeline.save_pretrained(root / "pipeline")
        if time_path:
            unet.register_to_config(class_embed_type="identity")
        model.encoder.save_pretrained(root / "encoder")
        model.conditioner.save_pretrained(root / "conditioner")
        write_portable_files(root, model.encoder, pipeline, drop=extra["drop"], card=card)
        write_json(root / "dreamscale.json", {"kind": KIND, "schema": SCHEMA, **extra})


class StableDiffusionGenerator:
    """Generate images from EEG trials with a fine-tuned Stable Diffusion.

    Parameters
    ----------
    folder : str or Path
        Package folder of the model, ``<run>/model``.
    values : dict
        Content of dreamscale.json, whose kind and schema `finetune.generators.load_generator` has checked.
    device : str
        Device of the computation: cpu or cuda.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    part : dict
        Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset of the image.
    kind : str
        Kind of the model: ``stable_diffusion``.
    """

    kind = KIND

    def __init__(self, folder: str | Path, values: dict[str, Any], device: str = "cpu") -> None:
        folder = Path(folder)
        self.folder, self.device = folder, torch.device(device)
        self.part = read_part(values, str(folder / "dreamscale.json"))
        self.pipeline = load_base(folder / "pipeline")
        self.encoder = EEGEncoder.from_pretrained(folder / "encoder").requires_grad_(False).to(self.device)
        self.conditioner = Conditioner.from_pretrained(folder / "conditioner").requires_grad_(False).to(self.device)
        self.unet, self.vae = self.pipeline.unet.to(self.device), self.pipeline.vae.to(self.device)
        # Older versions of Dreamscale did not store `drop`, the fraction of conditions that were dropped in training.
        where, drop = str(folder / "dreamscale.json"), values.get("drop")
        self.drop = None if drop is None else float(check_number(drop, where, "drop"))

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing that the EEG trials must have."""
        return self.encoder.spec

    @property
    def image_size(self) -> int:
        """Width and height of the generated images in pixels."""
        return find_image_size(self.pipeline)

    def choose_sampling(
        self, *, sampler: SamplerName | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampling:
        """Fill in the sampling settings that are None (see `finetune.generators.Generator`).

        The default sampler is DPM-Solver++, or DDIM for a base model with a cosine noise schedule, or Euler for a base
        model that was distilled to a few steps. Guidance needs a model that was trained with dropped conditions. If it
        is unknown whether conditions were dropped, a message says that guidance is switched off.
        """
        config = self.pipeline.scheduler.config
        if guidance_scale not in (None, 1) and self.drop is None:
            raise RequestError(f"{self._say_unknown_drop()}; or set guidance_scale to 1")
        sampler = sampler or choose_sampler(self.pipeline.scheduler)
        unknown = guidance_scale is None and self.drop is None and sampler not in FEW_STEP
        if unknown and os.environ.get("RANK", "0") == "0":
            print(
                f"{self._say_unknown_drop()}; guidance_scale is 1 (earlier versions used 2); to hide this message, "
                "set guidance_scale to 1"
            )
        try:
            return choose_sampling(
                config,
                sampler=sampler,
                steps=steps,
                guidance_scale=guidance_scale,
                dropped=bool(self.drop),
                has_null=bool(self.drop),
            )
        except ValueError as error:
            raise RequestError(f"{self.folder}: {error}") from None

    def use_bf16(self) -> None:
        """Store the weights of the U-Net in bf16, and compute with them."""
        self.unet.to(torch.bfloat16)

    def find_obstacle(self, source: Source, metas: Sequence[dict[str, Any]]) -> str:
        """Return why the model cannot generate images from a source (see `finetune.generators.Source`).

        The source ``no_eeg`` needs a model that was trained with dropped conditions.
        """
        del metas
        if source != "no_eeg" or self.drop:
            return ""
        if self.drop is None:
            return self._say_unknown_drop()
        return (
            f"{self.folder}: this model was trained with drop 0, so it cannot generate without EEG; use the control "
            "'shuffle', or a model that was trained with drop above 0"
        )

    def _say_unknown_drop(self) -> str:
        return (
            f"{self.folder}: dreamscale.json does not say with which 'drop' this model was trained, so guidance and "
            "the control 'no_eeg' are not possible; if you know the value, add \"drop\" to dreamscale.json"
        )

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> Condition:
        """Compute the condition of captions with the text encoder of the base model.

        Parameters
        ----------
        captions : list of str
            One caption for each trial.

        Returns
        -------
        tuple of Tensor
            Condition of the U-Net that the base model's text encoders compute from the captions. As in
            `Conditioner.null`, nothing is added to the time embedding.
        """
        states_BLW, pooled_BP = embed_texts(self.pipeline, captions, self.device)
        _, time_BE, _, sizes_B6 = self.conditioner.null(len(captions))
        return states_BLW, time_BE, pooled_BP, sizes_B6

    @torch.no_grad()
    def generate(
        self,
        eeg_B128T: Tensor,
        *,
        seeds: list[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        source: Source = "eeg",
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> np.ndarray:
        """Generate one image for each trial (see `finetune.generators.Generator`).

        For the source ``class``, the text encoder of the base model encodes the caption of the image, or the name of
        the category if the image has no caption. For the source ``no_eeg``, the condition is the null condition.

        Raises
        ------
        RequestError
            If the settings or the source do not fit the model.
        """
        assert len(eeg_B128T) == len(seeds)
        chosen = self.choose_sampling(sampler=sampler, steps=steps, guidance_scale=guidance_scale)
        if obstacle := self.find_obstacle(source, metas or []):
            raise RequestError(obstacle)
        null = self.conditioner.null(len(seeds))
        if source == "eeg":
            places = find_places(self.encoder, metas, self.device) if metas else {}
            x_BCT = scale_eeg(eeg_B128T, self.encoder, self.device, places)
            condition = self.conditioner(self.encoder(x_BCT, **places))
        elif source == "class":
            assert metas is not None
            condition = self.embed_captions([read_caption(meta) for meta in metas])
        else:
            condition = null
        if source == "no_eeg":
            chosen = replace(chosen, guidance_scale=1.0)
        config = self.pipeline.scheduler.config
        images = sample_images(self.unet, self.vae, config, condition, null, chosen, seeds)
        return to_pixels(check_finite(images, self.folder))
