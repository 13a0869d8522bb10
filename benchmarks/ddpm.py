"""Measure training and sampling of EG-DDPM, and of a plain PyTorch training loop for diffusers' UNet2DModel.

``python benchmarks/ddpm.py [--size 64] [--base 64] [--batch 8] [--steps 5] [--device cpu] [--out FILE.json]``

Three programs are measured: EG-DDPM with the U-Net of the paper, EG-DDPM with UNet2DModel, and a plain PyTorch training
loop for the same UNet2DModel, written like the tutorial of diffusers. The three programs take turns, one step each, so
that a change of the machine's load affects all three programs. A training step consists of the forward and backward
pass, gradient clipping, and AdamW. A training step of EG-DDPM also averages the weights (EMA). A step of sampling is
one evaluation of the network and one step of the ancestral sampler. Images and EEG vectors of this benchmark are random
noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from machine import peak_memory, start_memory
from torch import Tensor, nn

from data_sharding.common.files import write_json
from finetune.diffusion import Sampling
from finetune.dm_re2i.backbones import build_unet
from finetune.dm_re2i.config import EGDDPMStage
from finetune.dm_re2i.portable.pipeline import sample_images
from finetune.dm_re2i.train import EGDDPMTask
from finetune.training.config import TrainingConfig
from finetune.training.parameters import EMA, make_optimizer, trainables
from pretrain.runs.distributed import choose_device

WIDTH = 512
"""Width of the EEG vector."""
Step = Callable[[], object]


def measure(step: Step, device: torch.device) -> dict[str, float]:
    """Run one step; return its wall time and CPU time in seconds, and by how many GiB its memory grew at the peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    before = start_memory(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, "growth_gib": peak_memory(device) - before}


def random_inputs(options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shape = (options.batch, 3, options.size, options.size)
    return {
        "image": torch.rand(shape, device=device) * 2 - 1,
        "noise": torch.randn(shape, device=device),
        "time": torch.randint(1000, (options.batch,), device=device),
        "eeg": torch.randn(options.batch, WIDTH, device=device),
        "jitter": torch.zeros(options.batch, WIDTH, device=device),
    }


def make_noising() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def ours(backbone: Any, options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, float, Step, Step]:
    """Return EG-DDPM's network, GiB of its training state, and functions: a training step and a short sampling."""
    stage = EGDDPMStage(image_size=options.size, base_channels=options.base, backbone=backbone, drop=0.0)
    task = EGDDPMTask(build_unet(stage, WIDTH), make_noising(), "l2").to(device)
    task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's type hints lack this overload
    optimizer, ema = make_optimizer(task, TrainingConfig()), EMA(trainables(task), 0.9999)
    inputs = random_inputs(options, device)

    def train() -> None:
        task.train()
        task(**inputs)["loss"].backward()
        nn.utils.clip_grad_norm_(list(trainables(task).values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(trainables(task))

    def sample() -> None:
        task.eval()
        sampling = Sampling(sampler="ddpm", steps=options.evaluations, guidance_scale=1.0)
        sample_images(task.unet, task.noising.config, inputs["eeg"], sampling, list(range(options.batch)))

    # The training state is four times as large as the weights: the weights, AdamW's two moments, and the averaged
    # weights. The gradients exist only inside of a step, so they are part of the step's growth of memory.
    return task.unet, state_gib(task, 4), train, sample


def plain(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, float, Step, Step]:
    """Make the plain training loop for diffusers' UNet2DModel, with which EG-DDPM is compared.

    The result is the network, the size of its training state in GiB, and two functions: a training step and a short
    sampling. The network has the same layer sizes as EG-DDPM with the backbone `unet2d`.
    """
    stage = EGDDPMStage(image_size=options.size, base_channels=options.base, backbone="unet2d", drop=0.0)
    net: Any = build_unet(stage, WIDTH)
    model = nn.ModuleDict({"unet": UNet2DModel.from_config(net.unet.config), "map": nn.Linear(WIDTH, 4 * options.base)})
    model.to(device)
    optimizer, scheduler = torch.optim.AdamW(model.parameters(), lr=1e-4), make_noising()
    inputs = random_inputs(options, device)

    def train() -> None:
        model.train()
        noisy = scheduler.add_noise(inputs["image"], inputs["noise"], inputs["time"])
        guess = model["unet"](noisy, inputs["time"], class_labels=model["map"](inputs["eeg"])).sample
        F.mse_loss(guess, inputs["noise"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sample() -> None:
        model.eval()
        x = torch.randn_like(inputs["image"])
        scheduler.set_timesteps(options.evaluations)
        for t in scheduler.timesteps:
            guess = model["unet"](x, t, class_labels=model["map"](inputs["eeg"])).sample
            x = scheduler.step(guess, t, x).prev_sample

    return model, state_gib(model, 3), train, sample


def state_gib(module: nn.Module, copies: int) -> float:
    return copies * sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="width and height of the images in pixels")
    parser.add_argument("--base", type=int, default=64, help="number of feature maps at the first level")
    parser.add_argument("--batch", type=int, default=8, help="number of images in one step")
    parser.add_argument("--steps", type=int, default=5, help="number of measured steps, after one step of warm-up")
    parser.add_argument("--evaluations", type=int, default=2, help="number of steps of the sampler in a measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    programs = {
        "EG-DDPM, U-Net of the paper": lambda: ours("paper", options, device),
        "EG-DDPM, UNet2DModel": lambda: ours("unet2d", options, device),
        "plain loop, UNet2DModel": lambda: plain(options, device),
    }
    made = {name: make() for name, make in programs.items()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {"training": [], "sampling": []} for name in made}
    for _ in range(options.steps + 1):
        for name, (_net, _gib, train, sample) in made.items():
            found[name]["training"].append(measure(train, device))
            found[name]["sampling"].append(measure(sample, device))
    results = {}
    for name, (net, gib, _train, _sample) in made.items():
        results[name] = {"parameters": sum(p.numel() for p in net.parameters())}
        for part, per_step in (("training", 1), ("sampling", options.evaluations)):
            runs = found[name][part][1:]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            state = gib if part == "training" else state_gib(net, 1)
            results[name][part] = {
                "steps_per_s": per_step / middle["wall_s"],
                "images_per_s": per_step * options.batch / middle["wall_s"],
                "cpu_s_per_step": middle["cpu_s"] / per_step,
                "memory_gib": state + max(run["growth_gib"] for run in runs),
            }
        print(json.dumps({name: results[name]}), flush=True)
    if options.out is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        machine = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        if hasattr(os, "getloadavg"):
            machine["load"] = os.getloadavg()[0]
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        settings = {key: getattr(options, key) for key in ("size", "base", "batch", "steps", "evaluations")}
        about = {"command": " ".join(["python", *sys.argv]), "machine": machine, "versions": versions}
        write_json(options.out, {**about, "settings": settings, "results": results})


if __name__ == "__main__":
    main()
