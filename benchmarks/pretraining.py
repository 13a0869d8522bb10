"""Measure throughput, utilisation and memory of a pretraining step for several model sizes and settings.

``python benchmarks/pretraining.py [--presets tiny,released] [--precisions fp32,bf16] [--stages 1] [--compile 0,1]``
``[--batch 8] [--steps 5] [--reference PATH] [--profile] [--out FILE.json]``. To train in several processes, start the
script with torchrun.

``--reference PATH`` also times the model code that the authors of DreamDiffusion released, where PATH is a checkout of
bbaaii/DreamDiffusion. The released model runs with PyTorch's AdamW and autocast. The signals are noise that is made on
the device, so data loading is not measured here, but by benchmarks/loading.py. ``--profile`` runs one more step under
PyTorch's profiler and prints the time of each kind of operation. If the peak speed of the device is not known,
utilisation is relative to the fastest matrix product that this benchmark measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_sharding.common.files import write_json
from pretrain.model.config import ComputeConfig, MaskedAutoencoderConfig
from pretrain.model.flops import peak_flops, training_flops
from pretrain.model.presets import PRESETS
from pretrain.runs.distributed import World, choose_device, import_deepspeed, launched_world, process_group
from pretrain.training.config import PretrainConfig
from pretrain.training.deepspeed_engine import start_engine


def time_step(step: Callable[[], object], steps: int, device: torch.device) -> tuple[float, float]:
    """Return the median time of a step in seconds, after two warm-up steps, and the peak memory in GiB."""
    durations = []
    for number in range(steps + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if number == 2:
                torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else resident_gib()
    return statistics.median(durations[2:]), peak


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution"),
    "Adam": ("_fused_adam", "_foreach_add", "_foreach_mul", "_foreach_lerp", "_foreach_div", "_foreach_sqrt", "addc"),
    "copies, casts and zeros": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::_to_copy"),
    "sums and norms of gradients": ("aten::add_", "aten::mul_", "vector_norm", "AccumulateGrad", "_foreach_norm"),
    "softmax, LayerNorm, GELU": ("softmax", "layer_norm", "gelu"),
}
"""For each kind of operation in a step, texts that occur in the names of its PyTorch operators."""


def profile_step(step: Callable[[], None]) -> dict[str, float]:
    """Return the CPU seconds of one step for each kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the best TFLOP/s of matrix products, with shapes of the released model and with large square matrices.

    Products with a transposed first matrix are measured too, because the backward pass computes the gradients of the
    weights with such products.
    """
    best = {"plain": 0.0, "first factor transposed": 0.0}
    for M, K, N in ((928, 1024, 4096), (3712, 1024, 4096), (4096, 4096, 4096)):
        a, b = torch.randn(M, K, device=device, dtype=dtype), torch.randn(K, N, device=device, dtype=dtype)
        transposed = a.T.contiguous().T
        for name, first in (("plain", a), ("first factor transposed", transposed)):
            seconds, _ = time_step(lambda first=first, b=b: torch.mm(first, b), 10, device)
            best[name] = max(best[name], 2 * M * K * N / seconds / 1e12)
    return best


def resident_gib() -> float:
    """Return this process's present memory, not its peak: the peak could come from an earlier model of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 2**20


def fake_batch(shape: MaskedAutoencoderConfig, batch: int) -> Any:
    channels = shape.encoder.channels
    metas = [{"n": channels, "positions": [None] * channels} for _ in range(batch)]
    return SimpleNamespace(numbers=list(range(batch)), epochs=[0] * batch, metas=metas)


def ours(
    deepspeed: Any, world: World, preset: str, precision: str, stage: int, compiled: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one variant of Dreamscale's training step: forward and backward pass and optimiser, under DeepSpeed."""
    shape = dataclasses.replace(
        PRESETS[preset], compute=ComputeConfig(compile=compiled, checkpointing=options.checkpointing)
    )
    config = PretrainConfig(
        dataset="none",
        output="none",
        num_processes=world.size,
        batch_size=options.batch * world.size,
        precision=precision,  # type: ignore[arg-type]
        zero_stage=stage,  # type: ignore[arg-type]
        model=shape,
    )
    engine = start_engine(deepspeed, config, world.device)
    model = engine.module
    # Under ZeRO stage 3, this process holds only a part of each parameter; `ds_numel` is the size of the whole
    # parameter.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    x_BCT = torch.randn(options.batch, shape.encoder.channels, shape.encoder.samples, device=world.device)
    inputs = {k: v.to(world.device) for k, v in model.prepare(fake_batch(shape, options.batch), 0).items()}

    def step() -> None:
        engine.backward(engine(x_BCT, **inputs).mean())
        engine.step()

    seconds, memory = time_step(step, options.steps, world.device)
    profile = profile_step(step) if options.profile else None
    engine.destroy()
    rate = options.batch * world.size / seconds
    peak = peak_flops(world.device, precision, options.peak_tflops) or options.matmul[precision]["plain"] * 1e12
    flops = training_flops(shape)
    return {
        "code": "ours",
        "preset": preset,
        "parameters": parameters,
        "precision": precision,
        "zero_stage": stage,
        "compile": compiled,
        "checkpointing": options.checkpointing,
        "batch_per_process": options.batch,
        "processes": world.size,
        "step_s": seconds,
        "samples_per_s": rate,
        "tokens_per_s": rate * shape.encoder.tokens,
        "tflops_per_process": rate * flops / world.size / 1e12,
        "mfu": rate * flops / world.size / peak,
        "memory_gib": memory,
        "profile_s": profile,
    }


def load_reference(path: Path) -> Any:
    """Import the class MAEforEEG from a checkout of the released code, without the packages needed only in training."""
    code = path / "code"
    file = code / "sc_mbm" / "mae_for_eeg.py"
    if not file.is_file():
        raise SystemExit(f"{file}: no such file; --reference must be a checkout of bbaaii/DreamDiffusion")
    sys.path.insert(0, str(code))
    # The released code uses np.float, but newer versions of NumPy do not have np.float.
    np.float = float  # type: ignore[attr-defined]
    if importlib.util.find_spec("timm") is None:
        sys.modules.update(_stand_in_for_timm())
    import sc_mbm.mae_for_eeg as released  # type: ignore[import-not-found]

    return released.MAEforEEG


def _stand_in_for_timm() -> dict[str, types.ModuleType]:
    """Make a stand-in for timm with the plain transformer block of timm 0.5.4.

    The released code requires this version of timm.
    """
    from torch import nn

    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
            super().__init__()
            self.heads, self.scale = heads, (dim // heads) ** -0.5
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, N, C = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
            attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
            return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))

    class Block(nn.Module):
        def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 4.0,
            qkv_bias: bool = False,
            norm_layer: Any = nn.LayerNorm,
            **_: Any,
        ) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
            self.attn = Attention(dim, num_heads, qkv_bias)
            hidden = int(dim * mlp_ratio)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    names = ("timm", "timm.models", "timm.models.vision_transformer")
    modules = {name: types.ModuleType(name) for name in names}
    modules["timm.models.vision_transformer"].Block = Block  # type: ignore[attr-defined]
    return modules


def reference(path: Path, precision: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a training step of the released model, in eager mode with autocast and PyTorch's AdamW."""
    shape = PRESETS["released"]
    torch.manual_seed(0)
    model = load_reference(path)(
        time_len=shape.encoder.samples,
        patch_size=shape.encoder.patch,
        embed_dim=shape.encoder.dim,
        in_chans=shape.encoder.channels,
        depth=shape.encoder.depth,
        num_heads=shape.encoder.heads,
        decoder_embed_dim=shape.decoder.dim,
        decoder_depth=shape.decoder.depth,
        decoder_num_heads=shape.decoder.heads,
        mlp_ratio=shape.encoder.mlp_ratio,
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
    x_BCT = torch.randn(options.batch, shape.encoder.channels, shape.encoder.samples, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss, *_ = model(x_BCT, mask_ratio=shape.mask_ratio)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)
        optimizer.step()

    seconds, memory = time_step(step, options.steps, device)
    profile = profile_step(step) if options.profile else None
    rate = options.batch / seconds
    peak = peak_flops(device, precision, options.peak_tflops) or options.matmul[precision]["plain"] * 1e12
    flops = training_flops(shape)
    return {
        "code": "released",
        "preset": "released",
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "precision": precision,
        "batch_per_process": options.batch,
        "processes": 1,
        "step_s": seconds,
        "samples_per_s": rate,
        "tflops_per_process": rate * flops / 1e12,
        "mfu": rate * flops / peak,
        "memory_gib": memory,
        "profile_s": profile,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets",
        default="tiny",
        help="names of presets; an empty text ('') measures only the released code, and no preset",
    )
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--stages", default="1")
    parser.add_argument("--compile", default="0")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, default=8, help="number of windows that one process uses in one step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed = import_deepspeed(device)
    rank, size = launched_world()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    # The fastest matrix product is needed only if the peak speed is not given.
    names = [] if options.peak_tflops else options.precisions.split(",")
    options.matmul = {name: matmul_tflops(device, dtypes[name]) for name in names}
    results = []
    with process_group(deepspeed, device) as world:
        for preset in filter(None, options.presets.split(",")):
            for precision in options.precisions.split(","):
                for stage in map(int, options.stages.split(",")):
                    if precision == "bf16" and stage == 0:
                        continue
                    for compiled in (word == "1" for word in options.compile.split(",")):
                        results.append(ours(deepspeed, world, preset, precision, stage, compiled, options))
                        if rank == 0:
                            print(json.dumps(results[-1]), flush=True)
        if options.reference is not None and size == 1:
            for precision in options.precisions.split(","):
                results.append(reference(options.reference, precision, device, options))
                print(json.dumps(results[-1]), flush=True)
    if options.out is not None and rank == 0:
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        machine = {
            "device": name,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "matmul_tflops": options.matmul,
        }
        write_json(options.out, {"machine": machine, "command": sys.argv, "results": results})


if __name__ == "__main__":
    main()
