"""Tiny base models with random weights, in the layouts of the published ones.

The configs have the keys and classes of Stable Diffusion 1.5 and 2.1, SDXL base 1.0 and SDXL-Turbo. Only the widths and
the number of layers are smaller, and the images have 64 x 64 pixels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.stable_diffusion.miniature import make_tokenizer

Layout = Literal["sd15", "sd21", "sdxl", "sdxl_turbo"]
LAYOUTS: tuple[Layout, ...] = ("sd15", "sd21", "sdxl", "sdxl_turbo")
SIZE = 64
"""Width and height of the images in pixels."""
LENGTH = 77
"""Number of tokens of a text, as in the published models."""
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_SCHEDULERS: dict[Layout, tuple[str, dict[str, Any]]] = {
    "sd15": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "sd21": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False}),
    "sdxl_turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
}


def _text(width: int, *, activation: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(make_tokenizer(["a bar", "a ring"])),
        max_position_embeddings=LENGTH,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=projection,
        # The published models have this wrong value, with which the last token is found in another way.
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )


def _make_unet(layout: Layout) -> UNet2DConditionModel:
    values: dict[str, Any] = {"sample_size": SIZE // 8, "norm_num_groups": 4, "layers_per_block": 2}
    if layout in ("sd15", "sd21"):
        values |= {"block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 16 if layout == "sd15" else 24}
    if layout == "sd15":
        values |= {"attention_head_dim": 4}
    if layout == "sd21":
        values |= {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True}
    if layout.startswith("sdxl"):
        values |= {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 2, 4),
            "use_linear_projection": True,
            "cross_attention_dim": 16 + 24,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        }
    return UNet2DConditionModel(**values)


def make_pipeline(layout: Layout) -> Any:
    """Make a tiny pipeline with random weights.

    Parameters
    ----------
    layout : str
        Published model whose layout the pipeline has.
    """
    import diffusers

    torch.manual_seed(LAYOUTS.index(layout))
    xl = layout.startswith("sdxl")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )
    tokenizer = make_tokenizer(["a bar", "a ring"])
    tokenizer.model_max_length = LENGTH
    name, values = _SCHEDULERS[layout]
    parts: dict[str, Any] = {
        "vae": vae,
        "unet": _make_unet(layout),
        "tokenizer": tokenizer,
        "scheduler": getattr(diffusers, name)(**_SCHEDULE, **values),
    }
    if layout == "sd21":
        parts["text_encoder"] = CLIPTextModel(_text(24, activation="gelu", projection=12))
    else:
        parts["text_encoder"] = CLIPTextModel(_text(16, activation="quick_gelu", projection=16))
    if xl:
        other = make_tokenizer(["a bar", "a ring"])
        other.model_max_length, other.pad_token = LENGTH, "!"
        second = CLIPTextModelWithProjection(_text(24, activation="gelu", projection=24))
        parts |= {"tokenizer_2": other, "text_encoder_2": second}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if xl:
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(**parts, **unused, requires_safety_checker=False)


def write_directory(folder: Path, layout: Layout, *, variant: str | None = None) -> Path:
    """Write a tiny base model in the layout of diffusers.

    The index of Stable Diffusion 1.5 names a safety checker and a feature extractor, whose folders are missing.

    Parameters
    ----------
    folder : Path
        Folder to write.
    layout : str
        Published model whose layout is written.
    variant : str, optional
        fp16: write only weights in fp16, in files with fp16 in their names.
    """
    pipeline = make_pipeline(layout)
    if variant:
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, variant=variant)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    if layout == "sd15":
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        index.pop("requires_safety_checker")
    path.write_text(json.dumps(index))
    return folder


def write_hub(cache: Path, name: str, folder: Path) -> None:
    """Write a folder to the cache of the Hugging Face hub, as if it had been downloaded.

    Parameters
    ----------
    cache : Path
        The cache: the value of HF_HUB_CACHE.
    name : str
        Hub id.
    folder : Path
        Folder whose files are copied.
    """
    root, version = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(version)
    shutil.copytree(folder, root / "snapshots" / version)


def write_single_file(path: Path, pipeline: Any) -> None:
    """Write the weights of a pipeline to one file, with the names of the original code.

    Parameters
    ----------
    path : Path
        The safetensors file to write.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The pipeline.
    """
    weights = {f"model.diffusion_model.{_rename_unet(n)}": v for n, v in pipeline.unet.state_dict().items()}
    for name, value in pipeline.vae.state_dict().items():
        new = _rename_vae(name)
        # The attention of the original VAE consists of convolutions.
        is_attention = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        weights[f"first_stage_model.{new}"] = value[:, :, None, None] if is_attention else value
    xl = hasattr(pipeline, "text_encoder_2")
    first = pipeline.text_encoder
    if xl:
        weights |= _clip(first, "conditioner.embedders.0.transformer.")
        weights |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif first.config.hidden_act == "gelu":
        weights |= _open_clip(first, "cond_stage_model.model.")
    else:
        weights |= _clip(first, "cond_stage_model.transformer.")
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)


def _replace(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _rename_unet(name: str) -> str:
    if ".resnets." in name:
        name = _replace(
            name,
            [
                *(("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0")),
                *(("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")),
            ],
        )
    pairs = [
        *(("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2.")),
        *(("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2.")),
        *(("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2.")),
        *(("mid_block.resnets.0.", "middle_block.0."), ("mid_block.resnets.1.", "middle_block.2.")),
        ("mid_block.attentions.0.", "middle_block.1."),
    ]
    for i in range(4):
        attended = f"up_blocks.{i}.attentions"
        for j in range(3):
            pairs.append((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0."))
            pairs.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1."))
            pairs.append((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0."))
            pairs.append((f"{attended}.{j}.", f"output_blocks.{3 * i + j}.1."))
        pairs.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * (i + 1)}.0.op."))
        # The converter of diffusers accepts the upsampler at the place 1 or 2.
        pairs.append((f"up_blocks.{i}.upsamplers.0.", f"output_blocks.{3 * i + 2}.2."))
    return _replace(name, pairs)


def _rename_vae(name: str) -> str:
    pairs = [
        *(
            ("conv_norm_out.", "norm_out."),
            ("conv_shortcut.", "nin_shortcut."),
            ("mid_block.attentions.0.", "mid.attn_1."),
        ),
        *(("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2.")),
        *(("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")),
    ]
    for i in range(4):
        for j in range(3):
            pairs.append((f"down_blocks.{i}.resnets.{j}.", f"down.{i}.block.{j}."))
            pairs.append((f"up_blocks.{i}.resnets.{j}.", f"up.{3 - i}.block.{j}."))
        pairs.append((f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample."))
        pairs.append((f"up_blocks.{i}.upsamplers.0.", f"up.{3 - i}.upsample."))
    return _replace(name, pairs)


def _clip(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": v for n, v in model.state_dict().items()}


def _open_clip(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    values = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    weights = {
        "positional_embedding": values.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": values.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": values.pop("final_layer_norm.weight"),
        "ln_final.bias": values.pop("final_layer_norm.bias"),
    }
    width = model.config.hidden_size
    projection = values.pop("text_projection.weight", None)
    # The text encoder of Stable Diffusion 2.1 has no projection, but the original file has one.
    weights["text_projection"] = torch.eye(width) if projection is None else projection.T
    for name in list(values):
        new = _replace(
            name,
            [
                *(("encoder.layers.", "transformer.resblocks."), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")),
                *((".fc1.", ".c_fc."), (".fc2.", ".c_proj."), (".self_attn.", ".attn.")),
            ],
        )
        if ".q_proj." in new:
            packed = [values[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            new = new.replace(".q_proj.weight", ".in_proj_weight").replace(".q_proj.bias", ".in_proj_bias")
            weights[new] = torch.cat(packed)
        elif ".k_proj." not in new and ".v_proj." not in new:
            weights[new] = values[name]
    return {prefix + name: value for name, value in weights.items()}
