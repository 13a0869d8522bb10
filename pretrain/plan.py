"""Estimate memory and time of a pretraining run: ``dreamscale plan CONFIG``, or ``--preset paper --gpus 8``.

The numbers of a plan are computed, not measured. They are the bytes that ZeRO keeps on each GPU, the bytes that
autograd keeps for the backward pass, and the number of floating-point operations. The time is computed from these
numbers and from a model-FLOPs utilisation that the user gives. The plan also lists all assumptions.
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
    from rich.console import Console

    from pretrain.model.config import MaskedAutoencoderConfig

GIB = 2**30
MEMORY_GIB: dict[str, float] = {
    # Memory sizes as the GPU's driver reports them; the sizes that the maker advertises are a little different.
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
"""Memory in GiB for each kind of GPU. The names are the same as in `pretrain.model.flops.PEAK_TFLOPS`."""
DEFAULT_WINDOWS = 120_000
"""Number of training windows that is assumed if there is no dataset whose windows can be counted: the number in
DreamDiffusion's corpus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate the memory, the computation and the duration of a pretraining run."""

    run_config: str | None = None
    """Config file of 'dreamscale pretrain'; it gives the default values of other keys, such as batch_size."""
    preset: str | None = None
    """Name of a model preset (see `pretrain.model.presets`). Give either a preset or a config."""
    gpus: int | None = None
    """Number of GPUs over all machines. By default, num_processes of the config is used, or 1 if there is no config."""
    gpu: str = "H200"
    """Kind of GPU: B200, GH200, H200, H100, A100, A40, L40S, RTX 4090 and the like."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU in GiB, if it differs from the usual memory of this kind of GPU."""
    peak_tflops: float | None = None
    """Peak speed of one GPU in TFLOP/s, for dense matrices at the run's precision. Give this speed if the kind of GPU
    is unknown, or if the GPU's speed differs from its data sheet."""
    mfu: float = 0.4
    """Expected model-FLOPs utilisation: the model's floating-point operations per second, divided by the peak speed.
    The metric mfu in metrics.jsonl is the measured utilisation. Recomputed activations do not count, so activation
    checkpointing lowers the utilisation by up to a quarter."""
    batch_size: int | None = None
    """Number of windows in one optimiser step, summed over all GPUs. By default, batch_size of the config is used, or
    100 windows for each GPU if there is no config."""
    micro_batch_size: int | None = None
    """Number of windows that one GPU computes in one forward pass. By default, micro_batch_size of the config is used,
    or the GPU's whole share of the batch."""
    precision: Literal["fp32", "bf16"] | None = None
    """Number format of the computation. By default, the precision in the config is used, or bf16 if there is no
    config."""
    offload: Literal["none", "optimizer", "all"] | None = None
    """What is kept in the CPU's memory. By default, the key offload of the config is used, or 'none' if there is no
    config."""
    checkpointing: bool | None = None
    """Whether activations are recomputed in the backward pass. By default, the setting in the model's config is used.
    The printed table shows the memory with and without recomputed activations."""
    channels: int | None = None
    """Number of recorded channels of a window, for the montage tokenizer. By default, a window has the largest number
    of channels that the montage tokenizer allows."""
    windows: int | None = None
    """Number of training windows. By default, the windows in the config's dataset are counted; if there is no dataset,
    the default is 120,000."""
    epochs: float | None = None
    """Number of passes over the training windows. By default, the number of epochs in the config is used, or 500 if
    there is no config."""
    gpus_per_machine: int = 8
    """Number of GPUs in one machine. The GPUs of one machine communicate without the network."""
    link_gb_s: float = 400.0
    """Bandwidth in GB/s between one GPU and the other GPUs of its machine."""
    network_gb_s: float = 40.0
    """Bandwidth in GB/s between one GPU and other machines. All GPUs of a machine send at the same time, each through
    its own network link; if they share one link, divide its bandwidth by the number of GPUs."""
    latency_us: float = 10.0
    """Seconds from the start of a message to its first byte, in microseconds. In a ring of GPUs, each message has as
    many parts as there are other GPUs."""
    scale: list[int] = dataclasses.field(default_factory=list)
    """Numbers of GPUs for which the plan also estimates the speed, for example '[1, 8, 64, 512]'. Each GPU then
    computes as many windows in a step as in the planned run."""
    loader_windows_per_s: float = 5000.0
    """Windows that one loading process prepares in one second. docs/performance.md gives a measured number."""
    loaders_per_machine: int = 32
    """Number of processor cores of a machine that load windows."""
    storage_gb_s: float | None = None
    """GB/s that the file server or the object store delivers to all machines together. By default, storage is assumed
    to be fast enough."""
    reserve_gib: float = 3.0
    """Memory of each GPU in GiB that is reserved for the driver, libraries and fragmentation."""
    output: str | None = None
    """JSON file to which the plan is written. By default, the plan is only printed."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "gpus", "batch_size", "micro_batch_size", "channels", "windows", "gpus_per_machine")
        check_at_least(self, 1, "loaders_per_machine")
        check_at_least(self, 0, "latency_us")
        if any(gpus < 1 for gpus in self.scale):
            raise ValueError(f"scale is {self.scale}; each number of GPUs must be at least 1")
        check_at_least(self, 0, "reserve_gib")
        for name in (
            "gpu_memory_gib",
            "peak_tflops",
            "epochs",
            "link_gb_s",
            "network_gb_s",
            "loader_windows_per_s",
            "storage_gb_s",
        ):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A planned pretraining run, with all defaults filled in."""

    model: MaskedAutoencoderConfig
    """Architecture and objective of the model."""
    name: str
    """Name of the config or the preset."""
    gpus: int
    """Number of GPUs over all machines."""
    gpu: str
    """Kind of GPU."""
    gpu_gib: float
    """Memory of one GPU in GiB."""
    peak: float
    """Peak speed of one GPU in FLOP/s."""
    batch_size: int
    """Number of windows in one optimiser step."""
    micro: int
    """Number of windows that one GPU computes in one forward pass."""
    precision: str
    """Number format of the computation: fp32 or bf16."""
    zero_stage: int
    """Stage of ZeRO in the run's config."""
    offload: str
    """What is kept in the CPU's memory: none, optimizer or all."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    windows: int
    """Number of training windows."""
    windows_from: str
    """Text that says where the number of training windows comes from."""
    epochs: float
    """Number of passes over the training windows."""
    steps: int
    """Number of optimiser steps in the run."""


def resolve(config: PlanConfig) -> Request:
    """Fill in the default values of a plan's config.

    Parameters
    ----------
    config : PlanConfig
        Config of the plan.

    Returns
    -------
    Request
        The planned run, with all defaults filled in.

    Raises
    ------
    RequestError
        If not exactly one of config and preset is given, or if the preset or the GPU is unknown. If `batch_size` cannot
        be divided evenly among the GPUs, or `micro_batch_size` does not divide a GPU's share of the batch.
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
            raise RequestError(f"preset '{config.preset}' is unknown; use one of {', '.join(PRESETS)}")
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
        raise RequestError(f"batch_size is {batch_size}; it must be a multiple of gpus, which is {gpus}")
    share = batch_size // gpus
    asked = config.micro_batch_size or (run.micro_batch_size if run else None)
    if asked is not None and share % asked:
        if config.micro_batch_size is not None:
            raise RequestError(f"micro_batch_size is {asked}; it must divide {share}, a GPU's share of batch_size")
        asked = None
    windows, windows_from = config.windows, "--windows"
    if windows is None and run is not None:
        datasets = [as_path(path) for path in run.datasets or [run.dataset]]
        # Count the windows only if all datasets of the config are on this machine: a dataset may be on another machine,
        # or not exist yet.
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
    """Compute the memory and the time of a planned run.

    Parameters
    ----------
    config : PlanConfig
        Config of the plan.

    Returns
    -------
    dict
        The keys are ``request``, ``model`` (parameters, tokens, FLOPs), ``memory`` (two entries for each possible ZeRO
        stage, without and with activation checkpointing), ``time``, ``scale`` and ``assumptions``. Memory is in bytes.
        The name of each value in ``time`` contains its unit.

    Raises
    ------
    RequestError
        If `resolve` raises an error, or if `channels` is given for the temporal tokenizer.
    """
    import torch

    from pretrain.model.build import build_autoencoder, count_parameters
    from pretrain.model.flops import training_flops
    from pretrain.scale import Network, Work, scale_row, step_exchange, step_seconds
    from pretrain.training.estimates import activation_bytes, state_bytes, tokens_of

    request = resolve(config)
    model = request.model
    if config.channels is not None:
        if not model.encoder.by_channel:
            raise RequestError(
                "the key 'channels' can be set only for a model with the montage tokenizer, and this model has the "
                "temporal tokenizer, which always has 128 channels; leave 'channels' out"
            )
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
    share = request.batch_size // request.gpus
    work = Work(
        windows=share,
        micro_batches=share // request.micro,
        arithmetic_s=flops * share / (request.peak * config.mfu),
        parameters=parameters,
        zero_stage=request.zero_stage,
        precision=request.precision,
        window_bytes=2.0 * model.encoder.signal_rows() * model.encoder.samples,
        loader_windows_per_s=config.loader_windows_per_s,
        loaders_per_machine=config.loaders_per_machine,
        storage=config.storage_gb_s and config.storage_gb_s * 1e9,
    )
    network = Network(
        gpus_per_machine=config.gpus_per_machine,
        link=config.link_gb_s * 1e9,
        network=config.network_gb_s * 1e9,
        latency_s=config.latency_us / 1e6,
    )
    exchange_s = step_exchange(work, request.gpus, network)
    offloaded = [f"offload {request.offload}: gradients are counted on the GPU; the transfer to the CPU takes no time"]
    offloaded = offloaded if request.offload != "none" else []
    step_s = step_seconds(work.arithmetic_s, exchange_s)
    return {
        "request": {k: v for k, v in dataclasses.asdict(request).items() if k != "model"},
        "model": {
            "parameters": parts | {"total": parameters},
            "tokens": dict(zip(("encoder", "decoder"), tokens_of(model), strict=True)),
            "training_flops_a_window": flops,
        },
        "memory": rows,
        "time": {
            "arithmetic_s": work.arithmetic_s,
            "exchange_s": exchange_s,
            "exchanged_bytes_a_gpu": work.sent(request.gpus),
            "step_s": step_s,
            "windows_per_s": request.batch_size / step_s,
            "steps": request.steps,
            "days": request.steps * step_s / 86400,
            "gpu_hours": request.steps * step_s * request.gpus / 3600,
        },
        "scale": [dataclasses.asdict(scale_row(gpus, work, network)) for gpus in config.scale],
        "assumptions": [
            f"{request.gpu}: {request.peak / 1e12:g} TFLOP/s dense at {request.precision}, {request.gpu_gib:g} GiB, "
            f"of which {config.reserve_gib:g} GiB are reserved for driver, libraries and fragmentation",
            f"model-FLOPs utilisation {config.mfu:.0%}, as in metrics.jsonl: recomputed activations do not count",
            f"{request.windows:,} windows ({request.windows_from}), {request.epochs:g} passes",
            "gradients are accumulated and sent in float32; AdamW has two moments; ZeRO keeps float32 master weights",
            "stage 3 keeps up to 1e9 gathered weights, DeepSpeed's default; bucket sizes as set by Dreamscale",
            "attention is fused; the activations do not include temporary buffers, which may need 25 % more memory",
            f"{config.link_gb_s:g} GB/s for each GPU inside a machine of {config.gpus_per_machine} GPUs, "
            f"{config.network_gb_s:g} GB/s for each GPU to other machines, {config.latency_us:g} µs of latency; "
            "communication overlaps the backward pass, which is two thirds of the arithmetic",
            "evaluation and checkpoints take no time; in the step, waiting for data takes no time",
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
    if plan["scale"]:
        show_scale(console, plan["scale"])
    console.print("Assumed:")
    for line in plan["assumptions"]:
        console.print(f"- {line}")


def show_scale(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print how the speed grows with the number of GPUs.

    Parameters
    ----------
    console : Console
        Where to print.
    rows : list of dict
        The fields of each `pretrain.scale.ScaleRow`.
    """
    from rich.table import Table

    table = Table(title="More GPUs, the same number of windows for each GPU", title_justify="left")
    heads = ("GPUs", "batch", "communication (s)", "step (s)", "windows/s", "efficiency")
    for name in (*heads, "loaders a machine", "read (GB/s)", "checkpoint (s)"):
        table.add_column(name, justify="right")
    table.add_column("limited by")
    for row in rows:
        table.add_row(
            f"{row['gpus']:,}",
            f"{row['batch_size']:,}",
            f"{row['exchange_s']:.4f}",
            f"{row['step_s']:.4f}",
            f"{row['windows_per_s']:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['loaders']:,}",
            f"{row['read_gb_s']:.2f}",
            f"{row['checkpoint_s']:.2f}",
            ", ".join(row["limits"]) or "computation",
        )
    console.print(table)


def run_plan(config: PlanConfig) -> int:
    """Print a plan. If `output` is set, also write the plan to this file.

    Parameters
    ----------
    config : PlanConfig
        Config of the plan.

    Returns
    -------
    int
        Exit code 0, even if the run does not fit into the memory.

    Raises
    ------
    RequestError
        If the plan cannot be computed or written.
    """
    from data_sharding.common.files import write_json

    plan = make_plan(config)
    show(plan)
    if config.output is not None:
        try:
            write_json(Path(config.output), plan)
        except OSError as error:
            raise RequestError(
                f"output {config.output}: cannot be written ({error.strerror}); choose another output"
            ) from None
    return EXIT_DONE


main = command(PlanConfig, run_plan, prog="dreamscale plan", positionals=("run_config",), aliases={"-o": "output"})


if __name__ == "__main__":
    sys.exit(main())
