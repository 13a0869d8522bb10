"""The table of all commands (stages). This module imports no heavy library, so that ``dreamscale --help`` is fast."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from finetune.papers import find_papers


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of ``dreamscale``."""

    module: str
    """Module of the command; the module has a function ``main(argv) -> int``."""
    usage: str
    """Arguments of the command, as the usage line shows them. Arguments in brackets are optional."""
    help: str
    """Description of the command in one line."""
    launcher: Literal["torchrun", "accelerate"] | None = None
    """Program that starts the training processes; it is used if ``num_processes`` is above 1 or ``restarts`` is above
    0."""
    arguments: str | None = None
    """``module:function`` that checks the command's arguments, if this is not the method ``main.parse`` of
    `module`."""
    submits: bool = True
    """Whether ``dreamscale submit`` can run the command on a cluster."""
    uses_ray: bool = False
    """Whether the command itself distributes its work with Ray; its config then has the key ``ray.address``."""

    def read(self, words: list[str]) -> Any:
        """Read the arguments of the command, and return its config; raise `RequestError` if an argument is wrong."""
        module, _, name = (self.arguments or f"{self.module}:main").partition(":")
        reader = getattr(importlib.import_module(module), name)
        return getattr(reader, "parse", reader)(words)


def import_quickly(module: str) -> ModuleType:
    """Import a module without garbage collections, which take a sixth of the time to import diffusers.

    Parameters
    ----------
    module : str
        Name of the module.

    Returns
    -------
    module
        The module. The objects that exist now stay until the process ends, so later garbage collections skip them.
    """
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.enable()
        gc.freeze()


STAGES: dict[str, Stage] = {
    "demo": Stage(
        module="launch.demo.run",
        usage="[--out DIR]",
        help="run all stages, from EEG to images, on simulated recordings",
    ),
    "shard": Stage(
        module="data_sharding.__main__",
        arguments="data_sharding.job.run:main",
        usage="CONFIG --output DIR",
        uses_ray=True,
        help="turn recordings of any maker into a dataset; Ray distributes the work",
    ),
    "verify": Stage(
        module="data_sharding.audit.verify",
        usage="DATASET [--against OTHER]",
        help="check every byte of a dataset, and check that splits or datasets share no data",
    ),
    "inspect": Stage(
        module="data_sharding.audit.inspect_dataset",
        submits=False,
        usage="DATASET",
        help="show the content of a dataset, and why recordings were left out",
    ),
    "pretrain": Stage(
        module="pretrain.train",
        usage="CONFIG",
        help="pretrain a masked-signal autoencoder with DeepSpeed ZeRO",
        launcher="torchrun",
    ),
    "plan": Stage(
        module="pretrain.plan",
        submits=False,
        usage="[CONFIG] [--preset NAME] [--gpus N]",
        help="estimate memory and duration of pretraining before you start it",
    ),
    "export": Stage(module="pretrain.export", usage="RUN OUT", help="export a pretraining run as an encoder package"),
    "convert": Stage(
        module="pretrain.convert",
        usage="CHECKPOINT OUT",
        help="convert a checkpoint of DreamDiffusion's released code to an encoder package",
    ),
    "encode": Stage(
        module="pretrain.encode", usage="ENCODER RECORDING -o OUT.npz", help="compute the embeddings of one recording"
    ),
    "probe": Stage(
        module="pretrain.probe.run",
        usage="ENCODER DATASET [--folds split|subjects]",
        help="test an encoder with a linear probe, against random weights, classical features and EEGNet",
    ),
    "miniature": Stage(
        module="finetune.stable_diffusion.miniature",
        usage="DATASET -o DIR",
        help="train a small Stable Diffusion and CLIP on the images of a dataset",
        launcher="accelerate",
    ),
    "align": Stage(
        module="finetune.align",
        usage="CONFIG",
        help="align the embeddings of an encoder with those of CLIP",
        launcher="accelerate",
    ),
    **{
        paper.command: Stage(module=paper.module, usage="CONFIG", help=paper.help, launcher=paper.launcher)
        for paper in find_papers()
    },
    "generate": Stage(
        module="finetune.generate",
        usage="MODEL DATASET -o DIR",
        help="generate an image for each trial of a split",
        launcher="accelerate",
    ),
    "retrieve": Stage(
        module="finetune.retrieval.run",
        usage="RUN|ridge DATASET -o DIR",
        help="find the image of each trial among all images of a split, with controls and a verdict",
    ),
    "evaluate": Stage(
        module="finetune.evaluation.evaluate",
        usage="DIR",
        help="compute metrics of generated images and controls, and write a report",
        launcher="accelerate",
    ),
    "compare": Stage(
        module="finetune.evaluation.compare",
        usage="DIR DIR",
        help="compare the evaluated images of two models, paired by trial",
    ),
    "ablate": Stage(
        module="launch.ablate.run",
        arguments="launch.ablate.config:read_ablation",
        usage="CONFIG|FOLDER",
        help="train variants of a model, and compare their images with those of a base variant",
    ),
    "preset": Stage(
        module="launch.preset",
        arguments="launch.preset:read_preset",
        usage="NAME --output DIR [--encoder DIR] [--base DIR] [--clip DIR]",
        help="run a published experiment, from the files of a dataset to images, retrieval and a report",
    ),
    "submit": Stage(
        module="launch.submit.run",
        submits=False,
        usage="slurm|ray|k8s STAGE [CONFIG] [-- ARGUMENTS]",
        help="write a cluster job and submit it; --dry-run only prints it",
    ),
    "configs": Stage(
        module="launch.configs",
        submits=False,
        usage="[NAME] [-o DIR]",
        help="list, print or copy the configs that come with Dreamscale",
    ),
    "doctor": Stage(
        module="launch.doctor.run",
        usage="[--num_processes N] [--store URL]",
        help="show what works here, on one machine or in a job on a cluster, and what to do about the rest",
        launcher="torchrun",
    ),
}
