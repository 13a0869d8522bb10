"""Tests of checkpoints of real runs: asynchronous writing, milestones, damage, full disks, and repeated steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_sharding.dataset.batch import Batch
from pretrain.runs.checkpoint import complete_checkpoints
from pretrain.train import main
from pretrain.training.trainer import Trainer

from ..conftest import losses, mark_interrupted, metrics, saved_state, write_config


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def finished(self, unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """Train a run of 12 steps that writes an asynchronous checkpoint every 2 steps."""
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

    def test_milestones_are_kept(self, finished: tuple[Path, Path]) -> None:
        found = [int(path.name[-4:]) for path in complete_checkpoints(finished[1] / "checkpoints")]
        assert found == [4, 8, 10, 12]
        assert not list((finished[1] / "checkpoints").glob(".partial_*"))

    def test_asynchronous_checkpoints_have_the_same_content(
        self, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import pretrain.model.weights

        # Make the writing slow, so that the training takes more steps before the checkpoint is complete.
        save = pretrain.model.weights.save_weights
        monkeypatch.setattr(pretrain.model.weights, "save_weights", lambda *args: (time.sleep(0.5), save(*args)))
        manifests = []
        for asynchronous in ("true", "false"):
            run = tmp_path / asynchronous
            words = ["--output", str(run), "--checkpoint.asynchronous", asynchronous, "--log_every", "5"]
            assert main([str(finished[0]), *words]) == 0
            paths = [run / "checkpoints" / f"step_{step:08d}" / "complete.json" for step in (4, 8, 10, 12)]
            manifests.append([json.loads(path.read_text()) for path in paths])
        # A checkpoint stores the losses since the last line of metrics. Lines of metrics are written after steps 5, 10
        # and 12, so the checkpoints of steps 4, 8, 10 and 12 store 4, 3, 0 and 0 losses.
        assert [len(manifest["interval"]["losses"]) for manifest in manifests[0]] == [4, 3, 0, 0]
        assert manifests[0] == manifests[1]

    @pytest.mark.parametrize("kind", ["truncated", "flipped", "unlisted"])
    def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
        self, kind: str, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = finished
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        mark_interrupted(copy)
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
        ours, theirs = saved_state(copy, 12), saved_state(run, 12)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_only_damaged_checkpoints_are_refused(
        self, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config, run = finished
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        mark_interrupted(copy)
        for path in (copy / "checkpoints").rglob("state_00000.safetensors"):
            path.write_bytes(b"")
        assert main([str(config), "--output", str(copy)]) == 2
        assert "every checkpoint is damaged" in capsys.readouterr().err
        # A second start must be refused, too, so the first start must not rename the damaged checkpoints.
        assert main([str(config), "--output", str(copy)]) == 2

    def test_repeated_steps_are_not_in_the_metrics_twice(
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
        # The run has no checkpoint, so the next start trains from step 0 and must ignore the list of left-out batches.
        (tmp_path / "run" / "left_out.json").write_text('[{"batches": [0, 4], "step": 4, "loss": "of old"}]')
        assert main(words) == 0
        # The last checkpoint is that of the last step, so the resumed run only repeats the evaluation after this step.
        mark_interrupted(tmp_path / "run")
        assert main(words) == 0
        for key in ("loss", "val_loss"):
            ours, theirs = (
                [(line["step"], line[key]) for line in metrics(run) if key in line] for run in (tmp_path / "run", whole)
            )
            assert ours == theirs

    def test_the_last_checkpoint_is_complete_although_the_one_before_failed(
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
    def test_a_full_disk_loses_checkpoints_but_not_the_run(
        self,
        asynchronous: str,
        finished: tuple[Path, Path],
        small_disk: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        config, run = finished
        # The disk has room for one checkpoint of about 0.7 MB, but not for a second checkpoint.
        words = [str(config), "--output", str(small_disk / "run"), "--checkpoint.asynchronous", asynchronous]
        with pytest.raises(RuntimeError, match="last checkpoint, of step 12"):
            main(words)
        error = capsys.readouterr().err
        assert "could not write the checkpoint of step 4" in error
        assert "No space left on device" in error
        kept = complete_checkpoints(small_disk / "run" / "checkpoints")
        assert [path.name for path in kept] == ["step_00000002"]
        assert losses(small_disk / "run") == losses(run)
        # On a disk with enough room, the same command resumes the run and finishes it.
        shutil.copytree(small_disk / "run", tmp_path / "roomy")
        assert main([str(config), "--output", str(tmp_path / "roomy")]) == 0
        assert "resuming from step 2" in capsys.readouterr().err
        assert losses(tmp_path / "roomy") == losses(run)
