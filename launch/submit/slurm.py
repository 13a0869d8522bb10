"""Options of a Slurm job, and the commands with which a user follows the job."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_sharding.common.errors import RequestError, show
from launch.submit.values import check_plain, check_printable

OWN_OPTIONS = {
    "account": "use --account",
    "array": "use --array",
    "chdir": "use --directory",
    "constraint": "use --constraint",
    "cpus-per-task": "use --cpus_per_node",
    "dependency": "use --dependency",
    "gpus": "use --gpus_per_node",
    "gpus-per-node": "use --gpus_per_node",
    "gpus-per-task": "use --gpus_per_node",
    "gres": "use --gres",
    "job-name": "use --name",
    "mem": "use --mem",
    "no-requeue": "leave it out, because a job always resumes through a requeue",
    "nodes": "use --nodes",
    "ntasks": "use --nodes",
    "ntasks-per-node": "leave it out, because it is always 1: one launcher on each machine",
    "open-mode": "leave it out, because a requeued job always appends to its log",
    "output": "use --logs",
    "partition": "use --partition",
    "qos": "use --qos",
    "requeue": "leave it out, because a job always resumes through a requeue",
    "signal": "use --grace_s",
    "time": "use --time",
}
"""Options of sbatch that the job file itself sets, and what the user should do to change each."""
_KEPT_BY_CONTAINER = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOME", "SHELL", "PWD", "OLDPWD", "_")
"""Variables that are not passed on to a container of enroot, because they describe the machine and not the job."""
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
    """Slurm: resources per machine, such as gpu:a100:8; without a number, one GPU. If gres names GPUs, the job file
    does not contain --gpus-per-node."""
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
    """Slurm: folders that the container can access, separated by commas, such as /data,/scratch:/tmp. The
    container also has access to the folder of the job."""
    sbatch: list[str] = field(default_factory=list)
    """Slurm: any other option of sbatch, as KEY=VALUE or KEY: '--sbatch exclusive --sbatch nodelist=n[1-4]'."""
    logs: str = "."
    """Slurm: folder for the log file of the job."""

    def check_slurm(self) -> None:
        """Check the options. Whether `gres` fits the stage is checked when the stage is known.

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
        _ = self.gres_gpus
        if self.binds and not self.container:
            raise ValueError("binds needs a container; give --container, or leave --binds out")
        for option in self.sbatch:
            key, _, value = option.partition("=")
            if not re.fullmatch(r"[a-z]+(-[a-z]+)*", key):
                raise ValueError(f"sbatch '{option}': write the option as KEY=VALUE or KEY, without -- before KEY")
            if key in OWN_OPTIONS:
                raise ValueError(f"sbatch '{option}': the job file sets this itself; {OWN_OPTIONS[key]}")
            check_plain(f"sbatch {key}", value, more="|&*()")

    @property
    def gres_gpus(self) -> int | None:
        """Number of GPUs per machine in `gres`; None if `gres` names no GPUs. As in Slurm, a missing count means 1."""
        counts = []
        for resource in self.gres.split(","):
            name, *rest = re.split("[:=]", resource)
            if name != "gpu":
                continue
            if len(rest) == 2 and rest[1].isdecimal():
                counts.append(int(rest[1]))
            elif len(rest) < 2 and all(rest):
                counts.append(int(rest[0]) if rest and rest[0].isdecimal() else 1)
            else:
                raise ValueError(f"gres '{self.gres}': write gpu, gpu:COUNT, gpu:TYPE or gpu:TYPE:COUNT")
        return sum(counts) if counts else None

    @property
    def log_name(self) -> str:
        """Name of the log file, with Slurm's placeholders."""
        return "%x-%A_%a.log" if self.array else "%x-%j.log"

    def run_in_container(self, command: str, gpus: int, directory: str) -> str:
        """Return the shell lines that run the command of the stage in the container.

        Parameters
        ----------
        command : str
            Shell command that runs the stage.
        gpus : int
            GPUs per machine.
        directory : str
            Folder of the job. The shell that runs the lines must be in this folder.

        Returns
        -------
        str
            The lines; without a container, `command` itself.

        Raises
        ------
        RequestError
            If enroot cannot mount the folder of the job.
        """
        if not self.container:
            return command
        binds = [bind for bind in self.binds.split(",") if bind]
        if self.container_runtime != "enroot":
            words = ["exec", *(["--nv"] if gpus else []), *(w for b in binds for w in ("--bind", b)), self.container]
            return f"{shlex.join([self.container_runtime, *words])} {command}"
        # Enroot gives a container neither the folders nor the variables of the job.
        if re.search(r"[\s:]", directory):
            raise RequestError(
                f"directory '{show(directory)}': enroot cannot mount a folder with a blank or ':' in its path; give "
                "another --directory"
            )
        mounts = [word for bind in binds for word in ("--mount", bind if ":" in bind else f"{bind}:{bind}")]
        image = shlex.quote(self.container)
        start = f'enroot start --mount "$PWD:$PWD" {shlex.join(mounts)}'.rstrip()
        inside = """sh -c 'cd -- "$0" && exec "$@"' "$PWD\""""
        hint = "# shellcheck disable=SC2016"  # The shell inside the container expands the variables.
        return f'{_FORWARD}\n  {hint}\n  {start} "${{forward[@]}}" {image} {inside} {command}'


_FORWARD = rf"""forward=()
  for name in $(compgen -e); do
    case $name in
      {" | ".join(_KEPT_BY_CONTAINER)}) ;;
      *)
        case ${{!name}} in
          *$'\n'*) echo "dreamscale: enroot cannot pass on the variable $name, because it has several lines" >&2 ;;
          *) forward+=(--env "$name") ;;
        esac
        ;;
    esac
  done"""
"""Shell lines that collect the options of enroot for the variables of the job."""


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
    # Show the log of the first job of an array.
    first = next(iter(re.findall(r"\d+", options.array)), "")
    log = options.log_name.replace("%x", name).replace("%A", job).replace("%j", job).replace("%a", first)
    lines = {
        f"squeue --job {job}": "show the state of the job",
        f"tail -F {shlex.quote(str(Path(options.logs).absolute() / log))}": "show the log",
        f"scancel {job}": "stop the job for good; a training first writes a checkpoint",
    }
    rows = [f"  {command}   # {meaning}" for command, meaning in lines.items()]
    return "\n".join([f"dreamscale: submitted Slurm job {job} ({name})", *rows])
