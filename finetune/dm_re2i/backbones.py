"""Build the backbone (U-Net) of EG-DDPM from a config, or load it from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_count
from finetune.dm_re2i.config import EGDDPMStage
from finetune.dm_re2i.eg_ddpm import EGDDPM
from finetune.dm_re2i.guided import GuidedUNet
from finetune.dm_re2i.unet2d import GuidedUNet2D
from finetune.foreign_models import MAX_SIDE, check_diffusers_model, load_with_library, read_model_config

BACKBONES: dict[str, type[GuidedUNet]] = {"paper": EGDDPM, "unet2d": GuidedUNet2D}
"""Class of each backbone. diffusers stores the name of the class in the config of the network."""


def build_unet(stage: EGDDPMStage, condition_dim: int) -> GuidedUNet:
    """Build a backbone (U-Net) with new weights.

    Parameters
    ----------
    stage : EGDDPMStage
        Config of the second stage.
    condition_dim : int
        Width of the EEG vector.

    Returns
    -------
    GuidedUNet
        The network.
    """
    options: dict[str, Any] = {
        "sample_size": stage.image_size,
        "condition_dim": condition_dim,
        "base_channels": stage.base_channels,
        "multipliers": tuple(stage.multipliers),
        "head_dim": stage.head_dim,
        "scale_shift": stage.scale_shift,
        "null_condition": stage.drop > 0,
        "patch": stage.patch,
    }
    if stage.backbone == "paper":
        options |= {"expansion": stage.expansion, "heads": stage.heads, "join_first": stage.join_first}
    return BACKBONES[stage.backbone](**options)


def load_unet(folder: Path) -> GuidedUNet:
    """Load a backbone (U-Net) from a folder that its method `save_pretrained` wrote.

    Parameters
    ----------
    folder : Path
        Directory of the network, ``<run>/model/unet``.

    Returns
    -------
    GuidedUNet
        The network in evaluation mode, without gradients.

    Raises
    ------
    RequestError
        If a file is missing or damaged, or the backbone is unknown.
    """
    name = read_model_config(folder / "config.json").get("_class_name")
    network = next((network for network in BACKBONES.values() if network.__name__ == name), None)
    if network is None:
        raise RequestError(
            f"{folder / 'config.json'}: '{show(name)}' is not a U-Net that this version knows; train the model again"
        )
    shape = check_diffusers_model(network, folder)
    check_count(shape.get("sample_size"), str(folder / "config.json"), "sample_size", least=1, most=MAX_SIDE)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    unet, report = load_with_library(lambda: network.from_pretrained(str(folder), **options), folder, "the U-Net")
    odd = [*report["missing_keys"], *report["unexpected_keys"]]
    if odd:
        raise RequestError(f"{folder}: {len(odd)} weights are missing or unknown, e.g. {odd[0]}; train the model again")
    return unet.eval().requires_grad_(False)
