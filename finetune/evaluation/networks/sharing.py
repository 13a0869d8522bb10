"""Compute values of images block by block, and divide the blocks among the processes of an evaluation.

Rank 0 runs the same code as an evaluation with one process, and asks the other processes to compute values of images,
such as embeddings. The other processes only answer these requests. A block always holds the same images, whatever the
number of processes, so the number of processes does not change the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_sharding.common.errors import RequestError
from finetune.evaluation.pixel_metrics import ImageSource
from pretrain.runs.distributed import World

Compute = Callable[..., Any]
"""Function that takes one array of images [B, H, W, 3] for each source, and returns values that can be pickled."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A request of rank 0: the name of a function, and the images whose blocks are its arguments."""

    name: str
    sources: tuple[ImageSource, ...]
    block: int

    def read(self, number: int) -> list[Any] | None:
        """Read block `number` of each source of images; None if there is no such block."""
        start = number * self.block
        if start >= len(self.sources[0]):
            return None
        return [source[start : start + self.block] for source in self.sources]


class Sharing:
    """The processes among which the blocks of images are divided.

    Parameters
    ----------
    world : World, optional
        The processes; by default, this process works alone.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()

    def compute(self, name: str, compute: Compute, *sources: ImageSource, block: int) -> Iterator[Any]:
        """Call a function for each block of images, on all processes; only rank 0 calls this method.

        Parameters
        ----------
        name : str
            Name under which the other processes know the function (see `follow`).
        compute : callable
            The function.
        *sources : ImageSource
            Sources of images, with the same number of images in each. The function is called with one block from each
            source.
        block : int
            Number of images in a block.

        Yields
        ------
        Any
            Result of the function for each block, in the order of the images.

        Raises
        ------
        RequestError
            If the function, or the reading of images, raised this error on any process.
        """
        task, blocks = _Task(name=name, sources=sources, block=block), math.ceil(len(sources[0]) / block)
        self.world.broadcast(task)
        for first in range(0, blocks, self.world.size):
            # In a round, each process computes one block. Before each round, rank 0 sends the number of the round's
            # first block to the other processes, so that rank 0 may stop after any round.
            self.world.broadcast(first)
            for value, fault in self._run_round(task, compute, first)[: blocks - first]:
                if fault is not None:
                    raise fault
                yield value

    def _run_round(self, task: _Task, compute: Compute, first: int) -> list[tuple[Any, RequestError | None]]:
        """Compute one block on each process, and return the results of these blocks on every process."""
        value, fault = None, None
        try:
            images = task.read(first + self.world.rank)
            value = None if images is None else compute(*images)
        except RequestError as error:
            fault = error
        return self.world.all_gather((value, fault))

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Context manager for rank 0: at the end, also after an error, it tells the other processes to end."""
        try:
            yield
        finally:
            self.world.broadcast(None)

    def announce(self, value: Any) -> None:
        """Send a value from rank 0 to the other processes, which receive the value in `wait`.

        The sent value must not be None, because None tells the other processes that rank 0 has ended.
        """
        self.world.broadcast(value)

    def wait(self) -> Any:
        """Wait for a value that rank 0 sends with `announce`; None means that rank 0 has ended."""
        return self.world.broadcast(None)

    def follow(self, functions: Mapping[str, Compute]) -> None:
        """Compute blocks of images for rank 0, until rank 0 ends; every process except rank 0 calls this method.

        Parameters
        ----------
        functions : mapping
            The functions that rank 0 calls in `compute`, by name.
        """
        task: _Task | None = None
        while (message := self.wait()) is not None:
            if isinstance(message, _Task):
                task = message
            else:
                assert task is not None
                self._run_round(task, functions[task.name], message)
