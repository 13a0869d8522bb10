"""The training loop of pretraining: steps, metrics, evaluations, checkpoints and the handling of loss spikes."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.mixture import Mixture
from pretrain.runs.checkpoint import CheckpointReader, complete_checkpoints, find_damage, step_folder
from pretrain.runs.checkpoint_writer import CheckpointWriter
from pretrain.runs.directory import RunDirectory
from pretrain.runs.distributed import World
from pretrain.runs.guards import SpikeDetector, Watchdog
from pretrain.runs.stop import StopSignal
from pretrain.runs.tracking import live_table
from pretrain.training.config import PretrainConfig
from pretrain.training.data_summary import describe_data, describe_people
from pretrain.training.deepspeed_engine import adam_steps, gather_state, load_state
from pretrain.training.left_out import LEFT_OUT, is_left_out, read_left_out, write_left_out
from pretrain.training.throughput import Throughput
from pretrain.training.validation import evaluate


class Trainer:
    """The training loop of one pretraining run; each process has one `Trainer`.

    Most methods contain collective operations, so every process must make the same decisions in the same order. If a
    decision depends only on values that are equal on all processes, such as the mean loss or the step, each process
    makes it itself. Rank 0 makes all other decisions and broadcasts them.

    Parameters
    ----------
    config : PretrainConfig
        The run's config.
    run : RunDirectory
        The directory of the run.
    train, held_out : EEGDataset or Mixture
        The splits train and val of the dataset.
    engine : DeepSpeedEngine
        The engine that `pretrain.training.deepspeed_engine.start_engine` returned.
    world : World
        The processes of the run.
    stop : StopSignal
        Tells whether a stop was requested.

    Attributes
    ----------
    global_step : int
        Number of optimiser steps done.
    total_steps : int
        Number of optimiser steps in the whole run.
    stopping : bool
        True as soon as a stop of the training was requested on any process.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run: RunDirectory,
        train: EEGDataset | Mixture,
        held_out: EEGDataset | Mixture,
        engine: Any,
        world: World,
        stop: StopSignal,
    ) -> None:
        self.config, self.run, self.engine, self.world, self.stop = config, run, engine, world, stop
        self.train_set, self.held_out = train, held_out
        self.loader = Loader(
            train,
            config.batch_size,
            config.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.num_workers,
            order=config.order,
        )
        self.total_steps = config.total_steps(len(train))
        self.global_step = self.skipped = self.skipped_in_a_row = 0
        self.stopping = False
        # Whether `loop` must evaluate the model before it trains. It must do so in a new run, and in a resumed run if
        # the stop had interrupted an evaluation.
        self.evaluation_due = True
        self.throughput = Throughput(config, world)
        self.spikes = SpikeDetector(config.guards)
        self.left_out: list[dict[str, Any]] = world.broadcast(read_left_out(run) if world.first else None)
        self.writer = CheckpointWriter(
            run.checkpoints, world, keep=config.checkpoint.keep, milestones=config.checkpoint.milestones
        )
        self.watchdog = Watchdog(config.timeout_s, rank=world.rank, size=world.size, run=run)
        self.people = describe_people(train) if world.first else {}

    def resume(self, *, rewind: bool = False) -> None:
        """Restore the newest undamaged checkpoint, if the run has a checkpoint.

        Parameters
        ----------
        rewind : bool
            True if a running training goes back to an earlier checkpoint (in this case at least one checkpoint must
            exist); False if a run starts or is resumed.

        Raises
        ------
        RequestError
            If all checkpoints are damaged, or this version of Dreamscale cannot read the newest checkpoint.
        """
        folder, fault = self.world.broadcast(self._find_newest() if self.world.first else None)
        if fault is not None:
            raise RequestError(fault)
        if folder is None:
            # There is no checkpoint, so the run starts from the beginning. Delete the metrics and the list of left-out
            # batches of an earlier attempt that ended before its first checkpoint.
            self.run.rewind_metrics(-1)
            self.left_out = []
            if self.world.first:
                write_left_out(self.run, [])
            return
        with CheckpointReader(folder) as reader:
            saved = reader.check_manifest(
                *("step", "skipped", "skipped_in_a_row", "recent_losses", "adam_steps", "loader.step"),
                *("interval.steps", "interval.losses"),
            )
            self.loader.load_state_dict(saved["loader"])
            load_state(self.engine, reader)
        self.global_step, self.skipped = saved["step"], saved["skipped"]
        self.skipped_in_a_row = saved["skipped_in_a_row"]
        self.spikes = SpikeDetector(self.config.guards, saved["recent_losses"])
        self.evaluation_due = not rewind and saved.get("evaluation_due", False)
        self.throughput.reset(saved["interval"]["steps"], saved["interval"]["losses"])
        # At the end of a run, the last checkpoint is written first, and then the model is evaluated. If a run is
        # resumed from this checkpoint, it repeats the evaluation, so delete the line of the old evaluation.
        evaluated = not self.evaluation_due and self.global_step < self.total_steps
        self.run.rewind_metrics(self.global_step, evaluated=evaluated)
        if self.world.first and not rewind:
            print(f"dreamscale pretrain: resuming from step {self.global_step} ({folder})", file=sys.stderr)

    def _find_newest(self) -> tuple[Path | None, str | None]:
        """Return (newest checkpoint or None, None), or (None, message of the error) if the search fails."""
        try:
            return self.run.latest(self.left_out), None
        except RequestError as error:
            return None, str(error)

    def save(self) -> None:
        """Write a checkpoint of the current step if it is missing; in the background if `asynchronous` is set."""
        self.writer.wait()
        folder = step_folder(self.run.checkpoints, self.global_step)
        # Only rank 0 checks whether the checkpoint exists, because other machines may see new files on a network disk
        # late.
        if not self.world.broadcast(self.world.first and find_damage(folder, read_bytes=False)):
            return
        manifest = {
            "zero_stage": self.config.zero_stage,
            "precision": self.config.precision,
            "loader": self.loader.state_dict(),
            "adam_steps": adam_steps(self.engine),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_losses": self.spikes.recent,
            "evaluation_due": self.evaluation_due,
            "interval": {"steps": self.throughput.steps, "losses": self.throughput.losses},
            "left_out": self.left_out,
            "epochs": self.loader.epoch,
            "data": describe_data(self.train_set, self.people, self.global_step * self.config.batch_size),
        }
        tensors = gather_state(self.engine, self.world)
        asynchronous = self.config.checkpoint.asynchronous
        self.writer.begin(self.global_step, tensors, manifest, asynchronous=asynchronous)
        if not asynchronous:
            self.writer.wait()

    def save_last(self) -> None:
        """Write a checkpoint of the current step and wait until it is complete.

        Raises
        ------
        RuntimeError
            If the checkpoint could not be written.
        """
        self.watchdog.at(self.global_step, "saving")
        # An earlier asynchronous checkpoint may still fail here. This is no error if the last checkpoint succeeds, so
        # wait for the earlier one first, and count only failures after this line.
        self.writer.wait()
        failed = self.writer.failed
        self.save()
        if not self.writer.wait() or self.writer.failed > failed:
            raise RuntimeError(
                f"the last checkpoint, of step {self.global_step}, could not be written; free some disk space at "
                f"{self.run.path} and run the same command again: it resumes from the previous checkpoint"
            )

    def rewind(self, spike: str, loss: float) -> bool:
        """Go back to a checkpoint before a loss spike, and from now on leave out the batches that led to the spike.

        Parameters
        ----------
        spike : str
            Description of the spike.
        loss : float
            Loss of the current step, i.e. the loss that is the spike.

        Returns
        -------
        bool
            True if training went back to a checkpoint; False if there is no checkpoint yet. In this case, training
            continues as without a spike.

        Raises
        ------
        RuntimeError
            If there were too many spikes.
        """
        guards = self.config.guards
        self.writer.wait()
        if not self.world.broadcast(self.world.first and bool(complete_checkpoints(self.run.checkpoints))):
            self._say(
                f"loss spike at step {self.global_step} ({spike}); there is no checkpoint yet, so training continues"
            )
            self.spikes.accept(loss)
            return False
        end = self.loader.step
        batches = f"batches {end - guards.leave_out} to {end - 1}"
        if len(self.left_out) >= guards.max_rewinds:
            raise RuntimeError(
                f"loss spike at step {self.global_step} ({spike}), in {batches}, after {len(self.left_out)} earlier "
                f"spikes (their batches are listed in {LEFT_OUT} of the run). To continue, run the same command with a "
                f"larger guards.max_rewinds or guards.spike_sigma; or start another run, in another output, with a "
                f"lower optimizer.lr"
            )
        spiked_at = self.global_step
        self.left_out = [*self.left_out, {"batches": [end - guards.leave_out, end], "step": spiked_at, "loss": spike}]
        if self.world.first:
            # Write the list of left-out batches to disk before the training returns to an earlier checkpoint, so that
            # the run leaves out these batches even if it is interrupted now and resumed later.
            write_left_out(self.run, self.left_out)
        self.resume(rewind=True)
        self.run.log(self.global_step, rewound_from=spiked_at, rewinds=len(self.left_out))
        self._say(
            f"loss spike at step {spiked_at} ({spike}); back to step {self.global_step}; {batches} are left out from "
            "now on"
        )
        return True

    def _say(self, message: str) -> None:
        if self.world.first:
            print(f"dreamscale pretrain: {message}", file=sys.stderr)

    def evaluate(self) -> dict[str, float]:
        """Compute the loss on the val split and write it to the metrics.

        Returns
        -------
        dict
            The metrics of the evaluation. If a stop was requested during the evaluation, the dictionary is empty, and
            the run repeats the evaluation when it is resumed.
        """
        result = evaluate(
            self.engine,
            self.held_out,
            self.config,
            self.world,
            before_batch=lambda: self.watchdog.at(self.global_step, "evaluating"),
            stopping=lambda: self.stop.requested,
        )
        self.evaluation_due = result is None
        if result is None:
            self.stopping = True
            return {}
        self.run.log(self.global_step, **result)
        return result

    def take_step(self, batch: Batch) -> float:
        """Take one optimiser step on one global batch.

        Parameters
        ----------
        batch : Batch
            This process's part of the batch.

        Returns
        -------
        float
            Mean loss over the global batch; NaN if the loss was not finite.

        Raises
        ------
        RuntimeError
            If the gradient was not finite in `max_skipped` steps in a row, or if DeepSpeed took a step although the
            loss was not finite.
        """
        config, engine = self.config, self.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = config.optimizer.lr_at(self.global_step, self.total_steps, config.batch_size)
        self.watchdog.at(self.global_step, "computing")
        own_loss = self._accumulate_gradient(batch)
        finite = math.isfinite(own_loss)
        self.watchdog.at(self.global_step, "agreeing on the loss")
        # One small all-reduce tells every process the sum of the losses, whether any loss was not finite, whether a
        # stop was requested, and how many processes have written their share of an asynchronous checkpoint.
        total, bad, stops, *written = self.world.all_reduce_sum(
            own_loss if finite else 0.0, float(not finite), float(self.stop.requested), *self.writer.progress()
        )
        self.writer.settle(*written)
        self.watchdog.at(self.global_step, "updating")
        # If the reduced gradient is not finite, the engine skips the step on every process.
        engine.step()
        skipped = not engine.was_step_applied()
        if bad and not skipped:
            raise RuntimeError(
                f"step {self.global_step}: the loss was not finite, but DeepSpeed did not skip the step, so the "
                "weights may be damaged; run the same command to resume from the newest checkpoint"
            )
        self.global_step += 1
        self.stopping = self.stopping or stops > 0
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= config.max_skipped:
            raise RuntimeError(
                f"the gradient was not finite for {self.skipped_in_a_row} steps in a row, up to step "
                f"{self.global_step}; check the data with 'dreamscale verify {self.train_set.path}'. To continue from "
                f"the newest checkpoint, run the same command; you may set a larger max_skipped. To train with a lower "
                f"optimizer.lr, start another run, in another output"
            )
        return float("nan") if bad else total / self.world.size

    def _accumulate_gradient(self, batch: Batch) -> float:
        """Run forward and backward passes on this process's part of a batch, and return the mean loss of this part."""
        config, engine, device = self.config, self.engine, self.world.device
        # Draw the masks before the batch is divided into micro batches, so that masks do not depend on
        # micro_batch_size.
        with self.throughput.pace.computing():
            inputs = engine.module.prepare(batch, config.seed)
        losses = []
        for start in range(0, len(batch.numbers), config.micro):
            part = slice(start, start + config.micro)
            with self.throughput.pace.computing():
                x_BCT = engine.module.windows(batch[part], self.train_set.spec, device)
                loss = engine(x_BCT, **{k: v[part].to(device, non_blocking=True) for k, v in inputs.items()}).mean()
            engine.backward(loss)
            losses.append(loss.detach())
            if start + config.micro < len(batch.numbers):
                # DeepSpeed counts micro batches by calls of `engine.step`. Here, after every micro batch except the
                # last, `engine.step` only counts the call and does not change the weights. After the last micro batch,
                # `take_step` calls `engine.step`, which then updates the weights.
                engine.step()
        return float(torch.stack(losses).mean())

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch of the loader; batches in the list `left_out` are skipped."""
        while is_left_out(self.loader.step, self.left_out):
            next(batches)
        return next(batches)

    def loop(self) -> None:
        """Train the model until the last step, or until a stop is requested."""
        config, throughput = self.config, self.throughput
        with live_table("pretrain", self.total_steps, enabled=self.world.first) as show:
            if self.evaluation_due and self.global_step < self.total_steps:
                show(self.global_step, self.evaluate())
            batches: Iterator[Batch] = iter(self.loader)
            throughput.start_clock()
            while self.global_step < self.total_steps and not self.stopping:
                self.watchdog.at(self.global_step, "waiting for data")
                with throughput.waiting_for_data():
                    batch = self.next_batch(batches)
                loss = self.take_step(batch)
                throughput.add(batch, loss)
                show(self.global_step, {"loss": loss})
                spike = self.spikes.check(loss)
                if spike and self.rewind(spike, loss):
                    if self.global_step < self.total_steps and not self.stopping:
                        # `rewind` moved the loader back to an earlier batch. The old iterator would still continue with
                        # later batches, so make a new iterator.
                        batches = iter(self.loader)
                    continue
                last = self.global_step == self.total_steps
                if self.global_step % config.log_every == 0 or last:
                    show(self.global_step, self.log())
                with throughput.paused():
                    if self.global_step % config.evaluation.every == 0 and not last:
                        show(self.global_step, self.evaluate())
                    if self.global_step % config.checkpoint.every == 0 and not last:
                        self.watchdog.at(self.global_step, "saving")
                        self.save()

    def log(self) -> dict[str, Any]:
        """Write a line of metrics, reset the counters for the next line, and return the metrics."""
        (rss,) = self.world.all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        on_gpu = self.world.device.type == "cuda"
        norm = self.engine.get_global_grad_norm()
        metrics = {
            "loss": self.throughput.loss,
            "lr": self.config.optimizer.lr_at(self.global_step - 1, self.total_steps, self.config.batch_size),
            "grad_norm": None if norm is None else float(norm),
            "epoch": self.loader.epoch,
            **self.throughput.rates(),
            "skipped_steps": self.skipped,
            "rewinds": len(self.left_out),
            "failed_checkpoints": self.writer.failed,
            "memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else rss,
        }
        self.run.log(self.global_step, **metrics)
        self.throughput.reset()
        return metrics

    def finish(self) -> bool:
        """Write the last checkpoint, evaluate the model, and draw the figures.

        Returns
        -------
        bool
            True if all three were done. False if a stop was requested during the evaluation; the model is then
            evaluated and the figures are drawn when the run is resumed.
        """
        from pretrain.training.plots import plot_loss, plot_reconstruction

        # Write the checkpoint first: after a stop signal, a batch system may not wait until a long evaluation ends, but
        # kill the run.
        self.save_last()
        result = self.evaluate()
        if not result:
            return False
        plots = self.run.path / "plots"
        plot_reconstruction(
            plots / "reconstruction.png", self.engine.module, self.held_out, self.world, step=self.global_step
        )
        if self.world.first:
            plot_loss(plots / "loss.png", self.run.metrics())
            print(
                f"dreamscale pretrain: {self.global_step} steps, held-out loss {result['val_loss']:.4f}, "
                f"{result['val_explained']:.1%} of the hidden signal explained; run in {self.run.path}. "
                f"Next: 'dreamscale export {self.run.path} ENCODER'"
            )
        return True
