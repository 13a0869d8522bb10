"""Table of the commands. Nothing heavy is imported here, so that ``dreamscale --help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.papers import find_papers


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command."""

    module: str
    """Module with ``main(argv) -> int``."""
    usage: str
    """Arguments, as the usage line shows them. Arguments in brackets are optional."""
    help: str
    """What the command does, in one line."""
    launcher: Literal["torchrun", "accelerate"] | None = None
    """Program that starts the processes of a training when ``num_processes`` is larger than 1."""
    config: str | None = None
    """``module:class`` of the config, for commands that ``dreamscale submit`` can hand to a cluster."""


STAGES: dict[str, Stage] = {
    "demo": Stage(
        module="launch.demo.run",
        usage="[--out DIR]",
        help="the whole chain, from EEG to images, on recordings that the demo makes itself",
    ),
    "shard": Stage(
        module="data_sharding.job.run",
        config="data_sharding.job.request:ShardConfig",
        usage="CONFIG --output DIR",
        help="recordings of any maker -> dataset; Ray distributes the work",
    ),
    "verify": Stage(
        module="data_sharding.audit.verify",
        usage="DATASET [--against OTHER]",
        help="check every byte of a dataset, and that its splits, or two datasets, share no data",
    ),
    "inspect": Stage(
        module="data_sharding.audit.inspect_dataset",
        usage="DATASET",
        help="show what a dataset holds, which recordings were set aside, and why",
    ),
    "pretrain": Stage(
        module="pretrain.train",
        config="pretrain.training.config:PretrainConfig",
        usage="CONFIG",
        help="masked-signal pretraining with DeepSpeed ZeRO",
        launcher="torchrun",
    ),
    "plan": Stage(
        module="pretrain.plan",
        usage="[CONFIG] [--preset NAME] [--gpus N]",
        help="estimate memory and duration of a pretraining before it is started",
    ),
    "export": Stage(module="pretrain.export", usage="RUN OUT", help="pretraining run -> encoder package"),
    "convert": Stage(
        module="pretrain.convert",
        usage="CHECKPOINT OUT",
        help="checkpoint of the code released with DreamDiffusion -> encoder package",
    ),
    "encode": Stage(module="pretrain.encode", usage="ENCODER RECORDING -o OUT.npz", help="embeddings of one recording"),
    "probe": Stage(
        module="pretrain.probe.run",
        usage="ENCODER DATASET [--folds split|subjects]",
        help="linear probe of an encoder, compared with random weights, classical features and EEGNet",
    ),
    "miniature": Stage(
        module="finetune.stable_diffusion.miniature",
        usage="DATASET -o DIR",
        help="train a small Stable Diffusion and CLIP on the images of a dataset",
    ),
    "align": Stage(
        module="finetune.align",
        config="finetune.align:AlignConfig",
        usage="CONFIG",
        help="align the embeddings of an encoder with those of CLIP",
        launcher="accelerate",
    ),
    **{
        paper.command: Stage(
            module=paper.module, config=paper.config, usage="CONFIG", help=paper.help, launcher="accelerate"
        )
        for paper in find_papers()
    },
    "generate": Stage(
        module="finetune.generate", usage="MODEL DATASET -o DIR", help="generate an image for each trial of a split"
    ),
    "evaluate": Stage(
        module="finetune.evaluation.evaluate",
        usage="DIR",
        help="metrics of generated images, with controls, and a report",
    ),
    "submit": Stage(
        module="launch.submit",
        usage="slurm|ray|k8s STAGE CONFIG",
        help="write a cluster job and submit it; --dry-run only prints it",
    ),
    "configs": Stage(
        module="launch.configs",
        usage="[NAME] [-o DIR]",
        help="list, print or copy the configs that come with Dreamscale",
    ),
    "doctor": Stage(module="launch.doctor", usage="", help="show what works on this machine, and what to install"),
}
