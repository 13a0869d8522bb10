"""The demo's steps: what each one runs, on what, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.errors import RequestError
from data_sharding.common.shipped import shipped_configs

DEFAULT_OUT = "runs/demo"
"""Where the paths in ``configs/demo`` point to."""
MODELS = {"stable_diffusion": "stable_diffusion", "eg_ddpm": "dm_re2i"}
"""Generator's kind to the folder of the run that makes it."""
CONTROLS = {"none": "", "shuffle": "-shuffled"}
"""Control to the ending of the folder's name."""
Profile = Literal["full", "smoke"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the chain."""

    name: str
    title: str
    """What it does, in plain words."""
    words: list[str]
    """The command, without its program."""
    outputs: list[str]
    """Folders, relative to the demo's, that it writes; removed when it must begin anew."""
    proofs: list[str] = field(default_factory=list)
    """Files, relative to the demo's folder, without which it is not complete."""
    needs: list[str] = field(default_factory=list)
    """Steps whose outputs it reads."""
    config: dict[str, Any] | None = None
    """Resolved config, written to ``configs/NAME.yaml`` before the step runs."""
    program: tuple[str, ...] = ("-m", "launch")
    """Python's arguments in place of ``dreamscale``."""

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        import shlex

        program = "dreamscale" if self.program == ("-m", "launch") else " ".join(("python", *self.program))
        return f"{program} {shlex.join(self.words)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one of the project's YAML files.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        Its content.

    Raises
    ------
    RequestError
        If it is not there.
    """
    import yaml

    if not path.is_file():
        raise RequestError(f"{path}: no such file; install Dreamscale again, with pip")
    return yaml.safe_load(path.read_text()) or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return merged


def _moved(value: Any, out: Path) -> Any:
    """Point paths below the default folder to the one asked for."""
    if isinstance(value, dict):
        return {key: _moved(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, out) for item in value]
    if isinstance(value, str) and (value == DEFAULT_OUT or value.startswith(f"{DEFAULT_OUT}/")):
        return str(out) + value[len(DEFAULT_OUT) :]
    return value


def _flags(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def make_steps(out: Path, seed: int, profile: Profile) -> list[Step]:
    """List the chain's commands.

    Parameters
    ----------
    out : Path
        The demo's folder.
    seed : int
        Of everything.
    profile : str
        full, or smoke: the same chain with hardly any training.

    Returns
    -------
    list of Step
        In the order in which they run.

    Raises
    ------
    RequestError
        If the configs are not there.
    """
    smoke = read_yaml(shipped_configs() / "demo" / "smoke.yaml") if profile == "smoke" else {}

    def resolve(name: str) -> dict[str, Any]:
        config = _merge(_moved(read_yaml(shipped_configs() / "demo" / f"{name}.yaml"), out), smoke.get(name, {}))
        if "seed" in config:
            config["seed"] = seed
        return config

    def staged(name: str, command: str, title: str, needs: list[str], flag: Sequence[str] = ()) -> Step:
        config = resolve(name)
        return Step(
            name=name,
            title=title,
            words=[command, *flag, str(out / "configs" / f"{name}.yaml")],
            outputs=[Path(config["output"]).relative_to(out).as_posix()],
            needs=needs,
            config=config,
        )

    steps = [
        Step(
            name="corpus",
            title="make recordings of 12 people: 5 formats, 5 electrode layouts, 4 rates",
            words=[str(out / "corpus"), "--seed", str(seed)],
            outputs=["corpus"],
            program=("-m", "launch.demo.corpus"),
        ),
        staged("shard_unpaired", "shard", "shard the resting recordings on Ray", ["corpus"]),
        staged("shard_paired", "shard", "shard the recordings with pictures on Ray", ["corpus"]),
        staged(
            "pretrain",
            "pretrain",
            "pretrain the masked autoencoder: DeepSpeed ZeRO-2, two processes",
            ["shard_unpaired"],
        ),
        Step(
            name="export",
            title="export the encoder",
            words=["export", str(out / "pretrain"), str(out / "encoder")],
            outputs=["encoder"],
            needs=["pretrain"],
        ),
        staged(
            "miniature",
            "miniature",
            "make a miniature Stable Diffusion and CLIP of the training pictures",
            ["shard_paired"],
            ["--config"],
        ),
        staged("align", "align", "align the encoder with CLIP", ["export", "miniature", "shard_paired"]),
        staged(
            "stable_diffusion",
            "finetune",
            "fine-tune Stable Diffusion on EEG: Accelerate",
            ["align", "miniature", "shard_paired"],
        ),
        staged("dm_re2i", "ddpm", "train EVRNet and the EEG-guided DDPM: Accelerate", ["shard_paired"]),
    ]
    images = _merge(_moved(read_yaml(shipped_configs() / "demo" / "images.yaml"), out), smoke.get("images", {}))
    judge: str | None = None
    for kind, run in MODELS.items():
        options = _flags(images["generate"].get(kind, {}))
        for control, ending in CONTROLS.items():
            folder = f"generated/{kind}{ending}"
            what = "EEG of people never trained on" if control == "none" else "the control: EEG of another trial"
            words = ["generate", str(out / run / "model"), str(out / "paired"), "-o", str(out / folder)]
            words += ["--split", "test", "--control", control, "--seed", str(seed), *options]
            steps.append(
                Step(
                    name=f"generate_{kind}{ending.replace('-', '_')}",
                    title=f"generate pictures, {kind.replace('_', ' ')}, from {what}",
                    words=words,
                    outputs=[folder],
                    needs=[run],
                )
            )
        own = out / "generated" / kind
        words = ["evaluate", str(own), "--control_dir", f"{own}-shuffled"]
        # One judge for all: the second generator is judged by the network that was trained for the first.
        words += _flags(images["evaluate"]) if judge is None else ["--classifier", judge]
        first = [] if judge is None else [next(step.name for step in steps if step.name.startswith("evaluate"))]
        judge = judge or str(own / "classifier.safetensors")
        steps.append(
            Step(
                name=f"evaluate_{kind}",
                title=f"evaluate {kind.replace('_', ' ')}",
                words=[*words, "--seed", str(seed)],
                outputs=[],
                proofs=[f"generated/{kind}/metrics.json"],
                needs=[f"generate_{kind}", f"generate_{kind}_shuffled", *first],
            )
        )
    return steps
