"""Tests of runs that are stopped while recordings are added to their dataset."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_sharding.dataset.manifest import Manifest
from pretrain.train import main

from ..conftest import losses, mark_interrupted, write_config
from .test_training import stop_after


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_reads_the_version_it_began_with(
    unpaired_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mixture: bool,
    grow: Callable[[Path], None],
) -> None:
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    shutil.copytree(unpaired_dataset, dataset)
    data: dict[str, Any] = {"datasets": {str(dataset): 1.0}} if mixture else {"dataset": str(dataset)}
    settings: dict[str, Any] = {**data, "steps": 16, "batch_size": 13}
    whole = write_config(tmp_path / "whole.yaml", output=str(tmp_path / "whole"), **settings)
    assert main([str(whole)]) == 0
    config = write_config(tmp_path / "run.yaml", output=str(run), **settings)
    code, stderr = stop_after(run, config, 3, signal.SIGTERM)
    assert code == 75, stderr[-2000:]
    grow(dataset)
    capsys.readouterr()
    assert main([str(config)]) == 0
    assert f"began with version 1 of {dataset} and reads this version" in capsys.readouterr().err
    assert losses(run) == losses(tmp_path / "whole")

    # Imitate a compacted dataset: a shard of version 1 is no longer in the dataset.
    mark_interrupted(run)
    manifest = Manifest.read(dataset)
    kept = {**manifest.splits, "train": manifest.splits["train"][1:]}
    dataclasses.replace(manifest, dataset_id="1" * 64, splits=kept, extra={"version": 3}).write(dataset)
    assert main([str(config)]) == 2
    assert "version 1 (id " in (said := capsys.readouterr().err) and "was compacted" in said and "version 3" in said
