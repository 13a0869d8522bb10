"""The manifest of a dataset: a list of its contents, which is checked when the dataset is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json, write_json
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.common.untrusted import check_manifest
from data_sharding.processing.preprocess import PreprocessSpec

SCHEMA = 1
NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Manifest entry of one shard, which is a tar of samples."""

    path: str
    """Path of the tar, relative to the directory of the dataset."""
    sha256: str
    """Checksum of the tar."""
    index_sha256: str
    """Checksum of the index beside the tar."""
    bytes: int
    """Size of the tar."""
    samples: int
    """Number of samples in the tar."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a dataset. The file is written last, so a dataset without a manifest is not complete."""

    dataset_id: str
    """Checksum of preprocessing, labels and shards."""
    preprocess: PreprocessSpec
    """Preprocessing of every sample."""
    splits: dict[str, list[Shard]]
    """Shards of train, val and test."""
    labels: list[str] = field(default_factory=list)
    """Name of each label, in the order of the label numbers; empty if the dataset has no labels."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of recordings found and of each status, of windows, and of windows or trials left out for each reason."""
    hours: dict[str, float] = field(default_factory=dict)
    """Hours of the recordings found, of the recordings of each status, and of the signal written."""
    config: dict[str, Any] = field(default_factory=dict)
    """Config of the job that wrote the dataset."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of this project, and of the libraries that influence the stored bytes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries, such as ``request``, ``ledger_sha256``, and ``corpora`` with the design of each corpus."""

    def samples(self, split: str) -> int:
        """Return the number of samples of a split; 0 if the split does not exist."""
        return sum(shard.samples for shard in self.splits.get(split, []))

    def write(self, directory: str | AnyPath) -> None:
        """Write the manifest to the directory of a dataset. An interrupted write leaves no partial file."""
        write_json(as_path(directory) / NAME, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, directory: str | AnyPath) -> Manifest:
        """Read and check the manifest of a dataset.

        Parameters
        ----------
        directory : str, Path or UPath
            Directory of the dataset.

        Returns
        -------
        Manifest
            The manifest.

        Raises
        ------
        RequestError
            If the directory is missing, or if its manifest is missing, damaged or of another schema.
        """
        directory = as_path(directory)
        if not directory.is_dir():
            raise RequestError(f"{directory}: no such dataset directory")
        if not (directory / NAME).is_file():
            raise RequestError(
                f"{directory}: no {NAME}, so this is not a complete dataset; write it with 'dreamscale shard'"
            )
        values = read_json(directory / NAME)
        where = str(directory / NAME)
        try:
            if (schema := values.pop("schema")) != SCHEMA:
                raise RequestError(
                    f"{directory / NAME}: the file has schema {schema}, but this version reads only schema {SCHEMA}; "
                    "make the dataset again with 'dreamscale shard CONFIG --output DIR'"
                )
            check_manifest(values, where)
            values["preprocess"] = PreprocessSpec.from_dict(values["preprocess"])
            values["splits"] = {
                split: [Shard(**shard) for shard in shards] for split, shards in values["splits"].items()
            }
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{directory / NAME}: damaged ({error}); copy the dataset again, or run 'dreamscale shard' again"
            ) from None
