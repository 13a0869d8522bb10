"""What every fine-tuning stage shares: Accelerate set up and checked, one training loop, EMA, checkpoints, stopping.

A stage puts all that trains (and all that gradients pass through) into one module whose ``forward(**inputs)`` gives a
dictionary of scalars with ``loss`` among them, and calls `fit`.

Shapes: G samples of a global batch, b samples of this rank.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from data_sharding.common.errors import RequestError, StopRequested
from data_sharding.common.files import write_json
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Batch, Loader
from pretrain.runs.directory import RunDirectory, StopSignal, TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10
"""Steps in a row with gradients that are not finite before a run gives up."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and how often."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 64
    """Samples of a step over all processes; a multiple of num_processes * accumulate."""
    accumulate: int = 1
    """Parts into which a process cuts its share of the batch, one after another, to save memory."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end over the peak; cosine in between."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only: vectors (biases, norms) have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    clip_norm: float = 1.0
    """Limit of the gradient's norm; 0 for none."""
    ema: float = 0.0
    """Decay of the moving average of the fp32 weights, warmed up; 0 for none."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: autocast; the weights stay fp32."""
    workers: int = 0
    """Reading processes of each rank."""
    log_every: int = 10
    """Steps between lines of metrics."""
    validate_every: int = 100
    """Steps between validations; the last step has one, too."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or self.warmup < 0 or not 0 <= self.ema < 1:
            raise ValueError("training: need lr > 0, warmup >= 0 and 0 <= ema < 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step.

        Parameters
        ----------
        step : int
            Optimiser steps done before it.

        Returns
        -------
        float
            Linear warm-up, then cosine.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.min_lr_ratio
        return self.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def quiet_libraries() -> None:
    """Keep the model libraries' loading bars, reports and advice off the terminal; errors still come as exceptions."""
    import logging

    from transformers.utils import logging as transformers_logging

    # Before diffusers is imported: its import makes transformers speak.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def pick_device(device: str) -> str:
    """Turn auto into what the machine has.

    Parameters
    ----------
    device : str
        auto, cpu or cuda.

    Returns
    -------
    str
        cpu or cuda.

    Raises
    ------
    RequestError
        If cuda was asked for and there is none, or the name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device '{device}' is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device cuda was asked for, but torch sees no GPU here; use device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def make_accelerator(*, num_processes: int, device: str = "auto", precision: str = "no") -> Accelerator:
    """Set Accelerate up and check that it got the world that the config asks for.

    Parameters
    ----------
    num_processes : int
        Processes that the config asks for.
    device : str
        auto, cpu or cuda.
    precision : str
        no or bf16.

    Returns
    -------
    Accelerator
        With an explicit backend: without one, every process on a CPU would believe that it is alone.

    Raises
    ------
    RequestError
        If the launcher started another number of processes, or a kind of distribution that is not supported here.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    cpu = pick_device(device) == "cpu"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but this launch has {launched}; start it with 'dreamscale', or with "
            f"'accelerate launch --multi_gpu --num_processes {num_processes} -m ...' (see configs/accelerate)"
        )
    # Accelerate passes the keyword on even to a single process, where a backend means nothing.
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl")] if launched > 1 else []
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
    expected = (
        DistributedType.NO if launched == 1 else (DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU)
    )
    if accelerator.distributed_type != expected:
        raise RequestError(
            f"Accelerate started as {accelerator.distributed_type.value}, not as {expected.value}; DeepSpeed and FSDP "
            f"are not for this stage: use one of configs/accelerate"
        )
    if accelerator.num_processes != num_processes:
        raise RequestError(f"num_processes is {num_processes}, Accelerate's world has {accelerator.num_processes}")
    return accelerator


def open_run(config: Any, accelerator: Accelerator, *, output: str | Path | None = None) -> RunDirectory:
    """Open the run directory of a stage on every rank.

    Parameters
    ----------
    config : dataclass instance
        The stage's config, with ``output`` and perhaps ``tracker``.
    accelerator : Accelerator
        The world.
    output : str or Path, optional
        Instead of the config's, for a stage of several runs.

    Returns
    -------
    RunDirectory
        The run; `finished` is True where there is nothing left to do.
    """
    tracker: TrackerConfig | None = getattr(config, "tracker", None)
    run = RunDirectory(output or config.output, config, rank=accelerator.process_index, tracker=tracker)
    accelerator.wait_for_everyone()
    return run


class StepRandom:
    """Randomness of one step: drawn for the global batch, cut for the rank.

    So a step's noise depends on the seed and the step alone, not on the number of processes nor on what was drawn
    before, and a resumed run draws what it would have drawn.

    Parameters
    ----------
    seed, step : int
        What it depends on.
    rank, world_size : int
        Which samples of the global batch are ours: every world_size-th.
    """

    def __init__(self, seed: int, step: int, *, rank: int = 0, world_size: int = 1) -> None:
        # A hash of both: consecutive seeds and steps must not share their streams.
        self._generator = torch.Generator().manual_seed(((seed + 1) * 0x9E3779B97F4A7C15 + step) % (1 << 63))
        self.rank, self.world_size = rank, world_size

    def _draw(self, draw: Callable[..., torch.Tensor], b: int, *shape: int) -> torch.Tensor:
        return draw((b * self.world_size, *shape), generator=self._generator)[self.rank :: self.world_size]

    def normal(self, b: int, *shape: int) -> torch.Tensor:
        """Standard normal numbers [b, *shape] on the CPU."""
        return self._draw(torch.randn, b, *shape)

    def uniform(self, b: int, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), [b, *shape], on the CPU."""
        return self._draw(torch.rand, b, *shape)

    def integers(self, high: int, b: int, *shape: int) -> torch.Tensor:
        """Integers in [0, high), [b, *shape], on the CPU."""
        return self._draw(lambda size, generator: torch.randint(high, size, generator=generator), b, *shape)


def trainables(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that train, by name.

    Parameters
    ----------
    module : Module
        Any module; wrappers of Accelerate taken off.

    Returns
    -------
    dict
        Name to parameter.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_trainables(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load exactly the parameters that train.

    Parameters
    ----------
    module : Module
        Where to.
    tensors : dict
        Name to tensor.

    Raises
    ------
    RequestError
        If names or shapes are not exactly those of the module's trainable parameters.
    """
    own = trainables(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise RequestError(
            f"checkpoint holds other parameters than this model trains: {odd[0]} and {len(odd) - 1} more"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise RequestError(
                    f"checkpoint: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


class EMA:
    """Moving average of the trainable weights, in fp32.

    Parameters
    ----------
    module : Module
        Whose trainable parameters to average.
    decay : float
        Final decay; early on it is ``(1 + n) / (10 + n)``.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in trainables(module).items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the present weights in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in trainables(module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Put the averages into the module for the length of a block."""
        kept = {name: p.detach().clone() for name, p in trainables(module).items()}
        load_trainables(module, self.shadow)
        try:
            yield
        finally:
            load_trainables(module, kept)


@dataclass(kw_only=True)
class FitResult:
    """What training came to; the module holds the best weights."""

    step: int
    """Steps done."""
    best_step: int
    """The validation that was best; the last step where nothing was watched."""
    best: dict[str, float] = field(default_factory=dict)
    """Its metrics."""


def _optimizer(
    module: torch.nn.Module, config: TrainingConfig, lr_scale: Callable[[str], float] | None
) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainables(module).items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr_scale(name) if lr_scale else 1.0, decay), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()],
        lr=config.lr,
        betas=config.betas,
    )


class _State:
    """All that a checkpoint keeps."""

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Loader, ema: EMA | None
    ) -> None:
        self.module, self.optimizer, self.loader, self.ema = module, optimizer, loader, ema
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_step = -1
        self.best_weights: dict[str, torch.Tensor] | None = None

    def save(self, run: RunDirectory, accelerator: Accelerator) -> None:
        from safetensors.torch import save_file

        accelerator.wait_for_everyone()
        directory = run.begin_checkpoint(self.step)
        if accelerator.is_main_process:
            weights = {name: p.detach().cpu().contiguous() for name, p in trainables(self.module).items()}
            save_file(weights, directory / "trainables.safetensors")
            if self.ema is not None:
                save_file({n: p.cpu().contiguous() for n, p in self.ema.shadow.items()}, directory / "ema.safetensors")
            if self.best_weights is not None:
                # Weights may lie channels-last in memory, which safetensors does not keep.
                best = {n: p.contiguous() for n, p in self.best_weights.items()}
                save_file(best, directory / "best.safetensors")
            torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
            write_json(
                directory / "state.json",
                {
                    "step": self.step,
                    "loader": self.loader.state_dict(),
                    "best": self.best,
                    "best_step": self.best_step,
                    "ema_updates": self.ema.updates if self.ema else 0,
                },
            )
            run.commit_checkpoint(self.step)
        accelerator.wait_for_everyone()

    def load(self, directory: Path) -> None:
        from safetensors.torch import load_file

        load_trainables(self.module, load_file(directory / "trainables.safetensors"))
        state = json.loads((directory / "state.json").read_text())
        if self.ema is not None:
            shadow = load_file(directory / "ema.safetensors")
            assert shadow.keys() == self.ema.shadow.keys()
            self.ema.shadow = {n: shadow[n].to(p.device) for n, p in self.ema.shadow.items()}
            self.ema.updates = state["ema_updates"]
        if (directory / "best.safetensors").is_file():
            self.best_weights = load_file(directory / "best.safetensors")
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu"))
        self.loader.load_state_dict(state["loader"])
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]


def _same_on_all(accelerator: Accelerator, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _any_rank(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    total: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device))
    return bool(total > 0)


def rank_loader(dataset: EEGDataset, config: TrainingConfig, seed: int, accelerator: Accelerator) -> Loader:
    """Batches of this rank.

    Parameters
    ----------
    dataset : EEGDataset
        The train split.
    config : TrainingConfig
        Batch and workers.
    seed : int
        Of the order.
    accelerator : Accelerator
        The world.

    Returns
    -------
    Loader
        Endless.
    """
    world = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return Loader(dataset, config.batch, seed, **world, num_workers=config.workers)


def fit(
    module: torch.nn.Module,
    *,
    config: TrainingConfig,
    seed: int,
    accelerator: Accelerator,
    run: RunDirectory,
    loader: Loader,
    inputs: Callable[[Batch, StepRandom], dict[str, torch.Tensor]],
    validate: Callable[[Any], dict[str, float]] | None = None,
    watch: str = "loss",
    mode: Literal["min", "max"] = "min",
    lr_scale: Callable[[str], float] | None = None,
    description: str = "training",
) -> FitResult:
    """Train, resume where a checkpoint is, stop on request, and leave the best weights in the module.

    Parameters
    ----------
    module : Module
        Everything that gradients pass through; ``module(**inputs)`` gives a dictionary of scalars, ``loss`` among them.
        Its parameters with `requires_grad` are what trains. It is moved to the accelerator's device.
    config : TrainingConfig
        Steps, rates and so on.
    seed : int
        Of noise and dropout; the loader has its own.
    accelerator : Accelerator
        From `make_accelerator`.
    run : RunDirectory
        From `open_run`; checkpoints and metrics go there.
    loader : Loader
        Batches of this rank, from `rank_loader`.
    inputs : callable
        ``inputs(batch, random)`` gives tensors with the batch first, for the module; moved to the device here.
    validate : callable, optional
        ``validate(module)`` gives numbers; called on every rank with the bare module in eval mode and without
        gradients, under the EMA weights where there are any. Rank 0's numbers count.
    watch : str
        The number by which the best weights are chosen.
    mode : str
        Whether it should be small or large.
    lr_scale : callable, optional
        Factor of the learning rate by parameter name.
    description : str
        Shown beside the progress bar.

    Returns
    -------
    FitResult
        The best validation. The module then holds its weights; without `validate`, the EMA's or the last.

    Raises
    ------
    StopRequested
        If a signal came; a checkpoint was written.
    RuntimeError
        If gradients were not finite `MAX_SKIPPED` times in a row.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if (config.batch // world) % config.accumulate:
        raise RequestError(
            f"training.batch {config.batch} on {world} processes cannot be cut into {config.accumulate} equal parts"
        )
    module.to(accelerator.device)
    optimizer = _optimizer(module, config, lr_scale)
    ema = EMA(module, config.ema) if config.ema else None
    state = _State(module, optimizer, loader, ema)
    latest = _same_on_all(accelerator, str(run.latest() or ""))
    if latest:
        state.load(Path(latest))
        run.rewind_metrics(state.step)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    names = list(trainables(module))
    sums: dict[str, float] = {}
    logged, skipped, since = state.step, 0, time.monotonic()

    def check() -> dict[str, float]:
        module.eval()
        with torch.no_grad(), ema.applied(module) if ema else nullcontext():
            found = _same_on_all(accelerator, validate(module)) if validate else {}
            value, known = found.get(watch), state.best.get(watch)
            if value is not None and math.isfinite(value):
                better = known is None or (value < known if mode == "min" else value > known)
                if better:
                    state.best, state.best_step = found, state.step
                    weights = {n: p.detach().cpu().clone() for n, p in trainables(module).items()}
                    state.best_weights = weights
        module.train()
        return found

    module.train()
    with (
        StopSignal() as stop,
        progress(description, config.steps, enabled=accelerator.is_main_process) as advance,
    ):
        advance(state.step)
        batches = iter(loader)
        while state.step < config.steps:
            batch = next(batches)
            random = StepRandom(seed, state.step, rank=rank, world_size=world)
            tensors = {k: v.to(accelerator.device) for k, v in inputs(batch, random).items()}
            # Dropout and the like draw from the global generator: make it a function of the step, too.
            torch.manual_seed((seed * 1_000_003 + state.step) * 1_009 + rank)
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(state.step) * group["scale"]
            for part in range(config.accumulate):
                last = part == config.accumulate - 1
                piece = {k: v.chunk(config.accumulate)[part] for k, v in tensors.items()}
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    out = wrapped(**piece)
                    accelerator.backward(out["loss"] / config.accumulate)
                for name, value in out.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / config.accumulate
            # After the backward pass all ranks hold the same gradient, so all of them decide alike.
            norm = torch.nn.utils.clip_grad_norm_(
                [p for p in trainables(module).values() if p.grad is not None], config.clip_norm or math.inf
            )
            if torch.isfinite(norm):
                optimizer.step()
                skipped = 0
                if ema:
                    ema.update(module)
            else:
                skipped += 1
                if skipped >= MAX_SKIPPED:
                    raise RuntimeError(f"{description}: the gradient was not finite {skipped} steps in a row")
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            final = state.step == config.steps
            if state.step % config.log_every == 0 or final:
                n, seconds = state.step - logged, time.monotonic() - since
                means = {f"train/{k}": v / n for k, v in sums.items()}
                if world > 1:
                    stacked = torch.tensor(list(means.values()), device=accelerator.device)
                    means = dict(zip(means, accelerator.reduce(stacked, "mean").tolist(), strict=True))
                rates = {"lr": config.lr_at(state.step - 1), "grad_norm": float(norm), "epoch": loader.epoch}
                run.log(state.step, **means, **rates, samples_per_s=n * config.batch / seconds, skipped=skipped)
                advance(n, note=f"loss {means['train/loss']:.4f}")
                sums, logged, since = {}, state.step, time.monotonic()
            if validate and (state.step % config.validate_every == 0 or final):
                run.log(state.step, **{f"val/{k}": v for k, v in check().items()})
                since = time.monotonic()
            stopping = _any_rank(accelerator, stop.requested)
            if state.step % config.checkpoint_every == 0 or final or stopping:
                state.save(run, accelerator)
                since = time.monotonic()
            if stopping and not final:
                run.status("stopped", at=state.step)
                run.close()
                raise StopRequested(f"checkpoint at step {state.step}; run the same command to go on")
    accelerator.wait_for_everyone()
    assert list(trainables(module)) == names
    if state.best_weights is not None:
        load_trainables(module, state.best_weights)
    elif ema is not None:
        load_trainables(module, ema.shadow)
    module.eval()
    return FitResult(step=state.step, best_step=state.best_step if state.best else state.step, best=state.best)


def plot_losses(run: RunDirectory, path: Path, columns: list[str]) -> None:
    """Draw curves of metrics.jsonl.

    Parameters
    ----------
    run : RunDirectory
        The run.
    path : Path
        PNG to write.
    columns : list of str
        Metrics to draw, e.g. ``train/loss``; those that are not there are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = run.metrics()
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for column in columns:
        points = [(line["step"], line[column]) for line in lines if line.get(column) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=column)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
