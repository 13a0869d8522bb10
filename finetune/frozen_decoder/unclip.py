"""Load Stable unCLIP, a Stable Diffusion that generates images from a CLIP image embedding.

Tensor shapes: B trials, P width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sharding.common.errors import RequestError, show
from finetune.base_models.download import download_base, download_files
from finetune.base_models.kinds import WEIGHTS, BaseKind, check_base_files, find_weights
from finetune.base_models.load import freeze, load_parts
from finetune.foreign_models import check_noise_schedule, is_local, load_with_library
from pretrain.model.weights import read_tensors

KINDS = {
    "StableUnCLIPImg2ImgPipeline": BaseKind(
        pipeline="StableUnCLIPImg2ImgPipeline",
        networks={"text_encoder": "CLIPTextModel"},
        tokenizers=("tokenizer",),
        named="Stable unCLIP",
    )
}
_NORMALISER = "image_normalizer"
_NOISING = "image_noising_scheduler"


@dataclass(frozen=True, kw_only=True)
class UnCLIP:
    """Stable unCLIP without its image encoder."""

    pipeline: Any
    """Pipeline of diffusers."""
    noising: Any
    """Noise scheduler for embeddings."""
    mean_1P: Tensor
    std_1P: Tensor
    """Mean and standard deviation of CLIP's embeddings, by which embeddings are scaled before noise is added."""

    def add_noise(self, embeds_BP: Tensor, noise_BP: Tensor, level: int) -> Tensor:
        """Add noise to embeddings, and append the noise level: the input [B, 2 P] of the U-Net.

        Parameters
        ----------
        embeds_BP : Tensor, [B, P]
            Embeddings with the norm that CLIP computes.
        noise_BP : Tensor, [B, P]
            Standard normal noise.
        level : int
            Step of the noise schedule for embeddings.
        """
        from diffusers.models.embeddings import get_timestep_embedding

        level_B = torch.full((len(embeds_BP),), level, device=embeds_BP.device)
        mean_1P, std_1P = self.mean_1P.to(embeds_BP.device), self.std_1P.to(embeds_BP.device)
        noisy_BP = self.noising.add_noise((embeds_BP - mean_1P) / std_1P, noise_BP, level_B) * std_1P + mean_1P
        width = embeds_BP.shape[1]
        level_BP = get_timestep_embedding(level_B, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy_BP, level_BP], dim=1)


def load_unclip(base: str | Path) -> UnCLIP:
    """Load Stable unCLIP from a directory or from the Hugging Face hub.

    Parameters
    ----------
    base : str or Path
        Directory in the layout of diffusers, or a hub id such as ``stabilityai/stable-diffusion-2-1-unclip``.

    Returns
    -------
    UnCLIP
        The parts in fp32 on the CPU, with frozen weights.

    Raises
    ------
    RequestError
        If `base` is no Stable unCLIP, or cannot be loaded.
    """
    import diffusers

    if is_local(base):
        folder = Path(base)
    else:
        folder = download_base(str(base), KINDS)
        download_files(str(base), (f"{_NORMALISER}/*.safetensors",), revision=folder.name)
    files = check_base_files(folder, KINDS)
    if files.index.get(_NOISING) != ["diffusers", "DDPMScheduler"]:
        raise RequestError(
            f"{folder / 'model_index.json'}: the part '{_NOISING}' is {show(files.index.get(_NOISING))}, not a "
            "DDPMScheduler; choose another base"
        )
    check_noise_schedule(folder / _NOISING / "scheduler_config.json")
    parts = load_parts(folder, base, files)
    noising = load_with_library(
        lambda: diffusers.DDPMScheduler.from_pretrained(str(folder / _NOISING), local_files_only=True),
        base,
        files.kind.named,
    )
    unused: dict[str, Any] = {"feature_extractor": None, "image_encoder": None, "image_normalizer": None}
    pipeline = load_with_library(
        lambda: diffusers.StableUnCLIPImg2ImgPipeline(**parts, **unused, image_noising_scheduler=noising),
        base,
        files.kind.named,
    )
    freeze(pipeline, f"{folder}/")
    width = _find_width(folder, pipeline.unet)
    mean_1P, std_1P = _read_normaliser(folder / _NORMALISER, width)
    return UnCLIP(pipeline=pipeline, noising=noising, mean_1P=mean_1P, std_1P=std_1P)


def _find_width(folder: Path, unet: Any) -> int:
    """Return the width of the embeddings. The U-Net reads embeddings and noise levels, which have the same width."""
    both = unet.config.projection_class_embeddings_input_dim
    if unet.config.class_embed_type != "projection" or not both or both % 2:
        raise RequestError(
            f"{folder / 'unet' / 'config.json'}: the U-Net reads no image embedding (class_embed_type must be "
            "projection); choose another base"
        )
    return both // 2


def _read_normaliser(folder: Path, width: int) -> tuple[Tensor, Tensor]:
    """Read the mean and the standard deviation of CLIP's embeddings."""
    (path, *others), _ = find_weights(folder, "diffusers")
    found = read_tensors(path)
    values = [found[name].float() for name in ("mean", "std") if name in found]
    finite = all(bool(value.isfinite().all()) and value.shape == (1, width) for value in values)
    if others or len(values) != 2 or not finite or not bool((values[1] > 0).all()):
        raise RequestError(
            f"{path}: does not hold the mean and the standard deviation of embeddings of width {width} (files with "
            f"the name {WEIGHTS['diffusers']}.safetensors have them); get this folder again from its source"
        )
    return values[0], values[1]
