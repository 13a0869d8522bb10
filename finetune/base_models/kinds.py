"""The kinds of base models, and the check of a base model's files before any of its networks is built."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_count
from finetune.foreign_models import MAX_SIDE, check_noise_schedule, read_model_config
from pretrain.model.weights import WeightsSize, check_network, measure_weights

_TOKENIZERS = {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
_SCHEDULERS = {
    ("diffusers", f"{name}Scheduler")
    for name in (
        *("DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"),
        "DPMSolverMultistep",
    )
}
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of the weight files of each library, without the ending."""


@dataclass(frozen=True, kw_only=True)
class BaseKind:
    """A kind of base model."""

    pipeline: str
    """Class of the diffusers pipeline."""
    networks: dict[str, str]
    """Maps the name of each text encoder to its class."""
    tokenizers: tuple[str, ...]
    """Names of the tokenizers, one for each text encoder."""
    named: str
    """Name of the kind in messages."""

    @property
    def classes(self) -> dict[str, tuple[str, str]]:
        """Library and class of each network."""
        text = {name: ("transformers", kind) for name, kind in self.networks.items()}
        return {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"), **text}

    def allowed(self, part: str) -> set[tuple[str, str]]:
        """Return the libraries and classes that a part of the pipeline may have."""
        if part == "scheduler":
            return _SCHEDULERS
        return _TOKENIZERS if part in self.tokenizers else {self.classes[part]}

    def make_options(self, index: dict[str, Any]) -> dict[str, Any]:
        """Return the options of the pipeline without the parts that this project does not use."""
        options: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
        if self.pipeline == "StableDiffusionPipeline":
            return options | {"safety_checker": None, "requires_safety_checker": False}
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return options | {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}


KINDS = {
    kind.pipeline: kind
    for kind in (
        BaseKind(
            pipeline="StableDiffusionPipeline",
            networks={"text_encoder": "CLIPTextModel"},
            tokenizers=("tokenizer",),
            named="Stable Diffusion",
        ),
        BaseKind(
            pipeline="StableDiffusionXLPipeline",
            networks={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
            tokenizers=("tokenizer", "tokenizer_2"),
            named="Stable Diffusion XL",
        ),
    )
}
"""The kinds of base models, by the class of their pipeline."""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """Files of a base model, after the check of all configs."""

    kind: BaseKind
    index: dict[str, Any]
    """Content of model_index.json."""
    variants: dict[str, str | None]
    """Maps each network to the variant of its weight files, e.g. fp16; None if the files have no variant."""


def read_index(folder: Path, kinds: Mapping[str, BaseKind] = KINDS) -> tuple[BaseKind, dict[str, Any]]:
    """Read model_index.json of a pipeline, and refuse classes that this project does not load.

    Parts that this project does not use, such as the safety checker, may be missing.

    Parameters
    ----------
    folder : Path
        Folder of the pipeline.
    kinds : mapping
        Allowed kinds, by the class of their pipeline.

    Returns
    -------
    kind : BaseKind
        Kind of the base model.
    index : dict
        Content of the file.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or if it names another kind of pipeline or an unknown class.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise RequestError(f"{folder}: not a diffusers pipeline (no model_index.json); give the pipeline's directory")
    index = read_model_config(path)
    name = index.get("_class_name")
    kind = next((kind for pipeline, kind in kinds.items() if pipeline == name), None)
    if kind is None:
        raise RequestError(f"{folder}: holds a {show(name)}, not a {' or '.join(kinds)}; choose another base model")
    for part in (*kind.classes, *kind.tokenizers, "scheduler"):
        stated, allowed = index.get(part), kind.allowed(part)
        if not isinstance(stated, list) or [*stated] not in [[*words] for words in allowed]:
            raise RequestError(f"{path}: the part '{part}' is no {sorted(allowed)[0][1]}; choose another base")
    return kind, index


def find_weights(folder: Path, library: str) -> tuple[list[Path], str | None]:
    """Find the weight files of a network.

    If the folder has weights in several number formats, the files without a variant are used, otherwise those of the
    variant fp16.

    Parameters
    ----------
    folder : Path
        Folder of the network.
    library : str
        Library that wrote the files: diffusers or transformers.

    Returns
    -------
    files : list of Path
        The files: one, or several parts of one network.
    variant : str or None
        Variant of the files, e.g. fp16.

    Raises
    ------
    RequestError
        If the folder has no weights as safetensors, or weights of several unknown variants.
    """
    part = r"-\d+-of-\d+"
    name = re.compile(rf"{WEIGHTS[library]}(?:{part})?(?:\.(?P<variant>\w+))?(?:{part})?\.safetensors")
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        if match := name.fullmatch(path.name):
            found[match["variant"]].append(path)
    if not found:
        raise RequestError(
            f"{folder}: has no weights in a .safetensors file with the name {WEIGHTS[library]}.safetensors; other "
            "files of weights can hold code and are not read"
        )
    variant = next((name for name in (None, "fp16") if name in found), None)
    if variant not in found:
        if len(found) > 1:
            raise RequestError(
                f"{folder}: has weights of the variants {', '.join(map(str, found))}; keep the files of one variant"
            )
        variant = next(iter(found))
    return found[variant], variant


def check_base_files(folder: Path, kinds: Mapping[str, BaseKind] = KINDS) -> BaseFiles:
    """Check the files of a base model in a folder, before any of its parts is built.

    Parameters
    ----------
    folder : Path
        Folder of a diffusers pipeline.
    kinds : mapping
        Allowed kinds, by the class of their pipeline.

    Returns
    -------
    BaseFiles
        What is in the folder.

    Raises
    ------
    RequestError
        If a file is missing or damaged, if the folder holds another kind of model, or if a config describes a larger
        network than its weights.
    """
    kind, index = read_index(folder, kinds)
    sizes, variants = {}, {}
    for part, (library, _) in kind.classes.items():
        read_model_config(folder / part / "config.json")
        paths, variants[part] = find_weights(folder / part, library)
        sizes[part] = measure_weights(paths)
    check_configs(folder, kind, sizes)
    return BaseFiles(kind=kind, index=index, variants=variants)


def check_configs(folder: Path, kind: BaseKind, sizes: dict[str, WeightsSize]) -> None:
    """Check all configs of a base model.

    Parameters
    ----------
    folder : Path
        Folder of a diffusers pipeline, which may have no weights.
    kind : BaseKind
        Kind of the base model.
    sizes : dict
        Size of the weights of each network.

    Raises
    ------
    RequestError
        If a config is missing, describes a larger network than its weights, or describes a network that cannot be
        conditioned on EEG.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    values = {}
    for part, (library, name) in kind.classes.items():
        path = folder / part / "config.json"
        values[part], made = read_model_config(path), getattr(libraries[library], name)

        def build(part: str = part, library: str = library, made: Any = made) -> Any:
            if library == "diffusers":
                return made.from_config(values[part])
            return made(made.config_class.from_pretrained(str(folder / part), local_files_only=True))

        check_network(build, sizes[part], path)
    check_noise_schedule(folder / "scheduler" / "scheduler_config.json")
    _check_shapes(folder, kind, values)


def _check_shapes(folder: Path, kind: BaseKind, values: dict[str, dict[str, Any]]) -> None:
    """Check that the networks of a base model fit each other."""
    unet, vae = values["unet"], values["vae"]
    where, levels = str(folder / "unet" / "config.json"), len(vae.get("block_out_channels") or [0])
    # Each level of the autoencoder except the first halves the size of the image, and each level of the U-Net except
    # the first halves the size of the latent.
    side = check_count(unet.get("sample_size"), where, "sample_size", least=1, most=MAX_SIDE >> min(levels - 1, 11))
    halvings = len(unet.get("block_out_channels") or [0]) - 1
    if side % 2**halvings:
        raise RequestError(
            f"{where}: sample_size is {side}, which cannot be halved {halvings} times as this network needs; get the "
            "file again from its source"
        )
    latent = vae.get("latent_channels", 4)
    if unet.get("in_channels", 4) != latent or unet.get("out_channels", 4) != latent:
        raise RequestError(
            f"{where}: in_channels and out_channels must be {show(latent)}, the latent_channels of the VAE, but are "
            f"{show(unet.get('in_channels', 4))} and {show(unet.get('out_channels', 4))}; a model for inpainting or "
            "depth cannot be used, so choose another base"
        )
    added = "text_time" if kind.pipeline == "StableDiffusionXLPipeline" else None
    if unet.get("addition_embed_type") != added:
        raise RequestError(
            f"{where}: addition_embed_type is {show(unet.get('addition_embed_type'))}, but a {kind.named} needs "
            f"{show(added)}; choose another base"
        )
    if any(vae.get(name) is not None for name in ("latents_mean", "latents_std", "shift_factor")):
        raise RequestError(
            f"{folder / 'vae' / 'config.json'}: the latents are shifted (latents_mean, latents_std or shift_factor), "
            "which is not supported; choose another base"
        )
    width = sum(int(values[part].get("hidden_size", 512)) for part in kind.networks)
    if unet.get("cross_attention_dim") != width:
        raise RequestError(
            f"{where}: cross_attention_dim is {show(unet.get('cross_attention_dim'))}, but the text encoders have the "
            f"width {width}; the parts are from different models, so get the base again from its source"
        )
