"""A tiny encoder package and a tiny Stable Diffusion for the tests of fine-tuning."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.training.accelerate import quiet_libraries

LAUNCH_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    quiet_libraries()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let a test choose the precision of Accelerate, which a process can otherwise choose only once."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def encoder_package(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an encoder package with random weights and 32 tokens of width 32, for the windows of the paired dataset."""
    import torch

    from data_sharding.dataset.dataset import EEGDataset
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.model.config import EncoderConfig

    torch.manual_seed(0)
    config = EncoderConfig(samples=128, dim=32, depth=1, heads=2, mlp_ratio=2.0)
    path = tmp_path_factory.mktemp("encoder") / "encoder"
    EEGEncoder(config, EEGDataset(paired_dataset).spec).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def miniature(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a miniature Stable Diffusion and CLIP for two steps each with the real command."""
    from finetune.stable_diffusion.miniature import main

    path = tmp_path_factory.mktemp("miniature") / "miniature"
    steps = ["--clip_steps", "2", "--vae_steps", "2", "--unet_steps", "2", "--batch_size", "8"]
    assert main([str(paired_dataset), "-o", str(path), *steps]) == 0
    return path


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a stage with 'accelerate launch': ``launch(module, *args, processes=1, env={})``."""
    folder = Path(__file__).parents[2] / "configs" / "accelerate"
    configs = {1: folder / "cpu.yaml", 2: folder / "cpu_two_processes.yaml"}

    def run(
        module: str, *args: object, processes: int = 1, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs[processes])]
        if processes > 1:
            command += ["--main_process_port", "0"]
        command += ["-m", module, *map(str, args), "--num_processes", str(processes), "--device", "cpu"]
        return subprocess.run(command, env=LAUNCH_ENV | (env or {}), capture_output=True, text=True, timeout=300)

    return run
