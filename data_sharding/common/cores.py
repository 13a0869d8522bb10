"""Count the CPU cores that this process may use. A job of a cluster often has only some cores of its machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Folder in which Linux shows the limits of control groups (cgroups)."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""File in which Linux names the control groups of this process."""


def count_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return the number of CPU cores that this process may use.

    Slurm gives a job some cores of a machine (its affinity), and a container can have a quota of CPU time. This
    function returns the smaller one of both numbers.

    Parameters
    ----------
    cgroups : Path
        Folder with the limits of control groups.
    own : Path
        File that names the control groups of this process.

    Returns
    -------
    int
        The number of cores; at least 1. A part of a core counts as a whole core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_folders(cgroups, own) if (quota := _read_quota(folder))]
    return max(1, min(cores, *(math.ceil(quota) for quota in quotas))) if quotas else cores


def _own_folders(cgroups: Path, own: Path) -> list[Path]:
    """Return the folders of the control groups of this process, and of the groups that contain them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        # Version 2 has one line, 0::/PATH. Version 1 has a line for each kind of limit, such as 4:cpu,cpuacct:/PATH.
        _, kinds, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if kinds and "cpu" not in kinds.split(","):
            continue
        roots = [cgroups / kinds, cgroups / "cpu"] if kinds else [cgroups]
        inside = [part for part in path.split("/") if part not in ("", "..")]
        folders += [root.joinpath(*inside[:depth]) for root in roots for depth in range(len(inside) + 1)]
    return folders


def _read_quota(folder: Path) -> float | None:
    """Return the number of cores that a control group may use; None if the group has no limit."""
    try:
        if (both := folder / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
