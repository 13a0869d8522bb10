"""Batches of samples for a training step.

Letters in shapes: `b` samples of this rank, `n` recorded channels of a sample (without padding), `T` time points of a
window.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.samples import N_PADDED
from data_sharding.dataset.shard_reader import crop_meta, parse_meta

if TYPE_CHECKING:
    import torch

_LISTS = ("channels", "keys", "json", "shards", "numbers", "epochs", "begins")


@dataclass(kw_only=True)
class Batch:
    """Samples that one rank uses in one training step.

    `len(batch)` is the number of samples, and a slice of a batch is a smaller batch.
    """

    packed: torch.Tensor
    """Recorded channels of all samples as float16 in microvolts, shape (sum of `n`, `T`). `padded` makes windows of 128
    channels."""
    channels: list[int]
    """Number of recorded channels of each sample."""
    keys: list[str]
    """Key of each sample."""
    json: list[bytes]
    """Metadata of each sample as JSON text; the property `metas` parses this text."""
    shards: list[str]
    """Path of the shard of each sample."""
    numbers: list[int]
    """Number of each sample in the dataset."""
    epochs: list[int]
    """Number of the epoch in which each sample is read; a batch may contain the last samples of one epoch and the first
    samples of the next."""
    begins: list[int]
    """For each sample, index of the first stored time point that was read; 0 except for trials stored with a
    baseline."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Batch:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a batch can only be sliced with step 1, got {step}")
        ends = np.cumsum([0, *self.channels])
        rows = slice(int(ends[start]), int(ends[max(start, stop)]))
        lists = {name: getattr(self, name)[part] for name in _LISTS}
        return Batch(packed=self.packed[rows], **lists)

    @functools.cached_property
    def metas(self) -> list[dict[str, Any]]:
        """Parsed metadata of each sample; if only a part of a trial was read, `start` and `onset` describe this part.

        If the JSON of a sample is damaged, a RequestError is raised; its message contains the path of the file and the
        sample's key.
        """
        samples = zip(self.json, self.shards, self.keys, self.begins, strict=True)
        return [crop_meta(parse_meta(text, shard, key), begin) for text, shard, key, begin in samples]

    @functools.cached_property
    def eeg(self) -> torch.Tensor:
        """Windows as float16 in microvolts, padded to 128 channels by replication; shape (b, 128, T)."""
        return self.padded()

    def padded(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Make a window of 128 rows from each sample: row `i` is the recorded channel ``i % n`` of the sample.

        Only the recorded channels are copied to the device, as float16. The device then converts them to `dtype` and
        replicates them.

        Parameters
        ----------
        device : torch.device or str, optional
            Target device; by default, the windows stay on the device of the batch.
        dtype : torch.dtype, optional
            Data type of the result; float16 by default.

        Returns
        -------
        Tensor, shape (b, 128, T)
            Padded windows in microvolts.

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
        # Convert the data type before replicating the channels, because replication increases the number of rows.
        x = x if dtype is None else x.to(dtype)
        return x.index_select(0, rows.to(device, non_blocking=True)).view(len(self), N_PADDED, -1)

    def pin_memory(self) -> Batch:
        """Move the signals to page-locked memory, so that they can be copied to the GPU while the GPU computes.

        Returns
        -------
        Batch
            This batch.
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
        Dataset to read from.
    numbers : sequence of int
        Numbers of the samples.
    epochs : sequence of int, optional
        Number of the training epoch in which each sample is read; 0 by default.
    out : ndarray of float16, shape (rows, T), optional
        Memory for the signals. If `out` is too small, new memory is allocated.

    Returns
    -------
    Batch
        Batch of the samples, in the order of `numbers`.

    Raises
    ------
    RequestError
        If a sample is damaged; the message names the file and the sample's key.
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
        begins=packed.begins,
    )


def sequential(dataset: EEGDataset, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield batches with every sample of a split exactly once, in stored order, for evaluation.

    Parameters
    ----------
    dataset : EEGDataset
        Dataset to read from.
    batch_size : int
        Number of samples of a batch; the last batch may be smaller.
    rank, world_size : int
        Rank of this process and number of ranks. Each rank reads every world_size-th sample, so one rank may read one
        sample more than another rank.

    Yields
    ------
    Batch
        The next batch.
    """
    numbers = list(range(rank, len(dataset), world_size))
    for start in range(0, len(numbers), batch_size):
        yield collate(dataset, numbers[start : start + batch_size])
