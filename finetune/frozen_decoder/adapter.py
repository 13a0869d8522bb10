"""Read the weights of an IP-Adapter, check them, and put them into the U-Net of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from data_sharding.common.errors import RequestError, show
from finetune.foreign_models import load_with_library
from pretrain.model.weights import read_tensors

TOKENS = 4
"""Number of condition tokens that a plain IP-Adapter computes from an image embedding."""
_PROJECTION = {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}


def find_adapter(adapter: str) -> Path:
    """Return the file of an IP-Adapter, which is downloaded if a hub id and a path are given.

    Parameters
    ----------
    adapter : str
        A .safetensors file, or a hub id and the path of the file, e.g.
        ``h94/IP-Adapter/models/ip-adapter_sd15.safetensors``.

    Raises
    ------
    RequestError
        If there is no such file, or if it is no safetensors file.
    """
    if not adapter.endswith(".safetensors"):
        raise RequestError(
            f"{adapter}: give IP-Adapter weights as a .safetensors file; other files of weights can hold code and are "
            "not read"
        )
    if Path(adapter).is_file():
        return Path(adapter)
    parts = adapter.split("/")
    if adapter.startswith((".", "/", "~")) or len(parts) < 3:
        raise RequestError(f"{adapter}: no such file, and not a hub id with a path ('owner/name/path') either")

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]))

    return Path(load_with_library(download, adapter, "an IP-Adapter from the Hugging Face hub"))


def read_adapter(adapter: str) -> dict[str, dict[str, Tensor]]:
    """Read the weights of a plain IP-Adapter, which reads one embedding of an image.

    Parameters
    ----------
    adapter : str
        The file, as in `find_adapter`.

    Returns
    -------
    dict
        ``image_proj``: the layer that computes condition tokens from an embedding. ``ip_adapter``: the layers of the
        cross-attentions.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or holds another kind of adapter.
    """
    path = find_adapter(adapter)
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in read_tensors(path).items():
        group, _, rest = name.partition(".")
        if group in state:
            state[group][rest] = value.float()
    if state["image_proj"].keys() != _PROJECTION or not state["ip_adapter"]:
        raise RequestError(
            f"{adapter}: not the weights of a plain IP-Adapter, which reads one embedding of an image (the kinds Plus, "
            "Full and FaceID read other values); give a file such as ip-adapter_sd15.safetensors or "
            "ip-adapter_sdxl_vit-h.safetensors"
        )
    return state


def install_adapter(pipeline: Any, adapter: str, scale: float) -> int:
    """Put the weights of an IP-Adapter into the U-Net of a base model.

    Parameters
    ----------
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The base model, which is changed in place.
    adapter : str
        The file, as in `find_adapter`.
    scale : float
        Weight of the image embedding in the cross-attentions.

    Returns
    -------
    int
        Width of the image embeddings that the adapter reads.

    Raises
    ------
    RequestError
        If the adapter is for another base model.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    state, unet = read_adapter(adapter), pipeline.unet
    width = int(unet.config.cross_attention_dim)
    attentions = [
        module for name, module in unet.named_modules() if name.endswith("attn2") and hasattr(module, "processor")
    ]
    # An adapter numbers all attentions of the U-Net, and the cross-attentions have the odd numbers.
    expected = {
        f"{2 * number + 1}.to_{part}_ip.weight": (module.to_k.out_features, width)
        for number, module in enumerate(_in_order(unet, attentions))
        for part in "kv"
    }
    found = {name: tuple(value.shape) for name, value in state["ip_adapter"].items()}
    projection = tuple(state["image_proj"]["proj.weight"].shape)
    if found != expected or len(projection) != 2 or projection[0] != TOKENS * width:
        differs = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), "proj.weight")
        raise RequestError(
            f"{adapter}: this IP-Adapter is for another base model ({show(differs)} has the shape "
            f"{found.get(differs, projection)}, but the base model needs {expected.get(differs, (TOKENS * width,))}); "
            "use the adapter for SD 1.5 or for SDXL as the base model is"
        )
    # The library would make an image processor of its own, which needs another package. This project computes the
    # embeddings of images by itself.
    pipeline.register_modules(feature_extractor=CLIPImageProcessorPil())
    load_with_library(
        lambda: pipeline.load_ip_adapter(
            state, subfolder="", weight_name="", image_encoder_folder=None, low_cpu_mem_usage=False
        ),
        adapter,
        "an IP-Adapter",
    )
    pipeline.set_ip_adapter_scale(scale)
    unet.requires_grad_(False).eval()
    return projection[1]


def _in_order(unet: Any, attentions: list[Any]) -> list[Any]:
    """Sort attentions as the library numbers them: by the order of the U-Net's attention processors."""
    by_processor = {id(module.processor): module for module in attentions}
    return [by_processor[id(p)] for p in unet.attn_processors.values() if id(p) in by_processor]
