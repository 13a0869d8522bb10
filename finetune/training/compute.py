"""Options that make fine-tuning faster or smaller, and that change its results only by rounding errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.encoder.encoder import EEGEncoder
from pretrain.model import config as pretrain_config
from pretrain.model.transformer import Blocks

REPEATED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "ConvNeXtBlock")
"""Names of the classes of blocks that U-Nets contain many times."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the networks are computed. These settings change the results only by rounding errors."""

    tf32: bool = False
    """Compute matrix products and convolutions of fp32 numbers with TF32 on a GPU: faster, but with rounding errors
    like those of numbers with 10 bits of mantissa. The key has no effect on a CPU."""
    compile: bool = False
    """Compile the repeated blocks of the trained networks with torch.compile. The first steps take minutes longer."""


@dataclass(frozen=True, kw_only=True)
class EncoderComputeConfig(ComputeConfig):
    """How the encoder and other networks are computed."""

    checkpointing: bool = False
    """Activation checkpointing: keep only the input of each block, and compute the block again in the backward pass. A
    training step needs far less memory, but about a third more computation."""


@dataclass(frozen=True, kw_only=True)
class UNetComputeConfig(EncoderComputeConfig):
    """How the encoder and the U-Net of Stable Diffusion are computed."""

    channels_last: bool = False
    """Store images and weights of convolutions with the channels as the last axis, which is faster on GPUs with tensor
    cores."""
    frozen_bf16: bool = False
    """Store the frozen matrices and convolutions of the U-Net in bf16 while training, so that they need half the
    memory. The trained model is written with the weights of the base model. This needs training.precision bf16, which
    computes with bf16 copies of the weights in any case."""


@contextmanager
def use_tf32(config: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Allow TF32 inside the ``with`` block, if the config asks for it and the device is a GPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if config.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def apply_to_encoder(encoder: EEGEncoder, config: EncoderComputeConfig) -> None:
    """Choose how the blocks of an EEG encoder are computed."""
    if not (config.compile or config.checkpointing):
        return
    chosen = pretrain_config.ComputeConfig(checkpointing=config.checkpointing, compile=config.compile)
    for module in encoder.modules():
        if isinstance(module, Blocks):
            module.set_compute(chosen)


def compile_blocks(module: nn.Module) -> None:
    """Compile every block of a U-Net whose class is in `REPEATED_BLOCKS`. The names of the weights do not change."""
    for part in module.modules():
        if type(part).__name__ in REPEATED_BLOCKS:
            part.compile()


def apply_to_unet(unet: Any, config: UNetComputeConfig) -> None:
    """Choose how a U-Net of diffusers is computed.

    Parameters
    ----------
    unet : UNet2DConditionModel
        The U-Net, whose trainable parameters are already chosen.
    config : UNetComputeConfig
        Settings of the computation. `frozen_bf16` is not applied here, but by `store_frozen_in_bf16`.
    """
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(unet)


def store_frozen_in_bf16(module: nn.Module) -> dict[str, Tensor]:
    """Store the frozen weights of linear layers and convolutions in bf16.

    Autocast computes these layers with bf16 copies of their weights, so the results of the training do not change.

    Parameters
    ----------
    module : Module
        Network on the CPU, whose trainable parameters are already chosen.

    Returns
    -------
    dict
        The original weights on the CPU, by the name of the parameter, for `restore_frozen`.
    """
    kept = {}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            for own, parameter in part.named_parameters(prefix=name, recurse=False):
                if not parameter.requires_grad:
                    kept[own] = parameter.data
                    parameter.data = parameter.data.bfloat16()
    return kept


def restore_frozen(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Give a network its original frozen weights again.

    Parameters
    ----------
    module : Module
        Network that `store_frozen_in_bf16` has changed.
    kept : dict
        Weights that `store_frozen_in_bf16` returned.
    """
    parameters = dict(module.named_parameters())
    for name, weight in kept.items():
        parameters[name].data = weight.to(parameters[name].device)
