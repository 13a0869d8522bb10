"""Memory in which reading processes leave signals for the training process, used over and over.

Torch would make a new piece of shared memory for each batch, hand it over through a socket and map it: that costs more
than reading and decompressing the batch.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakValueDictionary

import numpy as np

if TYPE_CHECKING:
    import torch

    from data_sharding.dataset.loader import Batch


class Slots:
    """Room for a number of batches in each of some processes that are forked from this one.

    Parameters
    ----------
    workers : int
        Reading processes.
    each : int
        Batches that one of them may have under way.
    rows, window : int
        Most channels of a batch, over all of its samples, and samples of a window.
    """

    _numbers: ClassVar = itertools.count()
    _open: ClassVar[WeakValueDictionary[int, Slots]] = WeakValueDictionary()

    def __init__(self, workers: int, each: int, rows: int, window: int) -> None:
        self.each, self.rows, self.window = each, rows, window
        self.size = -(-rows * window * 2 // mmap.PAGESIZE) * mmap.PAGESIZE
        # Anonymous: a container's small /dev/shm does not matter. Pages are taken when they are first written to.
        self.memory = mmap.mmap(-1, workers * each * self.size)
        self.number = next(self._numbers)
        self._open[self.number] = self

    @classmethod
    def possible(cls) -> bool:
        """Whether reading processes can share memory of this one."""
        return sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()

    @classmethod
    def of(cls, number: int) -> Slots:
        """Slots of this process by their number.

        Parameters
        ----------
        number : int
            Theirs.

        Returns
        -------
        Slots
            The slots.
        """
        return cls._open[number]

    def view(self, place: int) -> np.ndarray:
        """Memory of one batch.

        Parameters
        ----------
        place : int
            Which: ``worker * each + batch``.

        Returns
        -------
        ndarray of float16, shape (rows, window)
            A view.
        """
        flat = np.frombuffer(self.memory, np.float16, self.rows * self.window, place * self.size)
        return flat.reshape(self.rows, self.window)


@dataclass(kw_only=True)
class Shipped:
    """A batch on its way: its signals lie in a slot until the training process has copied them."""

    batch: Batch
    """All but its signals."""
    slots: int
    """Number of the `Slots`."""
    place: int
    """Where in them."""
    rows: int
    """Channels over all samples."""

    def _signals(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(Slots.of(self.slots).view(self.place)[: self.rows])

    def arrived(self) -> Batch:
        """Copy the signals, whereby the slot is free.

        Returns
        -------
        Batch
            Whole.
        """
        self.batch.packed = self._signals().clone()
        return self.batch

    def pin_memory(self) -> Batch:
        """Copy the signals to page-locked memory; torch calls it in a thread of the training process.

        Returns
        -------
        Batch
            Whole.
        """
        self.batch.packed = self._signals().pin_memory()
        return self.batch
