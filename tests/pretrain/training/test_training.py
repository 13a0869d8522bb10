"""Tests of real DeepSpeed runs.

The tests check that runs learn, that results are equal for all ZeRO stages and numbers of processes, that runs can be
stopped and resumed, and that wrong settings are refused.
"""

from __future__ import annotations

import json
import os
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
from PIL import Image

from pretrain.runs.directory import RunDirectory
from pretrain.runs.tracking import TrackerConfig
from pretrain.train import main

from ..conftest import ROOT, environment, losses, metrics, run_jobs, saved_weights, torchrun, write_config


def stop_after(run: Path, config: Path, step: int, number: int) -> tuple[int, str]:
    """Start a training in a new process, and send a signal after a step; return exit code and error output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain.train", str(config)],
        env=environment(),
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    log = run / "metrics.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if log.is_file() and log.read_text().count('"lr"') >= step:
            process.send_signal(number)
            break
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def test_two_processes_learn_and_write_all_files(trained_run: Path) -> None:
    held_out = [line["val_loss"] for line in metrics(trained_run) if "val_loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] < 0.9 * held_out[0]
    assert [line["val_explained"] for line in metrics(trained_run) if "val_loss" in line][-1] > 0.05
    line = next(line for line in metrics(trained_run) if "loss" in line)
    assert {"lr", "grad_norm", "samples_per_s", "data_stall_s", "skipped_steps"} <= line.keys()
    assert json.loads((trained_run / "status.json").read_text())["state"] == "done"
    for name in ("reconstruction.png", "loss.png"):
        with Image.open(trained_run / "plots" / name) as image:
            assert image.width > 800
    assert [p.name for p in sorted((trained_run / "checkpoints").iterdir())] == ["step_00000120", "step_00000240"]


def test_a_finished_run_is_not_trained_again(trained_run: Path, unpaired_dataset: Path, tmp_path: Path) -> None:
    before = (trained_run / "metrics.jsonl").read_text()
    done = torchrun(["-m", "pretrain.train", str(trained_run / "config.yaml")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is done already" in done.stdout
    assert (trained_run / "metrics.jsonl").read_text() == before


def test_losses_agree_over_zero_stages_processes_and_precision(unpaired_dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", dataset=str(unpaired_dataset), output="unused")

    def job(variant: str, processes: int) -> dict[str, Any]:
        stage, precision, *micro = variant.split(",")
        words = [str(config), "--output", str(tmp_path / f"{variant}_{processes}")]
        words += ["--zero_stage", stage, "--precision", precision]
        return {"words": words + (["--micro_batch_size", micro[0]] if micro else [])}

    variants = ["1,fp32", "2,fp32", "3,fp32", "2,fp32,4", "1,bf16", "2,bf16", "3,bf16"]
    run_jobs(tmp_path, 1, [job("0,fp32", 1)])
    run_jobs(tmp_path, 2, [job(variant, 2) for variant in variants])
    reference = losses(tmp_path / "0,fp32_1")
    assert len(reference) == 6
    assert reference[-1] < reference[0] - 0.01
    for variant in variants:
        found = losses(tmp_path / f"{variant}_2")
        np.testing.assert_allclose(found, reference, atol=1e-4 if "fp32" in variant else 2e-2, err_msg=variant)
        # The checkpoint holds the trained weights, independent of how ZeRO divided the weights among the processes.
        ours = saved_weights(tmp_path / f"{variant}_2", 6)
        theirs = saved_weights(tmp_path / "0,fp32_1", 6)
        assert ours.keys() == theirs.keys()
        assert all(value.dtype == torch.float32 for value in ours.values())
        # Compare the mean difference over all weights, not the maximum. The gradient of the keys' bias in attention
        # consists only of rounding errors, which Adam's first steps enlarge, so this bias differs more.
        apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).abs().mean()
        assert apart < (1e-5 if "fp32" in variant else 1e-3), variant


def test_stop_and_resume_give_the_undisturbed_losses(unpaired_dataset: Path, tmp_path: Path) -> None:
    # There are 96 windows, and each step uses 13 of them, so epochs end in the middle of a batch.
    settings: dict[str, Any] = {"dataset": str(unpaired_dataset), "steps": 40, "batch_size": 13, "zero_stage": 2}
    whole = write_config(tmp_path / "whole.yaml", output=str(tmp_path / "whole"), **settings)
    assert main([str(whole)]) == 0
    run = tmp_path / "stopped"
    config = write_config(tmp_path / "stopped.yaml", output=str(run), **settings)
    code, stderr = stop_after(run, config, 5, signal.SIGTERM)
    assert code == 75, stderr[-2000:]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 5 <= status["step"] < 40
    assert "run the same command" in stderr
    # Imitate a crash: leave a half-written checkpoint, and lines of metrics after the last complete checkpoint.
    (run / "checkpoints" / ".partial_00000039").mkdir()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 39, "loss": 9.0}\n{"step": 40, "lo')
    assert main([str(config)]) == 0
    assert losses(run) == losses(tmp_path / "whole")
    ours, theirs = (saved_weights(p, 40) for p in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_process_may_start_while_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_file, config = Path.is_file, TrackerConfig()

    def write_after_check(path: Path) -> bool:
        found = is_file(path)
        if path.name == "status.json" and not found:
            RunDirectory(tmp_path / "run", config).close()
        return found

    with monkeypatch.context() as patch:
        # `write_after_check` starts the first process inside the patched `is_file`. The first process must use the
        # original `is_file`, so the patch is undone before that.
        patch.setattr(Path, "is_file", lambda path: patch.undo() or write_after_check(path))
        second = RunDirectory(tmp_path / "run", config, rank=1)
    assert not second.finished
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"


def test_a_stop_does_not_wait_for_an_evaluation(
    unpaired_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pretrain.training.validation

    collate, calls, signal_at = pretrain.training.validation.collate, 0, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(*args)

    monkeypatch.setattr(pretrain.training.validation, "collate", interrupted)
    settings: dict[str, Any] = {"dataset": str(unpaired_dataset), "steps": 4, "batch_size": 13}
    words = ["--evaluation.every", "2", "--evaluation.batch_size", "1"]
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    assert main([str(write_config(tmp_path / "whole.yaml", output=str(whole), **settings)), *words]) == 0
    batches = calls // 3
    assert batches >= 3
    config = write_config(tmp_path / "stopped.yaml", output=str(run), **settings)
    # The first signal arrives in the second batch of the evaluation before step 1. Each resumed run completes the
    # interrupted evaluation and gets a signal in the second batch of the next evaluation.
    for step, signal_at in ((0, 2), (2, batches + 2), (4, batches + 2)):
        calls = 0
        assert main([str(config), *words]) == 75
        assert calls == signal_at
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"]) == ("stopped", step)
        assert (run / "latest").read_text().strip() == f"step_{step:08d}"
    signal_at = 0
    assert main([str(config), *words]) == 0
    for name in ("loss", "val_loss", "val_explained"):
        ours, theirs = ([line[name] for line in metrics(p) if name in line] for p in (run, whole))
        assert ours == theirs, name


@pytest.mark.parametrize("stage", [0, 1])
def test_steps_with_a_gradient_that_is_not_finite_are_skipped_and_end_the_run(
    stage: int, unpaired_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_sharding.processing.preprocess import PreprocessSpec

    config = write_config(
        tmp_path / "config.yaml",
        dataset=str(unpaired_dataset),
        output=str(tmp_path / "run"),
        zero_stage=stage,
        max_skipped=2,
    )
    scale, calls = PreprocessSpec.scale_for_model, []

    def poisoned(self: PreprocessSpec, x_uv: Any, channels: Any = None) -> Any:
        calls.append(len(x_uv))
        x = scale(self, x_uv, channels)
        # The first two calls of `scale_for_model` belong to the evaluation before training. In training, return windows
        # of NaN in step 2, and later in steps 4 and 5.
        return x * float("nan") if len(calls) - 2 in (2, 4, 5) else x

    monkeypatch.setattr(PreprocessSpec, "scale_for_model", poisoned)
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        main([str(config)])
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


class TestBadRequests:
    def refused(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    def test_no_dataset(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = write_config(tmp_path / "c.yaml", dataset=str(tmp_path), output=str(tmp_path / "run"))
        assert "manifest.json" in self.refused([str(config)], capsys)
        assert not (tmp_path / "run").exists()

    def test_unknown_key(self, unpaired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output="x", optimizer={"learning_rate": 1e-3}
        )
        assert "learning_rate" in self.refused([str(config)], capsys)

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--zero_stage", "3", "--model.compute.compile", "true"], "model.compute.compile"),
            (["--zero_stage", "0", "--precision", "bf16"], "precision bf16"),
            (["--zero_stage", "2", "--offload", "all"], "offload all"),
        ],
    )
    def test_options_that_exclude_each_other(
        self, words: list[str], named: str, unpaired_dataset: Path, tmp_path: Path, capsys: Any
    ) -> None:
        config = write_config(tmp_path / "c.yaml", dataset=str(unpaired_dataset), output=str(tmp_path / "run"))
        error = self.refused([str(config), *words], capsys)
        assert named in error and "zero_stage" in error
        assert not (tmp_path / "run").exists()

    def test_other_window_length(self, unpaired_dataset: Path, tmp_path: Path, capsys: Any) -> None:
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output="x", model={"encoder": {"samples": 256}}
        )
        error = self.refused([str(config)], capsys)
        assert "model.encoder.samples" in error
        assert "128" in error

    def test_other_number_of_processes(self, unpaired_dataset: Path, tmp_path: Path, capsys: Any) -> None:
        config = write_config(tmp_path / "c.yaml", dataset=str(unpaired_dataset), output="x", num_processes=2)
        assert "num_processes" in self.refused([str(config)], capsys)

    @pytest.mark.parametrize(
        ("words", "key"),
        [
            (["--batch_size", "15", "--num_processes", "2"], "batch_size"),
            (["--micro_batch_size", "5"], "micro_batch_size"),
            (["--precision", "bf16", "--zero_stage", "0"], "zero_stage"),
            (["--optimizer.lr", "-1"], "lr"),
            (["--zero_stage", "4"], "zero_stage"),
            (["--optimizer.weight_decay", "nan"], "weight_decay"),
            (["--deepspeed", "{gradient_accumulation_steps: 2}"], "use micro_batch_size"),
            (["--deepspeed", "{bf16: {enabled: true}}"], "use precision"),
            (["--deepspeed", "{zero_optimization: {stage: 3}}"], "use zero_stage"),
            (["--deepspeed", "{zero_optimization: null}"], "deepspeed.zero_optimization"),
        ],
    )
    def test_bad_values(self, words: list[str], key: str, tmp_path: Path, capsys: Any) -> None:
        config = write_config(tmp_path / "c.yaml", dataset="x", output="x")
        assert key in self.refused([str(config), *words], capsys)

    def test_other_config_on_resume(self, trained_run: Path, tmp_path: Path, capsys: Any) -> None:
        run = tmp_path / "run"
        shutil.copytree(trained_run, run)
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
        words = [str(run / "config.yaml"), "--output", str(run), "--num_processes", "1"]
        assert "another config" in self.refused([*words, "--seed", "99"], capsys)
        assert "RANK" not in os.environ
