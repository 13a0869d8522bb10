"""Estimate memory and time of a pretraining run: ``dreamscale plan CONFIG``, or ``--preset paper --gpus 8``.

The numbers are counted, not measured: the bytes that ZeRO leaves on each GPU, the tensors that autograd keeps for the
backward pass, and the arithmetic. The time follows from a utilisation that the user states. Every assumption is printed
with the result.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_sharding.common.config import command, parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError
from pretrain.runs.config import check_at_least

if TYPE_CHECKING:
    from pretrain.model.config import MaskedAutoencoderConfig

GIB = 2**30
MEMORY_GIB: dict[str, float] = {
    # As reported by the driver, which differs a little from the advertised size.
    "B200": 179.0,
    "GH200": 95.0,
    "H200": 140.0,
    "H100 PCIe": 79.6,
    "H100 NVL": 93.6,
    "H100": 79.6,
    "A100": 80.0,
    "A800": 80.0,
    "A40": 45.0,
    "A10": 22.5,
    "RTX A6000": 48.0,
    "L40S": 45.0,
    "L4": 22.5,
    "RTX 4090": 24.0,
    "RTX 3090": 24.0,
    "MI300X": 192.0,
}
"""Memory in GiB by kind of GPU, with the names of `pretrain.model.flops.PEAK_TFLOPS`."""
DEFAULT_WINDOWS = 120_000
"""Number of windows in DreamDiffusion's corpus, used if there is no dataset to count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate memory, arithmetic and duration of a pretraining run."""

    run_config: str | None = None
    """Config of 'dreamscale pretrain'. It gives the defaults of the keys below."""
    preset: str | None = None
    """Name of a model preset (`pretrain.model.presets`), in place of a config."""
    gpus: int | None = None
    """Number of GPUs over all machines; by default num_processes of the config, or 1 without a config."""
    gpu: str = "H200"
    """Kind of GPU: B200, GH200, H200, H100, A100, A40, L40S, RTX 4090 and the like."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU in GiB, if it differs from the usual size of that kind."""
    peak_tflops: float | None = None
    """Peak of one GPU in dense TFLOP/s at the run's precision, if it is unknown or differs from the data sheet."""
    mfu: float = 0.4
    """Model-FLOPs utilisation that you expect, as defined for metrics.jsonl: the model's own arithmetic as a share of
    the peak. The recomputation of activations does not count, so activation checkpointing lowers the utilisation by
    up to a quarter."""
    batch_size: int | None = None
    """Windows of one optimiser step over all GPUs; by default the config's, or 100 for each GPU without a config."""
    micro_batch_size: int | None = None
    """Windows of one GPU in one forward pass; by default the config's, or the GPU's whole share of the batch."""
    precision: Literal["fp32", "bf16"] | None = None
    """Number format; by default the config's, or bf16 without a config."""
    offload: Literal["none", "optimizer", "all"] | None = None
    """What is kept in the CPU's memory; by default as in the config, or none without a config."""
    checkpointing: bool | None = None
    """Recompute activations in the backward pass; by default as in the model's config. The table shows both cases."""
    channels: int | None = None
    """Number of true channels of a window, for the montage tokenizer; by default the largest number it allows."""
    windows: int | None = None
    """Number of training windows; by default counted in the config's dataset if that exists, else 120,000."""
    epochs: float | None = None
    """Passes over the training windows; by default the config's, or 500 without a config."""
    gpus_per_machine: int = 8
    """Number of GPUs in one machine, which communicate without the network."""
    link_gb_s: float = 400.0
    """Bandwidth in GB/s between one GPU and the other GPUs of its machine."""
    network_gb_s: float = 40.0
    """Bandwidth in GB/s between one GPU and other machines."""
    reserve_gib: float = 3.0
    """Memory of each GPU in GiB that is reserved for the driver, libraries and fragmentation."""
    output: str | None = None
    """JSON file to which the plan is written as well."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "gpus", "batch_size", "micro_batch_size", "channels", "windows", "gpus_per_machine")
        check_at_least(self, 0, "reserve_gib")
        for name in ("gpu_memory_gib", "peak_tflops", "epochs", "link_gb_s", "network_gb_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A planned pretraining run, with all defaults filled in."""

    model: MaskedAutoencoderConfig
    """Shape and objective."""
    name: str
    """Name of the config or the preset."""
    gpus: int
    """Number of GPUs over all machines."""
    gpu: str
    """Kind of GPU."""
    gpu_gib: float
    """Memory of one GPU in GiB."""
    peak: float
    """Peak of one GPU in FLOP/s."""
    batch_size: int
    """Windows of one optimiser step."""
    micro: int
    """Windows of one GPU in one forward pass."""
    precision: str
    """fp32 or bf16."""
    zero_stage: int
    """ZeRO's stage in the config."""
    offload: str
    """none, optimizer or all."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    windows: int
    """Number of training windows."""
    windows_from: str
    """Source of that number."""
    epochs: float
    """Passes over the training windows."""
    steps: int
    """Optimiser steps."""


def resolve(config: PlanConfig) -> Request:
    """Fill in the defaults of a request.

    Parameters
    ----------
    config : PlanConfig
        The request.

    Returns
    -------
    Request
        The request with all defaults filled in.

    Raises
    ------
    RequestError
        If there is no config and no preset, or both; if the GPU is unknown; or if batch_size does not divide evenly.
    """
    from data_sharding.common.storage import as_path
    from data_sharding.dataset.dataset import MANIFEST, read_manifest
    from pretrain.model.flops import PEAK_TFLOPS
    from pretrain.model.presets import PRESETS
    from pretrain.training.config import PretrainConfig

    if (config.run_config is None) == (config.preset is None):
        raise RequestError(f"give either a config of 'dreamscale pretrain' or --preset ({', '.join(PRESETS)})")
    run = None
    if config.run_config is not None:
        run = parse_config(PretrainConfig, [config.run_config], prog="dreamscale plan", positionals=("config",))
        model, name = run.model, config.run_config
    else:
        if config.preset not in PRESETS:
            raise RequestError(f"preset '{config.preset}' is unknown; there are {', '.join(PRESETS)}")
        model, name = PRESETS[config.preset], f"preset {config.preset}"
    known = next((kind for kind in PEAK_TFLOPS if kind.lower() == config.gpu.lower()), None)
    precision = config.precision or (run.precision if run else "bf16")
    gib = config.gpu_memory_gib or MEMORY_GIB.get(known or "")
    peak = config.peak_tflops or (PEAK_TFLOPS[known][precision] if known else None)
    if gib is None or peak is None:
        raise RequestError(
            f"gpu '{config.gpu}' is unknown; use one of {', '.join(PEAK_TFLOPS)}, or give --gpu_memory_gib and "
            "--peak_tflops"
        )
    gpus = config.gpus or (run.num_processes if run else 1)
    batch_size = config.batch_size or (run.batch_size if run else 100 * gpus)
    if batch_size % gpus:
        raise RequestError(f"batch_size {batch_size} is no multiple of gpus {gpus}")
    share = batch_size // gpus
    asked = config.micro_batch_size or (run.micro_batch_size if run else None)
    if asked is not None and share % asked:
        if config.micro_batch_size is not None:
            raise RequestError(f"micro_batch_size is {asked}; it must divide {share}, a GPU's share of batch_size")
        asked = None
    windows, windows_from = config.windows, "--windows"
    if windows is None and run is not None:
        datasets = [as_path(path) for path in run.datasets or [run.dataset]]
        # The dataset may not exist yet, or exist on another machine only.
        if all((path / MANIFEST).is_file() for path in datasets):
            windows = sum(read_manifest(path).samples("train") for path in datasets)
            windows_from = ", ".join(map(str, datasets))
    if windows is None:
        windows, windows_from = DEFAULT_WINDOWS, "the size of DreamDiffusion's corpus"
    epochs = config.epochs or (run.epochs if run else 500.0)
    steps = math.ceil(epochs * windows / batch_size)
    if run is not None and run.steps is not None and config.epochs is None:
        steps, epochs = run.steps, run.steps * batch_size / windows
    return Request(
        model=model,
        name=name,
        gpus=gpus,
        gpu=known or config.gpu,
        gpu_gib=gib,
        peak=peak * 1e12,
        batch_size=batch_size,
        micro=asked or share,
        precision=precision,
        zero_stage=run.zero_stage if run else 1,
        offload=config.offload or (run.offload if run else "none"),
        checkpointing=model.compute.checkpointing if config.checkpointing is None else config.checkpointing,
        windows=windows,
        windows_from=windows_from,
        epochs=epochs,
        steps=steps,
    )


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """Compute a plan.

    Parameters
    ----------
    config : PlanConfig
        The request.

    Returns
    -------
    dict
        ``request``, ``model`` (parameters, tokens, flops), ``memory`` (a row for each stage, with and without
        checkpointing), ``time`` and ``assumptions``; bytes, seconds and FLOPs.

    Raises
    ------
    RequestError
        As for `resolve`.
    """
    import torch

    from pretrain.model.build import build_autoencoder, count_parameters
    from pretrain.model.flops import training_flops
    from pretrain.training.estimates import activation_bytes, exchanged_bytes, state_bytes, tokens_of

    request = resolve(config)
    model = request.model
    if config.channels is not None:
        if not model.encoder.by_channel:
            raise RequestError("channels is for the montage tokenizer only; the temporal tokenizer always has 128 rows")
        model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, channels=config.channels))
    with torch.device("meta"):
        built = build_autoencoder(model)
    parts = {"encoder": count_parameters(built.encoder), "decoder": count_parameters(built.decoder)}
    parameters = sum(parts.values())
    flops = training_flops(model)
    usable = (request.gpu_gib - config.reserve_gib) * GIB
    rows = []
    for stage in range(4):
        if stage == 0 and request.precision == "bf16":
            continue
        state = state_bytes(
            parameters, zero_stage=stage, gpus=request.gpus, precision=request.precision, offload=request.offload
        )
        for checkpointing in (False, True):
            window = activation_bytes(model, precision=request.precision, checkpointing=checkpointing)
            rows.append(
                {
                    "zero_stage": stage,
                    "checkpointing": checkpointing,
                    **dataclasses.asdict(state),
                    "activations": window * request.micro,
                    "total": state.total + window * request.micro,
                    "fits": state.total + window * request.micro <= usable,
                    "largest_micro_batch": max(0, int((usable - state.total) // window)),
                }
            )
    micro_batches = request.batch_size // request.gpus // request.micro
    arithmetic_s = flops * request.batch_size / (request.gpus * request.peak * config.mfu)
    sent = exchanged_bytes(
        parameters,
        zero_stage=request.zero_stage,
        gpus=request.gpus,
        precision=request.precision,
        micro_batches=micro_batches,
    )
    speed = config.link_gb_s if request.gpus <= config.gpus_per_machine else config.network_gb_s
    exchange_s = sent / (speed * 1e9)
    offloaded = [f"offload {request.offload}: gradients are counted on the GPU; the transfer to the CPU takes no time"]
    offloaded = offloaded if request.offload != "none" else []
    step_s = arithmetic_s + max(0.0, exchange_s - arithmetic_s * 2 / 3)
    return {
        "request": {k: v for k, v in dataclasses.asdict(request).items() if k != "model"},
        "model": {
            "parameters": parts | {"total": parameters},
            "tokens": dict(zip(("encoder", "decoder"), tokens_of(model), strict=True)),
            "training_flops_a_window": flops,
        },
        "memory": rows,
        "time": {
            "arithmetic_s": arithmetic_s,
            "exchange_s": exchange_s,
            "exchanged_bytes_a_gpu": sent,
            "step_s": step_s,
            "windows_per_s": request.batch_size / step_s,
            "steps": request.steps,
            "days": request.steps * step_s / 86400,
            "gpu_hours": request.steps * step_s * request.gpus / 3600,
        },
        "assumptions": [
            f"{request.gpu}: {request.peak / 1e12:g} TFLOP/s dense at {request.precision}, {request.gpu_gib:g} GiB, "
            f"of which {config.reserve_gib:g} GiB are reserved for driver, libraries and fragmentation",
            f"model-FLOPs utilisation {config.mfu:.0%}, as in metrics.jsonl: recomputed activations do not count",
            f"{request.windows:,} windows ({request.windows_from}), {request.epochs:g} passes",
            "gradients are accumulated and sent in float32; AdamW has two moments; ZeRO keeps float32 master weights",
            "stage 3 keeps up to 1e9 gathered weights, DeepSpeed's default; bucket sizes as set by Dreamscale",
            "attention is fused; the activations do not include temporary buffers, which may need 25 % more memory",
            f"{speed:g} GB/s for each GPU between {'machines' if request.gpus > config.gpus_per_machine else 'GPUs'}; "
            "communication overlaps the backward pass, which is two thirds of the arithmetic",
            "evaluation, checkpoints and waiting for data take no time",
            *offloaded,
        ],
    }


def show(plan: dict[str, Any]) -> None:
    """Print a plan.

    Parameters
    ----------
    plan : dict
        Result of `make_plan`.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    request, model, time = plan["request"], plan["model"], plan["time"]
    counts = model["parameters"]
    console.print(
        f"[bold]{request['name']}[/]: {counts['encoder'] / 1e6:,.1f}M + {counts['decoder'] / 1e6:,.1f}M parameters, "
        f"{model['tokens']['encoder']} of {model['tokens']['decoder']} tokens visible, "
        f"{model['training_flops_a_window'] / 1e9:,.1f} GFLOP for each window"
    )
    table = Table(
        title=f"GiB on each of {request['gpus']} {request['gpu']}, {request['micro']} windows in one forward pass, "
        f"{request['precision']}",
        title_justify="left",
    )
    for name in ("ZeRO", "recompute", "weights", "gradients", "optimizer", "buffers", "activations", "total"):
        table.add_column(name, justify="left" if name in ("ZeRO", "recompute") else "right")
    table.add_column("fits", justify="center")
    table.add_column("largest micro batch", justify="right")
    for row in plan["memory"]:
        chosen = row["zero_stage"] == request["zero_stage"] and row["checkpointing"] == request["checkpointing"]
        table.add_row(
            f"{row['zero_stage']}{' <- this run' if chosen else ''}",
            "yes" if row["checkpointing"] else "no",
            *(
                f"{row[name] / GIB:,.2f}"
                for name in ("weights", "gradients", "optimizer", "buffers", "activations", "total")
            ),
            "yes" if row["fits"] else "[bold red]no[/]",
            f"{row['largest_micro_batch']:,}" if row["largest_micro_batch"] else "[bold red]none[/]",
            style="bold" if chosen else None,
        )
    console.print(table)
    console.print(
        f"A step of {request['batch_size']} windows: {time['step_s']:.3f} s ({time['arithmetic_s']:.3f} s of "
        f"arithmetic, {time['exchange_s']:.3f} s of communication), {time['windows_per_s']:,.0f} windows/s."
    )
    console.print(f"[bold]{time['steps']:,} steps: {time['days']:,.2f} days[/], {time['gpu_hours']:,.0f} GPU hours.")
    console.print("Assumed:")
    for line in plan["assumptions"]:
        console.print(f"- {line}")


def run_plan(config: PlanConfig) -> int:
    """Print a plan, and write it to `output` if that is set.

    Parameters
    ----------
    config : PlanConfig
        The request.

    Returns
    -------
    int
        0, whether the run fits or not.

    Raises
    ------
    RequestError
        If the request cannot be met.
    """
    from data_sharding.common.files import write_json

    plan = make_plan(config)
    show(plan)
    if config.output is not None:
        try:
            write_json(Path(config.output), plan)
        except OSError as error:
            raise RequestError(f"output {config.output}: cannot be written ({error.strerror})") from None
    return EXIT_DONE


main = command(PlanConfig, run_plan, prog="dreamscale plan", positionals=("run_config",), aliases={"-o": "output"})


if __name__ == "__main__":
    sys.exit(main())
