"""Tests that a stopped and resumed run gives the same results as a run without a stop.

A run may be resumed with another number of processes and another ZeRO stage.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ..conftest import losses, run_jobs, saved_state, write_config

STEPS, STOP = 8, 4
STAGES = (0, 1, 2, 3)
CHANGES = ((0, 2), (1, 2), (2, 1), (2, 3), (3, 1), (3, 0))


def state(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights and Adam's moments of a finished run."""
    return saved_state(run, STEPS)


@pytest.fixture(scope="module")
def runs(unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs with and without interruption, in three launches."""
    folder = tmp_path_factory.mktemp("restart")
    # There are 96 windows, and each step uses 14 of them, so the epoch ends in the middle of a batch.
    config = write_config(
        folder / "config.yaml", dataset=str(unpaired_dataset), output="unused", steps=STEPS, batch_size=14
    )

    def job(name: str, stage: int, stop_after: int | None = None, *more: str) -> dict[str, Any]:
        words = [str(config), "--output", str(folder / name), "--zero_stage", str(stage), *more]
        return {"words": words, "stop_after": stop_after}

    bf16 = ("--precision", "bf16")
    run_jobs(
        folder,
        2,
        [job(f"whole_2_{stage}", stage) for stage in STAGES]
        + [job(f"half_2_{stage}", stage, STOP) for stage in STAGES]
        + [job(f"bf16_whole_{stage}", stage, None, *bf16) for stage in (1, 2, 3)]
        + [job(f"bf16_half_{stage}", stage, STOP, *bf16) for stage in (1, 2, 3)],
    )
    for stage in STAGES:
        for goal in (f"same_2_{stage}", f"two_to_one_{stage}"):
            shutil.copytree(folder / f"half_2_{stage}", folder / goal)
    for before, after in CHANGES:
        shutil.copytree(folder / f"half_2_{before}", folder / f"stage_{before}_{after}")
    run_jobs(
        folder,
        1,
        [job("reference", 0)]
        + [job(f"two_to_one_{stage}", stage) for stage in STAGES]
        + [job(f"one_to_two_{stage}", stage, STOP) for stage in STAGES],
    )
    run_jobs(
        folder,
        2,
        [job(f"same_2_{stage}", stage) for stage in STAGES]
        + [job(f"one_to_two_{stage}", stage) for stage in STAGES]
        + [job(f"stage_{before}_{after}", after) for before, after in CHANGES]
        + [job(f"bf16_half_{stage}", stage, None, *bf16) for stage in (1, 2, 3)],
    )
    return folder


def test_resuming_with_the_same_processes_and_stage_is_exact(runs: Path) -> None:
    pairs = [(f"same_2_{stage}", f"whole_2_{stage}") for stage in STAGES]
    pairs += [(f"bf16_half_{stage}", f"bf16_whole_{stage}") for stage in (1, 2, 3)]
    for ours, theirs in pairs:
        assert losses(runs / ours) == losses(runs / theirs), ours
        one, other = state(runs / ours), state(runs / theirs)
        assert one.keys() == other.keys()
        assert any(name.startswith("exp_avg_sq/") for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one), ours


def test_other_numbers_of_processes_and_stages_follow_the_undisturbed_losses(runs: Path) -> None:
    reference = losses(runs / "reference")
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 0.01
    changed = [f"{way}_{stage}" for way, stage in itertools.product(("two_to_one", "one_to_two"), STAGES)]
    changed += [f"stage_{before}_{after}" for before, after in CHANGES]
    for name in changed:
        np.testing.assert_allclose(losses(runs / name), reference, atol=1e-4, err_msg=name)


def test_a_checkpoint_does_not_depend_on_who_wrote_it(runs: Path) -> None:
    reference = state(runs / "reference")
    for stage in STAGES:
        found = state(runs / f"whole_2_{stage}")
        assert found.keys() == reference.keys()
        assert all(found[name].shape == reference[name].shape for name in reference)
        moments = [name for name in reference if name.startswith("exp_avg/")]
        apart = torch.cat([(found[name] - reference[name]).flatten() for name in moments]).abs().max()
        assert apart < 1e-5
    # Each of the two processes has written one part of the checkpoint.
    folder = runs / "whole_2_2" / "checkpoints" / f"step_{STEPS:08d}"
    assert {"state_00000.safetensors", "state_00001.safetensors"} <= {p.name for p in folder.iterdir()}
    manifest = json.loads((folder / "complete.json").read_text())
    assert manifest["files"].keys() == {p.name for p in folder.iterdir()} - {"complete.json"}
