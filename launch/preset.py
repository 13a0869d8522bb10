"""The command ``dreamscale preset``: run a published experiment, from the files of a dataset to a report."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data_sharding.common.config import parse_config, to_yaml
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.common.files import atomic_write_text
from data_sharding.common.plain_yaml import parse_yaml
from data_sharding.common.shipped import find_config, shipped_configs
from launch.ablate.plan import flatten, to_words
from launch.chain import Chain, Step, say
from launch.stages import STAGES

PROG = "dreamscale preset"
SMOKE = "smoke.yaml"
"""File in ``configs/presets`` with the settings of the smoke form; it is no preset."""
Stage = Literal["shard", "align", "finetune", "ddpm", "linear"]
Result = Literal["retrieve", "generate", "evaluate"]
PATHS = {"align": ("encoder", "clip"), "finetune": ("encoder", "base")}
"""Paths that a command needs, in addition to its dataset and its output."""
KEYS = {"clip": "target.model"}
"""Key of the commands for a path, if it differs from the name of the path."""
MADE = ("pretrain", "export", "miniature")
"""Commands that a smoke run adds to make the models that are not given."""
_SET_HERE = {
    **{name: f"give --{name} instead" for name in ("output", "dataset", "encoder", "base")},
    KEYS["clip"]: "give --clip instead",
    **dict.fromkeys(("run", "model", "directory"), "remove this key"),
    "config": "write the config in 'stages' instead",
}
"""Keys of the commands that the preset itself sets, and what to do instead of setting them in `settings`."""


@dataclass(kw_only=True)
class PresetConfig:
    """Run a published experiment: shard the released files, train, generate images, and write a report."""

    output: str
    """Folder for the dataset, the runs, the images and the report. Steps that are complete are not repeated."""
    stages: dict[str, str]
    """Config of each command, in this order: shard, align, finetune, ddpm, linear."""
    results: list[Result] = field(default_factory=lambda: ["generate", "evaluate"])
    """Commands that measure the result, in this order: retrieve (needs align), generate, evaluate."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys that differ from the configs of `stages`; each key begins with its command, as in
    {finetune.training.steps: 1000}. Settings on the command line are added to the settings of the file, and replace
    only the settings with the same key."""
    encoder: str = ""
    """Pretrained encoder package: a directory that `dreamscale export` or `dreamscale convert` wrote."""
    base: str = ""
    """Stable Diffusion model in the layout of diffusers: a directory, or a hub id."""
    clip: str = ""
    """CLIP model: a directory, or a hub id such as openai/clip-vit-large-patch14."""
    dataset: str = ""
    """Finished dataset. If it is set, the released files are not sharded."""
    num_processes: int = 0
    """Number of processes (one for each GPU) of training and generation. 0: the numbers in the configs."""
    smoke: bool = False
    """Run every step with very little training, as a quick test. Models that are not given are replaced by tiny models
    that the run itself trains for a few steps. The images of a smoke run have no meaning. `--smoke true` replaces
    settings of the file, but never settings on the command line."""

    def __post_init__(self) -> None:
        trained = [name for name in self.stages if name != "shard"]
        order = get_args(Stage)
        if wrong := [name for name in self.stages if name not in order]:
            raise ValueError(f"stages: '{wrong[0]}' cannot be a stage; use {', '.join(order[:-1])} or {order[-1]}")
        if list(self.stages) != [name for name in order if name in self.stages]:
            raise ValueError(
                f"stages: {', '.join(self.stages)} is a wrong order; write them in the order of {', '.join(order)}"
            )
        results = get_args(Result)
        if self.results != [name for name in results if name in self.results]:
            raise ValueError(
                f"results: write each command once, in the order of {', '.join(results)}; got {', '.join(self.results)}"
            )
        if not trained:
            raise ValueError("stages: no command trains a model; name align, finetune, ddpm or linear")
        if "retrieve" in self.results and "align" not in trained:
            raise ValueError("results: 'retrieve' needs the stage align")
        if "generate" in self.results and trained[-1] == "align":
            raise ValueError("results: 'generate' needs a stage after align that trains a generator")
        if "evaluate" in self.results and "generate" not in self.results:
            raise ValueError("results: 'evaluate' needs 'generate'")
        if not self.dataset and "shard" not in self.stages:
            raise ValueError("stages: 'shard' is missing, so give the key 'dataset'")


def read_preset(argv: list[str]) -> PresetConfig:
    """Read the arguments of the command.

    Parameters
    ----------
    argv : list of str
        The arguments. The first argument is the name of a preset, such as dreamdiffusion_paper, or a YAML file.

    Returns
    -------
    PresetConfig
        The preset. Its `settings` have dotted keys, and contain the settings of the file, of the smoke form if `smoke`
        is true, and of the command line.

    Raises
    ------
    RequestError
        If there is no such preset, or a key is wrong.
    """
    words = list(argv)
    if words and not words[0].startswith("-") and not find_config(words[0]).is_file():
        folder = shipped_configs() / "presets"
        if not (folder / f"{words[0]}.yaml").is_file() or words[0] == Path(SMOKE).stem:
            known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml") if path.name != SMOKE))
            raise RequestError(f"{PROG}: no preset '{words[0]}'; give one of {known}, or a YAML file")
        words[0] = str(folder / f"{words[0]}.yaml")
    words, own = _split_settings(words)
    plain = [word for word in words if not word.startswith("--print_config")]
    config = parse_config(PresetConfig, plain, prog=PROG, positionals=("config",))
    layers = [config.settings, parse_config(_Settings, own, prog=PROG).settings]
    if config.smoke:
        # The smoke form replaces what was given before it: the settings of the file, if the command line asks for it.
        asked = any(word.partition("=")[0] == "--smoke" for word in words)
        layers.insert(int(asked), _read_smoke(config))
    settings = {key: value for layer in layers for key, value in flatten(layer).items()}
    if plain != words:
        words += ["--settings", json.dumps(settings)]
        return parse_config(PresetConfig, words, prog=PROG, positionals=("config",))
    return replace(config, settings=settings)


@dataclass(kw_only=True)
class _Settings:
    """The key `settings` of the command line alone."""

    settings: dict[str, Any] = field(default_factory=dict)
    """As in `PresetConfig`."""


def _split_settings(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without the key `settings`, and the arguments that set it."""
    others: list[str] = []
    own: list[str] = []
    is_value = False
    for word in words:
        ours = is_value or word.partition("=")[0] == "--settings" or word.startswith("--settings.")
        (own if ours else others).append(word)
        is_value = ours and not is_value and "=" not in word
    return others, own


def _read_smoke(config: PresetConfig) -> dict[str, Any]:
    """Return the settings of the smoke form for the commands of a preset."""
    found = parse_yaml((shipped_configs() / "presets" / SMOKE).read_text())
    return {name: keys for name, keys in found.items() if name in (*config.stages, *config.results, *MADE)}


def make_steps(config: PresetConfig) -> list[Step]:
    """List the steps of a preset, and check the config of every step.

    Parameters
    ----------
    config : PresetConfig
        The preset.

    Returns
    -------
    list of Step
        The steps, in the order in which they run.

    Raises
    ------
    RequestError
        If a path is missing, a key does not begin with a command of the preset, or a config is wrong.
    """
    return _Planner(config).plan()


class _Planner:
    """Makes the steps of a preset one after another, and remembers what the steps so far have made."""

    def __init__(self, config: PresetConfig) -> None:
        self.config, self.out = config, Path(config.output)
        self.steps: list[Step] = []
        self.paths = {"encoder": config.encoder, "base": config.base, "clip": config.clip}
        self.dataset = config.dataset or str(self.out / "dataset")
        self.made_by: dict[str, str] = {}
        commands = [*config.stages, *config.results, *(MADE if config.smoke else ())]
        self.keys: dict[str, dict[str, Any]] = {name: {} for name in commands}
        for key, value in flatten(config.settings).items():
            command, _, rest = key.partition(".")
            if command not in commands or not rest:
                raise RequestError(
                    f"settings: '{key}' does not begin with a command of the preset; begin it with one of "
                    f"{', '.join(f'{name}.' for name in commands)}"
                )
            if rest in _SET_HERE:
                raise RequestError(f"settings: '{key}' cannot be set, because the preset sets it; {_SET_HERE[rest]}")
            self.keys[command][rest] = value

    def plan(self) -> list[Step]:
        stages = self.config.stages
        needed = {name for stage in stages for name in PATHS.get(stage, ())}
        if "finetune" in stages and self._read_order() == "joint":
            needed.add("clip")
        missing = sorted(name for name in needed if not self.paths[name])
        if missing and not self.config.smoke:
            raise RequestError(
                f"{PROG}: give --{missing[0]}, which this preset needs; only a smoke run (--smoke true) makes "
                "tiny models itself"
            )
        if not self.config.dataset:
            words = [stages["shard"], "--output", self.dataset]
            if "encoder" in needed and self.paths["encoder"]:
                words += ["--encoder", self.paths["encoder"]]
            shard = self._add("shard", "shard the released files", words, "dataset")
            self.made_by["dataset"] = "shard"
            if "encoder" in missing:
                self._make_encoder(shard.preprocess.window)
        elif "encoder" in missing:
            raise RequestError(f"{PROG}: give --encoder together with --dataset, because both must fit")
        if {"base", "clip"} & set(missing):
            self._make_base()
        run = ""
        for stage in stages:
            if stage != "shard":
                run = self._add_training(stage)
        for result in self.config.results:
            self._add_result(result, run)
        return self.steps

    def _read_order(self) -> str:
        """Return the order of the stage finetune: joint or sequential."""
        # The order does not depend on the paths, which are not known yet.
        paths = ("dataset", "output", "encoder", "base", KEYS["clip"])
        words = [word for name in paths for word in (f"--{name}", name)]
        words = [self.config.stages["finetune"], *words, *to_words(self.keys["finetune"])]
        return self._read("finetune", words).order

    def _make_encoder(self, window: int) -> None:
        """Add the steps that pretrain a tiny encoder on the dataset, for a smoke run without an encoder."""
        words = ["configs/pretrain/tiny.yaml", "--dataset", self.dataset, "--output", str(self.out / "pretrain")]
        words += ["--model.encoder.samples", str(window)]
        self._add("pretrain", "pretrain a tiny encoder on the trials", words, "pretrain", needs=["dataset"])
        self.paths["encoder"] = str(self.out / "encoder")
        words = [str(self.out / "pretrain"), self.paths["encoder"]]
        self._add("export", "export the tiny encoder", words, "encoder", extra_needs=["pretrain"])
        self.made_by["encoder"] = "export"

    def _make_base(self) -> None:
        """Add the step that trains a tiny Stable Diffusion and CLIP, for a smoke run without base models."""
        folder = self.out / "miniature"
        words = [self.dataset, "--output", str(folder)]
        self._add("miniature", "train a tiny Stable Diffusion and CLIP", words, "miniature", needs=["dataset"])
        for name, part in (("base", "stable-diffusion"), ("clip", "clip")):
            if not self.paths[name]:
                self.paths[name] = str(folder / part)
                self.made_by[name] = "miniature"

    def _add_training(self, stage: str) -> str:
        """Add a command that trains; return its run directory."""
        run = self.out / stage
        words = [self.config.stages[stage], "--dataset", self.dataset, "--output", str(run)]
        uses = [*PATHS.get(stage, ())]
        if stage == "finetune" and self._read_order() == "joint":
            uses.append("clip")
        for name in uses:
            words += [f"--{KEYS.get(name, name)}", self.paths[name]]
        self._add(stage, f"train ({stage})", words, stage, needs=["dataset", *uses], resumes=True)
        if stage == "align":
            self.paths["encoder"] = str(run / "encoder")
            self.made_by["encoder"] = stage
        return str(run)

    def _add_result(self, result: str, run: str) -> None:
        """Add a command that measures the result."""
        images = self.out / "images"
        if result == "retrieve":
            words = [str(self.out / "align"), self.dataset, "--output", str(self.out / "retrieval")]
            self._add(result, "search for the seen image", words, "retrieval", extra_needs=["align"])
        elif result == "generate":
            words = [str(Path(run) / "model"), self.dataset, "--output", str(images)]
            self._add(result, "generate images", words, "images", extra_needs=[Path(run).name], resumes=True)
        else:
            words = [str(images)]
            proofs = ["images/metrics.json", "images/report.html"]
            self._add(result, "evaluate the images", words, "", extra_needs=["generate"], proofs=proofs)

    def _add(
        self,
        name: str,
        title: str,
        words: list[str],
        output: str,
        *,
        needs: list[str] | None = None,
        extra_needs: list[str] | None = None,
        proofs: list[str] | None = None,
        resumes: bool = False,
    ) -> Any:
        """Check the config of a step, add the step, and return the config.

        `needs` names inputs (dataset, encoder, base, clip), and `extra_needs` names steps.
        """
        keys = dict(self.keys[name])
        if self.config.num_processes and (STAGES[name].launcher and name not in ("pretrain", "miniature", "evaluate")):
            keys["num_processes"] = self.config.num_processes
        words = [*words, *to_words(keys)]
        config = self._read(name, words)
        made = [self.made_by[need] for need in needs or () if need in self.made_by]
        self.steps.append(
            Step(
                name=name,
                title=title,
                words=[name, *words],
                outputs=[output] if output else [],
                proofs=proofs or [],
                needs=list(dict.fromkeys([*made, *(extra_needs or ())])),
                resumes=resumes,
            )
        )
        return config

    @staticmethod
    def _read(name: str, words: list[str]) -> Any:
        """Return the config of a command."""
        try:
            return STAGES[name].read(words)
        except RequestError as error:
            raise RequestError(f"{PROG}: {name}: {error}") from None


def run_preset(config: PresetConfig) -> int:
    """Run all steps of a preset.

    Parameters
    ----------
    config : PresetConfig
        The preset.

    Returns
    -------
    int
        0, or the exit code of the step that failed.

    Raises
    ------
    RequestError
        If a path or key is wrong, or the folder cannot be used.
    StopRequested
        If a signal asked the command to stop. The same command resumes.
    """
    steps, out = make_steps(config), Path(config.output)
    if out.exists() and not out.is_dir():
        raise RequestError(f"output {out}: this is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "preset.yaml").is_file():
        raise RequestError(f"output {out}: the folder is not empty and is not of a preset; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "preset.yaml", to_yaml(config))
    except OSError as error:
        raise RequestError(
            f"output {out}: the folder cannot be written ({error.strerror}); choose another folder"
        ) from None
    chain = Chain(out, say)
    with chain.forward_signals():
        if code := chain.run_all(steps):
            return code
    for name in ("images/report.html", "retrieval/retrieval.html"):
        if (out / name).is_file():
            print(out / name, flush=True)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale preset``; returns its exit code."""
    return run_main(lambda words: run_preset(read_preset(words)), argv)


if __name__ == "__main__":
    sys.exit(main())
