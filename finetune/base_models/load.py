"""Load a base model from a directory, from the Hugging Face hub, or from a single file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_count
from finetune.base_models.download import download_base
from finetune.base_models.kinds import BaseFiles, check_base_files
from finetune.base_models.single_file import load_single_file, names_a_file
from finetune.foreign_models import is_local, load_with_library


def load_base(base: str | Path, base_config: str | Path | None = None) -> Any:
    """Load Stable Diffusion 1 or 2, Stable Diffusion XL, or a model with the same layout, such as SDXL-Turbo.

    Parameters
    ----------
    base : str or Path
        Directory in the layout of diffusers, a hub id such as ``stable-diffusion-v1-5/stable-diffusion-v1-5``, or a
        single .safetensors file in the layout of the original code. Weights in fp16 are converted to fp32.
    base_config : str or Path, optional
        For a single file: directory or hub id of a pipeline of the same kind, whose configs and tokenizers are used.

    Returns
    -------
    StableDiffusionPipeline or StableDiffusionXLPipeline
        The pipeline in fp32 on the CPU, with frozen weights, and without safety checker and watermark.

    Raises
    ------
    RequestError
        If `base` is no such model, or cannot be loaded.
    """
    if names_a_file(base):
        pipeline = load_single_file(Path(base), base_config)
        where = f"{base_config}/"
    else:
        if base_config is not None:
            raise RequestError(
                f"base_config is only for a single file of weights, but the base {base} is not a file; remove the key "
                "'base_config'"
            )
        folder = Path(base) if is_local(base) else download_base(str(base))
        pipeline, where = _load_folder(folder, base), f"{folder}/"
    freeze(pipeline, where)
    return pipeline


def freeze(pipeline: Any, where: str) -> None:
    """Check the tokenizers of a pipeline, and freeze its networks. `where` is the start of the tokenizers' path."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
            most = int(encoder.config.max_position_embeddings)
            check_count(tokenizer.model_max_length, where + name, "model_max_length", least=1, most=most)
    for network in find_networks(pipeline).values():
        network.requires_grad_(False).eval()


def find_networks(pipeline: Any) -> dict[str, Any]:
    """Return the networks of a pipeline by name: unet, vae and one or two text encoders."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}


def _load_folder(folder: Path, base: str | Path) -> Any:
    import diffusers

    files = check_base_files(folder)
    made = getattr(diffusers, files.kind.pipeline)
    parts, options = load_parts(folder, base, files), files.kind.make_options(files.index)
    return load_with_library(lambda: made(**parts, **options), base, files.kind.named)


def load_parts(folder: Path, base: str | Path, files: BaseFiles) -> dict[str, Any]:
    """Load the networks, the tokenizers and the scheduler of a pipeline.

    Parameters
    ----------
    folder : Path
        Folder of the pipeline.
    base : str or Path
        Name of the pipeline in messages.
    files : BaseFiles
        Result of `check_base_files`.

    Returns
    -------
    dict
        Maps the name of each part to the part. Weights in fp16 are converted to fp32.

    Raises
    ------
    RequestError
        If a part cannot be loaded.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    local: dict[str, Any] = {"local_files_only": True}
    parts: dict[str, Any] = {}
    for part, (library, name) in files.kind.classes.items():
        made = getattr(libraries[library], name)
        words = {**local, "use_safetensors": True, "variant": files.variants[part], "output_loading_info": True}
        network, info = load_with_library(
            lambda made=made, part=part, words=words: made.from_pretrained(str(folder / part), **words),
            base,
            files.kind.named,
        )
        if missing := sorted(info["missing_keys"]):
            raise RequestError(
                f"{folder / part}: the weights do not fit config.json: missing {', '.join(map(show, missing[:3]))}"
                f"{' ...' if len(missing) > 3 else ''}; get this folder again from its source"
            )
        parts[part] = network.float()
    for part in files.kind.tokenizers:
        parts[part] = load_with_library(
            lambda part=part: transformers.CLIPTokenizer.from_pretrained(str(folder / part), **local),
            base,
            files.kind.named,
        )
    scheduler = getattr(diffusers, files.index["scheduler"][1])
    parts["scheduler"] = load_with_library(
        lambda: scheduler.from_pretrained(str(folder / "scheduler"), **local), base, files.kind.named
    )
    return parts
