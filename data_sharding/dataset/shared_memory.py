"""Shared memory in which workers pass the signals of their batches to the training process.

The shared memory of this module replaces torch's transfer of batches, which is slow. For each batch, torch allocates
shared memory, sends its file descriptor through a socket and maps the memory. These steps take longer than reading and
decompressing the batch. The shared memory of this module is allocated only once, before the workers are forked. The
shared memory is divided into slots for one batch each, and the slots are reused.
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

from data_sharding.dataset.batch import Batch

if TYPE_CHECKING:
    import torch


class Slots:
    """Shared memory with a fixed number of slots for each worker. The workers must be forked from this process.

    Parameters
    ----------
    workers : int
        Number of workers.
    per_worker : int
        Number of slots of one worker. A worker can write this many batches before the training process has copied a
        batch.
    rows : int
        Maximum number of channels of a batch, summed over all samples of the batch.
    window : int
        Number of time points of a window.
    """

    _numbers: ClassVar = itertools.count()
    _open: ClassVar[WeakValueDictionary[int, Slots]] = WeakValueDictionary()

    def __init__(self, workers: int, per_worker: int, rows: int, window: int) -> None:
        self.per_worker, self.rows, self.window = per_worker, rows, window
        self.size = -(-rows * window * 2 // mmap.PAGESIZE) * mmap.PAGESIZE
        # Use anonymous memory (memory without a file), because /dev/shm is often small in a container. Linux allocates
        # a page of anonymous memory only when the page is first written, so slots that are never used cost nothing.
        self.memory = mmap.mmap(-1, workers * per_worker * self.size)
        self.number = next(self._numbers)
        self._open[self.number] = self

    @classmethod
    def supported(cls) -> bool:
        """Return whether workers can share memory with this process; sharing works only on Linux, with fork."""
        return sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()

    @classmethod
    def by_number(cls, number: int) -> Slots:
        """Return this process's `Slots` object with the given number.

        A message from a worker contains the number of a `Slots` object, because the shared memory itself cannot be
        pickled.
        """
        return cls._open[number]

    def view(self, slot: int) -> np.ndarray:
        """Return the memory of one slot.

        Parameters
        ----------
        slot : int
            Number of the slot: ``worker * per_worker + i`` for slot `i` of a worker.

        Returns
        -------
        ndarray of float16, shape (rows, window)
            A view of the shared memory.
        """
        flat = np.frombuffer(self.memory, np.float16, self.rows * self.window, slot * self.size)
        return flat.reshape(self.rows, self.window)


@dataclass(kw_only=True)
class BatchInSlot:
    """Message of a worker: a batch with its signals in a slot of the shared memory."""

    batch: Batch
    """The batch without its signals."""
    slots: int
    """Number of the `Slots` object."""
    slot: int
    """Number of the slot with the signals."""
    rows: int
    """Number of channels, summed over all samples of the batch."""

    def _signals(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(Slots.by_number(self.slots).view(self.slot)[: self.rows])

    def copy_out(self) -> Batch:
        """Copy the signals to ordinary memory; after the copy, the worker may write to the slot again.

        Returns
        -------
        Batch
            The batch with its signals.
        """
        self.batch.packed = self._signals().clone()
        return self.batch

    def pin_memory(self) -> Batch:
        """Copy the signals to page-locked memory; torch calls this method in a thread of the training process.

        Returns
        -------
        Batch
            The batch with its signals.
        """
        self.batch.packed = self._signals().pin_memory()
        return self.batch
