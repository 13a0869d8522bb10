"""Load the frozen models whose embeddings are targets: CLIP, DINOv2, SigLIP and ViT, in the layout of transformers.

Tensor shapes: B images, S tokens of width D, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_count
from finetune.foreign_models import (
    MAX_SIDE,
    check_transformers_model,
    is_local,
    load_with_library,
    read_model_config,
)

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
"""Files of a tokenizer; not every tokenizer has all of them."""
_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", *TOKENIZER_FILES]


@dataclass(frozen=True, kw_only=True)
class ImageModelKind:
    """A kind of frozen image model; one entry of `KINDS`."""

    what: str
    """Name of the kind in messages."""
    classes: Callable[[], tuple[Any, Any]]
    """Function that imports the class of the model and the class of its image processor."""
    embed: Callable[[Any], Tensor]
    """Function that returns the final embedding [B, P] from the output of the model."""
    pool: Callable[[Tensor], Tensor] = lambda tokens_BSD: tokens_BSD[:, 0]
    """Function that returns the embedding [B, D] from the tokens of a hidden layer. By default, the class token."""


def _clip_classes() -> tuple[Any, Any]:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPVisionModelWithProjection, CLIPImageProcessorPil


def _dinov2_classes() -> tuple[Any, Any]:
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return Dinov2Model, BitImageProcessorPil


def _dinov2_with_registers_classes() -> tuple[Any, Any]:
    from transformers import Dinov2WithRegistersModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return Dinov2WithRegistersModel, BitImageProcessorPil


def _siglip_classes() -> tuple[Any, Any]:
    from transformers import SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipVisionModel, SiglipImageProcessorPil


def _vit_classes() -> tuple[Any, Any]:
    from transformers import ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTModel, ViTImageProcessorPil


KINDS = {
    "clip": ImageModelKind(what="a CLIP model", classes=_clip_classes, embed=lambda out: out.image_embeds),
    "dinov2": ImageModelKind(what="a DINOv2 model", classes=_dinov2_classes, embed=lambda out: out.pooler_output),
    "dinov2_with_registers": ImageModelKind(
        what="a DINOv2 model with registers",
        classes=_dinov2_with_registers_classes,
        embed=lambda out: out.pooler_output,
    ),
    # SigLIP has no class token. Its final embedding comes from attention over all tokens.
    "siglip": ImageModelKind(
        what="a SigLIP model",
        classes=_siglip_classes,
        embed=lambda out: out.pooler_output,
        pool=lambda tokens_BSD: tokens_BSD.mean(dim=1),
    ),
    "vit": ImageModelKind(what="a ViT model", classes=_vit_classes, embed=lambda out: out.last_hidden_state[:, 0]),
}
"""The kinds of frozen image models, by the entry `model_type` of config.json."""
WHAT = "a frozen image model of the types " + ", ".join(KINDS)
"""Names of all kinds for messages."""


def load_clip(clip: str | Path) -> tuple[Any, Any]:
    """Check the files of a CLIP model, and load its image encoder.

    Parameters
    ----------
    clip : str or Path
        Directory or hub id of the model.

    Returns
    -------
    model : CLIPVisionModelWithProjection
        The model on the CPU, in evaluation mode, with frozen weights.
    processor : CLIPImageProcessorPil
        The model's image processor.

    Raises
    ------
    RequestError
        If `clip` is not a CLIP model, cannot be loaded, or has a config that describes a larger network than the one in
        the weight files.
    """
    return _load(clip, find_model_folder(clip, KINDS["clip"].what), KINDS["clip"])


def load_dinov2(dinov2: str | Path) -> tuple[Any, Any]:
    """Load a DINOv2 model and its image processor; arguments and results as in `load_clip`."""
    return _load(dinov2, find_model_folder(dinov2, KINDS["dinov2"].what), KINDS["dinov2"])


def load_image_model(model: str | Path) -> tuple[Any, Any, ImageModelKind]:
    """Load a frozen image model of one of the `KINDS`.

    Parameters
    ----------
    model : str or Path
        Directory or hub id of the model.

    Returns
    -------
    model : PreTrainedModel
        The model on the CPU, in evaluation mode, with frozen weights.
    processor : BaseImageProcessor
        The model's image processor.
    kind : ImageModelKind
        Entry of `KINDS`, which says how embeddings are read from the output of the model.

    Raises
    ------
    RequestError
        If the model is of another kind, cannot be loaded, or has a config that describes a larger network than the one
        in the weight files.
    """
    folder = find_model_folder(model, WHAT)
    name = str(read_model_config(folder / "config.json").get("model_type", ""))
    kind = KINDS.get(name.removesuffix("_vision_model"))
    if kind is None:
        raise RequestError(
            f"{model}: config.json names the model type {show(name)}; give a model of type {', '.join(KINDS)}"
        )
    return *_load(model, folder, kind), kind


def load_text_model(clip: str | Path) -> tuple[Any, Any, Path]:
    """Load the text encoder of a CLIP model, with its projection to the space that images and texts share.

    Parameters
    ----------
    clip : str or Path
        Directory or hub id of the model.

    Returns
    -------
    model : CLIPTextModelWithProjection
        The model on the CPU, in evaluation mode, with frozen weights.
    tokenizer : CLIPTokenizer
        The model's tokenizer.
    folder : Path
        Folder of the model.

    Raises
    ------
    RequestError
        If the model is no CLIP model, has no tokenizer, cannot be loaded, or has a config that describes a larger
        network than the one in the weight files.
    """
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    what = "a CLIP model with a text encoder"
    folder = find_model_folder(clip, what)
    name = read_model_config(folder / "config.json").get("model_type")
    if name not in ("clip", "clip_text_model"):
        raise RequestError(
            f"{clip}: config.json names the model type {show(name)}, but texts are embedded only by a model of type "
            "clip; choose a CLIP model, or set target.text_weight to 0"
        )
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise RequestError(
            f"{clip}: has no tokenizer (tokenizer.json, or vocab.json and merges.txt), so texts cannot be embedded; "
            "copy these files from the model's source, or set target.text_weight to 0"
        )
    if (folder / "tokenizer_config.json").is_file():
        read_model_config(folder / "tokenizer_config.json")
    check_transformers_model(CLIPTextModelWithProjection, folder)

    def load() -> tuple[Any, Any]:
        model = CLIPTextModelWithProjection.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        length = int(model.config.max_position_embeddings)
        # Try the tokenizer once, because errors in its files appear only when it reads a text.
        ids = tokenizer(["a picture"], padding="max_length", max_length=length, return_tensors="pt").input_ids
        if int(ids.max()) >= model.config.vocab_size or ids.shape != (1, length):
            raise RequestError(f"{clip}: the tokenizer does not fit the text encoder; get the model again")
        return model.requires_grad_(False).eval(), tokenizer

    return *load_with_library(load, clip, what), folder


def find_model_folder(model: str | Path, what: str) -> Path:
    """Return the folder of a model of transformers, and download the model if a hub id is given.

    Parameters
    ----------
    model : str or Path
        Directory or hub id of the model.
    what : str
        Kind of the model, such as "a DINOv2 model", for error messages.

    Returns
    -------
    Path
        Folder with config.json, preprocessor_config.json and weights.

    Raises
    ------
    RequestError
        If the folder does not exist or is not complete, or if the model cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    folder = Path(model)
    if not is_local(model):
        # Download the files first, so that they can be checked before the model is built.
        folder = Path(load_with_library(lambda: snapshot_download(str(model), allow_patterns=_FILES), model, what))
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise RequestError(
                f"{model}: not {what} (the file {name} is missing); give the directory that save_pretrained wrote"
            )
    return folder


def _load(name: str | Path, folder: Path, kind: ImageModelKind) -> tuple[Any, Any]:
    model_class, processor_class = kind.classes()
    check_transformers_model(model_class, folder)
    read_model_config(folder / "preprocessor_config.json")

    def load() -> tuple[Any, Any]:
        words: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        model = model_class.from_pretrained(str(folder), **words)
        return model, processor_class.from_pretrained(str(folder), local_files_only=True)

    model, processor = load_with_library(load, name, kind.what)
    check_count(model.config.image_size, str(folder / "config.json"), "image_size", least=1, most=MAX_SIDE)
    for field in ("size", "crop_size"):
        for key, value in (dict(getattr(processor, field) or {})).items():
            if value is not None:
                where = str(folder / "preprocessor_config.json")
                check_count(value, where, f"{field}.{key}", least=1, most=MAX_SIDE)
    # Run the image processor once, because values of a wrong type in its config cause an error only when it processes
    # an image.
    black = np.zeros((32, 32, 3), np.uint8)
    load_with_library(lambda: processor(images=[black], return_tensors="pt")["pixel_values"].float(), name, kind.what)
    return model.requires_grad_(False).eval(), processor
