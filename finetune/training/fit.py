"""The training loop that every fine-tuning stage shares: resume, EMA, validation, checkpoints, stopping.

A stage puts all that trains (and all that gradients pass through) into one module whose ``forward(**inputs)`` gives a
dictionary of scalars with ``loss`` among them, and calls `fit`.

Shapes: G samples of a global batch, b samples of this rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from data_sharding.common.errors import RequestError, StopRequested
from data_sharding.common.progress import progress
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.loader import Loader
from finetune.training.config import TrainingConfig
from finetune.training.state import EMA, TrainingState, load_trainables, trainables
from finetune.training.step_random import StepRandom
from pretrain.runs.directory import RunDirectory
from pretrain.runs.stop import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10
"""Steps in a row with gradients that are not finite before a run gives up."""


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
    state = TrainingState(module, optimizer, loader, ema)
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
