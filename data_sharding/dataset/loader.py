"""Batches in an order that is exactly once an epoch, the same for any number of ranks and workers.

Shapes: b samples of this rank, n true channels of a sample, T samples a window.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RankError, RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.order import EpochOrder, Interleaved, Order
from data_sharding.dataset.samples import N_PADDED
from data_sharding.dataset.shard_reader import parse_meta
from data_sharding.dataset.shared_memory import Shipped, Slots

if TYPE_CHECKING:
    import torch

    from data_sharding.dataset.mixture import Mixture


_UNDER_WAY = 4
"""Batches that a reading process prepares ahead."""
_LISTS = ("channels", "keys", "json", "shards", "numbers", "epochs")


@dataclass(kw_only=True)
class Batch:
    """Samples of one rank for one step; `len` is b, and a slice is a batch of fewer."""

    packed: torch.Tensor
    """[sum of n, T] float16 microvolts: true channels only, sample after sample. `padded` makes windows of them."""
    channels: list[int]
    """n of each sample."""
    keys: list[str]
    """Keys of the samples."""
    json: list[bytes]
    """Their metadata as it is stored; `metas` parses it."""
    shards: list[str]
    """The shard that each comes from."""
    numbers: list[int]
    """Their numbers in the dataset."""
    epochs: list[int]
    """The epoch each belongs to: a batch may straddle two."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Batch:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("batches are cut without gaps")
        ends = np.cumsum([0, *self.channels])
        rows = slice(int(ends[start]), int(ends[max(start, stop)]))
        lists = {name: getattr(self, name)[part] for name in _LISTS}
        return Batch(packed=self.packed[rows], **lists)

    @functools.cached_property
    def metas(self) -> list[dict[str, Any]]:
        """Their JSON, parsed; a RequestError names file and key of a damaged one."""
        return [parse_meta(*of) for of in zip(self.json, self.shards, self.keys, strict=True)]

    @functools.cached_property
    def eeg(self) -> torch.Tensor:
        """[b, 128, T] float16 microvolts on the CPU, padded by replication."""
        return self.padded()

    def padded(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Windows of 128 channels, row i the true channel i mod n.

        Only true channels travel to the device, as float16; they are replicated and cast there.

        Parameters
        ----------
        device : torch.device or str, optional
            Where to; stays where it is by default.
        dtype : torch.dtype, optional
            Of the result; float16 by default.

        Returns
        -------
        Tensor, shape (b, 128, T)
            Microvolts.

        References
        ----------
        Bai et al., DreamDiffusion, arXiv 2306.16934, section 3.1.
        """
        import torch

        n_b1 = np.array(self.channels)[:, None]
        rows_bC = (np.cumsum(n_b1, axis=0) - n_b1) + np.arange(N_PADDED) % n_b1
        rows = torch.from_numpy(rows_bC.ravel())
        device = torch.device(device or self.packed.device)
        if device.type == "cuda":
            rows = rows.pin_memory()
        x = self.packed.to(device, non_blocking=True)
        # Cast before replicating: fewer rows to cast.
        x = x if dtype is None else x.to(dtype)
        return x.index_select(0, rows.to(device, non_blocking=True)).view(len(self), N_PADDED, -1)

    def pin_memory(self) -> Batch:
        """Move to page-locked memory, from which copies to a GPU run beside its work.

        Returns
        -------
        Batch
            Itself.
        """
        self.packed = self.packed.pin_memory()
        return self


def collate(
    dataset: EEGDataset | Mixture,
    numbers: Sequence[int],
    epochs: Sequence[int] | None = None,
    out: np.ndarray | None = None,
) -> Batch:
    """Read samples into a batch.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        Where from.
    numbers : sequence of int
        Which samples.
    epochs : sequence of int, optional
        The epoch each belongs to; 0 by default.
    out : ndarray of float16, shape (rows, T), optional
        Memory for the signals, if they find room there.

    Returns
    -------
    Batch
        The batch.

    Raises
    ------
    RequestError
        If a sample is damaged, with file and key.
    """
    import torch

    packed = dataset.pack(numbers, out)
    return Batch(
        packed=torch.from_numpy(packed.eeg),
        channels=packed.channels,
        keys=packed.keys,
        json=packed.json,
        shards=packed.shards,
        numbers=list(numbers),
        epochs=list(epochs or [0] * len(numbers)),
    )


@dataclass(frozen=True)
class _Refusal:
    """What a reading process says in place of a batch; torch would wrap an exception's one line in a traceback."""

    message: str


class _Ahead:
    """Fetches the shards of this window and the next one of remote datasets, beside the reading."""

    def __init__(self) -> None:
        self.windows: dict[int, tuple[int, int]] = {}

    def fetch(self, loader: Loader, step: int) -> None:
        """Start a thread for each dataset of which this step begins a window."""
        if loader.order != "shards":
            return
        for stream, (part, place) in enumerate(zip(loader.dataset.parts, loader.first_places(step), strict=True)):
            if not part.cache:
                continue
            window, shards = loader.orders[stream].windows(place)
            if self.windows.get(stream) != window:
                self.windows[stream] = window
                threading.Thread(target=self._run, args=(part, stream, window, shards), daemon=True).start()

    def _run(self, part: EEGDataset, stream: int, window: tuple[int, int], shards: list[int]) -> None:
        # Other processes want the same ones: each begins elsewhere.
        turn = os.getpid() % len(shards)
        for shard in shards[turn:] + shards[:turn]:
            if self.windows.get(stream) != window:
                # Reading was faster, and what it has passed would only take room.
                return
            try:
                os.close(part.open_shard(shard))
            except (OSError, RequestError):
                # Who needs the shard will find the same, and say so.
                return


class _Steps:
    """Map-style view of the stream for torch's DataLoader: item t is this rank's part of global batch t."""

    def __init__(self, loader: Loader, slots: Slots | None = None) -> None:
        self.loader, self.ahead, self.slots = loader, _Ahead(), slots
        self.served = 0

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> Batch | Shipped | _Refusal:
        from torch.utils.data import get_worker_info

        numbers, epochs = self.loader.positions(step)
        self.ahead.fetch(self.loader, step)
        worker, out, place = get_worker_info(), None, 0
        if self.slots and worker:
            place = worker.id * self.slots.each + self.served % self.slots.each
            out = self.slots.view(place)
            self.served += 1
        try:
            batch = collate(self.loader.dataset, numbers, epochs, out)
        except RequestError as error:
            return _Refusal(str(error))
        if self.slots is None or out is None or batch.packed.data_ptr() != out.ctypes.data:
            return batch
        rows, batch.packed = len(batch.packed), batch.packed[:0].clone()
        return Shipped(batch=batch, slots=self.slots.number, place=place, rows=rows)


class _From:
    """Steps from a place on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


@contextlib.contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back from this thread, and from all threads of the processes that it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(reads_for: int, worker: int) -> None:
    """Let a reading process outlive what is meant for the training, which decides by itself when to stop.

    Batch systems and torchrun signal every process of a job. Of SIGTERM, torch's reading processes die unless it comes
    from the process that they read for, and that one fails as soon as one of them is dead. The process must have been
    started with SIGTERM held back, or a thread that some library starts in every new process could still take it.

    Where the process read for is gone, this one ends, too: torch's would wait for somebody to empty its queue.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return

    def wait() -> None:
        while os.getppid() == reads_for:
            found = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if found and found.si_pid == reads_for:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Loader:
    """Endless stream of batches.

    The epochs' orders stand one after another; global batch t is the slice ``[tB, (t + 1)B)`` of that line, and
    each rank takes every world_size-th sample of it. So every sample comes exactly once an epoch, all ranks take equal
    steps, and the global batches do not depend on ranks or workers. In a mixture each dataset has such a line of its
    own, and its weight says how large a share of the places is dealt to it.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        What to read.
    global_batch : int
        Samples of a step over all ranks.
    seed : int
        Of the order.
    rank, world_size : int
        This process among how many.
    num_workers : int
        Reading processes; 0 reads in this one.
    order : {"global", "shards"}
        global: at random over all samples; a remote dataset must then fit into the cache. shards: shards at random, and
        samples at random within each `window` of them; only two windows need fit.
    window : int
        Shards that are read at a time under order shards.
    pin_memory : bool, optional
        Whether batches come in page-locked memory; where there is a GPU by default.

    Raises
    ------
    RequestError
        If the global batch is not a multiple of the world size, or what is read at a time exceeds the cache.
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
            raise RequestError(f"order is '{order}' and window {window}: need global or shards, and a window from 1")
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
        self._turns = Interleaved(weights, seed) if weights else None

    def positions(self, step: int) -> tuple[list[int], list[int]]:
        """Samples of this rank in a step.

        Parameters
        ----------
        step : int
            Global step, from 0.

        Returns
        -------
        numbers : list of int
            Samples of the dataset.
        epochs : list of int
            The epoch each belongs to, of its own dataset in a mixture.
        """
        line = np.arange(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world_size)
        if self._turns is None:
            numbers, epochs = self.orders[0].at(line)
            return numbers.tolist(), epochs.tolist()
        which, place = self._turns.at(line)
        numbers, epochs = np.empty_like(line), np.empty_like(line)
        for stream in np.unique(which).tolist():
            mine = which == stream
            numbers[mine], epochs[mine] = self.orders[stream].at(place[mine])
            numbers[mine] += self._first[stream]
        return numbers.tolist(), epochs.tolist()

    def first_places(self, step: int) -> list[int]:
        """Where a step begins in each dataset's own order.

        Parameters
        ----------
        step : int
            Global step, from 0.

        Returns
        -------
        list of int
            A place for each dataset; within a block of the mixture's turns, where that block begins.
        """
        place = step * self.global_batch
        return [place] if self._turns is None else self._turns.begun(place)

    @property
    def epoch(self) -> float:
        """Epochs consumed so far; of a mixture, samples consumed over the samples that it has."""
        return self.step * self.global_batch / len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present step on; the step counts what was taken, not what was read ahead."""
        import torch
        from torch.utils.data import DataLoader

        slots = None
        if self.num_workers and Slots.possible():
            # Torch deals steps out in turn and lets each process have so many under way; one more is being copied.
            known = [int(part.index["n"].max()) if part.index["n"].all() else N_PADDED for part in self.dataset.parts]
            rows = self.global_batch // self.world_size * max(known)
            slots = Slots(self.num_workers, _UNDER_WAY + 2, rows, self.dataset.spec.window)
        reader = DataLoader(
            _Steps(self, slots),  # type: ignore[arg-type]
            sampler=_From(self.step),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=_UNDER_WAY if self.num_workers else None,
            multiprocessing_context="fork" if slots else None,
            worker_init_fn=functools.partial(_outlive_signals, os.getpid()),
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )
        with _held_back(signal.SIGTERM):
            batches = iter(reader)
        for batch in batches:
            if isinstance(batch, _Refusal):
                raise RankError(batch.message)
            if isinstance(batch, Shipped):
                batch = batch.arrived()
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; of constant size."""
        return {
            "dataset_id": self.dataset.manifest.dataset_id,
            "split": self.dataset.split,
            "seed": self.seed,
            "order": self.order if self.order == "global" else f"{self.order} {self.window}",
            "step": self.step,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, with any number of ranks and workers.

        Parameters
        ----------
        state : dict
            What `state_dict` gave.

        Raises
        ------
        RequestError
            If it belongs to another dataset, seed, order or global batch.
        """
        for key, value in self.state_dict().items():
            if key != "step" and state.get(key) != value:
                raise RequestError(
                    f"cannot resume: {key} is {value!r} now and was {state.get(key)!r} in the checkpoint; "
                    f"restore it, or start a new run in another output directory"
                )
        self.step = int(state["step"])


def check_cache(dataset: EEGDataset | Mixture, order: Order, window: int) -> None:
    """Refuse an order under which a bounded cache would fetch the same shards over and over.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        What is to be read.
    order : {"global", "shards"}
        The order.
    window : int
        Shards that are read at a time under order shards.

    Raises
    ------
    RequestError
        If what is read at a time is more than the cache holds.
    """
    remote = [part for part in dataset.parts if part.cache]
    if not remote:
        return
    need = 0
    for part in remote:
        sizes = sorted((shard.bytes for shard in part.shards), reverse=True)
        # A window is finished while the next one begins.
        need += sum(sizes if order == "global" else sizes[: 2 * window])
    limit = min(part.cache.limit for part in remote if part.cache)
    if need > limit:
        advice = "read it with order: shards, or " if order == "global" else f"lower its window of {window} shards, or "
        raise RequestError(
            f"{dataset.path} ({dataset.split}): order '{order}' reads {need / 1e9:.3g} GB at a time, the cache holds "
            f"{limit / 1e9:.3g} GB; {advice}raise DREAMSCALE_CACHE_GB"
        )


def sequential(dataset: EEGDataset, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Every sample of a split once, in its own order, for evaluation.

    Parameters
    ----------
    dataset : EEGDataset
        What to read.
    batch_size : int
        Samples a batch; the last one may be smaller.
    rank, world_size : int
        This process takes every world_size-th sample; the ranks' counts may differ by one.

    Yields
    ------
    Batch
        The next batch.
    """
    numbers = list(range(rank, len(dataset), world_size))
    for start in range(0, len(numbers), batch_size):
        yield collate(dataset, numbers[start : start + batch_size])
