"""Tests with real processes under torchrun and Accelerate: exit codes, requests to stop, and wrong requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.submit.config import SubmitConfig
from launch.submit.render import build_command
from launch.submit.stage import check_stage

TINY = [
    *("--num_processes", "2", "--batch_size", "8", "--num_workers", "0", "--tracker.kind", "none", "--device", "cpu"),
    *("--model.encoder.samples", "128", "--model.encoder.dim", "32", "--model.encoder.depth", "1"),
    *("--model.encoder.heads", "2", "--model.decoder.dim", "16", "--model.decoder.depth", "1"),
    *("--model.decoder.heads", "2", "--log_every", "1", "--checkpoint.every", "100000"),
]


def start(words: list[str], **options) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_for_steps(run: Path, process: subprocess.Popen[str], steps: int = 3) -> None:
    while process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and metrics.read_text().count('"lr"') >= steps:
            return
        time.sleep(0.1)
    pytest.fail(f"ended with {process.returncode} before it was stopped: {process.stdout.read()}")


def alive(pattern: str) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if pattern in (folder / "cmdline").read_text():
                return True
        except OSError:
            continue
    return False


@pytest.fixture
def pretraining(unpaired_dataset: Path, tmp_path: Path) -> list[str]:
    return ["--dataset", str(unpaired_dataset), "--output", str(tmp_path / "run"), *TINY]


def test_a_stopped_run_ends_with_75_and_the_same_command_resumes(pretraining: list[str], tmp_path: Path):
    run = tmp_path / "run"
    words = [sys.executable, "-m", "launch", "pretrain", *pretraining]
    process = start([*words, "--steps", "100000"])
    wait_for_steps(run, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "Traceback" not in text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert not alive(str(run))
    # The same command resumes the run, and a second request to stop works too.
    process = start([*words, "--steps", "100000"])
    wait_for_steps(run, process, steps=status["step"] + 2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert f"resuming from step {status['step']}" in text


def test_a_wrong_request_found_by_the_processes_is_one_line_and_2(pretraining: list[str], tmp_path: Path):
    process = start([sys.executable, "-m", "launch", "pretrain", *pretraining, "--model.encoder.samples", "64"])
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "model.encoder.samples" in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_the_command_of_a_cluster_job_runs_and_stops_at_usr1(pretraining: list[str], tmp_path: Path):
    """Run the command that Slurm starts on a node, with the environment variables that Slurm sets."""
    config = tmp_path / "pretrain.yaml"
    config.write_text("{}\n")
    submit = SubmitConfig(
        scheduler="slurm", stage="pretrain", stage_config=str(config), gpus_per_node=2, python=sys.executable
    )
    line = build_command(submit, check_stage(submit, [*pretraining, "--steps", "100000"]))
    process = start(
        [
            "env",
            "HEAD_NODE=127.0.0.1",
            f"PORT={20000 + os.getpid() % 10000}",
            "SLURM_NODEID=0",
            "bash",
            "-c",
            f"exec {line}",
        ]
    )
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
