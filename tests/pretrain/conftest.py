"""A small config for pretraining, and a run with this config under a real launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_sharding.common.config import merge_configs
from pretrain.runs.checkpoint import CheckpointReader, step_folder

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "seed": 3,
    "device": "cpu",
    "model": {
        "encoder": {"samples": 128, "patch": 4, "dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 1.0},
        "decoder": {"dim": 32, "depth": 1, "heads": 2, "mlp_ratio": 1.0},
        "mask_ratio": 0.5,
        "mimetic": 3.0,
    },
    "optimizer": {"lr": 6e-3, "warmup": 0.1},
    "steps": 6,
    "batch_size": 16,
    "num_workers": 0,
    "log_every": 1,
    "evaluation": {"every": 1000},
    "checkpoint": {"every": 1000},
    "tracker": {"kind": "none"},
}


def write_config(path: Path, **over: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(merge_configs(SMALL, over)))
    return path


def environment() -> dict[str, str]:
    # wandb sets environment variables in the process of the tests. Remove these variables, because a child process with
    # them would use the wandb service of the tests in place of its own.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "offline"}
    return inherited | own


def torchrun(words: Sequence[str], *, processes: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    return subprocess.run(
        command, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=240, check=False, **options
    )


def run_jobs(folder: Path, processes: int, jobs: list[dict[str, Any]]) -> str:
    """Run several trainings in one launch (see jobs_worker.py), and return the error output of the launch."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = torchrun([str(Path(__file__).with_name("jobs_worker.py")), str(path)], processes=processes)
    assert done.returncode == 0, done.stderr[-20000:]
    return done.stderr


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def saved_state(run: Path, step: int) -> dict[str, Any]:
    """Return the weights and Adam's moments in a checkpoint, by name."""
    with CheckpointReader(step_folder(run / "checkpoints", step)) as saved:
        return {name: saved[name] for name in saved.names}


def saved_weights(run: Path, step: int) -> dict[str, Any]:
    with CheckpointReader(step_folder(run / "checkpoints", step)) as saved:
        return saved.group("weights/")


def mark_interrupted(run: Path) -> None:
    """Change the status of a finished run, so that the run looks interrupted."""
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))


@pytest.fixture(scope="session")
def trained_run(unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model on two processes with torchrun and ZeRO stage 2, for enough steps to learn something."""
    folder = tmp_path_factory.mktemp("pretrain")
    config = write_config(
        folder / "config.yaml",
        dataset=str(unpaired_dataset),
        output=str(folder / "run"),
        num_processes=2,
        zero_stage=2,
        steps=240,
        batch_size=32,
        log_every=10,
        evaluation={"every": 120},
        checkpoint={"every": 120},
    )
    done = torchrun(["-m", "pretrain.train", str(config)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="session")
def encoder_package(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the encoder of the trained run."""
    from pretrain.export import main

    out = tmp_path_factory.mktemp("package") / "encoder"
    assert main([str(trained_run), str(out)]) == 0
    return out
