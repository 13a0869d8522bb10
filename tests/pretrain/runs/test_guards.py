"""What watches over a training: loss spikes, checkpoints that cannot be trusted, metrics wherever they go."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.flops import batch_flops, peak_flops, training_flops
from pretrain.runs.checkpoint import CheckpointReader, complete_checkpoints
from pretrain.runs.directory import RunDirectory
from pretrain.runs.guards import GuardConfig, SpikeDetector, Watchdog
from pretrain.runs.stop import StopSignal
from pretrain.train import main
from pretrain.training.config import OptimizerConfig
from pretrain.training.trainer import Trainer

from ..conftest import ROOT, environment, losses, metrics, write_config


def again(run: Path) -> None:
    """Let a finished run count as one that was interrupted."""
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as saved:
        return {name: saved[name] for name in saved.names}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, in which wandb keeps a run: blocks of 32 KiB behind a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


class TestSpikes:
    def test_only_what_is_far_above_the_last_losses_counts(self) -> None:
        detector = SpikeDetector(GuardConfig(spike_window=16))
        values = np.random.default_rng(0).normal(1.0, 0.01, 200)
        assert all(detector.check(float(value)) is None for value in values)
        assert detector.check(0.5) is None
        assert detector.check(float("nan")) is None
        detector = SpikeDetector(GuardConfig(spike_window=16), values[-16:].tolist())
        assert "1.2" in (detector.check(1.2) or "")
        # The spike itself is not remembered: the next one is seen as well.
        assert detector.check(1.2) is not None
        assert SpikeDetector(GuardConfig(spike_window=16), values[:15].tolist()).check(9.0) is None
        assert SpikeDetector(GuardConfig(spike_window=16, spike_sigma=0), values[:16].tolist()).check(9.0) is None

    @pytest.fixture(scope="class")
    def with_giant(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """96 windows, of which number 40 is a hundred times as large as the others."""
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
        """A seed whose order brings the giant in the ninth batch of eight, and not soon again."""
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

    def test_training_goes_back_and_leaves_the_batches_out(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        config = write_config(tmp_path / "c.yaml", output=str(run), **self.settings(with_giant, seed))
        assert main([str(config)]) == 0
        assert "back to step 6; batches 7 to 8 are left out" in capsys.readouterr().err
        # The spike came in step 9, that is batch 8; the checkpoint before it is of step 6.
        assert [found["batches"] for found in json.loads((run / "left_out.json").read_text())] == [[7, 9]]
        assert [line["rewound_from"] for line in metrics(run) if "rewound_from" in line] == [9]
        assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 15))
        assert max(losses(run)) < 2 * min(losses(run))
        # 14 steps and two batches left out: the data stand at batch 16.
        manifest = json.loads((run / "checkpoints" / "step_00000014" / "complete.json").read_text())
        assert manifest["loader"]["step"] == 16
        # Killed right after it went back, the run leaves out the same.
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        again(copy)
        for late in complete_checkpoints(copy / "checkpoints")[2:]:
            shutil.rmtree(late)
        assert main([str(config), "--output", str(copy)]) == 0
        assert "loss spike" not in capsys.readouterr().err
        assert losses(copy) == losses(run)
        ours, theirs = (weights(path / "checkpoints" / "step_00000014") for path in (copy, run))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_too_many_spikes_end_the_run(self, with_giant: Path, seed: int, tmp_path: Path) -> None:
        settings = self.settings(with_giant, seed, max_rewinds=0)
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "run"), **settings)
        with pytest.raises(RuntimeError, match=r"loss spike at step 9 .* in batches 7 to 8, .* guards\.max_rewinds"):
            main([str(config)])
        # What the message advises.
        assert main([str(config), "--guards.max_rewinds", "1"]) == 0
        assert len(json.loads((tmp_path / "run" / "left_out.json").read_text())) == 1

    def test_a_checkpoint_that_learned_from_them_is_not_gone_back_to(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With one in every second step, that of step 8 has learned from batch 7 already."""
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "whole"), **self.settings(with_giant, seed))
        assert main([str(config)]) == 0
        more = ["--output", str(tmp_path / "run")]
        assert main([str(config), *more, "--checkpoint.every", "2", "--checkpoint.keep", "2"]) == 0
        assert capsys.readouterr().err.count("back to step 6") == 2
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
        assert (tmp_path / "run" / "checkpoints" / "step_00000012").is_dir()

    def test_the_newest_where_all_learned_from_them(
        self, with_giant: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path / "c.yaml", output=str(tmp_path / "run"), **self.settings(with_giant, seed))
        assert main([str(config), "--checkpoint.every", "2", "--checkpoint.keep", "1"]) == 0
        assert "back to step 8; batches 7 to 8 are left out" in capsys.readouterr().err

    def test_a_spike_before_the_first_checkpoint_is_a_step_like_any_other(
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
    def test_whoever_is_behind_is_named(self) -> None:
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
                assert re.search(r"rank 1 .* in step 8 while computing: the others wait for it", dog.diagnose())
            dogs[1].__exit__()
            assert re.search(r"rank 1 .*: stopped, dead or cut off", dogs[0].diagnose())

    def test_a_store_that_does_not_answer_is_not_waited_for(self, tmp_path: Path) -> None:
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


def test_one_interruption_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr("pretrain.runs.stop._SAME_REQUEST_S", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class TestRunDirectory:
    def test_two_commands_do_not_write_one_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pretrain.runs.lock._SAME_HOST_S", 1)
        hold = "import sys, time; from pretrain.runs.directory import RunDirectory; "
        hold += "from data_sharding.processing.preprocess import PreprocessSpec; "
        hold += "run = RunDirectory(sys.argv[1], PreprocessSpec()); print('here', flush=True); time.sleep(600)"
        path = tmp_path / "run"
        other = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "here\n"
            with pytest.raises(RequestError, match=rf"process {other.pid} on .* is at work on this run"):
                RunDirectory(path, PreprocessSpec())
        finally:
            other.kill()
            other.wait()
        RunDirectory(path, PreprocessSpec()).close()

    def test_a_tracker_that_fails_does_not_end_the_training(self, tmp_path: Path) -> None:
        program = """
import os, signal, subprocess, sys, time
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.runs.directory import RunDirectory
from pretrain.runs.tracking import TrackerConfig

run = RunDirectory(sys.argv[1], PreprocessSpec(), tracker=TrackerConfig(kind="wandb"))
run.log(1, loss=2.0)
helpers = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb"], capture_output=True, text=True).stdout.split()
assert helpers
for pid in helpers:
    os.kill(int(pid), signal.SIGKILL)
for step in range(2, 100):
    run.log(step, loss=1.0)
    time.sleep(0.05)
run.close()
"""
        words = [sys.executable, "-c", program, str(tmp_path / "run")]
        env = environment() | {"WANDB_MODE": "offline"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("the tracker failed at step") == 1
        assert losses(tmp_path / "run") == [2.0] + 98 * [1.0]


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def finished(self, unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """A run of 12 steps with checkpoints every 2, written beside the training."""
        folder = tmp_path_factory.mktemp("checkpoints")
        config = write_config(
            folder / "c.yaml",
            dataset=str(unpaired_dataset),
            output=str(folder / "run"),
            steps=12,
            checkpoint={"every": 2, "keep": 2, "milestones": 4, "asynchronous": True},
        )
        assert main([str(config)]) == 0
        return config, folder / "run"

    def test_milestones_stay(self, finished: tuple[Path, Path]) -> None:
        found = [int(path.name[-4:]) for path in complete_checkpoints(finished[1] / "checkpoints")]
        assert found == [4, 8, 10, 12]
        assert not list((finished[1] / "checkpoints").glob(".partial_*"))

    def test_written_beside_the_training_is_the_same(
        self, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import pretrain.model.weights

        # So slowly that the training is further on before the checkpoint counts.
        save = pretrain.model.weights.save_weights
        monkeypatch.setattr(pretrain.model.weights, "save_weights", lambda *args: (time.sleep(0.5), save(*args)))
        manifests = []
        for asynchronous in ("true", "false"):
            run = tmp_path / asynchronous
            words = ["--output", str(run), "--checkpoint.asynchronous", asynchronous, "--log_every", "5"]
            assert main([str(finished[0]), *words]) == 0
            paths = [run / "checkpoints" / f"step_{step:08d}" / "complete.json" for step in (4, 8, 10, 12)]
            manifests.append([json.loads(path.read_text()) for path in paths])
        assert [len(manifest["interval"]["losses"]) for manifest in manifests[0]] == [4, 3, 0, 0]
        assert manifests[0] == manifests[1]

    @pytest.mark.parametrize("kind", ["truncated", "flipped", "unlisted"])
    def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
        self, kind: str, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = finished
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        again(copy)
        newest = copy / "checkpoints" / "step_00000012"
        victim = newest / ("complete.json" if kind == "unlisted" else "state_00000.safetensors")
        content = bytearray(victim.read_bytes())
        if kind == "flipped":
            content[-100] ^= 1
        else:
            del content[len(content) // 2 :]
        victim.write_bytes(content)
        assert main([str(config), "--output", str(copy)]) == 0
        error = capsys.readouterr().err
        assert f"checkpoint {newest} is damaged" in error
        assert victim.name in error
        assert "resuming from step 10" in error
        assert losses(copy) == losses(run)
        ours, theirs = weights(newest), weights(run / "checkpoints" / "step_00000012")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_only_damaged_checkpoints_are_refused(
        self, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = finished
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        again(copy)
        for path in (copy / "checkpoints").rglob("state_00000.safetensors"):
            path.write_bytes(b"")
        assert main([str(config), "--output", str(copy)]) == 2
        assert "every checkpoint is damaged" in capsys.readouterr().err
        # And again: nothing was moved or deleted that would let the next start begin from nothing.
        assert main([str(config), "--output", str(copy)]) == 2

    def test_what_comes_again_is_not_in_the_metrics_twice(
        self, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, whole = finished
        words = [str(config), "--output", str(tmp_path / "run")]
        take_step = Trainer.take_step

        def fails(training: Trainer, batch: Batch) -> float:
            if training.global_step == 4:
                raise OSError("power cut")
            return take_step(training, batch)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
            patch.setattr(Trainer, "take_step", fails)
            main([*words, "--checkpoint.every", "8", "--checkpoint.milestones", "null"])
        assert len(losses(tmp_path / "run")) == 4
        (tmp_path / "run" / "left_out.json").write_text('[{"batches": [0, 4], "step": 4, "loss": "of old"}]')
        assert main(words) == 0
        # After the last checkpoint, the last evaluation comes again.
        again(tmp_path / "run")
        assert main(words) == 0
        for key in ("loss", "val_loss"):
            ours, theirs = (
                [(line["step"], line[key]) for line in metrics(run) if key in line] for run in (tmp_path / "run", whole)
            )
            assert ours == theirs

    def test_the_last_checkpoint_counts_whatever_became_of_the_one_before(
        self, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import pretrain.model.weights

        save = pretrain.model.weights.save_weights

        def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
            time.sleep(0.3)
            if "00000010" in str(path):
                raise OSError(28, "No space left on device")
            save(tensors, path)

        monkeypatch.setattr(pretrain.model.weights, "save_weights", full)
        assert main([str(finished[0]), "--output", str(tmp_path / "run")]) == 0
        found = [path.name[-2:] for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
        assert found == ["04", "08", "12"]

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("a small disk can only be mounted by root")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    @pytest.mark.parametrize("asynchronous", ["false", "true"])
    def test_a_full_disk_costs_checkpoints_not_the_run(
        self,
        asynchronous: str,
        finished: tuple[Path, Path],
        small_disk: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        config, run = finished
        # Room for one checkpoint of some 0.7 MB, not for the next beside it.
        words = [str(config), "--output", str(small_disk / "run"), "--checkpoint.asynchronous", asynchronous]
        with pytest.raises(RuntimeError, match="last checkpoint, of step 12"):
            main(words)
        error = capsys.readouterr().err
        assert "could not write the checkpoint of step 4" in error
        assert "No space left on device" in error
        kept = complete_checkpoints(small_disk / "run" / "checkpoints")
        assert [path.name for path in kept] == ["step_00000002"]
        assert losses(small_disk / "run") == losses(run)
        # With room again, the same command finishes from what there was.
        shutil.copytree(small_disk / "run", tmp_path / "roomy")
        assert main([str(config), "--output", str(tmp_path / "roomy")]) == 0
        assert "resuming from step 2" in capsys.readouterr().err
        assert losses(tmp_path / "roomy") == losses(run)


class TestSight:
    def test_tensorboard_and_lines_say_the_same(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tmp_path / "run"
        config = write_config(
            tmp_path / "c.yaml",
            dataset=str(unpaired_dataset),
            output=str(run),
            steps=3,
            tracker={"kind": "tensorboard"},
            peak_tflops=0.5,
        )
        assert main([str(config)]) == 0
        lines = [line for line in metrics(run) if "loss" in line]
        assert {"mfu", "data_stall_share", "tokens_per_s", "memory_peak_gib", "grad_norm"} <= lines[0].keys()
        assert 0 < lines[-1]["mfu"] < 1
        assert 0 <= lines[-1]["data_stall_share"] < 1
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert [e.value for e in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
        held = next(line for line in metrics(run) if "val_loss" in line)
        # 24 windows of one corpus, a third each of 19, 32 and 64 channels.
        assert held["val_loss_corpus/tiny"] == pytest.approx(held["val_loss"])
        parts = [held[f"val_loss_channels/{n:03d}"] for n in (19, 32, 64)]
        assert np.mean(parts) == pytest.approx(held["val_loss"])
        assert len(set(parts)) == 3

    def test_wandb_offline_keeps_the_run(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        run = tmp_path / "run"
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output=str(run), steps=3, tracker={"kind": "wandb"}
        )
        assert main([str(config)]) == 0
        (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
        # wandb's own process writes the file, and is not always done when it says so.
        logged: list[float] = []
        until = time.monotonic() + 30
        while len(logged) < 3 and time.monotonic() < until:
            logged.clear()
            time.sleep(0.2)
            for data in leveldb_records(file.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                logged += [float(i.value_json) for i in record.history.item if list(i.nested_key) == ["loss"]]
        assert logged == pytest.approx(losses(run))

    def test_wandb_without_a_connection_keeps_the_run_and_says_so(self, tmp_path: Path) -> None:
        # Nobody listens there; the key is where 'wandb login' leaves it.
        keys = tmp_path / "netrc"
        keys.write_text(f"machine 127.0.0.1:9\n  login user\n  password {'a' * 40}\n")
        program = (
            "from pathlib import Path\n"
            "from pretrain.runs.tracking import TrackerConfig, open_tracker\n"
            f"log, close = open_tracker(TrackerConfig(kind='wandb'), Path({str(tmp_path)!r}), {{}})\n"
            "log(1, {'loss': 0.5})\n"
            "close()\n"
        )
        variables = {"NETRC": str(keys), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
        settings = {k: v for k, v in environment().items() if not k.startswith("WANDB")} | variables
        ids = set()
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
            )
            assert "wandb cannot be reached" in done.stderr
            ids.add((tmp_path / "wandb" / "run_id").read_text())
        # A run that goes on asks for the one it began.
        assert len(ids) == 1
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2

    def test_a_terminal_gets_a_table_and_a_log_gets_lines(self) -> None:
        program = (
            "from pretrain.runs.tracking import live_table\n"
            "with live_table('pretrain', 2) as show:\n"
            "    show(1, {'loss': 0.5, 'samples_per_s': 12.0})\n"
            "    show(2, {'loss': 0.25, 'val_loss': 0.3, 'mfu': 0.41})\n"
        )
        ours, theirs = pty.openpty()
        subprocess.run(
            [sys.executable, "-c", program],
            stderr=theirs,
            check=True,
            cwd=ROOT,
            env=environment() | {"TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        text = shown.decode()
        assert all(word in text for word in ("held-out loss", "0.3000", "windows / s", "41.0%", "2/2"))
        plain = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=environment()
        )
        assert plain.stderr == "pretrain: 2/2 loss 0.2500\n"

    def test_montage_flops_are_those_of_true_channels(self) -> None:
        def shape(channels: int) -> MaskedAutoencoderConfig:
            encoder = EncoderConfig(
                tokenizer="montage", channels=channels, samples=64, patch=16, dim=16, depth=2, heads=2, mlp_ratio=2.0
            )
            return MaskedAutoencoderConfig(encoder=encoder, decoder=DecoderConfig(dim=8, depth=1, heads=2))

        expected = sum(training_flops(shape(channels)) for channels in (19, 37, 37))
        assert batch_flops(shape(128), [19, 37, 37]) == pytest.approx(expected, rel=1e-9)
        assert expected < 0.5 * 3 * training_flops(shape(128))

    def test_flops_are_those_of_the_matrix_products(self) -> None:
        shape = MaskedAutoencoderConfig(
            encoder=EncoderConfig(channels=8, samples=64, patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0),
            decoder=DecoderConfig(dim=8, depth=1, heads=2, mlp_ratio=2.0),
            mask_ratio=0.5,
        )

        def block(tokens: int, dim: int) -> int:
            # Queries, keys, values and output; scores and their use; the perceptron of twice the width.
            return 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim + 2 * tokens * dim * 4 * dim

        forward = 2 * 16 * (8 * 4) * 16 + 2 * block(9, 16) + 2 * 9 * 16 * 8 + block(17, 8) + 2 * 16 * 8 * 32
        assert training_flops(shape) == 3 * forward
        assert batch_flops(shape, [3, 8]) == 2 * training_flops(shape)
        assert peak_flops(torch.device("cpu"), "fp32") is None
        assert peak_flops(torch.device("cpu"), "fp32", 2.0) == 2e12

    @pytest.mark.parametrize(
        ("name", "tflops"),
        [("NVIDIA L4", 121.0), ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3", 989.0)],
    )
    def test_a_device_is_known_by_whole_words(
        self, name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert peak_flops(torch.device("cuda"), "bf16") == (tflops and tflops * 1e12)


class TestOptimizer:
    @pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
    def test_the_rate_follows_the_batch_where_that_is_wished(self, rule: Any, factor: float) -> None:
        plain = OptimizerConfig(lr=1e-3, warmup=0.1)
        scaled = OptimizerConfig(lr=1e-3, warmup=0.1, base_batch=64, batch_scaling=rule)
        for step in (0, 9, 10, 50, 99):
            assert math.isclose(scaled.lr_at(step, 100, 256), factor * plain.lr_at(step, 100))
            assert plain.lr_at(step, 100, 256) == plain.lr_at(step, 100)

    def test_the_optimiser_may_wait_in_the_processors_memory(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output=str(tmp_path / "a"), zero_stage=2
        )
        assert main([str(config)]) == 0
        assert main([str(config), "--output", str(tmp_path / "b"), "--offload", "optimizer"]) == 0
        np.testing.assert_allclose(losses(tmp_path / "b"), losses(tmp_path / "a"), atol=1e-5)
