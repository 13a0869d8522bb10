"""Make and check the configs of all rows (variants of the model) of an ablation, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.common.config import parse_config, to_dict
from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.storage import as_path
from data_sharding.dataset.dataset import read_manifest
from finetune.papers import find_papers
from launch.ablate.config import Ablation
from launch.chain import Step
from launch.stages import STAGES

PRETRAIN, ALIGN = "pretrain", "align"
BEFORE = [PRETRAIN, ALIGN]
"""Commands that can come before the command that trains a generator, in this order. Each makes an encoder."""
_SET_HERE = ("dataset", "output")
_GENERATE_KEYS = {"model", "dataset", "output", "split", "control", "controls", "seed"}
_EVALUATE_KEYS = {"directory", "controls", "dataset", "seed"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of an ablation, with the steps that train the variant, generate its images and evaluate them."""

    name: str
    changes: dict[str, Any]
    """Dotted keys that differ from the base configs, with their values."""
    steps: list[Step]
    """Steps of training, generation and evaluation."""
    dataset: str
    """Path of the dataset."""
    images: Path
    """Folder of the generated images, with the results of the evaluation."""


def flatten(values: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """Return a flat dictionary with dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{lead}{key}.")
        else:
            flat[f"{lead}{key}"] = value
    return flat


def to_words(values: Mapping[str, Any]) -> list[str]:
    """Return dotted keys with their values as arguments of a command."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [word for key, value in texts.items() for word in (f"--{key}", value)]


def _assign(keys: Mapping[str, Any], stages: list[str], where: str) -> dict[str, dict[str, Any]]:
    """Sort the keys of a row by the command to which each key belongs: a training command, or ``generate``."""
    found: dict[str, dict[str, Any]] = {name: {} for name in (*stages, "generate")}
    for key, value in keys.items():
        first, _, rest = key.partition(".")
        if first == "generate" and rest:
            found["generate"][rest] = value
        elif len(stages) == 1:
            found[stages[0]][key] = value
        elif first in stages and rest:
            found[first][rest] = value
        else:
            known = ", ".join(f"{name}." for name in (*stages, "generate"))
            raise RequestError(
                f"{where}: key '{key}' does not say to which command it belongs; begin the key with one of {known}"
            )
    return found


def _check_stages(ablation: Ablation, where: str) -> list[str]:
    stages, papers = list(ablation.config.stages), {paper.command for paper in find_papers()}
    for number, name in enumerate(stages):
        last = number == len(stages) - 1
        if name not in papers.union(BEFORE) or (name in papers) != last:
            raise RequestError(
                f"{where}: stages: '{name}' cannot {'be the last command' if last else 'come before another command'}; "
                f"the last command must be one of {', '.join(sorted(papers))}, and only {' and '.join(BEFORE)} can "
                "come before it"
            )
    if stages[:-1] != [name for name in BEFORE if name in stages]:
        raise RequestError(f"{where}: stages: {PRETRAIN} must come before {ALIGN}; write the stages in this order")
    return stages


class _Planner:
    """Makes the steps of all rows. A command with equal configs in two rows runs once, and both rows use its result."""

    def __init__(self, ablation: Ablation) -> None:
        self.config, self.files = ablation.config, ablation.files
        self.where = ablation.files[ablation.config.base]
        self.stages = _check_stages(ablation, self.where)
        self.out = Path(ablation.config.output)
        self.runs: dict[str, tuple[str, Path]] = {}
        self.dataset = ""

    def _config_of(self, row: str, stage: str, changes: Mapping[str, Any], encoder: Path | None) -> dict[str, Any]:
        """Return the config with which a command runs in a row, without the key `output`."""
        where = f"{self.files[row]}: row '{row}'"
        if taken := [key for key in _SET_HERE if key in changes and (stage, key) != (PRETRAIN, "dataset")]:
            raise RequestError(
                f"{where}: key '{taken[0]}' cannot be set in a row, because all rows have the same {taken[0]}; "
                f"set '{taken[0]}' in the config of the ablation instead"
            )
        given = {"output": "OUTPUT", **changes}
        if self.config.dataset and stage != PRETRAIN:
            given["dataset"] = self.config.dataset
        if encoder is not None and "encoder" not in changes:
            given["encoder"] = str(encoder)
        base = self.out / "rows" / self.config.base
        given = {
            key: value.replace("{base}", str(base)) if isinstance(value, str) else value for key, value in given.items()
        }
        try:
            config = STAGES[stage].read([self.config.stages[stage], *to_words(given)])
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        values = to_dict(config)
        del values["output"]
        return values

    def plan_row(self, name: str) -> Row:
        """Make the steps of a row."""
        own = flatten(self.config.rows[name])
        keys = _assign({**flatten(self.config.common), **own}, self.stages, f"{self.files[name]}: row '{name}'")
        steps: list[Step] = []
        run, before = Path(), ""
        for stage in self.stages:
            encoder = run / "encoder" if before else None
            config = self._config_of(name, stage, keys[stage], encoder)
            same = digest_of([stage, config])
            if stage != PRETRAIN:
                self.dataset = self.dataset or config["dataset"]
            if stage != PRETRAIN and config["dataset"] != self.dataset:
                raise RequestError(
                    f"{self.where}: stages: the commands have different datasets ({config['dataset']} for '{stage}', "
                    f"{self.dataset} for another command); set 'dataset' in the config of the ablation"
                )
            if same in self.runs:
                before, run = self.runs[same]
                continue
            run = self.out / "rows" / name / stage
            step = Step(
                name=f"{name}.{stage}",
                title=f"{name}: train ({stage})",
                words=[stage, str(self.out / "configs" / f"{name}.{stage}.yaml")],
                outputs=[run.relative_to(self.out).as_posix()],
                needs=[before] if before else [],
                config={**config, "output": str(run)},
                resumes=True,
            )
            steps.append(step)
            if stage == PRETRAIN:
                step = self._export_step(name, run, step.name)
                steps.append(step)
            before = step.name
            self.runs[same] = before, run
        images = self.out / "images" / name
        steps += self._image_steps(name, run, before, keys["generate"], images)
        return Row(name=name, changes=own, steps=steps, dataset=self.dataset, images=images)

    def _export_step(self, name: str, run: Path, trained: str) -> Step:
        """Make the step that exports the encoder of a pretraining run to the folder ``encoder`` in the run."""
        return Step(
            name=f"{name}.export",
            title=f"{name}: export the pretrained encoder",
            words=["export", str(run), str(run / "encoder"), "--program", "false"],
            outputs=[(run / "encoder").relative_to(self.out).as_posix()],
            needs=[trained],
        )

    def _image_steps(self, name: str, run: Path, trained: str, options: dict[str, Any], images: Path) -> list[Step]:
        from finetune.evaluation.evaluate import EvaluateConfig
        from finetune.generate import GenerateConfig

        where, config, seed = f"{self.files[name]}: row '{name}'", self.config, str(self.config.seed)
        options = {**flatten(config.generate), **options}
        judging = flatten(config.evaluate)
        for what, given, taken in (("generate", options, _GENERATE_KEYS), ("evaluate", judging, _EVALUATE_KEYS)):
            if wrong := sorted(taken & given.keys()):
                raise RequestError(f"{where}: key '{what}.{wrong[0]}' is set by the ablation itself; remove this key")
        words = [str(run / "model"), self.dataset, "--output", str(images), "--split", config.split, "--seed", seed]
        words += [*(["--controls", '["shuffle"]'] if config.control else []), *to_words(options)]
        self._check(GenerateConfig, words, ("model", "dataset"), f"{where}: generate")
        folders = [images, *([images.with_name(f"{images.name}-shuffle")] if config.control else [])]
        generate = Step(
            name=f"{name}.generate",
            title=f"{name}: generate images" + (", also from shuffled EEG" if config.control else ""),
            words=["generate", *words],
            outputs=[folder.relative_to(self.out).as_posix() for folder in folders],
            needs=[trained],
        )
        needs = [generate.name]
        words = [str(images), "--seed", seed]
        words += to_words(judging)
        if name != config.base:
            # The evaluation of the base row trains a classifier. This classifier judges the images of all rows.
            if "classifier" not in judging:
                words += ["--classifier", str(self.out / "images" / config.base / "classifier.safetensors")]
            needs.append(f"{config.base}.evaluate")
        self._check(EvaluateConfig, words, ("directory",), f"{where}: evaluate")
        evaluate = Step(
            name=f"{name}.evaluate",
            title=f"{name}: evaluate the images",
            words=["evaluate", *words],
            outputs=[],
            proofs=[f"images/{name}/metrics.json", f"images/{name}/trials.json"],
            needs=needs,
        )
        return [generate, evaluate]

    @staticmethod
    def _check(kind: type, words: list[str], positionals: tuple[str, ...], where: str) -> None:
        try:
            parse_config(kind, words, prog="dreamscale ablate", positionals=positionals)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None


def plan_rows(ablation: Ablation) -> list[Row]:
    """Make the configs and steps of all rows, and check them.

    Parameters
    ----------
    ablation : Ablation
        The ablation, from `read_ablation`.

    Returns
    -------
    list of Row
        The rows; the base row comes first.

    Raises
    ------
    RequestError
        If a command cannot be part of an ablation, a key or value of a row is wrong, or the configs of two commands
        name different datasets.
    """
    planner = _Planner(ablation)
    return [planner.plan_row(name) for name in ablation.config.rows]


def check_dataset(dataset: str, split: str) -> None:
    """Check that the dataset has the splits for training and generation.

    Parameters
    ----------
    dataset : str
        Path of the dataset.
    split : str
        Split from which images are generated.

    Raises
    ------
    RequestError
        If the dataset is incomplete or a split has no samples.
    """
    manifest = read_manifest(as_path(dataset))
    for name in dict.fromkeys(("train", "val", split)):
        if not manifest.samples(name):
            raise RequestError(
                f"{dataset}: no samples in split '{name}', which the ablation needs; give a dataset with this split"
            )
