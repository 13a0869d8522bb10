"""List the steps of the demo: the command of each step, its config, its inputs and its outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.config import merge_configs
from data_sharding.common.errors import RequestError
from data_sharding.common.plain_yaml import parse_yaml
from data_sharding.common.shipped import shipped_configs
from launch.chain import Step

DEFAULT_OUT = "runs/demo"
"""Default output folder of the demo. The paths in the files of ``configs/demo`` begin with this folder; if the demo
writes to another folder, they are changed."""
MODELS = {"stable_diffusion": "stable_diffusion", "eg_ddpm": "dm_re2i"}
"""Folder of the training run for each kind of generator."""
CONTROLS = ("none", "shuffle", "shuffle_within", "no_eeg", "class")
"""Values of ``--control`` with which the demo generates images. With ``none``, the images are made from the right
EEG."""
Profile = Literal["full", "smoke"]


def name_images(kind: str, control: str) -> str:
    """Return the name of the folder for the images that a generator (`kind`) makes with a control."""
    return kind if control == "none" else f"{kind}-{control}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of the project; raise `RequestError` if the file does not exist."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file; install Dreamscale again, with pip")
    return parse_yaml(path.read_text()) or {}


def _replace_folder(value: Any, out: Path) -> Any:
    """Replace the demo's default folder with another folder in all paths of a config."""
    if isinstance(value, dict):
        return {key: _replace_folder(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_folder(item, out) for item in value]
    if isinstance(value, str) and (value == DEFAULT_OUT or value.startswith(f"{DEFAULT_OUT}/")):
        return str(out) + value[len(DEFAULT_OUT) :]
    return value


def _flags(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def make_steps(out: Path, seed: int, profile: Profile) -> list[Step]:
    """List the steps of the demo.

    Parameters
    ----------
    out : Path
        The demo's folder.
    seed : int
        Seed of every step.
    profile : str
        full, or smoke (the same steps with very little training).

    Returns
    -------
    list of Step
        The steps, in the order in which they run.

    Raises
    ------
    RequestError
        If the configs are not installed.
    """
    smoke = read_yaml(shipped_configs() / "demo" / "smoke.yaml") if profile == "smoke" else {}

    def read_config(name: str) -> dict[str, Any]:
        return _replace_folder(read_yaml(shipped_configs() / "demo" / f"{name}.yaml"), out)

    def resolve(name: str) -> dict[str, Any]:
        config = merge_configs(read_config(name), smoke.get(name, {}))
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
            title="simulate recordings of 16 people: 5 formats, 5 electrode layouts, 4 sampling rates",
            words=[str(out / "corpus"), "--seed", str(seed)],
            outputs=["corpus"],
            program=("-m", "launch.demo.corpus"),
        ),
        staged("shard_unpaired", "shard", "shard the resting recordings on Ray", ["corpus"]),
        staged("shard_paired", "shard", "shard the recordings with pictures on Ray", ["corpus"]),
        Step(
            name="verify",
            title="check that training and test data share no person and no picture",
            words=["verify", str(out / "paired"), "--against", str(out / "unpaired")],
            outputs=[],
            needs=["shard_unpaired", "shard_paired"],
        ),
        staged(
            "pretrain",
            "pretrain",
            "pretrain the masked autoencoder, with DeepSpeed ZeRO-2 and two processes",
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
            "train a miniature Stable Diffusion and CLIP on the training pictures",
            ["shard_paired"],
            ["--config"],
        ),
        staged("align", "align", "align the encoder with CLIP", ["export", "miniature", "shard_paired"]),
        staged(
            "stable_diffusion",
            "finetune",
            "fine-tune Stable Diffusion on EEG, with Accelerate",
            ["align", "miniature", "shard_paired"],
        ),
        staged("dm_re2i", "ddpm", "train EVRNet and the EEG-guided DDPM, with Accelerate", ["shard_paired"]),
        staged("linear", "linear", "train the linear baseline, which looks up training pictures", ["shard_paired"]),
    ]
    images = merge_configs(read_config("images"), smoke.get("images", {}))

    def generation(kind: str, run: str, title: str, controls: Sequence[str]) -> Step:
        folder = f"generated/{kind}"
        words = ["generate", str(out / run / "model"), str(out / "paired"), "-o", str(out / folder)]
        words += ["--split", "test", "--seed", str(seed)]
        if controls:
            words += ["--controls", json.dumps(list(controls))]
        return Step(
            name=f"generate_{kind}",
            title=title,
            words=words + _flags(images["generate"].get(kind, {})),
            outputs=[folder, *(f"generated/{name_images(kind, control)}" for control in controls)],
            needs=[run],
            # After a stop, the command keeps finished images, and replaces images that were made with other settings.
            resumes=True,
        )

    judge: str | None = None
    for kind, run in MODELS.items():
        title = f"generate pictures with {kind.replace('_', ' ')} from the EEG of new people, and for the controls"
        steps.append(generation(kind, run, title, CONTROLS[1:]))
        own = out / "generated" / kind
        # List the folders of all controls in the command, so that the step fails if one of them is missing.
        words = [
            "evaluate",
            str(own),
            "--controls",
            json.dumps([str(own.with_name(name_images(kind, control))) for control in CONTROLS[1:]]),
        ]
        # One classifier judges the pictures of both generators: the first evaluation trains it, and the second
        # evaluation loads it.
        words += _flags(images["evaluate"]) if judge is None else ["--classifier", judge]
        first = [] if judge is None else [next(step.name for step in steps if step.name.startswith("evaluate"))]
        judge = judge or str(own / "classifier.safetensors")
        steps.append(
            Step(
                name=f"evaluate_{kind}",
                title=f"evaluate the pictures of {kind.replace('_', ' ')}",
                words=[*words, "--seed", str(seed)],
                outputs=[],
                proofs=[f"generated/{kind}/metrics.json"],
                needs=[f"generate_{kind}", *first],
            )
        )
    return [*steps, generation("linear", "linear", "show the training pictures that the linear baseline chooses", [])]
