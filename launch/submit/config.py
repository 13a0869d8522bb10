"""Config of ``dreamscale submit``: what all schedulers need, and the options of each scheduler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from launch.submit.kubernetes import KubernetesOptions, check_name, choose_name
from launch.submit.ray import RayOptions
from launch.submit.slurm import SlurmOptions
from launch.submit.values import check_printable


@dataclass(kw_only=True)
class SubmitConfig(SlurmOptions, RayOptions, KubernetesOptions):
    """Write a cluster job that runs a command (the stage), and submit the job. Arguments after '--' go to the stage."""

    scheduler: Literal["slurm", "ray", "k8s"]
    """Scheduler that runs the job."""
    stage: str
    """Command to run, such as shard, pretrain, align, generate, or the command of a paper (finetune, ddpm, linear)."""
    stage_config: str = ""
    """First argument of the stage: for most commands a config file (YAML); its path must exist on the machines of the
    cluster."""
    dry_run: bool = False
    """Print the job file instead of submitting it."""
    nodes: int = 1
    """Number of machines that the job uses."""
    preflight: bool = False
    """Before the stage starts, run 'dreamscale doctor' on all machines of the job: do all processes reach each other,
    how fast, and does each machine have what it needs? If a check fails, the job ends with exit code 2."""
    gpus_per_node: int | None = None
    """GPUs on each machine; by default 8 for commands that can run in several processes, and 0 for all others. Training
    runs one process on each GPU. With 0, each machine runs one process on its CPU."""
    cpus_per_node: int = 64
    """CPU cores per machine; not used with Ray."""
    name: str = ""
    """Name of the job; by default dreamscale-STAGE. With Kubernetes, the default name also has a random end, because
    Kubernetes refuses a second job of the same name."""
    directory: str = ""
    """Folder on the cluster in which the job runs; by default the current folder, and with Kubernetes the folder of the
    volume claim (mount)."""
    python: str = "python"
    """Python interpreter on the cluster, in an environment with Dreamscale."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or (self.gpus_per_node or 0) < 0 or self.cpus_per_node < 1:
            raise ValueError("nodes and cpus_per_node must be at least 1, and gpus_per_node at least 0")
        kubernetes = self.scheduler == "k8s"
        self.name = self.name or (choose_name(self.stage) if kubernetes else f"dreamscale-{self.stage}")
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", self.name):
            raise ValueError(f"name '{self.name}': use only lower-case letters, digits and '-', at most 52 characters")
        for key in ("stage_config", "directory", "python"):
            check_printable(key, getattr(self, key))
        self.check_slurm()
        self.check_ray()
        self.check_kubernetes(self.directory if kubernetes else "")
        if kubernetes:
            check_name(self.name)
