"""Tests of the store of checkpoints: files of several processes, names, damage and older formats.

The checkpoints are written by one process, or by several processes as in DDP.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_sharding.common.errors import RequestError
from pretrain.export import main as export
from pretrain.runs.checkpoint import (
    MANIFEST,
    CheckpointReader,
    divide_by_size,
    file_record,
    newest_checkpoint,
    step_folder,
)
from pretrain.runs.checkpoint_writer import CheckpointWriter
from pretrain.runs.distributed import World
from pretrain.train import main

from ..conftest import losses, metrics, write_config


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"weights/layer{i}": torch.randn(i + 1, 3, generator=generator) for i in range(5)}
    # Weights of convolutions may have the memory format channels_last in fine-tuning.
    image = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    return weights | {"ema/image": image, "best/count": torch.tensor(3)}


def write(run: Path, step: int = 4, **manifest: object) -> Path:
    writer = CheckpointWriter(run / "checkpoints", World(), keep=2)
    writer.begin(step, tensors(), manifest)
    assert writer.wait()
    return step_folder(run / "checkpoints", step)


def to_format_2(run: Path) -> None:
    """Rewrite the checkpoints and the status of a pretraining run in format 2, the format before the current format."""
    for folder in (run / "checkpoints").glob("step_*"):
        state = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        for path in folder.glob("*.safetensors"):
            path.unlink()
        weights = {k.removeprefix("weights/"): v for k, v in state.items() if k.startswith("weights/")}
        save_file(weights, folder / "model.safetensors")
        moments = {k: v for k, v in state.items() if not k.startswith("weights/")}
        save_file(moments, folder / "moments_00000.safetensors")
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {path.name: file_record(path) for path in folder.glob("*.safetensors")}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2, "files": files}))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"config": "0123abcd"}))
    config = (run / "config.yaml").read_text()
    assert "grad_clip" in config
    (run / "config.yaml").write_text(config.replace("grad_clip", "clip"))


class TestStore:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        folder = write(tmp_path, loader={"step": 4}, losses=[0.5, None])
        assert {path.name for path in folder.iterdir()} == {MANIFEST, "state_00000.safetensors"}
        assert (tmp_path / "latest").read_text() == "step_00000004\n"
        with CheckpointReader(folder) as saved:
            assert saved.manifest["losses"] == [0.5, None]
            assert (saved.manifest["step"], saved.manifest["world_size"]) == (4, 1)
            saved.check_names(tensors())
            assert all(torch.equal(saved[name], value) for name, value in tensors().items())
            assert saved.group("ema/").keys() == {"image"}

    def test_names_are_checked(self, tmp_path: Path) -> None:
        with CheckpointReader(write(tmp_path)) as saved:
            with pytest.raises(RequestError, match="weights/other is missing"):
                saved.check_names([*tensors(), "weights/other"])
            with pytest.raises(RequestError, match="best/count is unknown"):
                saved.check_names(tensors().keys() - {"best/count"})

    def test_a_tensor_in_two_files_is_refused(self, tmp_path: Path) -> None:
        folder = write(tmp_path)
        save_file({"best/count": torch.tensor(4)}, folder / "state_00001.safetensors")
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"]["state_00001.safetensors"] = file_record(folder / "state_00001.safetensors")
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(RequestError, match="best/count is stored twice"), CheckpointReader(folder):
            pass

    def test_a_checkpoint_of_an_unknown_format_is_refused_in_one_line(self, tmp_path: Path) -> None:
        folder = write(tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["format"]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(RequestError, match="run the same command with another 'output' to train again"):
            CheckpointReader(folder)

    def test_shares_are_even_and_complete(self) -> None:
        sizes = {f"t{i}": (i * 37) % 100 + 1 for i in range(60)}
        shares = divide_by_size(sizes, 4)
        assert sorted(name for names in shares for name in names) == sorted(sizes)
        load = [sum(sizes[name] for name in names) for names in shares]
        assert max(load) - min(load) <= 5
        assert shares == divide_by_size(dict(reversed(sizes.items())), 4)
        assert divide_by_size({"a": 1}, 3) == [["a"], [], []]

    def test_old_checkpoints_are_deleted_but_for_milestones(self, tmp_path: Path) -> None:
        writer = CheckpointWriter(tmp_path / "checkpoints", World(), keep=1, milestones=4)
        for step in range(2, 12, 2):
            writer.begin(step, tensors(), {}, asynchronous=True)
            assert writer.wait()
        assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["04", "08", "10"]
        newest = newest_checkpoint(tmp_path / "checkpoints")
        assert newest is not None and newest.name == "step_00000010"


class TestOlderRuns:
    @pytest.fixture(scope="class")
    def older(self, unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
        """Return a config, a run with this config, and a copy of the run in the format of an older version."""
        folder = tmp_path_factory.mktemp("older")
        config = write_config(
            folder / "c.yaml", dataset=str(unpaired_dataset), output=str(folder / "run"), checkpoint={"every": 3}
        )
        assert main([str(config)]) == 0
        shutil.copytree(folder / "run", folder / "older")
        to_format_2(folder / "older")
        return config, folder / "run", folder / "older"

    def test_an_older_run_is_exported(self, older: tuple[Path, Path, Path], tmp_path: Path) -> None:
        _, run, old = older
        for source, name in ((run, "ours"), (old, "theirs")):
            assert export([str(source), str(tmp_path / name), "--program", "false"]) == 0
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_an_older_run_is_resumed(self, older: tuple[Path, Path, Path], tmp_path: Path) -> None:
        config, run, old = older
        shutil.copytree(old, tmp_path / "run")
        # Make the run look interrupted after the checkpoint of step 3.
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        (tmp_path / "run" / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
        assert main([str(config), "--output", str(tmp_path / "run")]) == 0
        assert losses(tmp_path / "run") == losses(run)

    def test_an_old_key_is_named(
        self, older: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(older[2] / "config.yaml"), "--output", str(tmp_path / "run")]) == 2
        assert "use 'optimizer.grad_clip'" in capsys.readouterr().err


class TestResumeWithAnotherConfig:
    @pytest.fixture(scope="class")
    def stopped(self, unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("stopped")
        config = write_config(
            folder / "c.yaml", dataset=str(unpaired_dataset), output=str(folder / "run"), checkpoint={"every": 3}
        )
        assert main([str(config)]) == 0
        shutil.rmtree(folder / "run" / "checkpoints" / "step_00000006")
        status = json.loads((folder / "run" / "status.json").read_text())
        (folder / "run" / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
        return config, folder / "run"

    def test_what_changes_nothing_may_change(self, stopped: tuple[Path, Path], tmp_path: Path) -> None:
        config, run = stopped
        shutil.copytree(run, tmp_path / "run")
        words = ["--output", str(tmp_path / "run"), "--log_every", "2", "--num_workers", "1"]
        words += ["--checkpoint.every", "2", "--evaluation.every", "2", "--micro_batch_size", "8"]
        assert main([str(config), *words]) == 0
        assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 6]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--steps", "12"], "steps was 6, is 12 (the learning rate of every step depends on the number of steps)"),
            (["--optimizer.grad_clip", "1.5"], "optimizer.grad_clip was 0.8, is 1.5;"),
            (["--model.encoder.depth", "3"], "model.encoder.depth was 2, is 3;"),
        ],
    )
    def test_what_changes_the_training_is_refused_by_name(
        self, words: list[str], said: str, stopped: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(stopped[0]), "--output", str(stopped[1]), *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
