"""The training loop of every fine-tuning stage, with evaluation, checkpoints, and resuming.

A stage is one training: most commands, such as ``dreamscale align``, have one stage, and ``dreamscale ddpm`` has two. A
stage puts all trainable layers, and all layers through which gradients flow, into one module, and then calls `fit`. The
module's ``forward(**inputs)`` returns a dictionary of scalars, which must contain ``loss``.

A run that is stopped and resumed gives exactly the same weights as an uninterrupted run:

- The order of samples depends only on the seed, and a checkpoint stores the loader's position in this order.
- The noise and the dropout of a step depend on the seed and the number of the step, but not on earlier steps.
- A checkpoint is normally written after the step's evaluation. If a stop is requested before or during an evaluation,
  the checkpoint is written at once and marks this evaluation as not done. If the checkpoint marks an evaluation as not
  done, the resumed run first does this evaluation.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from data_sharding.common.errors import FailedError, RequestError, StopRequested
from data_sharding.common.progress import progress
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.loader import Loader
from finetune.training.accelerate import flush_subnormals, get_world
from finetune.training.config import TrainingConfig
from finetune.training.engines import make_engine
from finetune.training.parameters import EMA, load_trainables, trainables
from finetune.training.state import TrainingState
from finetune.training.step_random import StepRandom
from pretrain.runs.checkpoint import CheckpointReader, newest_checkpoint
from pretrain.runs.checkpoint_writer import CheckpointWriter
from pretrain.runs.directory import RunDirectory
from pretrain.runs.guards import Watchdog
from pretrain.runs.pace import Pace
from pretrain.runs.stop import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10
"""The run fails if the loss or the gradient is not finite (NaN or infinite) in this many consecutive steps."""

Inputs = Callable[[Batch, StepRandom], dict[str, torch.Tensor]]
Evaluate = Callable[[Any, Callable[[], None]], dict[str, float]]


class _EvaluationStopped(Exception):
    """Raised during an evaluation if a stop of the run was requested."""


@dataclass(kw_only=True)
class FitResult:
    """Result of a training run. After `fit`, the module holds the best weights."""

    step: int
    """Number of optimiser steps that were done."""
    best_step: int
    """Number of the step with the best evaluation; the last step if there was no evaluation."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation."""


def fit(
    module: torch.nn.Module,
    *,
    config: TrainingConfig,
    seed: int,
    accelerator: Accelerator,
    run: RunDirectory,
    loader: Loader,
    inputs: Inputs,
    evaluate: Evaluate | None = None,
    watch: str = "loss",
    mode: Literal["min", "max"] = "min",
    lr_scale: Callable[[str], float] | None = None,
    timeout_s: float = 0.0,
    divide: bool = True,
    description: str = "training",
) -> FitResult:
    """Train a module, and load its best weights at the end. A run with checkpoints resumes from the newest checkpoint.

    Parameters
    ----------
    module : Module
        ``module(**inputs)`` returns a dictionary of scalars, which must contain ``loss``. Only parameters with
        `requires_grad` are trained. At the end, the module is on the accelerator's device.
    config : TrainingConfig
        Number of steps, batch size, learning rate, and steps between evaluations and between checkpoints.
    seed : int
        Seed for noise and dropout. The loader has its own seed for the order of samples.
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.
    run : RunDirectory
        The run directory that `open_run` returned, with the checkpoints and metrics.
    loader : Loader
        The loader that `make_loader` returned.
    inputs : callable
        ``inputs(batch, random)`` returns the module's arguments as tensors on any device, whose first axis is the
        batch.
    evaluate : callable, optional
        ``evaluate(module, pulse)`` returns a dictionary of metrics. Every process calls `evaluate` with the unwrapped
        module in evaluation mode, without gradients and in the precision of the training. During `evaluate`, the module
        has averaged weights if the config asks for a moving average of the weights. Only the metrics of rank 0 are
        used. `evaluate` must call ``pulse()`` between its batches, and equally often on every process; ``pulse()``
        raises an error, which ends the evaluation, if the run was asked to stop (e.g. by SIGTERM).
    watch : str
        Name of the metric that decides which weights are best.
    mode : str
        min: the smallest value of the metric is best; max: the largest value is best.
    lr_scale : callable, optional
        Function that takes the name of a parameter and returns the factor of this parameter's learning rate.
    timeout_s : float
        If the training makes no progress for this many seconds, the process ends with exit code 1 and a message that
        names the hanging process (see `Watchdog`). 0: the training may wait without limit.
    divide : bool
        False: every process holds the whole module, even if Accelerate's config file chooses DeepSpeed or FSDP. This is
        necessary if the module's forward pass changes its own weights.
    description : str
        Text that is shown next to the progress bar.

    Returns
    -------
    FitResult
        Result of the best evaluation. If `evaluate` is None, there are no best weights, and the module contains the
        averaged weights of the last step, or the weights of the last step if the config asks for no moving average.

    Raises
    ------
    StopRequested
        If the run was asked to stop, e.g. by SIGTERM. Before the error is raised, a checkpoint is written.
    RequestError
        If the batch cannot be divided among the processes, or the newest checkpoint is of another model or version.
    FailedError
        If the loss or the gradient was not finite in `MAX_SKIPPED` consecutive steps, or if the run was asked to stop
        and the checkpoint could not be written.
    """
    loop = _Loop(
        module, config, seed, accelerator, run, loader, inputs, evaluate, (watch, mode), timeout_s, description
    )
    loop.start(lr_scale, divide=divide)
    loop.train()
    return loop.finish()


class _Loop:
    """Training loop that `fit` runs; its arguments are those of `fit`."""

    def __init__(
        self,
        module: torch.nn.Module,
        config: TrainingConfig,
        seed: int,
        accelerator: Accelerator,
        run: RunDirectory,
        loader: Loader,
        inputs: Inputs,
        evaluate: Evaluate | None,
        best: tuple[str, str],
        timeout_s: float,
        description: str,
    ) -> None:
        self.module, self.config, self.seed, self.run, self.loader = module, config, seed, run, loader
        self.accelerator, self.world = accelerator, get_world(accelerator)
        self.inputs, self.evaluate, self.description = inputs, evaluate, description
        self.watch, self.mode = best
        try:
            self.micro_batches = config.micro_batches(self.world.size)
        except ValueError as error:
            raise RequestError(str(error)) from None
        self.writer = CheckpointWriter(
            run.checkpoints, self.world, keep=config.checkpoint.keep, milestones=config.checkpoint.milestones
        )
        self.watchdog = Watchdog(timeout_s, rank=self.world.rank, size=self.world.size, run=run)
        self.pace = Pace(self.world)
        self.stop = StopSignal()
        self.stopping = False
        self.skipped = 0
        self.sums: dict[str, float] = {}
        self.logged, self.since = 0, time.monotonic()

    def start(self, lr_scale: Callable[[str], float] | None, *, divide: bool) -> None:
        """Make the engine, and load the newest checkpoint, if the run has one."""
        # Only rank 0 chooses the checkpoint, because the search may rename damaged checkpoints.
        folder = self.world.broadcast(newest_checkpoint(self.run.checkpoints) if self.world.first else None)
        with nullcontext() if folder is None else CheckpointReader(folder) as reader:
            if reader is not None:
                # The engine may divide the weights among the processes, so load the whole weights before.
                load_trainables(self.module, reader.group("weights/"))
            self.engine = make_engine(self.module, self.config, self.accelerator, lr_scale, divide=divide)
            ema = EMA(self.engine.weights(), self.config.ema) if self.config.ema else None
            self.state = TrainingState(self.engine, ema)
            if reader is not None:
                self.state.load(reader)
                self.loader.load_state_dict(reader.manifest["loader"])
                self.run.rewind_metrics(self.state.step)
        if folder is not None and self.world.first:
            step = self.state.step
            print(f"dreamscale: {self.description}: resuming from step {step} ({folder})", file=sys.stderr)
        self.logged = self.state.step

    def train(self) -> None:
        """Do all remaining optimiser steps."""
        config, state = self.config, self.state
        self.module.train()
        with (
            flush_subnormals(),
            self.stop,
            self.watchdog,
            progress(self.description, config.steps, enabled=self.world.first) as advance,
        ):
            self.advance = advance
            advance(state.step)
            if state.evaluation_due:
                self.end_step()
            batches = iter(self.loader)
            while state.step < config.steps:
                self.watchdog.at(state.step, "waiting for data")
                with self.pace.working():
                    batch = next(batches)
                self.take_step(batch)
                self.end_step()
        self.accelerator.wait_for_everyone()

    def take_step(self, batch: Batch) -> None:
        """Do one optimiser step."""
        config, state, world = self.config, self.state, self.world
        self.watchdog.at(state.step, "computing")
        random = StepRandom(self.seed, state.step, rank=world.rank, world_size=world.size)
        with self.pace.working():
            tensors = {k: v.to(self.accelerator.device) for k, v in self.inputs(batch, random).items()}
        # Dropout uses PyTorch's global random generator, so the seed of this generator must depend on the step as well.
        torch.manual_seed((self.seed * 1_000_003 + state.step) * 1_009 + world.rank)
        self.engine.set_lr(config.lr_at(state.step))
        parts, finite = self.micro_batches, True
        for part in range(parts):
            piece = {k: v.chunk(parts)[part] for k, v in tensors.items()}
            out = self.engine.compute(piece, last=part == parts - 1)
            for name, value in out.items():
                number = float(value.detach())
                finite = finite and (name != "loss" or math.isfinite(number))
                self.sums[name] = self.sums.get(name, 0.0) + number / parts
        self.watchdog.at(state.step, "agreeing on the loss")
        broken = self.exchange(broken=not finite)
        self.watchdog.at(state.step, "updating")
        norm, applied = self.engine.step(broken=broken)
        if applied:
            self.skipped = 0
            if state.ema:
                state.ema.update(self.engine.weights())
        else:
            self.skipped += 1
            if self.skipped >= MAX_SKIPPED:
                raise FailedError(
                    f"{self.description}: the loss or the gradient was not finite in {self.skipped} consecutive steps; "
                    "check the dataset with 'dreamscale verify', or train again with a lower training.lr in another "
                    "output"
                )
        state.step += 1
        final = state.step == config.steps
        state.evaluation_due = self.evaluate is not None and (state.step % config.evaluation.every == 0 or final)
        if state.step % config.log_every == 0 or final:
            self.log(norm)

    def log(self, grad_norm: float) -> None:
        """Write one line of metrics; values with the prefix ``train/`` are means over the steps since the last line."""
        config, state = self.config, self.state
        n, seconds = state.step - self.logged, time.monotonic() - self.since
        means = {f"train/{k}": v / n for k, v in self.sums.items()}
        if self.world.size > 1:
            stacked = torch.tensor(list(means.values()), device=self.accelerator.device)
            reduced: Any = self.accelerator.reduce(stacked, "mean")
            means = dict(zip(means, reduced.tolist(), strict=True))
        rates = {"lr": config.lr_at(state.step - 1), "grad_norm": grad_norm, "epoch": self.loader.epoch}
        speed = {"samples_per_s": n * config.batch_size / seconds, "skipped": self.skipped}
        self.run.log(state.step, **means, **rates, **speed, **self.pace.compare(seconds))
        self.advance(n, note=f"loss {means['train/loss']:.4f}")
        self.sums, self.logged, self.since = {}, state.step, time.monotonic()

    def end_step(self) -> None:
        """After a step, do each of three actions if it is due: evaluate the model, write a checkpoint, stop the run."""
        config, state = self.config, self.state
        final = state.step == config.steps
        if state.evaluation_due and not self.stopping:
            self.run_evaluation()
        if self.stopping or final or state.step % config.checkpoint.every == 0:
            complete = self.save()
            if self.stopping and (not final or state.evaluation_due):
                if not complete:
                    raise FailedError(
                        f"{self.run.path}: the checkpoint of step {state.step} could not be written; free some disk "
                        "space there and run the same command again: the run resumes from the previous checkpoint"
                    )
                self.run.status("stopped", at=state.step)
                self.run.close()
                raise StopRequested(f"checkpoint at step {state.step}; run the same command to resume")

    def exchange(self, *, broken: bool = False) -> bool:
        """Return True if any process passed True. Every process must call this method.

        If any process was asked to stop, e.g. by SIGTERM, the attribute `stopping` becomes True.
        """
        # One all-reduce exchanges three things: losses that are not finite, requests to stop, and the progress of
        # checkpoints that are written in the background.
        found, stop, *written = self.world.all_reduce_sum(
            float(broken), float(self.stop.requested), *self.writer.progress()
        )
        self.writer.settle(*written)
        self.stopping = self.stopping or stop > 0
        return found > 0

    def pulse(self) -> None:
        """Raise an error, which ends the evaluation, if the run was asked to stop (e.g. by SIGTERM)."""
        self.watchdog.at(self.state.step, "evaluating")
        self.exchange()
        if self.stopping:
            raise _EvaluationStopped

    def run_evaluation(self) -> None:
        """Evaluate the model, and store its weights if this evaluation is the best so far."""
        state = self.state
        assert self.evaluate is not None
        self.watchdog.at(state.step, "evaluating")
        try:
            with torch.no_grad(), self.engine.evaluation(state.ema) as module, self.accelerator.autocast():
                found = self.world.broadcast(self.evaluate(module, self.pulse))
                value, best = found.get(self.watch), state.best.get(self.watch)
                if (
                    value is not None
                    and math.isfinite(value)
                    and (best is None or (value < best if self.mode == "min" else value > best))
                ):
                    state.best, state.best_step = found, state.step
                    state.best_weights = {n: p.detach().cpu().clone() for n, p in trainables(module).items()}
        except _EvaluationStopped:
            return
        state.evaluation_due = False
        self.run.log(state.step, **{f"val/{k}": v for k, v in found.items()})
        self.since = time.monotonic()

    def save(self) -> bool:
        """Write a checkpoint, perhaps in the background. Return False if the writing has already failed."""
        self.watchdog.at(self.state.step, "saving")
        self.writer.wait()
        background = self.config.checkpoint.asynchronous
        tensors = self.state.tensors(self.world.rank, self.world.size, copy=background)
        manifest = {**self.state.values(), "loader": self.loader.state_dict()}
        self.writer.begin(self.state.step, tensors, manifest, asynchronous=background)
        last = self.stopping or self.state.step == self.config.steps
        complete = self.writer.wait() if last or not background else True
        self.since = time.monotonic()
        return complete

    def finish(self) -> FitResult:
        """Load the best weights into the module."""
        state = self.state
        self.engine.finish(state.best_weights, state.ema)
        return FitResult(step=state.step, best_step=state.best_step if state.best else state.step, best=state.best)
