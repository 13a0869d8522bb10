"""Download a base model from the Hugging Face hub, or find it in the hub's cache on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from finetune.base_models.kinds import WEIGHTS, find_weights, read_index
from finetune.foreign_models import load_with_library

_CONFIGS = ("model_index.json", "*/*.json", "*/merges.txt")


def download_configs(base: str) -> Path:
    """Download the configs and tokenizers of a pipeline, without weights.

    Parameters
    ----------
    base : str
        Hub id.

    Returns
    -------
    Path
        Folder in the hub's cache.

    Raises
    ------
    RequestError
        If the files cannot be downloaded, or if the pipeline is no base model of a known kind.
    """
    folder = _download(base, _CONFIGS)
    read_index(folder)
    return folder


def download_base(base: str) -> Path:
    """Download a pipeline: first its configs, and then, if its kind is known, its weights.

    Weights without a variant are preferred; otherwise, the variant fp16 is downloaded.

    Parameters
    ----------
    base : str
        Hub id.

    Returns
    -------
    Path
        Folder in the hub's cache.

    Raises
    ------
    RequestError
        If the files cannot be downloaded, or if the pipeline is no base model of a known kind.
    """
    folder = download_configs(base)
    kind, _ = read_index(folder)
    for part, (library, _) in kind.classes.items():
        for variant in ("", ".fp16"):
            name = f"{part}/{WEIGHTS[library]}{variant}"
            # All files must be of the version of the configs, whose folder has the name of the version.
            patterns = (f"{name}.safetensors", f"{name}-?????-of-?????.safetensors")
            _download(base, patterns, revision=folder.name)
            try:
                find_weights(folder / part, library)
                break
            except RequestError:
                if variant:
                    raise
    return folder


def _download(base: str, patterns: tuple[str, ...], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    def run() -> str:
        return snapshot_download(base, allow_patterns=list(patterns), **options)

    return Path(load_with_library(run, base, "a base model from the Hugging Face hub"))
