"""Download a base model from the Hugging Face hub, or find it in the hub's cache on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from finetune.base_models.kinds import KINDS, WEIGHTS, BaseKind, find_weights, read_index
from finetune.foreign_models import load_with_library

_CONFIGS = ("model_index.json", "*/*.json", "*/merges.txt")


def download_configs(base: str, kinds: Mapping[str, BaseKind] = KINDS) -> Path:
    """Download the configs and tokenizers of a pipeline, without weights.

    Parameters
    ----------
    base : str
        Hub id.
    kinds : mapping
        Allowed kinds, by the class of their pipeline.

    Returns
    -------
    Path
        Folder in the hub's cache.

    Raises
    ------
    RequestError
        If the files cannot be downloaded, or if the pipeline is no base model of a known kind.
    """
    folder = download_files(base, _CONFIGS)
    read_index(folder, kinds)
    return folder


def download_base(base: str, kinds: Mapping[str, BaseKind] = KINDS) -> Path:
    """Download a pipeline: first its configs, and then, if its kind is known, its weights.

    Weights without a variant are preferred; otherwise, the variant fp16 is downloaded.

    Parameters
    ----------
    base : str
        Hub id.
    kinds : mapping
        Allowed kinds, by the class of their pipeline.

    Returns
    -------
    Path
        Folder in the hub's cache.

    Raises
    ------
    RequestError
        If the files cannot be downloaded, or if the pipeline is no base model of a known kind.
    """
    folder = download_configs(base, kinds)
    kind, _ = read_index(folder, kinds)
    for part, (library, _) in kind.classes.items():
        for variant in ("", ".fp16"):
            name = f"{part}/{WEIGHTS[library]}{variant}"
            # All files must be of the version of the configs, whose folder has the name of the version.
            patterns = (f"{name}.safetensors", f"{name}-?????-of-?????.safetensors")
            download_files(base, patterns, revision=folder.name)
            try:
                find_weights(folder / part, library)
                break
            except RequestError:
                if variant:
                    raise
    return folder


def download_files(base: str, patterns: tuple[str, ...], **options: Any) -> Path:
    """Download the files of a pipeline whose paths match one of the patterns; return the folder in the hub's cache."""
    from huggingface_hub import constants, snapshot_download

    def run() -> str:
        # Without network, older versions of the library find a version by its name only with this option.
        offline = constants.HF_HUB_OFFLINE
        return snapshot_download(base, allow_patterns=list(patterns), local_files_only=offline, **options)

    return Path(load_with_library(run, base, "a base model from the Hugging Face hub"))
