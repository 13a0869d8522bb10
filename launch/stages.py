"""The commands there are, without importing any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command."""

    module: str
    """Module with ``main(argv) -> int``."""
    usage: str
    """What follows the command's name."""
    help: str
    """One line."""
    launcher: Literal["torchrun", "accelerate"] | None = None
    """What starts its processes when a config asks for more than one."""
    config: str | None = None
    """``module:class`` of the config of a stage that a cluster can run."""


STAGES: dict[str, Stage] = {
    "demo": Stage(
        module="launch.demo.run", usage="[--out DIR]", help="the whole chain, EEG to images, on data it makes"
    ),
    "shard": Stage(
        module="data_sharding.job.run",
        config="data_sharding.job.request:ShardConfig",
        usage="CONFIG --output DIR",
        help="recordings of any maker -> dataset, on Ray",
    ),
    "verify": Stage(
        module="data_sharding.audit.verify",
        usage="DATASET [--against OTHER]",
        help="check every byte and count, and prove that splits, or two datasets, share nothing",
    ),
    "inspect": Stage(
        module="data_sharding.audit.inspect_dataset",
        usage="DATASET",
        help="what a dataset holds, and what was set aside and why",
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
        help="memory, arithmetic and days of a pretraining before it is started",
    ),
    "export": Stage(module="pretrain.export", usage="RUN OUT", help="pretraining run -> encoder package"),
    "convert": Stage(
        module="pretrain.convert",
        usage="CHECKPOINT OUT",
        help="checkpoint of DreamDiffusion's released code -> encoder package",
    ),
    "encode": Stage(
        module="pretrain.encode", usage="ENCODER RECORDING -o OUT.npz", help="embeddings of any readable recording"
    ),
    "probe": Stage(
        module="pretrain.probe.run",
        usage="ENCODER DATASET [--folds split|subjects]",
        help="linear probe of an encoder beside random weights, classical features, EEGNet and controls",
    ),
    "miniature": Stage(
        module="finetune.stable_diffusion.miniature",
        usage="DATASET -o DIR",
        help="a small Stable Diffusion and CLIP made from a dataset's images",
    ),
    "align": Stage(
        module="finetune.align",
        config="finetune.align:AlignConfig",
        usage="CONFIG",
        help="align an encoder with CLIP",
        launcher="accelerate",
    ),
    "finetune": Stage(
        module="finetune.stable_diffusion.train",
        config="finetune.stable_diffusion.train:StableDiffusionConfig",
        usage="CONFIG",
        help="fine-tune Stable Diffusion on EEG",
        launcher="accelerate",
    ),
    "ddpm": Stage(
        module="finetune.dm_re2i.train",
        config="finetune.dm_re2i.config:DMRE2IConfig",
        usage="CONFIG",
        help="train EVRNet, then the EEG-guided DDPM",
        launcher="accelerate",
    ),
    "generate": Stage(
        module="finetune.generate", usage="MODEL DATASET -o DIR", help="images for the trials of a split"
    ),
    "evaluate": Stage(
        module="finetune.evaluation.evaluate",
        usage="DIR",
        help="metrics with controls, and a report, of generated images",
    ),
    "submit": Stage(
        module="launch.submit",
        usage="slurm|ray|k8s STAGE CONFIG",
        help="render and submit a cluster job; --dry-run prints it",
    ),
    "configs": Stage(
        module="launch.configs",
        usage="[NAME] [-o DIR]",
        help="list, print or copy the configs that come with Dreamscale",
    ),
    "doctor": Stage(module="launch.doctor", usage="", help="what works on this machine, and what to install"),
}
