"""Tests that many ways to run a training give the same loss curve.

The loss curve must not depend on the ZeRO stage, the number of processes, the micro batch, interruptions, or
Dreamscale's version.

The golden losses were computed with the model, data and seed of this test when it was written (torch 2.13, float32 on a
CPU). Rounding on another CPU or in another version of torch changes the losses by about 1e-5. If a loss differs by more
than 1e-4, the training itself has changed, and this change must be intended and documented.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import losses, metrics, run_jobs, write_config

GOLDEN = [1.10884, 1.09148, 1.028576, 1.033566, 1.01761, 1.036201, 1.022006, 1.009028, 0.983081, 1.01919]
GOLDEN_HELD_OUT = [1.112818, 1.008595, 1.004305]
TOLERANCE = 1e-4
STEPS = 10
VARIANTS = [(stage, size) for size in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def runs(unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    config = write_config(
        folder / "config.yaml", dataset=str(unpaired_dataset), output="unused", steps=STEPS, evaluation={"every": 5}
    )

    def job(name: str, stage: int, *more: str, stop_after: int | None = None) -> dict[str, Any]:
        words = [str(config), "--output", str(folder / name), "--zero_stage", str(stage), *more]
        return {"words": words, "stop_after": stop_after}

    for size in (1, 2):
        jobs = []
        for stage in range(4):
            jobs.append(job(f"{stage}_{size}", stage))
            # The run with `_again` in its name is interrupted in the middle of an epoch and resumed in the same launch.
            jobs += [job(f"{stage}_{size}_again", stage, stop_after=4), job(f"{stage}_{size}_again", stage)]
        jobs.append(job(f"micro_{size}", 1, "--micro_batch_size", "4"))
        jobs.append(job(f"checkpointing_{size}", 2, "--model.compute.checkpointing", "true"))
        run_jobs(folder, size, jobs)
    return folder


def test_one_process_without_zero_has_the_golden_losses(runs: Path) -> None:
    found = losses(runs / "0_1")
    held_out = [line["val_loss"] for line in metrics(runs / "0_1") if "val_loss" in line]
    np.testing.assert_allclose(found, GOLDEN, atol=TOLERANCE, err_msg=f"found {found}")
    np.testing.assert_allclose(held_out, GOLDEN_HELD_OUT, atol=TOLERANCE, err_msg=f"found {held_out}")


@pytest.mark.parametrize(("stage", "size"), VARIANTS)
def test_stages_and_processes_agree(stage: int, size: int, runs: Path) -> None:
    for name in (f"{stage}_{size}", f"{stage}_{size}_again"):
        np.testing.assert_allclose(losses(runs / name), GOLDEN, atol=TOLERANCE, err_msg=name)
        held_out = [line["val_loss"] for line in metrics(runs / name) if "val_loss" in line]
        np.testing.assert_allclose(held_out, GOLDEN_HELD_OUT, atol=TOLERANCE, err_msg=name)
    assert losses(runs / f"{stage}_{size}") == losses(runs / f"{stage}_{size}_again")


@pytest.mark.parametrize("name", ["micro_1", "micro_2", "checkpointing_1", "checkpointing_2"])
def test_micro_batches_and_checkpointing_change_nothing(name: str, runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / name), GOLDEN, atol=TOLERANCE)
