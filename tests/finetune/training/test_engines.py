"""Trainings under DDP, DeepSpeed's ZeRO 1 to 3 and FSDP, on two processes of the CPU.

`engine_jobs.py` is the work of these processes. Under DDP it runs once, and every other engine must give the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.training.accelerate import make_accelerator
from finetune.training.engines import check_engine
from pretrain.encoder.encoder import EEGEncoder
from pretrain.runs.checkpoint import CheckpointReader
from tests.finetune.training.engine_jobs import train_toy

CONFIGS = Path(__file__).parents[3] / "configs" / "accelerate"
ENGINES = ["zero1", "zero2", "zero3", "fsdp"]
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""Engines sum the same numbers in another order. docs/distributed.md states this tolerance."""

Launch = Callable[..., Path]


@pytest.fixture(scope="module")
def launch(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path_factory: pytest.TempPathFactory
) -> Launch:
    """Return a function that runs the job under an engine, and returns the job's folder; each engine runs once."""
    root, done = tmp_path_factory.mktemp("engines"), set()

    def run(engine: str) -> Path:
        output = root / engine
        if engine in done:
            return output
        done.add(engine)
        flags = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
        # The toy's layers are tiny, but two of them must be units of FSDP.
        flags += ["--fsdp_min_num_params", "50"] if engine == "fsdp" else []
        job = [
            Path(__file__).with_name("engine_jobs.py"),
            paired_dataset,
            encoder_package,
            miniature / "stable-diffusion",
        ]
        job += [output, *([] if engine == "cpu_two_processes" else [run("cpu_two_processes")])]
        command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *map(str, job)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert (output / "done.json").is_file(), found.stdout[-4000:] + found.stderr[-8000:]
        return output

    return run


def _curve(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(max((run / "checkpoints").iterdir())) as reader:
        return reader.group("")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_training_is_the_same_as_under_ddp(engine: str, launch: Launch) -> None:
    own, ddp = launch(engine) / "whole", launch("cpu_two_processes") / "whole"
    for name in ("train/loss", "train/error", "val/loss", "val/seen", "grad_norm", "lr"):
        assert len(_curve(ddp, name)) in (3, 9)
        torch.testing.assert_close(_curve(own, name), _curve(ddp, name), **TOLERANCE)
    assert max(_curve(ddp, "grad_norm")) > 0.5, "the gradient was never clipped"
    # The checkpoints hold the same tensors: weights, moments, moving average and the best weights.
    found, expected = _tensors(own), _tensors(ddp)
    assert {name.partition("/")[0] for name in expected} == {"weights", "exp_avg", "exp_avg_sq", "ema", "best"}
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(
        load_file(own / "weights.safetensors"), load_file(ddp / "weights.safetensors"), **TOLERANCE
    )


@pytest.mark.parametrize("engine", ["cpu_two_processes", *ENGINES])
def test_a_run_stopped_in_mid_epoch_resumes_to_the_same_weights(engine: str, launch: Launch) -> None:
    folder = launch(engine)
    assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == ["step_00000005"]
    whole, parts = _tensors(folder / "whole"), _tensors(folder / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert _curve(folder / "parts", "train/loss") == _curve(folder / "whole", "train/loss")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_can_be_resumed_under_another_engine_and_number_of_processes(
    engine: str, launch: Launch, paired_dataset: Path, tmp_path: Path
) -> None:
    folder, whole = launch(engine), _tensors(launch("cpu_two_processes") / "whole")
    torch.testing.assert_close(_tensors(folder / "other"), whole, **TOLERANCE)
    shutil.copytree(folder / "stopped", tmp_path / "run")
    train_toy(EEGDataset(paired_dataset), tmp_path / "run", make_accelerator(num_processes=1, device="cpu"))
    torch.testing.assert_close(_tensors(tmp_path / "run"), whole, **TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_by_all_processes(engine: str, launch: Launch) -> None:
    for name in ("spoiled_x", "spoiled_loss"):
        run = launch(engine) / name
        tensors = _tensors(run)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        # metrics.jsonl has null in place of NaN.
        assert [step for step, loss in enumerate(_curve(run, "train/loss")) if loss is None] == [3]
        # Eight of the nine steps were taken.
        manifest = json.loads((max((run / "checkpoints").iterdir()) / "complete.json").read_text())
        assert (manifest["optimizer_step"], manifest["ema_updates"]) == (8, 8)


@pytest.mark.parametrize("engine", ENGINES)
def test_models_have_the_same_losses_and_export_as_under_ddp(engine: str, launch: Launch) -> None:
    own, ddp = launch(engine), launch("cpu_two_processes")
    for model in ("align", "diffusion"):
        assert len(set(_curve(ddp / model, "train/loss"))) == 4
        torch.testing.assert_close(
            _curve(own / model, "train/loss"), _curve(ddp / model, "train/loss"), rtol=1e-4, atol=1e-4
        )
        found, expected = (load_file(folder / model / "weights.safetensors") for folder in (own, ddp))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        # Frozen weights, such as the residual blocks of the U-Net, have not changed at all.
        trained = {name.partition("/")[2] for name in _tensors(ddp / model) if name.startswith("weights/")}
        frozen = found.keys() - trained
        assert all(torch.equal(found[name], expected[name]) for name in frozen)
        assert model == "align" or len(frozen) > 20
    EEGEncoder.from_pretrained(own / "encoder")


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(engine: str, launch: Launch) -> None:
    own, whole = launch(engine) / "bf16", launch(engine) / "whole"
    torch.testing.assert_close(_curve(own, "train/loss"), _curve(whole, "train/loss"), rtol=0.05, atol=0.02)
    assert _curve(own, "train/loss") != _curve(whole, "train/loss")
    assert {tensor.dtype for tensor in _tensors(own).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage is 0"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            "offload_optimizer_device is nvme",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, r"set training\.grad_clip"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            r"set training\.micro_batch_size",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "only FSDP 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_settings_that_are_not_supported_are_refused(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=message) as caught:
        check_engine(torch.device("cpu"))
    assert "\n" not in str(caught.value)
