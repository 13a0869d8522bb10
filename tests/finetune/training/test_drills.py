"""Tests of faults during fine-tuning and generation: stopped, killed and hanging processes, bad data, and full disks.

After each fault, the resumed run must end with the same weights as a run without the fault.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from pretrain.runs.checkpoint import complete_checkpoints
from pretrain.runs.metrics import read_metrics

from ...pretrain.training.test_drills import Training, encode_unchecked
from ..conftest import LAUNCH_ENV

ROOT = Path(__file__).parents[3]
MODULES = {
    "align": "finetune.align",
    "finetune": "finetune.stable_diffusion.train",
    "ddpm": "finetune.dm_re2i.train",
    "generate": "finetune.generate",
}
TINY = {"tracker.kind": "none"}
TRAINING = {
    "log_every": 1,
    "warmup": 0,
    "lr": 1e-3,
    "min_lr": 1e-3,
    "checkpoint.every": 4,
    "evaluation.every": 6,
    "ema": 0.9,
}
STOP = 5
"""Step at which runs are disturbed: in the middle of an epoch, and not at a checkpoint."""


def _training(prefix: str = "training.", **changes: object) -> dict[str, object]:
    return {f"{prefix}{key}": value for key, value in {**TRAINING, **changes}.items()}


class Drills:
    """Jobs for `drill_jobs.py`."""

    def __init__(self, folder: Path, dataset: Path, encoder: Path, miniature: Path) -> None:
        self.folder, self.dataset, self.jobs = folder, dataset, list[dict[str, Any]]()
        paths = {"dataset": dataset, "encoder": encoder}
        clip, base = miniature / "clip", miniature / "stable-diffusion"
        sizes = {"evrnet.channels": 16, "evrnet.widths": "[4,8,8,16,16]", "ddpm.image_size": 16, "ddpm.heads": 2}
        sizes |= {"ddpm.base_channels": 8, "ddpm.multipliers": "[1,2]", "ddpm.head_dim": 4}
        self.keys: dict[str, dict[str, object]] = {
            "align": {**TINY, **paths, "target.model": clip, **_training(steps=12, batch_size=16)},
            "joint": {
                **TINY,
                **paths,
                "base": base,
                "order": "joint",
                "target.model": clip,
                **_training(steps=9, batch_size=8),
            },
            "sequential": {**TINY, **paths, "base": base, **_training(steps=9, batch_size=8)},
            "ddpm": {
                **TINY,
                "dataset": dataset,
                **sizes,
                **_training("evrnet.training.", steps=8, batch_size=16),
                **_training("ddpm.training.", steps=9, batch_size=8),
            },
        }

    def words(self, kind: str, output: Path, **more: object) -> list[str]:
        keys = {**self.keys[kind], "output": output, **{k.replace("__", "."): v for k, v in more.items()}}
        return [word for key, value in keys.items() for word in (f"--{key}", str(value))]

    def add(self, name: str, kind: str, run: str | Path, *, more: dict[str, object] | None = None, **job: Any) -> None:
        command = "finetune" if kind in ("joint", "sequential") else kind
        words = self.words(kind, self.folder / run, **(more or {}))
        self.jobs.append({"name": name, "module": MODULES[command], "words": words, **job})

    def add_generate(self, name: str, output: str | Path, **job: Any) -> None:
        words = [str(self.folder / "joint"), str(self.dataset), "-o", str(self.folder / output)]
        words += ["--steps", "2", "--limit", "6", "--batch_size", "1"]
        self.jobs.append({"name": name, "module": MODULES["generate"], "words": words, **job})

    def run(self) -> dict[str, dict[str, Any]]:
        self.folder.joinpath("jobs.json").write_text(json.dumps(self.jobs))
        script = Path(__file__).with_name("drill_jobs.py")
        words = [sys.executable, str(script), str(self.folder / "jobs.json"), str(self.folder / "results.json")]
        done = subprocess.run(words, env=LAUNCH_ENV, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """Mount a small disk; None if this user must not mount a disk."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def drills(
    paired_dataset: Path,
    encoder_package: Path,
    miniature: Path,
    disk: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Drills, dict[str, dict[str, Any]]]:
    """Run all jobs of this file with one start of Python; return the results of the jobs by their names."""
    drills = Drills(tmp_path_factory.mktemp("drills"), paired_dataset, encoder_package, miniature)
    train = EEGDataset(paired_dataset)
    samples = [train[number] for number in range(len(train))]
    bad = samples[5]
    samples[5] = Sample(
        key=bad.key, eeg=np.full_like(bad.eeg, np.nan), meta=bad.meta, image=bad.image, image_ext=bad.image_ext
    )
    val = EEGDataset(paired_dataset, "val")
    with pytest.MonkeyPatch.context() as patch:
        # Dreamscale refuses to write a window that contains NaN, but other software may write such a window.
        patch.setattr("data_sharding.dataset.samples.encode_eeg", encode_unchecked)
        held_out = [val[number] for number in range(len(val))]
        write_dataset(drills.folder / "bad", {"train": samples, "val": held_out}, train.spec, labels=train.labels)

    for kind in ("align", "joint", "sequential", "ddpm"):
        drills.add(kind, kind, kind)
    for kind in ("joint", "sequential"):
        drills.add(f"{kind} stopped", kind, f"{kind}_stopped", at=["log", STOP], signal=signal.SIGTERM)
        drills.add(f"{kind} resumed", kind, f"{kind}_stopped")
    drills.add("align killed", "align", "align_killed", at=["save", 8], signal=signal.SIGKILL)
    drills.add("align resumed", "align", "align_killed")
    drills.add("ddpm killed", "ddpm", "ddpm_killed", at=["log", STOP], signal=signal.SIGKILL)
    drills.add("ddpm resumed", "ddpm", "ddpm_killed")
    hang = {"at": ["log", STOP], "signal": signal.SIGSTOP}
    drills.add("align hanging", "align", "align_hanging", more={"timeout_s": 6}, **hang)
    drills.add("align bad", "align", "align_bad", more={"dataset": drills.folder / "bad"})
    drills.add("align slow", "align", "align_slow", more={"training__log_every": 3}, at=["batch"], sleep_s=0.25)
    drills.add("align alone", "align", "align_alone", processes=1)
    drills.add_generate("generate", "images", processes=1)
    drills.add_generate("generate killed", "images_killed", at=["image"], signal=signal.SIGKILL)
    drills.add_generate("generate resumed", "images_killed")
    if disk is not None:
        full = {"rank": 0, "fill": str(disk / "fill")}
        drills.add("align full", "align", disk / "align", at=["log", STOP], **full)
        data = shutil.copytree(paired_dataset, disk / "data", ignore=shutil.ignore_patterns(".cache"))
        drills.add("align no cache", "align", "cache", more={"dataset": data}, at=["open"], processes=1, **full)
        drills.add("ddpm full", "ddpm", disk / "ddpm", at=["log", STOP], **full)
        drills.add_generate("generate full", disk / "images", at=["image"], **full)
    return drills, drills.run()


Found = tuple[Drills, dict[str, dict[str, Any]]]
WEIGHTS = {
    "align": ("encoder/model.safetensors", "align/model.safetensors"),
    "joint": ("model/encoder/model.safetensors", "model/pipeline/unet/diffusion_pytorch_model.safetensors"),
    "sequential": ("model/encoder/model.safetensors", "model/pipeline/unet/diffusion_pytorch_model.safetensors"),
    "ddpm": ("model/evrnet/model.safetensors", "model/unet/diffusion_pytorch_model.safetensors"),
}


def _state(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


def _check_undisturbed(drills: Drills, kind: str, run: Path) -> None:
    """Check that a run has the losses and the weights of the run without a fault."""
    whole = drills.folder / kind
    assert _state(run)["state"] == "done"
    assert _curve(run) == _curve(whole)
    for name in WEIGHTS[kind]:
        ours, theirs = load_file(run / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _messages(job: dict[str, Any]) -> list[str]:
    """Check that no process of a job printed a traceback; return the lines of all processes with an error."""
    said = "".join(job["said"])
    assert "Traceback" not in said, said
    # On a busy machine, a process may be slow.
    return [line for line in said.splitlines() if line.startswith("dreamscale: ") and " is slow: in " not in line]


@pytest.mark.parametrize("kind", ["joint", "sequential"])
def test_a_stop_in_the_middle_of_an_epoch_changes_no_weight(kind: str, drills: Found) -> None:
    """One of two processes gets SIGTERM while Stable Diffusion is fine-tuned."""
    jobs, found = drills
    assert found[kind]["codes"] == [0, 0], found[kind]["said"]
    assert found[f"{kind} stopped"]["codes"] == [75, 75]
    assert [line for line in _messages(found[f"{kind} stopped"]) if f"checkpoint at step {STOP + 1}" in line]
    assert found[f"{kind} resumed"]["codes"] == [0, 0], found[f"{kind} resumed"]["said"]
    _check_undisturbed(jobs, kind, jobs.folder / f"{kind}_stopped")


def test_a_process_killed_while_it_writes_a_checkpoint_costs_only_this_checkpoint(drills: Found) -> None:
    jobs, found = drills
    killed, run = found["align killed"], jobs.folder / "align_killed"
    assert killed["codes"] == [1, -signal.SIGKILL]
    (line,) = _messages(killed)
    assert "another process ended" in line and "run the same command again" in line.lower()
    assert found["align resumed"]["codes"] == [0, 0], found["align resumed"]["said"]
    _check_undisturbed(jobs, "align", run)


def test_a_killed_process_is_recorded_and_the_run_can_be_resumed(drills: Found) -> None:
    jobs, found = drills
    assert found["ddpm killed"]["codes"] == [1, -signal.SIGKILL]
    assert len(_messages(found["ddpm killed"])) == 1
    assert found["ddpm resumed"]["codes"] == [0, 0], found["ddpm resumed"]["said"]
    _check_undisturbed(jobs, "ddpm", jobs.folder / "ddpm_killed")


def test_a_hanging_process_is_named(drills: Found) -> None:
    jobs, found = drills
    assert found["align hanging"]["codes"][0] == 1
    (line,) = _messages(found["align hanging"])
    assert "no progress for 6 s: rank 1 (host " in line
    state = _state(jobs.folder / "align_hanging")
    assert state["state"] == "failed" and "rank 1" in state["reason"]


def test_a_slow_process_is_named(drills: Found) -> None:
    """Check a run in which one of two processes does nothing for 0.25 s in every step."""
    jobs, found = drills
    assert found["align slow"]["codes"] == [0, 0], found["align slow"]["said"]
    assert found["align slow"]["said"][0].count("dreamscale: rank 1 (host ") >= 1
    lines = [line for line in read_metrics(jobs.folder / "align_slow" / "metrics.jsonl") if "slowest_rank" in line]
    assert len(lines) == 4 and sum(line["slowest_rank"] == 1 for line in lines) >= 3
    # The slow process takes part in the same training.
    curve = _curve(jobs.folder / "align")
    means = [sum(loss for _, loss in curve[start : start + 3]) / 3 for start in range(0, 12, 3)]
    np.testing.assert_allclose([loss for _, loss in _curve(jobs.folder / "align_slow")], means, rtol=1e-5)


def test_bad_data_on_one_process_skips_the_step_on_all(drills: Found) -> None:
    """Check a run of three epochs. In each epoch, one of two processes reads a trial of NaN in one step."""
    jobs, found = drills
    run = jobs.folder / "align_bad"
    assert found["align bad"]["codes"] == [0, 0], found["align bad"]["said"]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 12 and sum(line["train/loss"] is None for line in lines) == 3
    assert [line["skipped"] for line in lines] == [int(line["train/loss"] is None) for line in lines]
    for name in WEIGHTS["align"]:
        assert all(torch.isfinite(value).all() for value in load_file(run / name).values())


def test_a_launcher_may_start_a_single_process(drills: Found) -> None:
    jobs, found = drills
    assert found["align alone"]["codes"] == [0], found["align alone"]["said"]
    assert [step for step, _ in _curve(jobs.folder / "align_alone")] == list(range(1, 13))


def test_a_killed_process_loses_none_of_the_stored_images(drills: Found) -> None:
    jobs, found = drills
    assert found["generate"]["codes"] == [0], found["generate"]["said"]
    killed = found["generate killed"]
    assert killed["codes"] == [1, -signal.SIGKILL]
    assert len(_messages(killed)) == 1
    assert found["generate resumed"]["codes"] == [0, 0], found["generate resumed"]["said"]
    # Rank 0 had stored its three images, and rank 1 one image.
    assert "4 of 6 images are finished already" in found["generate resumed"]["said"][0]
    images, whole = jobs.folder / "images_killed" / "images", jobs.folder / "images" / "images"
    names = {path.name for path in whole.iterdir()}
    assert len(names) == 6 and names == {path.name for path in images.iterdir()}
    assert all((images / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_full_disk_ends_a_command_with_one_line(drills: Found, disk: Path | None) -> None:
    if disk is None:
        pytest.skip("needs the right to mount a small disk")
    jobs, found = drills
    # The disk became full in the middle of the training: checkpoints are lost, training goes on, and the model cannot
    # be written.
    for name, run in (("align full", "align"), ("ddpm full", "ddpm/evrnet")):
        assert found[name]["codes"] == [1, 1], found[name]["said"]
        lines = [line for line in _messages(found[name]) if "run the same command again" in line]
        assert len(lines) == 1 and "No space left on device" in lines[0] and str(disk / run) in lines[0]
        assert "could not write the checkpoint of step 8" in found[name]["said"][0]
        state = _state(disk / run)
        assert state["state"] == "failed" and "No space left on device" in state["reason"]
    cache = found["align no cache"]
    assert cache["codes"] == [2] and "No space left" in _messages(cache)[0], cache["said"]
    assert _state(jobs.folder / "cache")["state"] == "failed"
    images = found["generate full"]
    assert images["codes"] == [1, 1] and any("No space left" in line for line in _messages(images)), images["said"]
    assert not (disk / "images").exists()


def test_the_launcher_restarts_a_killed_run_and_passes_a_stop_on(drills: Found, tmp_path: Path) -> None:
    jobs, _ = drills
    run = tmp_path / "run"
    # This run has far more steps than it can take, so that it never ends before the test disturbs it. The learning rate
    # is constant, so the losses are those of the short run.
    words = jobs.words("align", run, training__steps=10**6, num_processes=2, device="cpu", restarts=1)
    training = Training([sys.executable, "-m", "launch", "align", *words], run)
    training.wait_for(6)
    os.kill(training.workers()[1], signal.SIGKILL)
    training.wait_for(0, "a training process died; restarting")
    training.wait_for(training.steps() + 5, "resuming from step")
    training.process.send_signal(signal.SIGTERM)
    assert training.wait() == 75, training.log.read_text()[-3000:]
    assert not training.processes()
    assert _state(run)["state"] == "stopped"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{_state(run)['at']:08d}"
    assert _curve(run)[:6] == _curve(jobs.folder / "align")[:6]
