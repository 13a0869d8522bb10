"""Load a base model from a single safetensors file in the layout of the original code (CompVis, Stability AI).

Such a file has the weights of all networks, but no configs and no tokenizers. They are taken from a pipeline of the
same kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError, show
from finetune.base_models.download import download_configs
from finetune.base_models.kinds import BaseKind, check_configs, read_index
from finetune.foreign_models import is_local, load_with_library
from pretrain.model.weights import WeightsSize, measure_weights

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PREFIXES = {
    "StableDiffusionPipeline": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.",
    },
    "StableDiffusionXLPipeline": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
}
"""First part of the names of each network's weights, for each kind of base model."""
_PACKED = 2
"""A network of diffusers has up to this many times as many tensors as the file, because the text encoders of OpenCLIP
have one tensor where those of transformers have three."""


def names_a_file(base: str | Path) -> bool:
    """Return True if a base model is given as a file, and False if it is given as a directory or a hub id."""
    return Path(base).is_file() or Path(base).suffix in (".safetensors", *_PICKLES)


def load_single_file(path: Path, base_config: str | Path | None) -> Any:
    """Load a base model from a single file.

    Parameters
    ----------
    path : Path
        The safetensors file.
    base_config : str or Path, optional
        Directory or hub id of a pipeline of the same kind. Its weights are not used and may be missing.

    Returns
    -------
    StableDiffusionPipeline or StableDiffusionXLPipeline
        The pipeline in fp32 on the CPU.

    Raises
    ------
    RequestError
        If the file is no base model of the kind of `base_config`, or holds pickled weights.
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file; give a directory, a .safetensors file or a hub id ('owner/name')")
    if path.suffix != ".safetensors":
        raise RequestError(
            f"{path}: files of the type '{path.suffix}' can hold code and are not read; give a .safetensors file"
        )
    if base_config is None:
        raise RequestError(
            f"{path}: a single file has no configs and no tokenizers; set 'base_config' to the directory or hub id of "
            "a pipeline of the same kind, e.g. stable-diffusion-v1-5/stable-diffusion-v1-5; its weights are not used"
        )
    folder = Path(base_config) if is_local(base_config) else download_configs(str(base_config))
    kind, index = read_index(folder)
    check_configs(folder, kind, _measure(path, kind, base_config))
    return _load(path, folder, kind, index)


def _measure(path: Path, kind: BaseKind, base_config: str | Path) -> dict[str, WeightsSize]:
    sizes = {}
    for part, prefix in _PREFIXES[kind.pipeline].items():
        size = measure_weights([path], prefix)
        if not size.tensors:
            raise RequestError(
                f"{path}: has no weights whose names begin with {prefix}, so it is not a {kind.named} in the layout of "
                f"the original code; give another file, or set 'base_config' ({base_config}) to a pipeline of the "
                "file's kind"
            )
        sizes[part] = WeightsSize(_PACKED * size.tensors, size.values)
    return sizes


def _load(path: Path, folder: Path, kind: BaseKind, index: dict[str, Any]) -> Any:
    import diffusers
    import torch

    options = {**kind.make_options(index), "torch_dtype": torch.float32}
    made = getattr(diffusers, kind.pipeline)
    pipeline = load_with_library(
        lambda: made.from_single_file(str(path), config=str(folder), local_files_only=True, **options),
        path,
        kind.named,
    )
    for part in kind.classes:
        network = getattr(pipeline, part)
        # The library leaves weights that are not in the file on PyTorch's meta device.
        if missing := [name for name, value in network.state_dict().items() if value.is_meta]:
            raise RequestError(
                f"{path}: the weights do not fit {folder / part / 'config.json'}: missing "
                f"{', '.join(map(show, missing[:3]))}{' ...' if len(missing) > 3 else ''}; set 'base_config' to a "
                "pipeline of the file's kind"
            )
    return pipeline
