"""Guards of a training run: they detect loss spikes and hanging processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from data_sharding.common.errors import EXIT_FAILED
from pretrain.runs.config import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings that define a loss spike, and how the run reacts to a spike."""

    spike_sigma: float = 6.0
    """A loss is a spike if it is more than this many standard deviations above the mean of the last losses. After a
    spike, training goes back to a checkpoint and leaves out the batches that led to the spike. 0 switches the detection
    of spikes off."""
    spike_window: int = 128
    """Number of last losses from which the mean and the standard deviation are computed. Spikes are detected only after
    the run has this many losses."""
    leave_out: int = 8
    """Number of batches left out: the batch of the spike and the batches just before it."""
    max_rewinds: int = 5
    """Largest number of spikes in a run. If a run has more spikes than max_rewinds, it fails, because so many spikes
    come from a learning rate that is too high, not from the data."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "spike_sigma", "max_rewinds", prefix="guards.")
        check_at_least(self, 1, "leave_out", prefix="guards.")
        check_at_least(self, 2, "spike_window", prefix="guards.")


class SpikeDetector:
    """Detects loss spikes: losses that are far above the losses just before them.

    Each process has its own detector. All detectors get the same losses and so find the same spikes; they need not
    communicate.

    Parameters
    ----------
    config : GuardConfig
        Settings that define a loss spike.
    recent : sequence of float
        If a run is resumed: the value of `recent` in the checkpoint.
    """

    def __init__(self, config: GuardConfig, recent: Sequence[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent, maxlen=config.spike_window)

    @property
    def recent(self) -> list[float]:
        """The losses with which `check` compares the next loss; checkpoints store them."""
        return list(self._recent)

    def check(self, loss: float) -> str | None:
        """Check whether a loss is a spike; if the loss is not a spike, add it to the recent losses.

        Parameters
        ----------
        loss : float
            Mean loss over the global batch. A loss that is not finite is ignored.

        Returns
        -------
        str or None
            Description of the spike; None if the loss is not a spike.
        """
        if not math.isfinite(loss):
            return None
        if self._config.spike_sigma and len(self._recent) == self._config.spike_window:
            mean = math.fsum(self._recent) / len(self._recent)
            sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in self._recent) / (len(self._recent) - 1))
            if loss > mean + self._config.spike_sigma * sigma:
                last = f"the last {len(self._recent)} losses had mean {mean:.4g} and standard deviation {sigma:.2g}"
                return f"{loss:.4g}; {last}"
        self.accept(loss)
        return None

    def accept(self, loss: float) -> None:
        """Add a loss to the recent losses, even if `check` found that the loss is a spike."""
        self._recent.append(loss)


PHASES = ("waiting for data", "computing", "agreeing on the loss", "updating", "evaluating", "saving")
"""Names of the phases of one training step, in their order."""


class Watchdog:
    """Ends a training run in which a process hangs, and names that process.

    Each process has a thread that reports the progress of the process's training loop to the key-value store of the
    process group. If the loop makes no progress for too long, the thread compares the reports of all processes. A
    process counts as hanging if its reports have stopped, or if it is behind all others, because then the others wait
    for it. After the comparison, the thread ends the process in which it runs, so that a launcher can restart the run.

    Parameters
    ----------
    timeout_s : float
        If a process makes no progress for this many seconds, the run ends; with 0, the run never ends for this reason.
    rank, size : int
        Rank of this process, and number of processes.
    run : RunDirectory
        Directory of the run. The status of the run becomes "failed" if a process hangs.
    store : torch.distributed.Store, optional
        Store for the reports; by default, the process group's store, through a new connection. A process without a
        process group has a store in its own memory.
    """

    def __init__(self, timeout_s: float, *, rank: int, size: int, run: Any, store: Any = None) -> None:
        self._timeout_s, self._rank, self._size, self._run = timeout_s, rank, size, run
        self._place = (0, 0)
        self._since = time.monotonic()
        self._beat = 0
        self._end = threading.Event()
        self._period_s = min(5.0, timeout_s / 8)
        self._store: Any = None
        if timeout_s > 0:
            import torch.distributed as dist

            if store is None and dist.is_initialized():
                # Open a connection to the store for this thread alone: while a request waits for its answer, nobody
                # else can use the same connection.
                store = dist.distributed_c10d._get_default_store().clone()
            elif store is None:
                store = dist.HashStore()
            self._store = dist.PrefixStore("dreamscale_watchdog", store)
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self._report()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._store is not None:
            # Wait for the thread with a time limit, because the thread may wait for a store that does not answer.
            self._thread.join(timeout=2 * self._period_s)

    def at(self, step: int, phase: str) -> None:
        """Note this process's progress for its next report: optimiser steps done, and the current phase of `PHASES`."""
        self._place, self._since = (step, PHASES.index(phase)), time.monotonic()

    def _report(self) -> None:
        self._beat += 1
        state = {"place": self._place, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid()}
        # An error here means that the process that holds the key-value store has ended. Ignore it: the training loop
        # then gets an error too.
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), json.dumps(state))

    def _watch(self) -> None:
        while not self._end.wait(self._period_s):
            late = time.monotonic() - self._since > self._timeout_s
            if late:
                # If the store's host is frozen, the requests to the store below never return. Start a timer that then
                # ends this process.
                alone = threading.Timer(6 * self._period_s, self._give_up, ("the store does not answer",))
                alone.daemon = True
                alone.start()
            self._report()
            if late:
                self._end_late()

    def _end_late(self) -> None:
        diagnosis = self.diagnose()
        try:
            # All processes find out which process hangs, but only the first one to do so prints the diagnosis.
            first = self._store.add("diagnosed", 1) == 1
        except RuntimeError:
            first = True
        self._give_up(diagnosis if first else None)

    def _give_up(self, diagnosis: str | None) -> None:
        if self._end.is_set():
            return
        if diagnosis:
            message = f"no progress for {self._timeout_s:g} s: {diagnosis}"
            print(f"dreamscale: {message}", file=sys.stderr, flush=True)
            self._run.failed(message)
        # End the process with os._exit: an exception would not reach the main thread, which hangs in a system call or
        # in a collective operation.
        os._exit(EXIT_FAILED)

    def diagnose(self) -> str:
        """Compare the reports of all processes, and return a text that says which processes hang."""
        before = self._states()
        time.sleep(3 * self._period_s)
        after = self._states()
        after[self._rank] = (after.get(self._rank) or {}) | {"beat": -1}
        silent = [r for r in range(self._size) if not after.get(r) or after[r] == before.get(r)]
        lost = [r for r in silent if r != self._rank]
        if lost:
            return f"{'; '.join(self._describe(r, after.get(r)) for r in lost)}: stopped, dead or cut off"
        places = {rank: tuple(state.get("place", (0, 0))) for rank, state in after.items()}
        behind = [rank for rank, place in places.items() if place == min(places.values())]
        if len(behind) == self._size:
            step, phase = places[behind[0]]
            return f"all processes wait in step {step + 1} while {PHASES[phase]}; a collective or the network hangs"
        return f"{'; '.join(self._describe(r, after[r]) for r in behind)}: other processes wait for it"

    def _describe(self, rank: int, state: dict[str, Any] | None) -> str:
        if not state:
            return f"rank {rank} never answered"
        step, phase = state["place"]
        return f"rank {rank} (host {state['host']}, process {state['pid']}) in step {step + 1} while {PHASES[phase]}"

    def _states(self) -> dict[int, dict[str, Any]]:
        out = {}
        for rank in range(self._size):
            try:
                if self._store.check([str(rank)]):
                    out[rank] = json.loads(self._store.get(str(rank)))
            except RuntimeError:
                continue
        return out
