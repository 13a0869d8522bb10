"""Low-rank adaptation (LoRA, Hu et al. 2021) of the U-Net's cross-attentions, with the library peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

TARGETS = r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"
"""Regular expression for the names of the linear layers that get an adapter."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (LoRA) of the U-Net's cross-attentions."""

    rank: int = 0
    """Rank of the adapters, e.g. 16. 0: no adapters; the matrices of the cross-attentions are trained themselves."""
    alpha: float | None = None
    """Scale of the adapters: an adapter's output is multiplied by alpha / rank. Empty: alpha is equal to `rank`."""
    dropout: float = 0.0
    """Dropout rate at the input of the adapters."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1 or not (self.alpha is None or self.alpha > 0):
            raise ValueError(
                "lora.rank must be at least 0, lora.alpha above 0, and lora.dropout at least 0 and below 1, got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )


def add_adapters(unet: Any, config: LoRAConfig) -> None:
    """Add an adapter to each linear layer of the cross-attentions of a U-Net. The new adapters change nothing yet.

    Parameters
    ----------
    unet : UNet2DConditionModel
        U-Net that is changed in place.
    config : LoRAConfig
        Rank, scale and dropout of the adapters.
    """
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType] - peft divides alpha by the rank, and accepts fractions
            lora_dropout=config.dropout,
            target_modules=TARGETS,
        )
    )


def find_adapters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a U-Net's adapters, by name."""
    return {name: p for name, p in unet.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def save_and_merge_adapters(unet: Any, folder: Path) -> None:
    """Write a U-Net's adapters to a folder, then add the adapters to the weights and remove them from the U-Net.

    Parameters
    ----------
    unet : UNet2DConditionModel
        U-Net with adapters, which is changed in place.
    folder : Path
        Folder for the adapters, in the layout that `StableDiffusionPipeline.load_lora_weights` reads.
    """
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    layers: Any = get_peft_model_state_dict(unet)
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
