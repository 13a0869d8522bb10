"""Endless stream of training batches that contains every sample exactly once in each epoch.

The samples of a global batch (the batch of all ranks together) do not depend on the number of ranks or workers.

Letters in shapes: `b` samples of this rank, `n` recorded channels of a sample, `T` time points of a window.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.common.errors import RankError, RequestError
from data_sharding.dataset.batch import Batch, collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.order import DatasetInterleaver, EpochOrder, Order
from data_sharding.dataset.samples import N_PADDED
from data_sharding.dataset.shared_memory import BatchInSlot, Slots

_PREFETCH_BATCHES = 4
"""Number of batches that each worker prefetches."""


@dataclass(frozen=True)
class _WorkerError:
    """Error message that a worker sends instead of a batch.

    The worker does not raise the error, because torch would then add a long traceback to the message.
    """

    message: str


if hasattr(os, "register_at_fork"):
    # A forked worker must not collect unused objects of the training process. For example, an unused process group of
    # torch is deleted by joining its threads, but a forked process does not have these threads, so the deletion would
    # abort the worker or wait forever.
    os.register_at_fork(after_in_child=gc.freeze)


class _ShardPrefetcher:
    """Downloads the shards of the current and the next window (group of shards) of each remote dataset, in threads."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[int, int]] = {}

    def prefetch(self, loader: Loader, step: int) -> None:
        """Start a download thread for each dataset that begins a new window of shards at this step."""
        if loader.order != "shards":
            return
        for stream, (part, place) in enumerate(zip(loader.dataset.parts, loader.stream_places(step), strict=True)):
            if not part.cache:
                continue
            window, shards = loader.orders[stream].windows(place)
            if self.windows.get(stream) != window:
                self.windows[stream] = window
                threading.Thread(target=self._run, args=(part, stream, window, shards), daemon=True).start()

    def _run(self, part: EEGDataset, stream: int, window: tuple[int, int], shards: list[int]) -> None:
        # Other processes of the machine download the same shards, so let each process start with a different shard.
        turn = os.getpid() % len(shards)
        for shard in shards[turn:] + shards[:turn]:
            if self.windows.get(stream) != window:
                # The loader already reads another window of shards, so the remaining shards of the old window are not
                # needed.
                return
            try:
                os.close(part.open_shard(shard))
            except (OSError, RequestError):
                # Ignore a failed download: the process that reads a sample of the shard will get and report the same
                # error.
                return


class _StepDataset:
    """Map-style dataset for torch's DataLoader: item `t` contains this rank's samples of global batch `t`."""

    def __init__(self, loader: Loader, slots: Slots | None = None) -> None:
        self.loader, self.prefetcher, self.slots = loader, _ShardPrefetcher(), slots
        self.served = 0

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> Batch | BatchInSlot | _WorkerError:
        from torch.utils.data import get_worker_info

        numbers, epochs = self.loader.positions(step)
        self.prefetcher.prefetch(self.loader, step)
        worker, out, slot = get_worker_info(), None, 0
        if self.slots and worker:
            slot = worker.id * self.slots.per_worker + self.served % self.slots.per_worker
            out = self.slots.view(slot)
            self.served += 1
        try:
            batch = collate(self.loader.dataset, numbers, epochs, out)
        except RequestError as error:
            return _WorkerError(str(error))
        if self.slots is None or out is None or batch.packed.data_ptr() != out.ctypes.data:
            return batch
        rows, batch.packed = len(batch.packed), batch.packed[:0].clone()
        return BatchInSlot(batch=batch, slots=self.slots.number, slot=slot, rows=rows)


class _StepSampler:
    """Endless sampler for torch's DataLoader: yields the step numbers `start`, `start` + 1, and so on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


@contextlib.contextmanager
def _block_signal(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread, and in all processes that this thread starts during the ``with`` block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_job_signals(parent: int, worker: int) -> None:
    """Let a worker ignore the signals that a batch system sends to a whole job.

    Batch systems and torchrun signal every process of a job, but only the training process decides when to stop. By
    default, SIGTERM would end a worker of torch, and a dead worker makes the training process fail. So a worker ends at
    a SIGTERM only if its parent sent the signal. SIGTERM must be blocked in the training process before the worker is
    started, so that all threads of the worker inherit the block: otherwise, a thread that a library starts in every new
    process could receive the signal.

    The worker also ends when its parent process has ended: otherwise, a worker of torch would wait forever, because no
    process reads the batches from the worker's queue.

    Parameters
    ----------
    parent : int
        Process id of the training process.
    worker : int
        Number of the worker; torch passes this argument, but the function does not use it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return

    def wait() -> None:
        while os.getppid() == parent:
            found = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if found and found.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Loader:
    """Endless stream of training batches.

    The loader works on one endless sequence of samples: first the samples of epoch 0 in their random order, then the
    samples of epoch 1, and so on. Global batch `t` is the slice ``[t * B, (t + 1) * B)`` of the sequence of samples,
    where `B` is the global batch size. Each rank reads every `world_size`-th sample of the global batch. So every
    sample occurs exactly once in each epoch, all ranks have the same number of steps, and the global batches do not
    depend on the number of ranks or workers. In a mixture, each dataset has its own sequence of samples, and the weight
    of a dataset is the average fraction of a batch that comes from this dataset.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        Dataset to read from.
    global_batch : int
        Number of samples of a step, summed over all ranks.
    seed : int
        Seed of the random order of the samples.
    rank, world_size : int
        Rank of this process and number of ranks.
    num_workers : int
        Number of worker processes that read samples; with 0 workers, the training process reads the samples.
    order : {"global", "shards"}
        global: random order over all samples; with this order, a remote dataset must fit into the cache. shards: the
        shards are in random order, and the samples are in random order within each window, that is, within each group
        of `window` consecutive shards. With the order "shards", the cache must hold two windows of shards.
    window : int
        Number of shards in one window of the order "shards".
    pin_memory : bool, optional
        Whether the batches are in page-locked memory; by default True if the machine has a GPU, otherwise False.

    Raises
    ------
    RequestError
        If the global batch size is not a multiple of the world size, or if the cache is too small for the order.
    """

    def __init__(
        self,
        dataset: EEGDataset | Mixture,
        global_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        order: Order = "global",
        window: int = 16,
        pin_memory: bool | None = None,
    ) -> None:
        if global_batch < world_size or global_batch % world_size:
            raise RequestError(
                f"global batch {global_batch} must be a multiple of the number of processes, {world_size}"
            )
        if order not in ("global", "shards") or window < 1:
            raise RequestError(
                f"order is '{order}' and window is {window}; order must be global or shards, and window at least 1"
            )
        self.dataset, self.global_batch, self.seed = dataset, global_batch, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.order: Order = order
        self.window, self.pin_memory = window, pin_memory
        self.step = 0
        check_cache(dataset, order, window)
        self.orders = [
            EpochOrder(np.diff(part.first), seed, order, window, stream) for stream, part in enumerate(dataset.parts)
        ]
        self._first = np.cumsum([0, *(len(part) for part in dataset.parts)])
        weights = getattr(dataset, "weights", None)
        self._interleaver = DatasetInterleaver(weights, seed) if weights else None

    def positions(self, step: int) -> tuple[list[int], list[int]]:
        """Compute the numbers of the samples that this rank reads in a step.

        Parameters
        ----------
        step : int
            Number of the step, from 0.

        Returns
        -------
        numbers : list of int
            For each sample, its number in the dataset or in the mixture.
        epochs : list of int
            Epoch of each sample; in a mixture, the epochs are counted separately for each dataset.
        """
        line = np.arange(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world_size)
        if self._interleaver is None:
            numbers, epochs = self.orders[0].at(line)
            return numbers.tolist(), epochs.tolist()
        which, place = self._interleaver.at(line)
        numbers, epochs = np.empty_like(line), np.empty_like(line)
        for stream in np.unique(which).tolist():
            mine = which == stream
            numbers[mine], epochs[mine] = self.orders[stream].at(place[mine])
            numbers[mine] += self._first[stream]
        return numbers.tolist(), epochs.tolist()

    def stream_places(self, step: int) -> list[int]:
        """For each dataset, compute the place at which a step begins (see `data_sharding.dataset.order` for places).

        Parameters
        ----------
        step : int
            Number of the step, from 0.

        Returns
        -------
        list of int
            For each dataset, a place in the order of its samples. For a mixture, the places are those at the beginning
            of the block in which the step begins: a mixture assigns places to its datasets in blocks (see
            `DatasetInterleaver`).
        """
        place = step * self.global_batch
        return [place] if self._interleaver is None else self._interleaver.dealt_before(place)

    @property
    def epoch(self) -> float:
        """Number of samples read so far, divided by the number of samples of the dataset or of the whole mixture."""
        return self.step * self.global_batch / len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current step on.

        The attribute `step` is the number of yielded batches; it does not include batches that are only prefetched.
        """
        import torch
        from torch.utils.data import DataLoader

        slots = None
        if self.num_workers and Slots.supported():
            known = [int(part.index["n"].max()) if part.index["n"].all() else N_PADDED for part in self.dataset.parts]
            rows = self.global_batch // self.world_size * max(known)
            # Give each worker one slot for each prefetched batch, and two more slots: the worker writes to one of them,
            # while the training process copies a batch from the other.
            slots = Slots(self.num_workers, _PREFETCH_BATCHES + 2, rows, self.dataset.n_times)
        reader = DataLoader(
            _StepDataset(self, slots),  # type: ignore[arg-type]
            sampler=_StepSampler(self.step),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCH_BATCHES if self.num_workers else None,
            multiprocessing_context="fork" if slots else None,
            worker_init_fn=functools.partial(_ignore_job_signals, os.getpid()),
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )
        with _block_signal(signal.SIGTERM):
            batches = iter(reader)
        for batch in batches:
            if isinstance(batch, _WorkerError):
                raise RankError(batch.message)
            if isinstance(batch, BatchInSlot):
                batch = batch.copy_out()
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream as a small dictionary of constant size."""
        return {
            "dataset_id": self.dataset.manifest.dataset_id,
            "split": self.dataset.split,
            "seed": self.seed,
            "order": self.order if self.order == "global" else f"{self.order} {self.window}",
            "step": self.step,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position; the number of ranks and workers may have changed.

        Parameters
        ----------
        state : dict
            Dictionary that `state_dict` returned.

        Raises
        ------
        RequestError
            If the state belongs to another dataset, split, seed, order or global batch size.
        """
        for key, value in self.state_dict().items():
            if key != "step" and state.get(key) != value:
                raise RequestError(
                    f"cannot resume: {key} is {value!r} now and was {state.get(key)!r} in the checkpoint; "
                    f"restore the value of the checkpoint, or start a new run in another output directory"
                )
        self.step = int(state["step"])


def check_cache(dataset: EEGDataset | Mixture, order: Order, window: int) -> None:
    """Raise an error if the cache is so small that, with the given order, shards would be downloaded repeatedly.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        Dataset to read from.
    order : {"global", "shards"}
        Order of the samples.
    window : int
        Number of shards in one window of the order "shards".

    Raises
    ------
    RequestError
        If the shards that the loader needs at the same time are together larger than the size limit of the cache.
    """
    remote = [part for part in dataset.parts if part.cache]
    if not remote:
        return
    need = 0
    for part in remote:
        sizes = sorted((shard.bytes for shard in part.shards), reverse=True)
        # A batch can begin in one window of shards and end in the next, so the cache must hold two windows.
        need += sum(sizes if order == "global" else sizes[: 2 * window])
    limit = min(part.cache.limit for part in remote if part.cache)
    if need > limit:
        advice = "read it with order: shards, or " if order == "global" else f"lower its window of {window} shards, or "
        raise RequestError(
            f"{dataset.path} ({dataset.split}): order '{order}' needs {need / 1e9:.3g} GB in the cache, which is "
            f"limited to {limit / 1e9:.3g} GB; {advice}raise DREAMSCALE_CACHE_GB"
        )
