"""Find out which process of a training is slow, so that all other processes wait for it."""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.runs.distributed import World

SLOW, SLOW_SHARE = 1.5, 0.1
"""A process is slow if its own time is more than `SLOW` times the median of the other processes' times, and if the
difference is more than `SLOW_SHARE` of the measured time."""


class Pace:
    """Compares the time that each process needs for its own work.

    In every step, all processes wait for the slowest process, so the steps of all processes take equally long. The
    processes differ only in the parts of a step in which they do not wait for each other, such as reading a batch. The
    time of these parts is the own time of a process.

    Parameters
    ----------
    world : World
        The processes of the run.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts = world.all_gather(socket.gethostname())
        # Rank that was slow in the last comparison, and rank that a message has named already.
        self._slow = self._named = -1
        self.reset()

    def reset(self) -> None:
        """Start to measure again."""
        self._own_s = 0.0
        self._events: list[Any] = []

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the time of a ``with`` block, in which this process must not wait for other processes."""
        since = time.monotonic()
        yield
        self._own_s += time.monotonic() - since

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of a ``with`` block as in `working`; the block may compute on a GPU."""
        if self._world.device.type != "cuda":
            with self.working():
                yield
            return
        # The GPU runs behind the CPU, so let the GPU itself write down the time.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    def compare(self, seconds: float) -> dict[str, Any]:
        """Compare the own times of the processes, and start to measure again; every process must call this method.

        A process that is slow in two comparisons in a row is named by a message, and only once until it is no longer
        slow.

        Parameters
        ----------
        seconds : float
            Time since the last comparison.

        Returns
        -------
        dict
            ``slowest_rank`` and ``slowest_rank_ratio``: the process with the longest own time, and the ratio of this
            time to the median of the others; None if there is only one process.
        """
        own_s = self._own_s
        if self._events:
            self._events[-1][1].synchronize()
            own_s += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self.reset()
        size = self._world.size
        if size == 1:
            return {"slowest_rank": None, "slowest_rank_ratio": None}
        # Each process fills its own place in a list of zeros, so the sum has the times of all processes.
        times = self._world.all_reduce_sum(*(own_s if rank == self._world.rank else 0.0 for rank in range(size)))
        slowest = max(range(size), key=times.__getitem__)
        usual = statistics.median(times[:slowest] + times[slowest + 1 :])
        slow = times[slowest] > SLOW * usual and times[slowest] - usual > SLOW_SHARE * seconds
        if slow and slowest == self._slow != self._named and self._world.first:
            print(
                f"dreamscale: rank {slowest} (host {self._hosts[slowest]}) is slow: in {seconds:.1f} s, it needed "
                f"{times[slowest]:.1f} s for its own work, the other ranks {usual:.1f} s (median); the others wait for "
                "it, so check this machine",
                file=sys.stderr,
            )
        self._named = slowest if slow and slowest == self._slow else -1
        self._slow = slowest if slow else -1
        return {"slowest_rank": slowest, "slowest_rank_ratio": times[slowest] / usual if usual else None}
