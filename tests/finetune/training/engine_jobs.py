"""The work of one process in test_engines.py: several short trainings, one after the other, under one engine.

``python engine_jobs.py DATASET ENCODER MINIATURE OUTPUT [CHECKPOINTS OF ANOTHER ENGINE]``
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_sharding.common.errors import StopRequested
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.accelerate import get_world, make_accelerator, open_run, quiet_libraries
from finetune.training.config import EvaluationConfig, TrainingConfig, free_keys
from finetune.training.fit import fit
from finetune.training.step_random import StepRandom
from pretrain.runs.config import CheckpointConfig

CONFIG = TrainingConfig(
    steps=9,
    batch_size=8,
    micro_batch_size=2,
    lr=1e-2,
    warmup=2,
    weight_decay=0.1,
    grad_clip=0.5,
    ema=0.9,
    log_every=1,
    evaluation=EvaluationConfig(every=4),
    checkpoint=CheckpointConfig(every=100, asynchronous=False),
)
FREE = free_keys("training", independent_samples=True)
Inputs = Callable[[Batch, StepRandom], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Request:
    output: str
    training: TrainingConfig


class Toy(nn.Module):
    """A network with layers of which FSDP makes units, odd sizes, frozen weights and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in ((128, 13), (13, 7)))
        self.frozen, self.last = nn.Linear(7, 5).requires_grad_(False), nn.Linear(5, 1)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor, spoil: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += 1
        for layer in self.layers:
            x = layer(x)
        # `spoil` is NaN or 0; as a constant it does not change the gradient.
        error = (self.last(self.frozen(x))[:, 0] - y).square().mean()
        return {"loss": error + spoil.sum(), "error": error.detach()}


def make_loader(data: EEGDataset, accelerator: Any) -> Loader:
    return Loader(data, CONFIG.batch_size, 0, rank=accelerator.process_index, world_size=accelerator.num_processes)


def train_module(
    module: nn.Module, inputs: Inputs, loader: Loader, output: Path, accelerator: Any, evaluate: Any, **changes: Any
) -> None:
    config, world = replace(CONFIG, **changes), get_world(accelerator)
    run = open_run(Request(output=str(output), training=config), accelerator, free=FREE)
    try:
        fit(
            module,
            config=config,
            seed=3,
            accelerator=accelerator,
            run=run,
            loader=loader,
            inputs=inputs,
            evaluate=evaluate,
        )
    finally:
        run.close()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    digests = world.all_gather({name: float(tensor.double().sum()) for name, tensor in weights.items()})
    assert digests[0] == digests[-1], "the processes have different weights at the end"
    if world.first:
        save_file(weights, output / "weights.safetensors")


def train_toy(
    data: EEGDataset,
    output: Path,
    accelerator: Any,
    *,
    stop_at: int = -1,
    spoil: tuple[str, int] = ("", -1),
    **changes: Any,
) -> None:
    loader, last = make_loader(data, accelerator), accelerator.process_index == accelerator.num_processes - 1

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        step = loader.step - 1
        if step == stop_at and last:
            os.kill(os.getpid(), signal.SIGTERM)
        x = batch.eeg[:, 0].float() / 20 + 0.1 * random.normal(len(batch.eeg), 128)
        y = torch.tensor([float(meta["label"]) for meta in batch.metas])
        bad = torch.zeros(len(x))
        if step == spoil[1] and last:
            (x if spoil[0] == "x" else bad)[0] = torch.nan
        return {"x": x, "y": y, "spoil": bad}

    def evaluate(module: Toy, pulse: Callable[[], None]) -> dict[str, float]:
        pulse()
        assert not module.training and module.get_parameter("layers.0.0.weight").shape == (13, 128)
        assert {p.device.type for p in module.parameters()} == {accelerator.device.type}
        return {"loss": float(module.get_parameter("layers.0.0.weight").norm()), "seen": float(module.seen)}

    train_module(Toy(), inputs, loader, output, accelerator, evaluate, **changes)


def align_inputs(encoder: Any, rows: Tensor, target_MP: Tensor) -> Inputs:
    from finetune.eeg import scale_eeg

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        row = rows[torch.as_tensor(batch.numbers)]
        return {
            "x": scale_eeg(batch.padded(dtype=torch.float32), encoder),
            "target": target_MP[row][:, None],
            "group": row[:, None],
        }

    return inputs


def diffusion_inputs(encoder: Any, size: int) -> Inputs:
    from finetune.eeg import scale_eeg

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        b, x = len(batch.eeg), scale_eeg(batch.padded(dtype=torch.float32), encoder)
        noise, latent = random.normal(b, 4, size, size), random.normal(b, 4, size, size)
        keep = random.uniform(b) >= 0.1
        return {"x": x, "latent": latent, "noise": noise, "time": random.integers(100, b), "keep": keep}

    return inputs


def train_models(data: EEGDataset, encoder: Path, miniature: Path, output: Path, accelerator: Any) -> None:
    """Train the models of ``dreamscale align`` and ``dreamscale finetune`` for some steps."""
    from finetune.align import Aligner, AlignmentLoss
    from finetune.base_models.load import load_base
    from finetune.clip_head import ClipHead, ClipHeadConfig
    from finetune.eeg import load_encoder
    from finetune.images import ImageTable
    from finetune.stable_diffusion.train import StableDiffusionConfig, build, choose_noising

    torch.manual_seed(0)
    table, few = ImageTable(data), {"steps": 4, "lr": 1e-3, "grad_clip": 1.0, "evaluation": EvaluationConfig(every=100)}
    network = load_encoder(str(encoder), data)
    head = ClipHead(ClipHeadConfig(tokens=network.n_tokens, dim=network.dim, projection=16))
    target_MP = nn.functional.normalize(torch.randn(len(table), 16), dim=1)
    inputs = align_inputs(network, torch.as_tensor(table.row_of), target_MP)
    # The contrastive loss depends on the whole batch, so there is only one micro batch.
    aligner = Aligner(network, head, AlignmentLoss())
    loader = make_loader(data, accelerator)
    train_module(aligner, inputs, loader, output / "align", accelerator, None, micro_batch_size=None, **few)

    torch.manual_seed(0)
    network, pipeline = load_encoder(str(encoder), data), load_base(str(miniature))
    # DeepSpeed must not divide the frozen models.
    assert not any(hasattr(p, "ds_id") for p in (*pipeline.vae.parameters(), *pipeline.text_encoder.parameters()))
    config = StableDiffusionConfig(dataset="", encoder="", base="", output="")
    model = build(config, pipeline, network, None, choose_noising(config, pipeline))
    inputs = diffusion_inputs(network, int(pipeline.unet.config.sample_size))
    loader = make_loader(data, accelerator)
    train_module(model, inputs, loader, output / "diffusion", accelerator, None, **few)
    if accelerator.is_main_process:
        model.encoder.save_pretrained(output / "encoder")


def main() -> None:
    quiet_libraries()
    dataset, encoder, miniature, output, *other = map(Path, sys.argv[1:])
    accelerator = make_accelerator(num_processes=2, device="cpu")
    data = EEGDataset(dataset)
    train_toy(data, output / "whole", accelerator)
    try:
        train_toy(data, output / "parts", accelerator, stop_at=4)
    except StopRequested:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.copytree(output / "parts", output / "stopped")
        accelerator.wait_for_everyone()
    train_toy(data, output / "parts", accelerator)
    if other:
        if accelerator.is_main_process:
            shutil.copytree(other[0] / "stopped", output / "other")
        accelerator.wait_for_everyone()
        train_toy(data, output / "other", accelerator)
    for name in ("x", "loss"):
        train_toy(data, output / f"spoiled_{name}", accelerator, spoil=(name, 3))
    train_toy(data, output / "bf16", accelerator, precision="bf16")
    train_models(data, encoder, miniature, output, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output / "done.json").write_text(json.dumps({"processes": accelerator.num_processes}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
