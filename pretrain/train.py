"""Pretrain the masked-signal autoencoder: ``dreamscale pretrain``, ``torchrun -m pretrain.train CONFIG``.

Letters in names: B samples of this process, C channels, T time samples, K visible tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, StopRequested, run_main
from data_sharding.common.files import read_json, write_json
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.samples import N_PADDED
from pretrain.model.flops import batch_flops, peak_flops
from pretrain.runs.checkpoint import CheckpointReader, complete_checkpoints, find_damage, step_folder
from pretrain.runs.checkpoint_writer import CheckpointWriter
from pretrain.runs.directory import RunDirectory
from pretrain.runs.guards import SpikeDetector, Watchdog
from pretrain.runs.stop import StopSignal
from pretrain.runs.tracking import live_table
from pretrain.training.config import PretrainConfig

if TYPE_CHECKING:
    from pretrain.runs.distributed import World

# What may change when a run goes on: none of it changes what is learned, but for the guards, which somebody may have to
# move so that a run can go on at all.
FREE = (
    "output",
    "dataset",
    "datasets",
    "tracker",
    "num_processes",
    "device",
    "num_workers",
    "log_every",
    "checkpoint",
    "evaluation",
    "micro_batch_size",
    "max_skipped",
    "guards",
    "zero_stage",
    "offload",
    "timeout_s",
    "restarts",
    "peak_tflops",
    "model.compute",
)

LEFT_OUT = "left_out.json"
"""File in the run directory: batches that led to loss spikes and are not trained on."""


@dataclasses.dataclass
class _Interval:
    """What happened since the last line of metrics."""

    steps: int = 0
    losses: list[float | None] = dataclasses.field(default_factory=list)
    """None where the loss was not finite."""
    timed: int = 0
    """Steps since this process began; fewer than `steps` where the run was interrupted within the interval."""
    stall_s: float = 0.0
    flops: float = 0.0
    """Of this process, since it began; tokens likewise."""
    tokens: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def loss(self) -> float:
        """Mean loss; NaN where one was not finite."""
        return sum(float("nan") if loss is None else loss for loss in self.losses) / self.steps


class _Training:
    """State of one run in one process."""

    def __init__(
        self,
        config: PretrainConfig,
        run: RunDirectory,
        train: EEGDataset | Mixture,
        held_out: EEGDataset | Mixture,
        engine: Any,
        world: Any,
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
        self.total = config.total_steps(len(train))
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.stopping = False
        # Before the first step, and where a stop came in the middle of an evaluation.
        self.evaluation_due = True
        self.interval = _Interval()
        self.spikes = SpikeDetector(config.guards)
        self.left_out: list[dict[str, Any]] = world.broadcast(_read_left_out(run) if world.first else None)
        self.writer = CheckpointWriter(
            run.checkpoints, world, keep=config.checkpoint.keep, milestones=config.checkpoint.milestones
        )
        self.watchdog = Watchdog(config.timeout_s, rank=world.rank, size=world.size, run=run)
        self.peak = peak_flops(world.device, config.precision, config.peak_tflops)
        self.subjects = count_subjects(train) if world.first else 0

    def resume(self, *, rewind: bool = False) -> None:
        """Go on from the newest checkpoint that is whole, where there is one.

        Parameters
        ----------
        rewind : bool
            True in the middle of a run, which is then sure of a checkpoint.

        Raises
        ------
        RequestError
            If all checkpoints are damaged, or the newest is of another version.
        """
        folder, fault = self.world.broadcast(self._newest() if self.world.first else None)
        if fault is not None:
            raise RequestError(fault)
        if folder is None:
            # What an attempt left that ended before its first checkpoint.
            self.run.rewind_metrics(-1)
            self.left_out = []
            if self.world.first:
                (self.run.path / LEFT_OUT).unlink(missing_ok=True)
            return
        from pretrain.training.deepspeed_engine import load_state

        with CheckpointReader(folder) as reader:
            saved = reader.manifest
            self.loader.load_state_dict(saved["loader"])
            load_state(self.engine, reader)
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.skipped_in_a_row = saved["skipped_in_a_row"]
        self.spikes = SpikeDetector(self.config.guards, saved["recent_losses"])
        self.evaluation_due = not rewind and saved.get("evaluation_due", False)
        self.interval = _Interval(steps=saved["interval"]["steps"], losses=saved["interval"]["losses"])
        # The last evaluation comes after the last checkpoint.
        self.run.rewind_metrics(self.step, evaluated=not self.evaluation_due and self.step < self.total)
        if self.world.first and not rewind:
            print(f"dreamscale pretrain: going on from step {self.step} ({folder})", file=sys.stderr)

    def _newest(self) -> tuple[Path | None, str | None]:
        try:
            return self.run.latest(self.left_out), None
        except RequestError as error:
            return None, str(error)

    def save(self) -> None:
        """Begin a checkpoint, which counts wholly or not at all; it counts at once unless it is asynchronous."""
        from pretrain.training.deepspeed_engine import adam_steps, gather_state

        self.writer.wait()
        if self.world.broadcast(
            self.world.first and find_damage(step_folder(self.run.checkpoints, self.step), read_bytes=False)
        ):
            manifest = {
                "zero_stage": self.config.zero_stage,
                "precision": self.config.precision,
                "loader": self.loader.state_dict(),
                "adam_steps": adam_steps(self.engine),
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "recent_losses": self.spikes.recent,
                "evaluation_due": self.evaluation_due,
                "interval": {"steps": self.interval.steps, "losses": self.interval.losses},
                "left_out": self.left_out,
                "epochs": self.loader.epoch,
                "data": self.describe_data(),
            }
            tensors = gather_state(self.engine, self.world)
            self.writer.begin(self.step, tensors, manifest, asynchronous=self.config.checkpoint.asynchronous)
            if not self.config.checkpoint.asynchronous:
                self.writer.wait()

    def save_last(self) -> None:
        """Save, and insist on it.

        Raises
        ------
        RuntimeError
            If the checkpoint could not be written.
        """
        self.watchdog.at(self.step, "saving")
        # One that is still under way may fail without harm to this one.
        self.writer.wait()
        failed = self.writer.failed
        self.save()
        if not self.writer.wait() or self.writer.failed > failed:
            raise RuntimeError(
                f"the last checkpoint, of step {self.step}, could not be written; make room at {self.run.path} and run "
                "the same command again: it goes on from the checkpoint before"
            )

    def rewind(self, spike: str, loss: float) -> bool:
        """Go back to before a loss spike, and leave the batches that led to it out from now on.

        Parameters
        ----------
        spike : str
            What was seen.
        loss : float
            Of this step.

        Returns
        -------
        bool
            False where there is no checkpoint to go back to.

        Raises
        ------
        RuntimeError
            If there were too many spikes.
        """
        guards = self.config.guards
        self.writer.wait()
        if not self.world.broadcast(self.world.first and bool(complete_checkpoints(self.run.checkpoints))):
            if self.world.first:
                print(
                    f"dreamscale pretrain: loss spike at step {self.step} ({spike}); there is no checkpoint to go "
                    "back to yet, training goes on",
                    file=sys.stderr,
                )
            self.spikes.accept(loss)
            return False
        last = self.loader.step
        found = {"batches": [last - guards.leave_out, last], "step": self.step, "loss": spike}
        if len(self.left_out) >= guards.max_rewinds:
            raise RuntimeError(
                f"loss spike at step {self.step} ({spike}), in batches {found['batches'][0]} to {last - 1}, after "
                f"{len(self.left_out)} others ({LEFT_OUT} of the run names their batches); run the same command with "
                f"guards.max_rewinds or guards.spike_sigma raised to go on, or begin another run, in another output, "
                f"with a lower optimizer.lr"
            )
        self.left_out = [*self.left_out, found]
        if self.world.first:
            # On disk before anything else, so that a restart leaves out the same.
            write_json(self.run.path / LEFT_OUT, self.left_out)
        was = self.step
        self.resume(rewind=True)
        self.run.log(self.step, rewound_from=was, rewinds=len(self.left_out))
        if self.world.first:
            print(
                f"dreamscale pretrain: loss spike at step {was} ({spike}); back to step {self.step}, and without "
                f"batches {found['batches'][0]} to {last - 1} from now on",
                file=sys.stderr,
            )
        return True

    def describe_data(self) -> dict[str, Any]:
        """What an encoder package must say of the data, so that it can be exported without them."""
        manifest = self.train_set.manifest
        return {
            "dataset_id": manifest.dataset_id,
            "preprocess": manifest.preprocess.to_dict(),
            "windows": {split: manifest.samples(split) for split in sorted(manifest.splits)},
            "counts": manifest.counts,
            "hours": manifest.hours,
            "subjects": self.subjects,
            "hours_seen": self.step * self.config.batch_size * manifest.preprocess.window_s / 3600,
        }

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, written to the metrics; nothing, and due again, where somebody asks to stop meanwhile."""
        from pretrain.training.validation import evaluate

        def alive() -> None:
            self.watchdog.at(self.step, "evaluating")

        result = evaluate(
            self.engine, self.held_out, self.config, self.world, alive=alive, stopping=lambda: self.stop.requested
        )
        self.evaluation_due = result is None
        if result is None:
            self.stopping = True
            return {}
        self.run.log(self.step, **result)
        return result

    def take_step(self, batch: Batch) -> float:
        """One optimiser step on one global batch.

        Parameters
        ----------
        batch : Batch
            This process's part.

        Returns
        -------
        float
            Mean loss over the global batch; NaN where it was not finite.
        """
        import torch

        config, engine, device = self.config, self.engine, self.world.device
        for group in engine.optimizer.param_groups:
            group["lr"] = config.optimizer.lr_at(self.step, self.total, config.batch_size)
        self.watchdog.at(self.step, "computing")
        inputs = engine.module.prepare(batch, config.seed)
        losses = []
        for start in range(0, len(batch.numbers), config.micro):
            part = slice(start, start + config.micro)
            x_BCT = engine.module.windows(batch[part], self.train_set.spec, device)
            loss = engine(x_BCT, **{k: v[part].to(device, non_blocking=True) for k, v in inputs.items()}).mean()
            engine.backward(loss)
            losses.append(loss.detach())
            if start + config.micro < len(batch.numbers):
                engine.step()
        mine = float(torch.stack(losses).mean())
        finite = mine == mine and abs(mine) != float("inf")
        self.watchdog.at(self.step, "agreeing on the loss")
        # One small reduction tells every process the loss, whether anyone's is not finite, who wants to stop, and
        # whether a checkpoint is written.
        total, bad, stops, *written = self.world.all_reduce_sum(
            mine if finite else 0.0, float(not finite), float(self.stop.requested), *self.writer.progress()
        )
        self.writer.settle(*written)
        self.watchdog.at(self.step, "updating")
        # Skips by itself, on every process alike, if the reduced gradient is not finite.
        engine.step()
        skipped = not engine.was_step_applied()
        if bad and not skipped:
            raise RuntimeError(f"step {self.step}: the loss was not finite, and DeepSpeed took the step anyway")
        self.step += 1
        self.stopping = self.stopping or stops > 0
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= config.max_skipped:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a gradient that was not finite, the last one step "
                f"{self.step}; check the data with 'dreamscale verify {self.train_set.path}'. The same command goes on "
                f"from the newest checkpoint, with max_skipped raised if you wish; a lower optimizer.lr needs another "
                f"run, in another output"
            )
        return float("nan") if bad else total / self.world.size

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch that is not left out.

        Parameters
        ----------
        batches : iterator
            Of the loader.

        Returns
        -------
        Batch
            This process's part.
        """
        while any(first <= self.loader.step < end for first, end in (found["batches"] for found in self.left_out)):
            next(batches)
        return next(batches)

    def loop(self) -> None:
        """Train until the last step, or until somebody asks to stop."""
        config = self.config
        with live_table("pretrain", self.total, enabled=self.world.first) as show:
            if self.evaluation_due and self.step < self.total:
                show(self.step, self.evaluate())
            batches: Iterator[Batch] = iter(self.loader)
            self.interval.started = time.monotonic()
            while self.step < self.total and not self.stopping:
                interval = self.interval
                self.watchdog.at(self.step, "waiting for data")
                waited = time.monotonic()
                batch = self.next_batch(batches)
                interval.stall_s += time.monotonic() - waited
                loss = self.take_step(batch)
                interval.steps += 1
                interval.timed += 1
                self.count(batch)
                interval.losses.append(loss if math.isfinite(loss) else None)
                show(self.step, {"loss": loss})
                spike = self.spikes.seen(loss)
                if spike and self.rewind(spike, loss):
                    if self.step < self.total and not self.stopping:
                        batches = iter(self.loader)
                    continue
                if self.step % config.log_every == 0 or self.step == self.total:
                    show(self.step, self.log(interval))
                    self.interval = interval = _Interval()
                aside = time.monotonic()
                if self.step % config.evaluation.every == 0 and self.step < self.total:
                    show(self.step, self.evaluate())
                if self.step % config.checkpoint.every == 0 and self.step < self.total:
                    self.watchdog.at(self.step, "saving")
                    self.save()
                # Throughput is that of training alone.
                interval.started += time.monotonic() - aside

    def count(self, batch: Batch) -> None:
        """Count the arithmetic and the tokens of a batch.

        Parameters
        ----------
        batch : Batch
            This process's part.
        """
        shape = self.config.model.encoder
        rows = sum(map(shape.token_rows, batch.channels))
        self.interval.tokens += rows * shape.tokens
        if self.peak is not None:
            self.interval.flops += batch_flops(self.config.model, batch.channels)

    def log(self, interval: _Interval) -> dict[str, Any]:
        """Write a line of metrics.

        Parameters
        ----------
        interval : _Interval
            What it is about.

        Returns
        -------
        dict
            The metrics.
        """
        import torch

        seconds = time.monotonic() - interval.started
        stall_s, rss = self.world.all_reduce_max(
            interval.stall_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
        flops, tokens = self.world.all_reduce_sum(interval.flops, interval.tokens)
        rate = interval.timed * self.config.batch_size / seconds
        on_gpu = self.world.device.type == "cuda"
        norm = self.engine.get_global_grad_norm()
        metrics = {
            "loss": interval.loss,
            "lr": self.config.optimizer.lr_at(self.step - 1, self.total, self.config.batch_size),
            "grad_norm": None if norm is None else float(norm),
            "epoch": self.loader.epoch,
            "samples_per_s": rate,
            "tokens_per_s": tokens / seconds,
            "mfu": None if self.peak is None else flops / seconds / self.peak / self.world.size,
            "data_stall_s": stall_s,
            "data_stall_share": stall_s / seconds,
            "skipped_steps": self.skipped,
            "rewinds": len(self.left_out),
            "failed_checkpoints": self.writer.failed,
            "memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else rss,
        }
        self.run.log(self.step, **metrics)
        return metrics

    def finish(self) -> bool:
        """Last checkpoint, last evaluation, figures.

        Returns
        -------
        bool
            False where somebody asked to stop meanwhile; the rest is done when the run goes on.
        """
        from pretrain.training.plots import plot_loss, plot_reconstruction

        # The checkpoint first: the evaluation may take longer than the grace that a signal leaves.
        self.save_last()
        result = self.evaluate()
        if not result:
            return False
        plots = self.run.path / "plots"
        plot_reconstruction(plots / "reconstruction.png", self.engine.module, self.held_out, self.world, step=self.step)
        if self.world.first:
            plot_loss(plots / "loss.png", self.run.metrics())
            print(
                f"dreamscale pretrain: {self.step} steps, held-out loss {result['val_loss']:.4f}, "
                f"{result['val_explained']:.1%} of the hidden signal explained; run in {self.run.path}"
            )
        return True


def _read_left_out(run: RunDirectory) -> list[dict[str, Any]]:
    path = run.path / LEFT_OUT
    return read_json(path) if path.is_file() else []


def count_subjects(dataset: EEGDataset | Mixture) -> int | None:
    """Count the people in a split.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The split.

    Returns
    -------
    int or None
        Their number, from the ledger beside the manifest; from the samples where there is none and they are few;
        None where it would take long to know. The datasets of a mixture are taken to share nobody.
    """
    if isinstance(dataset, Mixture):
        counts = [count_subjects(part) for part in dataset.parts]
        return None if None in counts else sum(count or 0 for count in counts)
    ledger = dataset.path / "ledger.parquet"
    if ledger.is_file():
        import pyarrow.parquet

        with ledger.open("rb") as stream:
            table = pyarrow.parquet.read_table(stream, columns=["corpus", "subject", "split", "status"])
        rows = table.to_pylist()
        used = [r for r in rows if r["status"] == "sharded" and dataset.split in (r["split"] or "").split("+")]
        return len({(r["corpus"], r["subject"]) for r in used})
    if len(dataset) > 20_000:
        return None
    metas = [dataset.meta(number) for number in range(len(dataset))]
    return len({(meta.get("corpus"), meta.get("subject")) for meta in metas})


def check_request(config: PretrainConfig) -> tuple[EEGDataset | Mixture, EEGDataset | Mixture]:
    """Find the user's mistakes before anything heavy is loaded.

    Parameters
    ----------
    config : PretrainConfig
        The request.

    Returns
    -------
    train, held_out : EEGDataset or Mixture
        Splits train and val.

    Raises
    ------
    RequestError
        If dataset and model do not fit each other, or the launcher gave another number of processes.
    """
    train, held_out = (
        Mixture(config.datasets, split) if config.datasets else EEGDataset(config.dataset, split)
        for split in ("train", "val")
    )
    shape = config.model.encoder
    if shape.samples != train.spec.window:
        raise RequestError(
            f"model.encoder.samples is {shape.samples}, but the windows of {train.path} have {train.spec.window} "
            f"samples; set model.encoder.samples: {train.spec.window}, or shard with preprocess.window: {shape.samples}"
        )
    if shape.channels != N_PADDED:
        raise RequestError(f"model.encoder.channels is {shape.channels}; datasets are padded to {N_PADDED}")
    from pretrain.runs.distributed import check_num_processes

    check_num_processes(config.num_processes, "torchrun --nproc_per_node {} -m pretrain.train")
    return train, held_out


def pretrain(config: PretrainConfig) -> int:
    """Run, or go on with, a pretraining.

    Parameters
    ----------
    config : PretrainConfig
        The request.

    Returns
    -------
    int
        0.

    Raises
    ------
    RequestError
        If the request cannot be met.
    StopRequested
        If a signal came; a checkpoint was written first.
    """
    train, held_out = check_request(config)
    from pretrain.runs.distributed import choose_device, import_deepspeed, launched_world, process_group

    rank, _ = launched_world()
    device = choose_device(config.device)
    run = RunDirectory(config.output, config, rank=rank, tracker=config.tracker, free=FREE)
    if run.finished:
        if rank == 0:
            print(f"dreamscale pretrain: {config.output} is done already; choose another output for another run")
        return EXIT_DONE
    # DeepSpeed's calls, not ours to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with StopSignal() as stop, _status_on_failure(run):
        deepspeed = import_deepspeed(device)
        # Ours speaks first, and knows more.
        with process_group(deepspeed, device, timeout_s=2 * config.timeout_s) as world:
            step, done = train_in(world, deepspeed, config, run, train, held_out, stop)
        if not done:
            run.status("stopped", step=step)
            raise StopRequested(f"checkpoint of step {step} in {run.path}; run the same command to go on")
        run.status("done", step=step)
    return EXIT_DONE


def train_in(
    world: World,
    deepspeed: Any,
    config: PretrainConfig,
    run: RunDirectory,
    train: EEGDataset | Mixture,
    held_out: EEGDataset | Mixture,
    stop: StopSignal,
) -> tuple[int, bool]:
    """Train among processes that have met already.

    Parameters
    ----------
    world : World
        This process among all.
    deepspeed : module
        DeepSpeed.
    config : PretrainConfig
        The request.
    run : RunDirectory
        Where it is written.
    train, held_out : EEGDataset
        The splits.
    stop : StopSignal
        Whether somebody asks to stop.

    Returns
    -------
    step : int
        Steps done.
    done : bool
        False where it was stopped, and then there is a checkpoint.
    """
    from pretrain.training.deepspeed_engine import start_engine

    training = _Training(config, run, train, held_out, start_engine(deepspeed, config, world.device), world, stop)
    with training.watchdog:
        training.resume()
        training.loop()
        done = training.step == training.total and training.finish()
        if training.step < training.total:
            training.save_last()
    return training.step, done


@contextlib.contextmanager
def _status_on_failure(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except StopRequested:
        raise
    except BaseException as error:
        run.failed(f"{type(error).__name__}: {error}")
        raise
    finally:
        run.close()


def main(argv: list[str] | None = None) -> int:
    """Pretrain from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``CONFIG.yaml [--dotted.key value ...]``.

    Returns
    -------
    int
        Exit code.
    """

    def body(words: list[str]) -> int:
        # DeepSpeed's launcher says first what the environment says as well.
        words = [word for word in words if not word.startswith("--local_rank=")]
        return pretrain(parse_config(PretrainConfig, words, prog="dreamscale pretrain", positionals=("config",)))

    return run_main(body, argv)


if __name__ == "__main__":
    sys.exit(main())
