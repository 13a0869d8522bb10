"""Several datasets that are read as one dataset, each with its share of the samples."""

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
from data_sharding.dataset.order import DatasetInterleaver
from data_sharding.dataset.samples import Sample
from data_sharding.dataset.shard_reader import PackedSamples, pack
from data_sharding.processing.preprocess import PreprocessSpec


class Mixture:
    """The same split of several datasets; a `Loader` fills the places of a batch from them by weight.

    Samples are numbered from the first dataset to the last. A mixture has the methods of `EEGDataset` for reading.

    Parameters
    ----------
    weights : mapping of str to float
        Path of each dataset, with its share of the samples that training sees; the shares need not sum to 1.
    split : str
        train, val or test.
    cache_gb : float, optional
        Size limit of the cache, which all remote datasets share; DREAMSCALE_CACHE_GB by default.

    Attributes
    ----------
    parts : list of EEGDataset
        The datasets, sorted by dataset id, so that neither the order in `weights` nor the paths change anything.
    weights : list of float
        Share of each part; they sum to 1.
    manifest : Manifest
        Sum of the counts and hours, and all shards. Its dataset id depends on the datasets and their weights.

    Raises
    ------
    RequestError
        If a dataset cannot be opened or is named twice, a weight is not positive, or the preprocessing of the datasets
        differs.
    """

    def __init__(self, weights: Mapping[str, float], split: str = "train", *, cache_gb: float | None = None) -> None:
        if not weights:
            raise RequestError("datasets: name at least one dataset and its weight")
        try:
            DatasetInterleaver(list(weights.values()), 0)
        except ValueError as error:
            raise RequestError(f"datasets: {error}") from None
        self.split = split
        opened = [(EEGDataset(path, split, cache_gb=cache_gb), weight) for path, weight in weights.items()]
        opened.sort(key=lambda one: one[0].manifest.dataset_id)
        self.parts = [part for part, _ in opened]
        # fsum rounds once, so that shares and id do not depend on the order in which the weights are added.
        total = math.fsum(weights.values())
        self.weights = [weight / total for _, weight in opened]
        for part in self.parts[1:]:
            _require_same_preprocess(self.parts[0], part)
        ids = [part.manifest.dataset_id for part in self.parts]
        twice = next((part for number, part in enumerate(self.parts) if ids[number] in ids[:number]), None)
        if twice is not None:
            raise RequestError(
                f"datasets: {twice.path} is the same dataset as another one of them; name it once, with a larger weight"
            )
        self.first = np.cumsum([0, *(len(part) for part in self.parts)])
        self.manifest = self._merge_manifests(ids)

    def _merge_manifests(self, ids: list[str]) -> Manifest:
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
        """The paths of all datasets in one string, for messages."""
        return " + ".join(str(part.path) for part in self.parts)

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of every sample."""
        return self.parts[0].spec

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: int) -> tuple[EEGDataset, int]:
        """Find the dataset of a sample.

        Parameters
        ----------
        number : int
            Number of the sample in the mixture.

        Returns
        -------
        dataset : EEGDataset
            Dataset that holds the sample.
        number : int
            Number of the sample in that dataset.

        Raises
        ------
        IndexError
            If the mixture has no sample of this number.
        """
        number = range(len(self))[number]
        which = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.parts[which], number - int(self.first[which])

    def key(self, number: int) -> str:
        """Read the key of a sample. Two datasets of a mixture may use the same key."""
        part, own = self.locate(number)
        return part.key(own)

    def meta(self, number: int) -> dict[str, Any]:
        """Read the metadata of a sample; its EEG is not read."""
        part, own = self.locate(number)
        return part.meta(own)

    def image(self, number: int) -> bytes:
        """Read the image of a sample; its EEG is not read (see `EEGDataset.image`)."""
        part, own = self.locate(number)
        return part.image(own)

    def __getitem__(self, number: int) -> Sample:
        part, own = self.locate(number)
        return part[own]

    def pack(self, numbers: Sequence[int], out: np.ndarray | None = None) -> PackedSamples:
        """Read samples without their images.

        Parameters
        ----------
        numbers : sequence of int
            Numbers of the samples.
        out : ndarray of float16, shape (rows, T), optional
            Memory for the signals. If it is too small, new memory is allocated.

        Returns
        -------
        PackedSamples
            True channels one after another, in the order of `numbers`.
        """
        which = np.searchsorted(self.first, numbers, side="right") - 1
        own = np.asarray(numbers) - self.first[which]
        found: list[Any] = [None] * len(numbers)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(which == number)
            reader = part.reader
            reader.close_evicted()
            for at, location in zip(mine.tolist(), part.locations(own[mine]), strict=True):
                found[at] = reader, location
        return pack(found, self.spec.window, out)


def _require_same_preprocess(first: EEGDataset, other: EEGDataset) -> None:
    """Refuse datasets whose preprocessing differs: one model cannot train on both."""
    if differ := first.spec.differences(other.spec):
        raise RequestError(
            f"datasets: {first.path} and {other.path} were preprocessed differently ({', '.join(differ.values())}); "
            "shard one of them again"
        )
