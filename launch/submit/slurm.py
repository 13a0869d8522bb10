"""Options of a Slurm job, and the commands with which a user follows the job."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_sharding.common.errors import RequestError
from launch.submit.values import check_plain, check_printable

OWN_OPTIONS = {
    "account": "--account",
    "array": "--array",
    "constraint": "--constraint",
    "cpus-per-task": "--cpus_per_node",
    "dependency": "--dependency",
    "gpus-per-node": "--gpus_per_node",
    "gres": "--gres",
    "job-name": "--name",
    "mem": "--mem",
    "nodes": "--nodes",
    "ntasks": "--nodes",
    "ntasks-per-node": "--gpus_per_node",
    "output": "--logs",
    "partition": "--partition",
    "qos": "--qos",
    "signal": "--grace_s",
    "time": "--time",
}
"""Options of sbatch that the job file already contains, and the option of ``dreamscale submit`` that sets each."""
SHORTEST_GRACE_S = 30


@dataclass(kw_only=True)
class SlurmOptions:
    """Options for Slurm."""

    time: str = "24:00:00"
    """Slurm: time limit. When the time is over, the job goes back into the queue and later resumes."""
    grace_s: int = 120
    """Slurm: the job is asked to stop this number of seconds before the time limit. In this time, a training writes its
    checkpoint."""
    restarts: int = 0
    """Slurm: if a process dies or fails, start the stage again on the same machines, at most this many times."""
    partition: str = ""
    """Slurm: partition for the job; by default the cluster's default partition."""
    account: str = ""
    """Slurm: account to charge; by default the user's default account."""
    qos: str = ""
    """Slurm: quality of service."""
    mem: str = ""
    """Slurm: memory per machine, such as 200G; 0 means all memory. By default, the cluster decides."""
    gres: str = ""
    """Slurm: resources per machine, such as gpu:a100:8. The job file then does not contain --gpus-per-node."""
    constraint: str = ""
    """Slurm: features that the machines must have, such as a100 or rack1|rack2."""
    dependency: str = ""
    """Slurm: jobs for which this job waits, such as afterok:4711 (job 4711 has ended well) or singleton (one job of
    this name at a time)."""
    array: str = ""
    """Slurm: submit a job array. With 1-5%1, five jobs run one after the other, and each resumes the run."""
    modules: str = ""
    """Slurm: environment modules to load, separated by commas, such as gcc/13,cuda/12.6."""
    prologue: str = ""
    """Slurm: shell file on the cluster that the job reads before it starts the stage, for example to activate a Python
    environment."""
    container: str = ""
    """Slurm: container image in which the stage runs; Dreamscale must be installed in the image."""
    container_runtime: Literal["apptainer", "singularity", "enroot"] = "apptainer"
    """Slurm: program that runs the container."""
    binds: str = ""
    """Slurm: folders that the container can access, separated by commas, such as /data,/scratch:/tmp. Apptainer also
    gives access to the folder of the job."""
    sbatch: list[str] = field(default_factory=list)
    """Slurm: any other option of sbatch, as KEY=VALUE or KEY: '--sbatch exclusive --sbatch nodelist=n[1-4]'."""
    logs: str = "."
    """Slurm: folder for the log file of the job."""

    def check_slurm(self, gpus: int) -> None:
        """Check the options.

        Parameters
        ----------
        gpus : int
            GPUs per machine.

        Raises
        ------
        ValueError
            If an option cannot be written to the job file, or contradicts another option.
        """
        for key in ("time", "partition", "account", "qos", "mem", "gres", "dependency", "array", "logs"):
            check_plain(key, getattr(self, key), more="?" if key == "dependency" else "")
        check_plain("constraint", self.constraint, more="|&*()")
        for key in ("modules", "binds"):
            check_plain(key, getattr(self, key))
        for key in ("prologue", "container"):
            check_printable(key, getattr(self, key))
            if getattr(self, key).startswith("-"):
                raise ValueError(f"{key} '{getattr(self, key)}': use no - at the beginning of this value")
        if self.grace_s < SHORTEST_GRACE_S:
            raise ValueError(f"grace_s is {self.grace_s}; it must be at least {SHORTEST_GRACE_S} seconds")
        if self.restarts < 0:
            raise ValueError(f"restarts is {self.restarts}; it must not be negative")
        for wanted in re.findall(r"\bgpu(?::[a-zA-Z_][\w.-]*)?:(\d+)", self.gres):
            if int(wanted) != gpus:
                raise ValueError(f"gres '{self.gres}' and gpus_per_node {gpus} contradict each other; give both equal")
        if self.binds and not self.container:
            raise ValueError("binds needs a container; give --container, or leave --binds out")
        for option in self.sbatch:
            key, _, value = option.partition("=")
            if not re.fullmatch(r"[a-z]+(-[a-z]+)*", key):
                raise ValueError(f"sbatch '{option}': write the option as KEY=VALUE or KEY, without -- before KEY")
            if key in OWN_OPTIONS:
                raise ValueError(f"sbatch '{option}': the job file has this option already; use {OWN_OPTIONS[key]}")
            check_plain(f"sbatch {key}", value, more="|&*()")

    @property
    def log_name(self) -> str:
        """Name of the log file, with Slurm's placeholders."""
        return "%x-%A_%a.log" if self.array else "%x-%j.log"

    def container_words(self, gpus: int) -> list[str]:
        """Return the words before the command of the stage that run the command in the container.

        Parameters
        ----------
        gpus : int
            GPUs per machine.

        Returns
        -------
        list of str
            The words; empty without a container.
        """
        if not self.container:
            return []
        binds = [bind for bind in self.binds.split(",") if bind]
        if self.container_runtime == "enroot":
            # Enroot gives a container neither the environment nor the folders of the machine.
            mounts = [word for bind in binds for word in ("--mount", bind if ":" in bind else f"{bind}:{bind}")]
            names = ("OMP_NUM_THREADS", "PET_SHUTDOWN_TIMEOUT", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
            return ["enroot", "start", *mounts, *(word for name in names for word in ("--env", name)), self.container]
        nvidia = ["--nv"] if gpus else []
        return [self.container_runtime, "exec", *nvidia, *(w for b in binds for w in ("--bind", b)), self.container]


def check_logs(logs: str) -> None:
    """Check that the folder for the log exists. Without the folder, Slurm ends the job at once and says nothing.

    Parameters
    ----------
    logs : str
        The folder.

    Raises
    ------
    RequestError
        If the folder does not exist.
    """
    if not Path(logs).is_dir():
        raise RequestError(f"logs '{logs}': no such folder; create it, because Slurm ends a job that has no log file")


def follow(job: str, name: str, options: SlurmOptions) -> str:
    """Return the lines that tell a user how to follow a job.

    Parameters
    ----------
    job : str
        Number of the job.
    name : str
        Name of the job.
    options : SlurmOptions
        Options of the job.

    Returns
    -------
    str
        The lines.
    """
    log = options.log_name.replace("%x", name).replace("%A", job).replace("%j", job).replace("%a", "1")
    lines = {
        f"squeue --job {job}": "show the state of the job",
        f"tail -F {shlex.quote(str(Path(options.logs).absolute() / log))}": "show the log",
        f"scancel {job}": "stop the job for good; a training first writes a checkpoint",
    }
    rows = [f"  {command}   # {meaning}" for command, meaning in lines.items()]
    return "\n".join([f"dreamscale: submitted Slurm job {job} ({name})", *rows])
