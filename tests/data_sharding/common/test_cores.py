"""Tests of the number of CPU cores that a process may use: its affinity, and the quotas of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_sharding.common.cores import count_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_process_that_may_use_one_core_counts_one():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "from data_sharding.common.cores import count_cores; print(count_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


QUOTAS = {
    "a group of version 2": ("0::/slurm/job_1\n", {"slurm/job_1/cpu.max": "150000 100000\n"}, 2),
    "an outer group of version 2": ("0::/slurm/job_1\n", {"slurm/cpu.max": "100000 100000\n"}, 1),
    "a container of version 2": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "a group without a limit": ("0::/slurm\n", {"slurm/cpu.max": "max 100000\n"}, None),
    "a group of version 1": (
        "7:cpuset:/a\n4:cpu,cpuacct:/b\n",
        {"cpu,cpuacct/b/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/b/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "a group of version 1 without a limit": (
        "4:cpu,cpuacct:/b\n",
        {"cpu,cpuacct/b/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/b/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "files with other content": ("nothing\n0::/a\n", {"a/cpu.max": "many\n"}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas_of_control_groups(case: str, tmp_path: Path):
    groups, files, cores = QUOTAS[case]
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    everything = count_cores(tmp_path / "empty", tmp_path / "empty")
    assert count_cores(tmp_path / "cgroup", own) == min(everything, cores or everything)
