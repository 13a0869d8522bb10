"""Count the work and the time between two lines of metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from data_sharding.dataset.batch import Batch
from pretrain.model.flops import batch_flops, peak_flops
from pretrain.runs.distributed import World
from pretrain.runs.pace import Pace
from pretrain.training.config import PretrainConfig


class Throughput:
    """Counts steps, tokens and FLOPs, and collects losses and waiting times, since the last line of metrics.

    Parameters
    ----------
    config : PretrainConfig
        The run's config.
    world : World
        The processes of the run.

    Attributes
    ----------
    steps : int
        Number of steps since the last line of metrics. If the run was interrupted after this line, the steps before the
        interruption are counted too.
    losses : list of float or None
        Losses of the steps since the last line of metrics; None for a loss that was not finite.
    pace : Pace
        Compares the own times of the processes. A process waits for the others in its backward passes, but not while it
        waits for data or computes forward passes (except with ZeRO stage 3).
    """

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self._model, self._batch_size, self._world = config.model, config.batch_size, world
        self._peak = peak_flops(world.device, config.precision, config.peak_tflops)
        if self._peak is not None:
            # The first call of `batch_flops` takes seconds, because it counts the model's operations. Call
            # `batch_flops` here, so that its first call is not measured as training time. One of the two windows has
            # only one channel, so that `batch_flops` also computes its formula for other numbers of channels now.
            batch_flops(self._model, [1, self._model.encoder.channels])
        self.pace = Pace(world)
        self.reset()

    def reset(self, steps: int = 0, losses: Sequence[float | None] = ()) -> None:
        """Start counting for a new line of metrics. All counters except `steps` and `losses` begin with zero.

        Parameters
        ----------
        steps : int
            If a run is resumed between two lines of metrics: number of steps that it had done since the first of these
            lines.
        losses : sequence of float or None
            Losses of the steps since the last line of metrics; None for a loss that was not finite.
        """
        self.steps, self.losses = steps, list(losses)
        # Only steps that this process took itself count for rates such as `samples_per_s`. After a resumption, `steps`
        # also contains steps of an earlier process, whose time is not known here.
        self._timed_steps = 0
        self._stall_s = self._flops = 0.0
        self._tokens = 0
        self.pace.reset()
        self.start_clock()

    def start_clock(self) -> None:
        """Start the clock again: the time before this call does not count for the rates."""
        self._started = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the duration of a ``with`` block."""
        since = time.monotonic()
        yield
        self._started += time.monotonic() - since

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of a ``with`` block as time spent waiting for data."""
        since = time.monotonic()
        with self.pace.working():
            yield
        self._stall_s += time.monotonic() - since

    def add(self, batch: Batch, loss: float) -> None:
        """Count one optimiser step.

        Parameters
        ----------
        batch : Batch
            This process's part of the batch.
        loss : float
            Mean loss over the global batch.
        """
        self.steps += 1
        self._timed_steps += 1
        self.losses.append(loss if math.isfinite(loss) else None)
        encoder = self._model.encoder
        self._tokens += sum(map(encoder.token_rows, batch.channels)) * encoder.tokens
        if self._peak is not None:
            self._flops += batch_flops(self._model, batch.channels)

    @property
    def loss(self) -> float:
        """Mean loss since the last line of metrics; NaN if one of the losses was not finite."""
        return sum(float("nan") if loss is None else loss for loss in self.losses) / self.steps

    def rates(self) -> dict[str, Any]:
        """Return speed and waiting time since the last line of metrics; every process must call this method.

        Returns
        -------
        dict
            ``samples_per_s`` and ``tokens_per_s``: speed of all processes together. ``mfu``: model-FLOPs utilisation;
            None if the device's peak speed is not known. ``data_stall_s`` and ``data_stall_share``: time spent waiting
            for data, by the process that waited longest, in seconds and as a share of the measured time.
            ``slowest_rank`` and ``slowest_rank_ratio``: the process with the longest own time (waiting for data, and
            forward passes), and the ratio of this time to the median of the others; None if there is only one process.
        """
        seconds = time.monotonic() - self._started
        (stall_s,) = self._world.all_reduce_max(self._stall_s)
        flops, tokens = self._world.all_reduce_sum(self._flops, self._tokens)
        return {
            "samples_per_s": self._timed_steps * self._batch_size / seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": None if self._peak is None else flops / seconds / self._peak / self._world.size,
            "data_stall_s": stall_s,
            "data_stall_share": stall_s / seconds,
            **self.pace.compare(seconds),
        }
