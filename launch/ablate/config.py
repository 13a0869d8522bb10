"""Config of ``dreamscale ablate``: a YAML file, or a folder with one file for each variant of the model (row)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.config import parse_config
from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.plain_yaml import MAX_YAML, parse_yaml
from data_sharding.common.shipped import find_config
from data_sharding.common.untrusted import check_key, read_limited

MAIN = "ablation.yaml"
"""Name of the main file in the folder of an ablation. Every other YAML file in the folder describes one variant (in the
code: a row)."""
PROG = "dreamscale ablate"


@dataclass(kw_only=True)
class AblationConfig:
    """Train variants of a model, generate images with each variant, and compare them with those of the base variant."""

    output: str
    """Folder for all runs, images and results. Work that is complete in the folder is not repeated."""
    stages: dict[str, str]
    """Config of each command that trains, in the order of the commands: {ddpm: configs/finetune/dm_re2i.yaml}, or
    {align: ..., finetune: ...}. The last command in `stages` must train a model that generates images. After pretrain,
    the next command gets the exported encoder, and after align, the aligned encoder."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Variants: for each variant's name, the keys that differ, as in {no_mkrb: {evrnet.mkrb: false}}. With several
    commands, a key begins with the command (finetune.tune). A key for dreamscale generate begins with generate
    (generate.guidance_scale). In a value, {base} stands for the folder of the base variant, such as
    {base}/ddpm/model/evrnet."""
    base: str = "base"
    """Name of the base variant. The base variant comes first, and all other variants are compared with it. If `rows`
    has no variant with this name, the base variant is a training with the unchanged configs of `stages`."""
    common: dict[str, Any] = field(default_factory=dict)
    """Keys that are set in all variants, written like the keys in `rows`, such as {ddpm.training.steps: 1000}."""
    dataset: str = ""
    """Path of the EEG-image dataset for all commands except pretrain. If dataset is empty, the dataset in the configs
    of `stages` is used."""
    split: Literal["val", "test"] = "val"
    """Images are generated for the trials of this split. Use val to choose settings, and test only for final
    results."""
    control: bool = True
    """Whether images are also generated from shuffled EEG."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Keys of dreamscale generate for all variants, such as {steps: 50}."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Keys of dreamscale evaluate, such as {training.steps: 500}. The images of all variants are judged by one
    classifier."""
    resamples: int = 2000
    """Number of bootstrap resamples for the intervals, and of permutations for the p-values."""
    seed: int = 0
    """Seed for the initial noise of the generated images, the training of the classifier, and the bootstrap. The models
    are trained with the seeds in the configs of `stages`."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("'stages' is empty; name at least one command with its config")
        if self.resamples < 99:
            raise ValueError(f"resamples must be at least 99, got {self.resamples}")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Config of an ablation, and the file in which each variant was found."""

    config: AblationConfig
    files: dict[str, str]
    """For each variant's name, the file that describes the variant; error messages name this file."""


def read_ablation(argv: Sequence[str]) -> Ablation:
    """Read the arguments of the command.

    Parameters
    ----------
    argv : sequence of str
        The arguments. The first argument is a YAML file, or a folder with the file `MAIN` and one file per variant.

    Returns
    -------
    Ablation
        The config with the variants of all files.

    Raises
    ------
    RequestError
        If a file is missing or damaged, a key is unknown, two variants have the same name, or there is only one
        variant.
    """
    words = list(argv)
    source = find_config(words[0]) if words and not words[0].startswith("-") else None
    folder = source if source is not None and source.is_dir() else None
    if folder is not None:
        if not (folder / MAIN).is_file():
            raise RequestError(f"{words[0]}: the folder has no {MAIN}; write one, or give a YAML file")
        words[0] = str(folder / MAIN)
    where = words[0] if source is not None else "the command line"
    try:
        config = parse_config(AblationConfig, words, prog=PROG, positionals=("config",))
    except RequestError as error:
        raise error if where in str(error) else RequestError(f"{where}: {error}") from None
    rows, files = dict(config.rows), dict.fromkeys(config.rows, where)
    for path in sorted(folder.glob("*.yaml")) if folder else ():
        if path.name == MAIN:
            continue
        if path.stem in rows:
            raise RequestError(f"{path}: {where} has a row '{path.stem}' too; rename one of the two rows")
        rows[path.stem], files[path.stem] = _read_row(path), str(path)
    rows = {config.base: rows.pop(config.base, {}), **rows}
    files = {config.base: where, **files}
    for name in rows:
        try:
            check_key(name, files[name])
        except RequestError:
            raise RequestError(
                f"{files[name]}: rows: '{name}' is not the name of a row; use letters, digits, '_' and '-'"
            ) from None
    if len(rows) < 2:
        raise RequestError(f"{where}: rows: there is nothing to compare with '{config.base}'; add at least one row")
    return Ablation(config=dataclasses.replace(config, rows=rows), files=files)


def _read_row(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = parse_yaml(read_limited(path, MAX_YAML)) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise RequestError(f"{path}: cannot be read as YAML ({one_line(error)[:200]})") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path}: holds no keys; write the keys that differ from the base, such as 'evrnet: ...'")
    return values
