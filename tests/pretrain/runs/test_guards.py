"""Tests of the guards of a training run against loss spikes and hanging processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.runs.checkpoint import complete_checkpoints
from pretrain.runs.guards import GuardConfig, SpikeDetector, Watchdog
from pretrain.train import main

from ..conftest import ROOT, environment, losses, mark_interrupted, metrics, saved_state, write_config


class TestSpikes:
    def test_only_a_loss_far_above_the_last_losses_is_a_spike(self) -> None:
        detector = SpikeDetector(GuardConfig(spike_window=16))
        values = np.random.default_rng(0).normal(1.0, 0.01, 200)
        assert all(detector.check(float(value)) is None for value in values)
        assert detector.check(0.5) is None
        assert detector.check(float("nan")) is None
        detector = SpikeDetector(GuardConfig(spike_window=16), values[-16:].tolist())
        assert "1.2" in (detector.check(1.2) or "")
        # The detector does not store the loss of a spike, so an equal loss just afterwards is a spike too.
        assert detector.check(1.2) is not None
        assert SpikeDetector(GuardConfig(spike_window=16), values[:15].tolist()).check(9.0) is None
        assert SpikeDetector(GuardConfig(spike_window=16, spike_sigma=0), values[:16].tolist()).check(9.0) is None

    @pytest.fixture(scope="class")
    def with_giant(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Write a dataset of 96 windows; window 40 is a hundred times as large as the other windows."""
        spec = PreprocessSpec(
            sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=128, scaling="constant", scale_uv=20.0, clip=1e4
        )
        rng = np.random.default_rng(0)

        def sample(split: str, number: int) -> Sample:
            eeg = rng.normal(0, 20, (19, 128)).astype(np.float32) * (100 if (split, number) == ("train", 40) else 1)
            meta = {"n": 19, "ch_names": [f"E{i}" for i in range(19)], "positions": [None] * 19, "sfreq": 128.0}
            meta |= {"corpus": "tiny", "recording": "r", "subject": "s", "session": "", "start": float(number)}
            return Sample(key=f"{split}-{number:03d}", eeg=eeg, meta=meta | {"split": split, "bads": []})

        path = tmp_path_factory.mktemp("giant") / "data"
        write_dataset(path, {s: [sample(s, i) for i in range(n)] for s, n in (("train", 96), ("val", 8))}, spec)
        return path

    @pytest.fixture(scope="class")
    def seed(self, with_giant: Path) -> int:
        """Return a seed for the order of windows.

        The seed puts the giant window into the ninth batch of eight windows and into no other of the first 18 batches.
        """
        for seed in range(1000):
            batches = iter(Loader(EEGDataset(with_giant), 8, seed))
            places = [t for t in range(18) if 40 in next(batches).numbers]
            if places == [8]:
                return seed
        raise AssertionError

    def settings(self, data: Path, seed: int, **over: Any) -> dict[str, Any]:
        return {
            "dataset": str(data),
            "seed": seed,
            "steps": 14,
            "batch_size": 8,
            "optimizer": {"lr": 1e-4},
            "checkpoint": {"every": 3, "keep": 9},
            "guards": {"spike_window": 5, "leave_out": 2, **over},
        }

    def test_training_rewinds_and_leaves_batches_out(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        config = write_config(tmp_path / "c.yaml", output=str(run), **self.settings(with_giant, seed))
        assert main([str(config)]) == 0
        assert "back to step 6; batches 7 to 8 are left out" in capsys.readouterr().err
        # The spike is in step 9. This step trains on batch 8. The last checkpoint before the spike is the checkpoint of
        # step 6.
        assert [found["batches"] for found in json.loads((run / "left_out.json").read_text())] == [[7, 9]]
        assert [line["rewound_from"] for line in metrics(run) if "rewound_from" in line] == [9]
        assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 15))
        assert max(losses(run)) < 2 * min(losses(run))
        # The run has done 14 steps and left out two batches, so the loader is at batch 16.
        manifest = json.loads((run / "checkpoints" / "step_00000014" / "complete.json").read_text())
        assert manifest["loader"]["step"] == 16
        # If the run is killed right after it went back to a checkpoint, the resumed run must leave out the same
        # batches.
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        mark_interrupted(copy)
        for late in complete_checkpoints(copy / "checkpoints")[2:]:
            shutil.rmtree(late)
        assert main([str(config), "--output", str(copy)]) == 0
        assert "loss spike" not in capsys.readouterr().err
        assert losses(copy) == losses(run)
        ours, theirs = (saved_state(path, 14) for path in (copy, run))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_too_many_spikes_end_the_run(self, with_giant: Path, seed: int, tmp_path: Path) -> None:
        settings = self.settings(with_giant, seed, max_rewinds=0)
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "run"), **settings)
        with pytest.raises(RuntimeError, match=r"loss spike at step 9 .* in batches 7 to 8, .* guards\.max_rewinds"):
            main([str(config)])
        # The error message advises a larger guards.max_rewinds.
        assert main([str(config), "--guards.max_rewinds", "1"]) == 0
        assert len(json.loads((tmp_path / "run" / "left_out.json").read_text())) == 1

    def test_a_checkpoint_that_trained_on_left_out_batches_is_not_used(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Check that the run does not go back to a checkpoint that was already trained on a left-out batch.

        Batches are counted from 0, and the first spike leaves out batches 7 and 8. Checkpoints are written every second
        step. The checkpoint of step 8 was trained on batches 0 to 7, so the run goes back to step 6.
        """
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "whole"), **self.settings(with_giant, seed))
        assert main([str(config)]) == 0
        more = ["--output", str(tmp_path / "run")]
        assert main([str(config), *more, "--checkpoint.every", "2", "--checkpoint.keep", "2"]) == 0
        assert capsys.readouterr().err.count("back to step 6") == 2
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
        assert (tmp_path / "run" / "checkpoints" / "step_00000012").is_dir()

    def test_the_newest_checkpoint_is_used_if_all_trained_on_left_out_batches(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "run"), **self.settings(with_giant, seed))
        assert main([str(config), "--checkpoint.every", "2", "--checkpoint.keep", "1"]) == 0
        assert "back to step 8; batches 7 to 8 are left out" in capsys.readouterr().err

    def test_a_spike_before_the_first_checkpoint_changes_nothing(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = self.settings(with_giant, seed) | {"checkpoint": {"every": 9}, "evaluation": {"every": 9}}
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "run"), **settings)
        assert main([str(config)]) == 0
        assert "there is no checkpoint yet" in capsys.readouterr().err
        assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, 15))
        assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [0, 9, 14]
        assert (tmp_path / "run" / "checkpoints" / "step_00000009").is_dir()


class TestWatchdog:
    def test_the_process_that_is_behind_is_named(self) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dogs = [Watchdog(60.0, rank=rank, size=3, run=None, store=store) for rank in range(3)]
        for dog in dogs:
            dog._period_s = 0.05
        with dogs[0], dogs[1], dogs[2]:
            for dog in dogs:
                dog.at(7, "computing")
            time.sleep(0.2)
            assert "all processes wait in step 8 while computing" in dogs[0].diagnose()
            for dog in (dogs[0], dogs[2]):
                dog.at(8, "agreeing on the loss")
            time.sleep(0.2)
            for dog in dogs:
                assert re.search(r"rank 1 .* in step 8 while computing: other processes wait for it", dog.diagnose())
            dogs[1].__exit__()
            assert re.search(r"rank 1 .*: stopped, dead or cut off", dogs[0].diagnose())

    def test_the_watchdog_does_not_wait_for_a_frozen_store(self, tmp_path: Path) -> None:
        keep = "import sys, time, torch.distributed as dist; "
        keep += "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
        keep += "print(store.port, flush=True); time.sleep(600)"
        watch = """
import sys, time
import torch.distributed as dist
from pretrain.runs.guards import Watchdog
from pretrain.runs.directory import RunDirectory
from data_sharding.processing.preprocess import PreprocessSpec

run = RunDirectory(sys.argv[2], PreprocessSpec())
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
with Watchdog(2.0, rank=0, size=2, run=run, store=store) as dog:
    dog.at(7, "computing")
    print("watching", flush=True)
    time.sleep(600)
"""
        keeper = subprocess.Popen([sys.executable, "-c", keep], stdout=subprocess.PIPE, text=True, env=environment())
        try:
            assert keeper.stdout is not None
            words = [sys.executable, "-c", watch, keeper.stdout.readline().strip(), str(tmp_path / "run")]
            watcher = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
            )
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "watching\n"
            keeper.send_signal(signal.SIGSTOP)
            said = watcher.communicate(timeout=60)[1]
        finally:
            keeper.kill()
            keeper.wait()
        assert watcher.returncode == 1
        assert "no progress for 2 s: the store does not answer" in said
        assert "the store" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
