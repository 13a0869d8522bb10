"""What a pretraining needs before it is started: ``dreamscale plan CONFIG``, or ``--preset paper --gpus 8``.

Counts, not measurements: bytes that ZeRO leaves on each GPU, tensors that the backward pass keeps, arithmetic, and what
these come to at a utilisation that the user states. Every assumption is printed with the answer.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main

if TYPE_CHECKING:
    from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig

GIB = 2**30
MEMORY_GIB: dict[str, float] = {
    # What the driver reports, which is a little less or more than the name says.
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
"""GiB by the names of `pretrain.model.flops.PEAK_TFLOPS`."""
DEFAULT_WINDOWS = 120_000
"""Windows of DreamDiffusion's corpus, where no dataset is there to be counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Memory, arithmetic and days of a pretraining."""

    run_config: str | None = None
    """Config of 'dreamscale pretrain'; what follows is taken from it where it is not given."""
    preset: str | None = None
    """Name of a shape (`pretrain.model.presets`), in place of a config."""
    gpus: int | None = None
    """GPUs over all machines; num_processes of the config by default, else 1."""
    gpu: str = "H200"
    """Kind of GPU: B200, GH200, H200, H100, A100, A40, L40S, RTX 4090 and the like."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU in GiB, where it is not the usual one."""
    peak_tflops: float | None = None
    """Dense TFLOP/s of a GPU at the run's precision, where it is not known or not the maker's."""
    mfu: float = 0.4
    """Model-FLOPs utilisation that you expect, as metrics.jsonl has it: share of the peak that the model's own
    arithmetic reaches. What is computed again does not count as such, so checkpointing lowers it by up to a quarter."""
    batch_size: int | None = None
    """Windows of one step over all GPUs; the config's by default, else 100 a GPU."""
    micro_batch_size: int | None = None
    """Windows of one GPU at once; by default the config's, else its whole share."""
    precision: Literal["fp32", "bf16"] | None = None
    """The config's by default, else bf16."""
    offload: Literal["none", "optimizer", "all"] | None = None
    """What waits in the processor's memory; the config's by default, else none."""
    checkpointing: bool | None = None
    """Recompute activations; as the model says by default. The table shows both."""
    channels: int | None = None
    """Montage tokenizer: true channels of a window; its largest number by default."""
    windows: int | None = None
    """Training windows; by default the dataset's where it is there, else 120,000."""
    epochs: float | None = None
    """Passes over them; the config's by default, else 500."""
    gpus_per_machine: int = 8
    """GPUs that talk to each other without the network."""
    link_gb_s: float = 400.0
    """GB/s that a GPU exchanges with the others of its machine."""
    network_gb_s: float = 40.0
    """GB/s that a GPU exchanges with other machines."""
    reserve_gib: float = 3.0
    """GiB of each GPU for the driver, the libraries and gaps between tensors."""
    output: str | None = None
    """JSON file to write, too."""

    def __post_init__(self) -> None:
        for name in ("gpus", "batch_size", "micro_batch_size", "channels", "windows", "gpus_per_machine"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("gpu_memory_gib", "peak_tflops", "epochs", "link_gb_s", "network_gb_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it must be above 0 and at most 1")
        if self.reserve_gib < 0:
            raise ValueError(f"reserve_gib is {self.reserve_gib}; it must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a GPU holds whatever the batch."""

    weights: float
    """Weights that the model computes with."""
    gradients: float
    """Gradients as they are added up."""
    optimizer: float
    """float32 master weights, where they are kept apart, and Adam's two moments."""
    buffers: float
    """Gathered weights of stage 3, and buckets of the exchange."""

    @property
    def total(self) -> float:
        """Sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, offload: str = "none") -> StateBytes:
    """Count what ZeRO leaves on a GPU.

    Parameters
    ----------
    parameters : int
        Trainable values of the model.
    zero_stage : int
        0 spreads nothing, 1 the optimiser's state, 2 and the gradients, 3 and the weights.
    gpus : int
        Over how many.
    precision : str
        fp32 or bf16; gradients add up in float32 either way.
    offload : str
        What waits in the processor's memory: none, optimizer, or all; where the stage has it. Gradients are counted
        here all the same.

    Returns
    -------
    StateBytes
        Bytes of one GPU.

    References
    ----------
    .. [1] Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020.
    """
    value = 2 if precision == "bf16" else 4
    weights = parameters * value / (gpus if zero_stage == 3 else 1)
    gradients = parameters * 4 / (gpus if zero_stage >= 2 else 1)
    moments = parameters * 8 / (gpus if zero_stage else 1)
    # Stage 0 steps the weights themselves; ZeRO keeps a float32 copy of its part, for fp32, too.
    master = parameters * 4 / gpus if zero_stage else 0
    # As `pretrain.training.deepspeed_engine` sets them; two of them where the exchange overlaps the backward pass.
    bucket = min(5e8, max(parameters, 2**16)) * value
    gathered = min(parameters, 10**9) * value if zero_stage == 3 else 0
    # Stage 1 adds each bf16 gradient to the float32 ones at once and reduces those where they lie.
    in_place = precision == "bf16" and zero_stage == 1
    buckets = 2 if zero_stage >= 2 else 1 if gpus > 1 and not in_place else 0
    buffers = gathered + buckets * bucket
    optimizer = 0.0 if offload != "none" and zero_stage else moments + master
    weights = 0.0 if offload == "all" and zero_stage == 3 else weights
    return StateBytes(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buffers)


def tokens_of(model: MaskedAutoencoderConfig, channels: int | None = None) -> tuple[int, int]:
    """Count the tokens that the two halves of a model work on.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    channels : int, optional
        True channels, for the montage tokenizer; the most there may be by default.

    Returns
    -------
    encoder, decoder : int
        Tokens of a window, class token included.
    """
    from pretrain.model.masking import visible_tokens

    shape = model.encoder
    rows = shape.token_rows(channels)
    return rows * visible_tokens(shape.tokens, model.mask_ratio) + 1, rows * shape.tokens + 1


def activation_bytes(
    model: MaskedAutoencoderConfig, *, precision: str, checkpointing: bool, channels: int | None = None
) -> float:
    """Count what the backward pass keeps of one window.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    precision : str
        fp32 or bf16.
    checkpointing : bool
        Whether blocks are computed again.
    channels : int, optional
        True channels, for the montage tokenizer.

    Returns
    -------
    float
        Bytes, for fused attention.
    """
    value = 2 if precision == "bf16" else 4
    seen, every = tokens_of(model, channels)

    def block(shape: EncoderConfig | DecoderConfig, tokens: int) -> float:
        # Input, norm, q k v, attention's output, sum, norm: 8 widths; before and after the GELU: 2 hidden widths.
        # Beside them two float32 statistics a norm and one a head and token.
        wide = tokens * (8 * shape.dim + 2 * int(shape.dim * shape.mlp_ratio)) * value
        return wide + tokens * 4 * (4 + shape.heads)

    stacks = [(model.encoder, seen), (model.decoder, every)]
    if checkpointing:
        kept = sum(shape.depth * tokens * shape.dim * value for shape, tokens in stacks)
        kept += max(block(shape, tokens) for shape, tokens in stacks)
    else:
        kept = sum(shape.depth * block(shape, tokens) for shape, tokens in stacks)
    # Last norms and what they feed, the window in float32 and as the model casts it, and the errors in float32.
    ends = sum(2 * tokens * shape.dim * value for shape, tokens in stacks)
    rows = model.encoder.signal_rows(channels)
    return kept + ends + rows * model.encoder.samples * (8 + value % 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A pretraining as it is planned, everything decided."""

    model: MaskedAutoencoderConfig
    """Shape and objective."""
    name: str
    """Where it comes from."""
    gpus: int
    """Over all machines."""
    gpu: str
    """Kind."""
    gpu_gib: float
    """Memory of one in GiB."""
    peak: float
    """FLOP/s of one."""
    batch_size: int
    """Windows a step."""
    micro: int
    """Windows of one GPU at once."""
    precision: str
    """fp32 or bf16."""
    zero_stage: int
    """What the run asks for."""
    offload: str
    """none, optimizer or all."""
    checkpointing: bool
    """Whether activations are computed again."""
    windows: int
    """Training windows."""
    windows_from: str
    """Who says so."""
    epochs: float
    """Passes over them."""
    steps: int
    """Optimiser steps."""


def resolve(config: PlanConfig) -> Request:
    """Decide what the user left open.

    Parameters
    ----------
    config : PlanConfig
        The request.

    Returns
    -------
    Request
        Everything decided.

    Raises
    ------
    RequestError
        If there is no config and no preset, or both, or the GPU is not known, or numbers do not divide.
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
        # Not there yet, or on another machine: a plan is made for what is to come.
        if all((path / MANIFEST).is_file() for path in datasets):
            windows = sum(read_manifest(path).samples("train") for path in datasets)
            windows_from = ", ".join(map(str, datasets))
    if windows is None:
        windows, windows_from = DEFAULT_WINDOWS, "as many as DreamDiffusion's corpus had"
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


def exchanged_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, micro_batches: int) -> float:
    """Count what a GPU sends in one step.

    Parameters
    ----------
    parameters : int
        Trainable values of the model.
    zero_stage, gpus, precision
        As for `state_bytes`.
    micro_batches : int
        Forward passes of one step.

    Returns
    -------
    float
        Bytes: gradients in float32, weights at the run's precision, by rings. Stages 2 and 3 reduce gradients, and
        stage 3 gathers weights, with every micro batch.
    """
    value = 2 if precision == "bf16" else 4
    reduced = 4 * (micro_batches if zero_stage >= 2 else 1)
    gathered = {0: 4, 1: value, 2: value, 3: 2 * value * micro_batches}[zero_stage]
    return parameters * (reduced + gathered) * (gpus - 1) / gpus


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """Work out a plan.

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

    request = resolve(config)
    model = request.model
    if config.channels is not None:
        if not model.encoder.by_channel:
            raise RequestError("channels matters to the montage tokenizer alone; the temporal one always has 128 rows")
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
    offloaded = [f"offload {request.offload}: gradients counted on the GPU all the same, no time for the way there"]
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
            f"{config.reserve_gib:g} of them kept for driver, libraries and gaps",
            f"model-FLOPs utilisation {config.mfu:.0%}, as metrics.jsonl has it: of the model's own arithmetic, not of "
            "what is computed again",
            f"{request.windows:,} windows ({request.windows_from}), {request.epochs:g} passes",
            "gradients add up and travel in float32; AdamW with two moments; ZeRO's float32 master weights",
            "stage 3 keeps up to 1e9 gathered weights (DeepSpeed's default); buckets as this project sets them",
            "fused attention; activations are what the backward pass keeps, without passing buffers: allow 25 % more",
            f"{speed:g} GB/s a GPU between {'machines' if request.gpus > config.gpus_per_machine else 'GPUs'}; the "
            "exchange hides behind the backward pass, two thirds of the arithmetic",
            "no time for evaluation, checkpoints, or waiting for data",
            *offloaded,
        ],
    }


def show(plan: dict[str, Any]) -> None:
    """Print a plan.

    Parameters
    ----------
    plan : dict
        What `make_plan` gave.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    request, model, time = plan["request"], plan["model"], plan["time"]
    counts = model["parameters"]
    console.print(
        f"[bold]{request['name']}[/]: {counts['encoder'] / 1e6:,.1f}M + {counts['decoder'] / 1e6:,.1f}M parameters, "
        f"{model['tokens']['encoder']} of {model['tokens']['decoder']} tokens seen, "
        f"{model['training_flops_a_window'] / 1e9:,.1f} GFLOP a window"
    )
    table = Table(
        title=f"GiB on each of {request['gpus']} {request['gpu']}, {request['micro']} windows at once, "
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
        f"arithmetic, {time['exchange_s']:.3f} s of exchange), {time['windows_per_s']:,.0f} windows/s."
    )
    console.print(f"[bold]{time['steps']:,} steps: {time['days']:,.2f} days[/], {time['gpu_hours']:,.0f} GPU hours.")
    console.print("Assumed:")
    for line in plan["assumptions"]:
        console.print(f"- {line}")


def run_plan(config: PlanConfig) -> int:
    """Print a plan, and write it where asked.

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


def main(argv: list[str] | None = None) -> int:
    """Plan from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``[CONFIG.yaml] [--preset NAME] [--key value ...]``.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(
        lambda words: run_plan(parse_config(PlanConfig, words, prog="dreamscale plan", positionals=("run_config",))),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
