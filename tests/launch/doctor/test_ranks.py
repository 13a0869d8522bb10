"""Tests of the checks that several processes make together, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.doctor.ranks import judge_links

CHECK = """
import sys, time, os
from pathlib import Path
from launch.doctor import ranks
with ranks.join_processes("cpu", 300.0) as world:
    shift = 3600.0 * world.rank
    findings = ranks.check_processes(world, float(sys.argv[1]))
    findings.append(ranks.check_clocks(world, lambda: time.time() + shift))
    folder = sys.argv[2] if world.rank < 2 else sys.argv[3]
    ranks.SEEN_S = 1.0
    findings.append(ranks.check_folder(world, folder))
    if world.rank == int(sys.argv[4]):
        print(*(f"{one.what}|{one.state}|{one.found}" for one in findings), sep="\\n")
"""


def start_processes(count: int, *words: str, port: int) -> list[subprocess.Popen[str]]:
    started = []
    for rank in range(count):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_three_processes(tmp_path: Path):
    """The clock of each process is an hour ahead of the one before, and the third process has another folder."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "other").mkdir()
    words = ["-c", CHECK, "0", str(tmp_path / "shared"), str(tmp_path / "other"), "1"]
    started = start_processes(3, *words, port=free_port())
    outputs = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    rows = {line.split("|")[0]: line.split("|")[1:] for line in outputs[1][0].splitlines()}
    assert rows["processes"] == ["ok", "3 on 1 machine, gloo"]
    assert rows["all-reduce"][0] == "ok" and "64 MiB with" in rows["all-reduce"][1]
    assert "GB/s" in rows["links"][1]
    assert rows["clocks"][0] == "fails" and float(rows["clocks"][1].split()[-2]) == pytest.approx(7200.0, abs=600.0)
    assert rows["shared folder"][0] == "fails" and "is not the same folder on" in rows["shared folder"][1]
    assert not list((tmp_path / "shared").iterdir())


def test_the_launcher_starts_the_processes(tmp_path: Path):
    """In a job, exit code 2 ends the job."""
    words = ["doctor", "--num_processes", "2", "--device", "cpu", "--preflight", "true", "--least_gb_s", "1e9"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--path", str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 2, done.stdout + done.stderr
    # Only one process prints.
    assert done.stdout.count("verdict:") == 1
    assert "verdict: 1 of" in done.stdout and "checks failed: all-reduce" in done.stdout


def test_a_missing_process_is_a_finding():
    """Of two processes, only the second one starts."""
    code = """
from launch.doctor import ranks
try:
    with ranks.join_processes("cpu", 2.0):
        pass
except Exception as error:
    print(ranks.describe_failure(error))
"""
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, env=environment)
    assert "state='fails'" in done.stdout and "process 1 on" in done.stdout, done.stderr


def test_a_slow_link_is_named():
    hosts = ["a", "a", "b", "b", "c", "c", "d", "d"]
    fast = [90.0, 10.0, 80.0, 9.0, 85.0, 2.0, 90.0]
    finding = judge_links(fast, hosts)
    assert finding.state == "note" and "process 5 (c) and process 6 (d): 2.00 GB/s" in finding.found
    # The network is slower than a link inside a machine, and this is no fault.
    assert judge_links([90.0, 10.0, 80.0, 9.0, 85.0, 8.0, 90.0], hosts).state == "ok"
    assert judge_links([1.0], ["a", "a"]).state == "ok"
