"""The manifest of a dataset: what it holds, checked when it is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json, write_json
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.processing.preprocess import PreprocessSpec

SCHEMA = 1
NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a split."""

    path: str
    """Relative to the dataset's directory."""
    sha256: str
    """Of the tar."""
    index_sha256: str
    """Of the index beside it."""
    bytes: int
    """Size of the tar."""
    samples: int
    """Samples in it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset holds; the file is written last, so a dataset without it is not complete."""

    dataset_id: str
    """Checksum of the plan: preprocessing, recordings, splits."""
    preprocess: PreprocessSpec
    """Applied to every sample."""
    splits: dict[str, list[Shard]]
    """Shards of train, val and test."""
    labels: list[str] = field(default_factory=list)
    """Names of the labels of an EEG-image dataset, by number; empty otherwise."""
    counts: dict[str, int] = field(default_factory=dict)
    """Recordings found, recordings of each status, and windows or trials left out by reason."""
    hours: dict[str, float] = field(default_factory=dict)
    """Hours of each of them."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config of the job that wrote it."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the code and of the libraries that shape the bytes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping: ``request``, ``ledger_sha256``, and for each corpus in ``corpora`` its design."""

    def samples(self, split: str) -> int:
        """Number of samples of a split.

        Parameters
        ----------
        split : str
            train, val or test.

        Returns
        -------
        int
            The number; 0 where the split is not there.
        """
        return sum(shard.samples for shard in self.splits.get(split, []))

    def write(self, directory: str | AnyPath) -> None:
        """Write the manifest, whole or not at all.

        Parameters
        ----------
        directory : str, Path or UPath
            The dataset.
        """
        write_json(as_path(directory) / NAME, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, directory: str | AnyPath) -> Manifest:
        """Read and check a dataset's manifest.

        Parameters
        ----------
        directory : str, Path or UPath
            The dataset.

        Returns
        -------
        Manifest
            What it holds.

        Raises
        ------
        RequestError
            If the directory or its manifest is missing, damaged or of another schema.
        """
        directory = as_path(directory)
        if not directory.is_dir():
            raise RequestError(f"{directory}: no such dataset directory")
        if not (directory / NAME).is_file():
            raise RequestError(
                f"{directory}: no {NAME}, so this is not a complete dataset; write it with 'dreamscale shard'"
            )
        values = read_json(directory / NAME)
        try:
            if values.pop("schema") != SCHEMA:
                raise RequestError(f"{directory / NAME}: written with another schema; shard the corpus again")
            values["preprocess"] = PreprocessSpec.from_dict(values["preprocess"])
            values["splits"] = {
                split: [Shard(**shard) for shard in shards] for split, shards in values["splits"].items()
            }
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{directory / NAME}: damaged ({error}); shard the corpus again") from None
