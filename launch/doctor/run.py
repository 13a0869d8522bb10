"""The command ``dreamscale doctor``: run all checks, print a table, and return an exit code."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field, replace
from typing import Literal

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_DONE, EXIT_FAILED, RequestError, show
from data_sharding.job.cluster import RayConfig
from launch.doctor import machine, services
from launch.doctor.finding import Finding, run_checks


@dataclass(kw_only=True)
class DoctorConfig:
    """Show what works here, and what to do about the rest."""

    path: str = "."
    """A folder; its disk, its clock and, with several machines, its content are checked."""
    store: str = ""
    """A folder or an object store, such as s3://bucket/folder, in which the doctor writes, reads and deletes a small
    object."""
    start_ray: bool | None = None
    """Start Ray, and run a small task on each machine of the cluster. By default true, and false with `preflight`."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The Ray cluster."""
    num_processes: int = 1
    """Number of processes that exchange data, as in a training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device with which the processes exchange data."""
    least_gb_s: float = 0.0
    """Bandwidth of an all-reduce over all processes, in GB/s (1e9 bytes), below which the check fails."""
    timeout_s: float = 300.0
    """Time limit in seconds for the processes to find each other, and for each exchange of data."""
    preflight: bool = False
    """The doctor runs at the beginning of a job: if a check fails, the exit code is 2, which ends the job."""

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes is {self.num_processes}; it must be at least 1")
        if not self.timeout_s > 0 or not self.least_gb_s >= 0:
            raise ValueError("timeout_s must be above 0, and least_gb_s at least 0")


def examine(config: DoctorConfig, local: int = 1) -> list[Finding]:
    """Run every check of this machine and its services.

    Parameters
    ----------
    config : DoctorConfig
        The config.
    local : int
        Number of processes on this machine.

    Returns
    -------
    list of Finding
        The rows of the table, in their order.
    """
    start_ray = not config.preflight if config.start_ray is None else config.start_ray
    return run_checks(
        [
            ("Python", machine.check_python),
            ("packages", machine.check_packages),
            ("device", lambda: machine.check_device(local if config.device != "cpu" else 0)),
            ("compiler", machine.check_compiler),
            ("DeepSpeed", lambda: machine.check_deepspeed(config.device)),
            ("readers", machine.check_readers),
            ("wandb", services.check_wandb),
            ("model hub", services.check_hub),
            ("disk", lambda: machine.check_disk(config.path)),
            ("clock of the disk", lambda: machine.check_file_clock(config.path)),
            ("shared memory", lambda: machine.check_shared_memory(local)),
            ("limits", machine.check_limits),
            ("clusters", machine.check_clusters),
            ("store", lambda: services.check_store(config.store) if config.store else []),
            ("Ray", lambda: services.check_ray(config.ray) if start_ray else []),
        ]
    )


def merge(machines: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """Return one table for several machines.

    Parameters
    ----------
    machines : list of (str, list of Finding)
        Name and findings of each machine.

    Returns
    -------
    list of Finding
        All findings of the first machine, and what is not well on the other machines.
    """
    (_, first), *others = machines
    rows = list(first)
    for host, findings in others:
        rows += [replace(one, what=f"{one.what} ({show(host)})") for one in findings if one not in first if one.advice]
    return rows


def _examine_processes(config: DoctorConfig) -> tuple[list[Finding], bool]:
    """Run all checks in several processes. Return the findings, and whether this process is the first one."""
    from launch.doctor import ranks
    from pretrain.runs.distributed import check_num_processes

    check_num_processes(config.num_processes, "torchrun --nproc-per-node {} -m launch.doctor")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = examine(config, local) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    try:
        with ranks.join_processes(config.device, config.timeout_s) as world:
            gathered = world.all_gather(None if own is None else (socket.gethostname(), own))
            findings = merge([one for one in gathered if one is not None])
            findings += ranks.check_processes(world, config.least_gb_s)
            findings.append(ranks.check_clocks(world))
            findings.append(ranks.check_folder(world, config.path))
            return findings, world.first
    except RequestError:
        raise
    except Exception as error:
        # The communication libraries raise errors of many types. Every machine prints its own error.
        return [*(own or []), ranks.describe_failure(error)], own is not None


def print_table(findings: list[Finding]) -> None:
    """Print the table and the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "what", "found", "to do")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "fails": "[red]FAILS[/red]"}
    for finding in findings:
        table.add_row(marks[finding.state], *map(escape, (finding.what, finding.found, finding.advice)))
    # If the output is not a terminal, print a wide table, because a user cannot copy a path that is wrapped over two
    # lines.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    failed = [finding.what for finding in findings if finding.state == "fails"]
    verdict = f"verdict: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}"
    console.print(escape(verdict if failed else "verdict: everything that Dreamscale needs works here"))


def _doctor(config: DoctorConfig) -> int:
    findings, first = _examine_processes(config) if config.num_processes > 1 else (examine(config), True)
    if first:
        print_table(findings)
    if any(finding.state == "fails" for finding in findings):
        return EXIT_BAD_REQUEST if config.preflight else EXIT_FAILED
    return EXIT_DONE


main = command(DoctorConfig, _doctor, prog="dreamscale doctor", positionals=())
