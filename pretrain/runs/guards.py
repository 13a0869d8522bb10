"""Guards of a training: loss spikes, and processes that hang."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What counts as a loss spike, and what is done about it."""

    spike_sigma: float = 6.0
    """A loss so many standard deviations above the mean of the last ones is a spike: training goes back to its newest
    checkpoint and leaves the batches that led to it out. 0 for never."""
    spike_window: int = 128
    """Losses that the mean and the standard deviation are of; none is judged before there are so many."""
    leave_out: int = 8
    """Batches left out: the one of the spike and those just before it."""
    max_rewinds: int = 5
    """Spikes after which the run fails: more of them are a matter of the learning rate, not of the data."""

    def __post_init__(self) -> None:
        if self.spike_sigma < 0 or self.spike_window < 2 or self.leave_out < 1 or self.max_rewinds < 0:
            raise ValueError(
                "guards: spike_sigma and max_rewinds must not be negative, "
                "spike_window must be at least 2, leave_out at least 1"
            )


class SpikeDetector:
    """Finds losses far above those just before them.

    Every process is given the same losses and comes to the same verdict, so none has to ask another.

    Parameters
    ----------
    config : GuardConfig
        What counts.
    recent : sequence of float
        The last losses of a training that goes on.
    """

    def __init__(self, config: GuardConfig, recent: Sequence[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent, maxlen=config.spike_window)

    @property
    def recent(self) -> list[float]:
        """The last losses, for the checkpoint."""
        return list(self._recent)

    def seen(self, loss: float) -> str | None:
        """Judge a loss, and remember it where it is no spike.

        Parameters
        ----------
        loss : float
            Mean over the global batch; one that is not finite is neither judged nor remembered.

        Returns
        -------
        str or None
            What is wrong with it, or None.
        """
        if not math.isfinite(loss):
            return None
        if self._config.spike_sigma and len(self._recent) == self._config.spike_window:
            mean = math.fsum(self._recent) / len(self._recent)
            sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in self._recent) / (len(self._recent) - 1))
            if loss > mean + self._config.spike_sigma * sigma:
                return f"{loss:.4g}, where the last {len(self._recent)} were {mean:.4g} with a deviation of {sigma:.2g}"
        self.accept(loss)
        return None

    def accept(self, loss: float) -> None:
        """Remember a loss, spike or not.

        Parameters
        ----------
        loss : float
            Mean over the global batch.
        """
        self._recent.append(loss)


PHASES = ("waiting for data", "computing", "agreeing on the loss", "updating", "evaluating", "saving")
"""What a process does in a step, in this order."""


class Watchdog:
    """Ends a training in which a process hangs, and names that process.

    A thread of each process tells the others, through the store at which they met, where its training stands. When
    the own training stands still for too long, the thread compares: those that do not answer, or that are furthest
    behind, are the ones that all others wait for. Then it ends this process, so that a launcher can start anew.

    Parameters
    ----------
    timeout_s : float
        Seconds without progress after which to end; 0 for never.
    rank, size : int
        This process among how many.
    run : RunDirectory
        Whose status becomes "failed".
    store : torch.distributed.Store, optional
        Through which the processes tell each other; a connection of its own to where they met by default.
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

            # Not the shared connection: a thread that waits in it would block the training.
            store = store or dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore("dreamscale_watchdog", store)
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self._tell()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._store is not None:
            # Not for good: it may wait for a store that does not answer.
            self._thread.join(timeout=2 * self._period_s)

    def at(self, step: int, phase: str) -> None:
        """Say where the training stands.

        Parameters
        ----------
        step : int
            Optimiser steps done.
        phase : str
            One of `PHASES`.
        """
        self._place, self._since = (step, PHASES.index(phase)), time.monotonic()

    def _tell(self) -> None:
        self._beat += 1
        state = {"place": self._place, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid()}
        # Where the process that keeps the store is gone, the training finds out by itself.
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), json.dumps(state))

    def _watch(self) -> None:
        while not self._end.wait(self._period_s):
            late = time.monotonic() - self._since > self._timeout_s
            if late:
                # Where the host of the store is frozen, asking it takes forever.
                alone = threading.Timer(6 * self._period_s, self._give_up, ("the store does not answer",))
                alone.daemon = True
                alone.start()
            self._tell()
            if late:
                self._bark()

    def _bark(self) -> None:
        verdict = self.verdict()
        try:
            first = self._store.add("said", 1) == 1
        except RuntimeError:
            first = True
        self._give_up(verdict if first else None)

    def _give_up(self, verdict: str | None) -> None:
        if self._end.is_set():
            return
        if verdict:
            message = f"no progress for {self._timeout_s:g} s: {verdict}"
            print(f"dreamscale pretrain: {message}", file=sys.stderr, flush=True)
            self._run.failed(message)
        # The main thread is stuck in a system call or in a collective: nothing gentler reaches it.
        os._exit(EXIT_FAILED)

    def verdict(self) -> str:
        """Say who holds the training up, as far as the processes' reports show.

        Returns
        -------
        str
            Part of a sentence.
        """
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
        return f"{'; '.join(self._describe(r, after[r]) for r in behind)}: the others wait for it"

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
