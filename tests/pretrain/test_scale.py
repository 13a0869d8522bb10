"""Tests of `pretrain.scale`: the time of communication, loading and storage for many GPUs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.plan import main
from pretrain.scale import Network, Work, exchange_seconds, scale_row
from pretrain.training.estimates import collective_operations

from .conftest import ROOT, environment

NETWORK = Network(gpus_per_machine=8, link=400e9, network=40e9, latency_s=1e-5)
WORK = Work(
    windows=100,
    micro_batches=1,
    arithmetic_s=0.05,
    parameters=300_000_000,
    zero_stage=1,
    precision="bf16",
    window_bytes=65_536.0,
    loader_windows_per_s=5000.0,
    loaders_per_machine=32,
    storage=None,
)


def test_a_ring_sends_all_bytes_and_waits_once_for_each_other_gpu():
    assert exchange_seconds(4e9, 2, 1, NETWORK) == 0.0
    assert exchange_seconds(4e9, 2, 8, NETWORK) == pytest.approx(4e9 / 400e9 + 2 * 7 * 1e-5)
    # The network links of a machine's eight GPUs together have 320 GB/s, which is less than the 400 GB/s of one link.
    assert exchange_seconds(4e9, 2, 16, NETWORK) == pytest.approx(4e9 / 320e9 + 2 * 15 * 1e-5)


def test_collective_operations_of_each_stage():
    counts = [collective_operations(10**9, zero_stage=stage, micro_batches=3) for stage in range(4)]
    # There are two buckets. Stages 2 and 3 reduce in each micro batch; stage 3 also gathers twice in each micro batch.
    assert counts == [4, 4, 8, 18]


def test_what_limits_the_speed_is_named():
    rows = {gpus: scale_row(gpus, WORK, NETWORK) for gpus in (1, 8, 4096)}
    assert rows[1].efficiency == 1.0 and not rows[1].limits and rows[1].checkpoint_s == 0.0
    assert rows[1].windows_per_s == pytest.approx(2000) and rows[1].read_gb_s == pytest.approx(0.131072)
    assert rows[8].loaders == 4 and rows[8].batch_size == 800
    assert rows[4096].limits == ("communication",) and rows[4096].efficiency < 0.7
    slow = scale_row(8, dataclasses.replace(WORK, loaders_per_machine=2), NETWORK)
    assert slow.limits == ("loading processes",) and slow.windows_per_s == pytest.approx(10_000)
    stored = scale_row(64, dataclasses.replace(WORK, storage=1e9), NETWORK)
    assert stored.limits == ("storage",) and stored.read_gb_s == pytest.approx(1.0)


def test_the_command_prints_a_row_for_each_number_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    words = ["--preset", "paper", "--gpus", "8", "--scale", "[1, 16, 512]", "--storage_gb_s", "10"]
    assert main([*words, "--output", str(out)]) == 0
    assert "storage" in capsys.readouterr().out
    rows = json.loads(out.read_text())["scale"]
    assert [row["gpus"] for row in rows] == [1, 16, 512] and rows[2]["limits"][-1] == "storage"
    assert main(["--preset", "paper", "--scale", "[0]"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_a_fit_finds_the_speed_and_latency_of_exact_times():
    code = (
        "from scaling import fit, left_out_errors\n"
        "points = [(size, n, 8 * size * (n - 1) / n / 2e9 + 2 * (n - 1) * 3e-5)"
        " for size in (2**10, 2**16, 2**22) for n in (2, 4)]\n"
        "slope, latency = fit(points)\n"
        "assert abs(slope * 2e9 - 1) < 1e-6 and abs(latency / 3e-5 - 1) < 1e-6\n"
        "assert max(left_out_errors(points, 0) + left_out_errors(points, 1)) < 1e-6\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", env=environment(), check=True, timeout=120)
