"""Several datasets read as one, each with its share of the samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.manifest import Manifest, Shard
from data_sharding.dataset.order import Interleaved
from data_sharding.dataset.samples import Sample
from data_sharding.dataset.shard_reader import Packed, pack
from data_sharding.processing.preprocess import PreprocessSpec


class Mixture:
    """The same split of several datasets; a `Loader` deals places out to them by weight.

    Samples are numbered through, dataset after dataset. It offers what `EEGDataset` does for reading.

    Parameters
    ----------
    weights : mapping of str to float
        Paths of the datasets to their shares of the samples that training sees; they need not sum to 1.
    split : str
        train, val or test.
    cache_gb : float, optional
        Bound of the cache of remote ones, which all share; DREAMSCALE_CACHE_GB by default.

    Attributes
    ----------
    parts : list of EEGDataset
        The datasets, in the order of their ids: neither the order in `weights` nor their paths change anything.
    weights : list of float
        Their shares, summing to 1.
    manifest : Manifest
        Counts, hours and shards of all together. The dataset id depends on the datasets and their weights.

    Raises
    ------
    RequestError
        If one cannot be opened, weights are not positive, a dataset comes twice, or they were preprocessed differently.
    """

    def __init__(self, weights: Mapping[str, float], split: str = "train", *, cache_gb: float | None = None) -> None:
        if not weights:
            raise RequestError("datasets: name at least one dataset and its weight")
        try:
            Interleaved(list(weights.values()), 0)
        except ValueError as error:
            raise RequestError(f"datasets: {error}") from None
        self.split = split
        opened = [(EEGDataset(path, split, cache_gb=cache_gb), weight) for path, weight in weights.items()]
        opened.sort(key=lambda one: one[0].manifest.dataset_id)
        self.parts = [part for part, _ in opened]
        # Rounded once: the datasets' order must not tell in the shares, nor in the id.
        total = math.fsum(weights.values())
        self.weights = [weight / total for _, weight in opened]
        for part in self.parts[1:]:
            _require_alike(self.parts[0], part)
        ids = [part.manifest.dataset_id for part in self.parts]
        twice = next((part for number, part in enumerate(self.parts) if ids[number] in ids[:number]), None)
        if twice is not None:
            raise RequestError(f"datasets: {twice.path} is the same dataset as another one; give it a larger weight")
        self.first = np.cumsum([0, *(len(part) for part in self.parts)])
        self.manifest = self._merged(ids)

    def _merged(self, ids: list[str]) -> Manifest:
        counts: Counter[str] = Counter()
        hours: Counter[str] = Counter()
        splits: dict[str, list[Shard]] = {}
        for part in self.parts:
            counts.update(part.manifest.counts)
            hours.update(part.manifest.hours)
            for split, shards in part.manifest.splits.items():
                splits.setdefault(split, []).extend(shards)
        return Manifest(
            dataset_id=digest_of({"datasets": ids, "weights": self.weights}),
            preprocess=self.spec,
            splits=splits,
            counts=dict(counts),
            hours=dict(hours),
        )

    @property
    def path(self) -> str:
        """All paths in one, for messages."""
        return " + ".join(str(part.path) for part in self.parts)

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of every sample."""
        return self.parts[0].spec

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: int) -> tuple[EEGDataset, int]:
        """Dataset of a sample, and its number there.

        Parameters
        ----------
        number : int
            Which sample.

        Returns
        -------
        dataset : EEGDataset
            Where it is.
        number : int
            Its number in that dataset.

        Raises
        ------
        IndexError
            If there is no such sample.
        """
        number = range(len(self))[number]
        which = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.parts[which], number - int(self.first[which])

    def key(self, number: int) -> str:
        """Key of a sample; unique in its dataset only.

        Parameters
        ----------
        number : int
            Which sample.

        Returns
        -------
        str
            Its key.
        """
        part, own = self.locate(number)
        return part.key(own)

    def meta(self, number: int) -> dict[str, Any]:
        """JSON of a sample, without reading its signal.

        Parameters
        ----------
        number : int
            Which sample.

        Returns
        -------
        dict
            Its metadata.
        """
        part, own = self.locate(number)
        return part.meta(own)

    def __getitem__(self, number: int) -> Sample:
        part, own = self.locate(number)
        return part[own]

    def pack(self, numbers: Sequence[int], out: np.ndarray | None = None) -> Packed:
        """Read samples without their images.

        Parameters
        ----------
        numbers : sequence of int
            Which samples.
        out : ndarray of float16, shape (rows, T), optional
            Where signals go if they find room there.

        Returns
        -------
        Packed
            True channels one after another, in the order of `numbers`.
        """
        which = np.searchsorted(self.first, numbers, side="right") - 1
        own = np.asarray(numbers) - self.first[which]
        found: list[Any] = [None] * len(numbers)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(which == number)
            reader = part.reader
            reader.let_go()
            for spot, place in zip(mine.tolist(), part.places(own[mine]), strict=True):
                found[spot] = reader, place
        return pack(found, self.spec.window, out)


def _require_alike(first: EEGDataset, other: EEGDataset) -> None:
    """Refuse datasets that one model cannot see as one."""
    if differ := first.spec.differences(other.spec):
        raise RequestError(
            f"datasets: {first.path} and {other.path} were preprocessed differently ({', '.join(differ.values())}); "
            "shard one of them again"
        )
