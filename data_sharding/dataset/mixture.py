"""Several datasets that are mixed and read like one dataset. Each dataset of a mixture has a weight."""

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
    """One split of several datasets. The weight of a dataset is the fraction of the training samples that it supplies.

    The samples of all datasets are numbered together, from the first dataset to the last. A mixture has the same
    methods for reading as `EEGDataset`.

    Parameters
    ----------
    weights : mapping of str to float
        Path and weight of each dataset; the weights need not sum to 1.
    split : str
        train, val or test.
    cache_gb : float, optional
        Size limit of the cache, which all remote datasets use together; DREAMSCALE_CACHE_GB by default.
    versions : mapping of str to str, optional
        Maps the path of a dataset to the dataset id of the version to read. A dataset without an entry is read in its
        current version.

    Attributes
    ----------
    parts : list of EEGDataset
        The datasets, sorted by dataset id, so that the sample numbers do not depend on the paths or on the order in
        `weights`.
    weights : list of float
        Weight of each dataset in `parts`, normalised so that the sum of all weights is 1.
    manifest : Manifest
        Manifest of the mixture, with the sums of all counts and hours, and with all shards. The dataset id of the
        mixture depends on the datasets and their weights.

    Raises
    ------
    RequestError
        If a dataset cannot be opened or is listed twice, if a weight is not positive, or if the datasets have different
        preprocessing.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        split: str = "train",
        *,
        cache_gb: float | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        if not weights:
            raise RequestError("datasets: name at least one dataset and its weight")
        try:
            DatasetInterleaver(list(weights.values()), 0)
        except ValueError as error:
            raise RequestError(f"datasets: {error}") from None
        self.split = split
        opened = [
            (EEGDataset(path, split, cache_gb=cache_gb, version=(versions or {}).get(path, "")), weight)
            for path, weight in weights.items()
        ]
        opened.sort(key=lambda one: one[0].manifest.dataset_id)
        self.parts = [part for part, _ in opened]
        # The result of `math.fsum` does not depend on the order of the weights, so the dataset id of the mixture does
        # not either.
        total = math.fsum(weights.values())
        self.weights = [weight / total for _, weight in opened]
        for part in self.parts[1:]:
            _require_same_preprocess(self.parts[0], part)
        ids = [part.manifest.dataset_id for part in self.parts]
        twice = next((part for number, part in enumerate(self.parts) if ids[number] in ids[:number]), None)
        if twice is not None:
            raise RequestError(
                f"datasets: {twice.path} and another entry are the same dataset; list it once, with a larger weight"
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

    @property
    def n_times(self) -> int:
        """Number of time points that are read from each sample."""
        return self.parts[0].n_times

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: int) -> tuple[EEGDataset, int]:
        """Find the dataset that contains a sample of the mixture.

        Parameters
        ----------
        number : int
            Number of the sample in the mixture.

        Returns
        -------
        dataset : EEGDataset
            Dataset that contains the sample.
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
        """Read the key of a sample. Samples from different datasets of a mixture may have the same key."""
        part, own = self.locate(number)
        return part.key(own)

    def meta(self, number: int) -> dict[str, Any]:
        """Read the metadata of a sample without its EEG."""
        part, own = self.locate(number)
        return part.meta(own)

    def image(self, number: int) -> bytes:
        """Read the image of a sample without its EEG (see `EEGDataset.image`)."""
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
            Memory for the signals. If `out` is too small, new memory is allocated.

        Returns
        -------
        PackedSamples
            The recorded channels of all samples, concatenated in the order of `numbers`.
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
        return pack(found, self.n_times, out)


def _require_same_preprocess(first: EEGDataset, other: EEGDataset) -> None:
    """Raise an error for two datasets with different preprocessing, because one model cannot be trained on both."""
    if differ := first.spec.differences(other.spec):
        raise RequestError(
            f"datasets: {first.path} and {other.path} were preprocessed differently ({', '.join(differ.values())}); "
            "shard one of them again with the settings of the other"
        )
