"""The order in which training sees a dataset: exactly once an epoch, the same for any number of ranks and workers.

Shapes: b samples of this rank, T samples a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.dataset import EEGDataset
from data_sharding.errors import RequestError
from data_sharding.samples import N_PADDED, pad_channels

if TYPE_CHECKING:
    import torch


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch, a pure function of its arguments.

    Parameters
    ----------
    n : int
        Samples of the dataset.
    seed, epoch : int
        What the order depends on.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 .. n - 1.
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass(kw_only=True)
class Batch:
    """Samples of one rank for one step."""

    eeg: torch.Tensor
    """[b, 128, T] float16 microvolts, padded by replication."""
    keys: list[str]
    """Keys of the samples."""
    metas: list[dict[str, Any]]
    """Their JSON."""
    images: list[bytes | None]
    """Their image files."""
    numbers: list[int]
    """Their numbers in the dataset."""
    epochs: list[int]
    """The epoch each belongs to: a batch may straddle two."""


def collate(dataset: EEGDataset, numbers: list[int], epochs: list[int] | None = None) -> Batch:
    """Read samples and pad them into a batch.

    Parameters
    ----------
    dataset : EEGDataset
        Where from.
    numbers : list of int
        Which samples.
    epochs : list of int, optional
        The epoch each belongs to; 0 by default.

    Returns
    -------
    Batch
        The batch.
    """
    import torch

    samples = [dataset[number] for number in numbers]
    eeg = np.empty((len(samples), N_PADDED, dataset.spec.window), np.float16)
    for row, sample in zip(eeg, samples, strict=True):
        if sample.eeg.shape[-1] != dataset.spec.window:
            raise ValueError(
                f"{dataset.path}: sample {sample.key} has {sample.eeg.shape[-1]} samples, not {dataset.spec.window}"
            )
        row[:] = pad_channels(sample.eeg)
    return Batch(
        eeg=torch.from_numpy(eeg),
        keys=[sample.key for sample in samples],
        metas=[sample.meta for sample in samples],
        images=[sample.image for sample in samples],
        numbers=list(numbers),
        epochs=list(epochs or [0] * len(numbers)),
    )


class _Steps:
    """Map-style view of the stream for torch's DataLoader: item t is this rank's part of global batch t."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> Batch:
        numbers, epochs = self.loader.positions(step)
        return collate(self.loader.dataset, numbers, epochs)


class Loader:
    """Endless stream of batches.

    The epochs' permutations stand one after another; global batch t is the slice ``[tB, (t + 1)B)`` of that line, and
    each rank takes every world_size-th sample of it. So every sample comes exactly once an epoch, all ranks take equal
    steps, and the global batches do not depend on ranks or workers.

    Parameters
    ----------
    dataset : EEGDataset
        What to read.
    global_batch : int
        Samples of a step over all ranks.
    seed : int
        Of the order.
    rank, world_size : int
        This process among how many.
    num_workers : int
        Reading processes; 0 reads in this one.

    Raises
    ------
    RequestError
        If the global batch is not a multiple of the world size.
    """

    def __init__(
        self,
        dataset: EEGDataset,
        global_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if global_batch < world_size or global_batch % world_size:
            raise RequestError(
                f"global batch {global_batch} must be a multiple of the number of processes, {world_size}"
            )
        self.dataset, self.global_batch, self.seed = dataset, global_batch, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.step = 0
        self._orders: dict[int, np.ndarray] = {}

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
            The epoch each belongs to.
        """
        n = len(self.dataset)
        line = np.arange(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world_size)
        numbers, epochs = [], []
        for epoch, place in zip(*divmod(line, n), strict=True):
            epoch = int(epoch)
            if epoch not in self._orders:
                # Two epochs at the most meet in a batch larger than what is left of one; keep few.
                self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
                self._orders[epoch] = epoch_order(n, self.seed, epoch)
            numbers.append(int(self._orders[epoch][place]))
            epochs.append(epoch)
        return numbers, epochs

    @property
    def epoch(self) -> float:
        """Epochs consumed so far."""
        return self.step * self.global_batch / len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present step on; the step counts what was taken, not what was read ahead."""
        from torch.utils.data import DataLoader, Sampler

        class From(Sampler):
            def __init__(self, start: int) -> None:
                self.start = start

            def __iter__(self) -> Iterator[int]:
                step = self.start
                while True:
                    yield step
                    step += 1

        reader = DataLoader(
            _Steps(self),  # type: ignore[arg-type]
            sampler=From(self.step),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
        )
        for batch in reader:
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; of constant size."""
        return {
            "dataset_id": self.dataset.manifest.dataset_id,
            "split": self.dataset.split,
            "seed": self.seed,
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
            If it belongs to another dataset, seed or global batch.
        """
        for key, value in self.state_dict().items():
            if key != "step" and state.get(key) != value:
                raise RequestError(
                    f"cannot resume: {key} is {value!r} now and was {state.get(key)!r} in the checkpoint; "
                    f"restore it, or start a new run in another output directory"
                )
        self.step = int(state["step"])


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
