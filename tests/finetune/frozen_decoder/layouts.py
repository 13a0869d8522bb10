"""Tiny models with random weights, in the layouts of CLIP, of the published IP-Adapters and of Stable unCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.finetune.base_models.layouts import make_pipeline

WIDTH = 12
"""Width of the image embeddings."""


def make_clip() -> tuple[Any, Any]:
    """Make an image encoder and its image processor."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=WIDTH)
    ).eval()
    return model, CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def write_clip(folder: Path) -> Path:
    """Write a CLIP image encoder in the layout of transformers."""
    model, processor = make_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_adapter(path: Path, unet: Any, *, width: int = WIDTH) -> Path:
    """Write a plain IP-Adapter for a U-Net, as one safetensors file like ip-adapter_sd15.safetensors."""
    torch.manual_seed(4)
    inner = unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(4 * inner, width) / width**0.5,
        "image_proj.proj.bias": torch.randn(4 * inner) / 10,
        "image_proj.norm.weight": torch.ones(inner),
        "image_proj.norm.bias": torch.zeros(inner),
    }
    # The published files number all attentions of the U-Net; the cross-attentions have the odd numbers.
    for number, name in enumerate(unet.attn_processors):
        if number % 2:
            module = unet.get_submodule(name.removesuffix(".processor"))
            for part in "kv":
                shape = module.to_k.weight.shape
                weights[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(shape) / shape[1] ** 0.5
    save_file(weights, path)
    return path


def write_unclip(folder: Path) -> Path:
    """Write a Stable unCLIP in the layout of stabilityai/stable-diffusion-2-1-unclip."""
    stock = make_pipeline("sd21")
    model, processor = make_clip()
    torch.manual_seed(5)
    # The library would ignore values for the keys that it lists under _use_default_values.
    config = {name: value for name, value in stock.unet.config.items() if name != "_use_default_values"}
    config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
    normaliser = StableUnCLIPImageNormalizer(WIDTH)
    with torch.no_grad():
        normaliser.mean.normal_()
        normaliser.std.uniform_(0.5, 2)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=processor,
        image_encoder=model,
        image_normalizer=normaliser,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=stock.tokenizer,
        text_encoder=stock.text_encoder,
        unet=UNet2DConditionModel.from_config(config),
        scheduler=stock.scheduler,
        vae=stock.vae,
    ).save_pretrained(folder)
    return folder
