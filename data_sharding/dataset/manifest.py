"""The manifest of a dataset lists the files and settings of the dataset; it is checked when the dataset is opened.

A dataset has several versions if it was changed after its first job, for example by adding recordings. The file
``manifest.json`` in the directory of the dataset belongs to the current version. The folder ``versions/<number>``
contains the manifest and the ledger of the version with this number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json, write_json
from data_sharding.common.storage import AnyPath, as_path, fresh
from data_sharding.common.untrusted import (
    LEAST_SAMPLE,
    MAX_FILE,
    MAX_LABELS,
    check_count,
    check_group,
    check_key,
    check_list,
    check_number,
    check_path,
    check_preprocess,
    check_sha256,
    check_text,
    refusal,
)
from data_sharding.processing.preprocess import PreprocessSpec

SCHEMA = 1
NAME = "manifest.json"
WORK = ".work"
"""Name of the folder for unfinished work, inside the directory of the dataset. The job removes the folder at the
end."""
VERSIONS = "versions"
"""Name of the folder of the versions, inside the directory of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Manifest entry of one shard (a tar file with samples)."""

    path: str
    """Path of the tar, relative to the directory of the dataset."""
    sha256: str
    """Checksum of the tar."""
    index_sha256: str
    """Checksum of the shard's index, a file with the suffix ``.idx`` in the folder of the tar."""
    bytes: int
    """Size of the tar in bytes."""
    samples: int
    """Number of samples in the tar."""
    withdrawn: list[list[int]] = field(default_factory=list)
    """Withdrawn samples: ranges of samples in the tar that this version of the dataset does not contain. A range
    consists of the number of its first sample, and the number of its last sample plus one. Readers skip withdrawn
    samples."""

    @property
    def served(self) -> int:
        """Number of samples in the tar that belong to this version of the dataset, that is, are not withdrawn."""
        return self.samples - sum(stop - start for start, stop in self.withdrawn)

    def mask(self) -> np.ndarray:
        """Return for each sample of the tar whether it is in this version of the dataset (False: withdrawn)."""
        mask = np.ones(self.samples, bool)
        for start, stop in self.withdrawn:
            mask[start:stop] = False
        return mask


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a dataset.

    The file ``manifest.json`` is written last, so a dataset without this file is not complete.
    """

    dataset_id: str
    """Checksum of preprocessing, labels, shards and withdrawn samples. Each version of a dataset has its own id."""
    preprocess: PreprocessSpec
    """Preprocessing of every sample."""
    splits: dict[str, list[Shard]]
    """Shards of train, val and test."""
    labels: list[str] = field(default_factory=list)
    """Name of each label, in the order of the label numbers; empty if the dataset has no labels."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of recordings and windows: recordings found, recordings with each status, windows in the dataset, and
    windows or trials left out for each reason."""
    hours: dict[str, float] = field(default_factory=dict)
    """Hours of signal: in all recordings found, in the recordings with each status, and in the windows that were
    written."""
    config: dict[str, Any] = field(default_factory=dict)
    """Config of the job that wrote the dataset."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of this project, and of the libraries that influence the stored bytes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries, such as ``request``, ``ledger_sha256``, and ``corpora`` (in which order each corpus showed its
    categories)."""

    def samples(self, split: str) -> int:
        """Return the number of samples of a split; 0 if the split does not exist."""
        return sum(shard.served for shard in self.splits.get(split, []))

    @property
    def version(self) -> int:
        """Number of this version of the dataset, from 1."""
        return self.extra.get("version", 1)

    @property
    def withdrawn(self) -> int:
        """Number of withdrawn samples, which are in the shards but not in this version of the dataset."""
        return sum(shard.samples - shard.served for shards in self.splits.values() for shard in shards)

    def write(self, directory: str | AnyPath) -> None:
        """Write the manifest to the directory of a dataset. An interrupted write leaves no partial file."""
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for shard in (shard for shards in values["splits"].values() for shard in shards):
            if not shard["withdrawn"]:  # Older versions of Dreamscale refuse this key.
                del shard["withdrawn"]
        write_json(as_path(directory) / NAME, values)

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
            If the directory is missing, or if its manifest is missing, damaged, or written in another version of the
            schema.
        """
        directory = fresh(as_path(directory))  # Another process may have changed the folder, so use no cached listing.
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
                    f"{directory / NAME}: the file has schema {show(schema)}, but this version reads only schema "
                    f"{SCHEMA}; make the dataset again with 'dreamscale shard CONFIG --output DIR'"
                )
            _check_manifest(values, where)
            values["preprocess"] = PreprocessSpec.from_dict(values["preprocess"], where)
            values["splits"] = {
                split: [Shard(**shard) for shard in shards] for split, shards in values["splits"].items()
            }
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{directory / NAME}: damaged ({show(error, longest=300)}); copy the dataset again, or run "
                "'dreamscale shard' again"
            ) from None


def _check_manifest(values: Any, where: str) -> None:
    """Check the content of a dataset's manifest.

    Parameters
    ----------
    values : Any
        Parsed content of the manifest.
    where : str
        Path of the manifest, for the error message.

    Raises
    ------
    RequestError
        If a path is not inside the dataset, a checksum or a value has the wrong form, or a shard is too small for its
        number of samples.
    """
    check_group(values, where)
    check_key(values.get("dataset_id"), where)
    check_preprocess(values.get("preprocess"), where)
    for split, shards in check_group(values.get("splits"), where, "splits").items():
        for shard in check_list(shards, where, f"splits.{check_key(split, where)}"):
            path = check_path(check_group(shard, where, "a shard").get("path"), where)
            if not path.endswith(".tar"):
                raise refusal(where, f"the shard '{show(path)}' is not a .tar file")
            check_sha256(shard.get("sha256"), where)
            check_sha256(shard.get("index_sha256"), where)
            size = check_count(shard.get("bytes"), where, f"bytes of {path}", most=MAX_FILE)
            samples = check_count(shard.get("samples"), where, f"samples of {path}", most=size // LEAST_SAMPLE)
            last = 0
            for one in check_list(shard.get("withdrawn", []), where, f"withdrawn of {path}"):
                if len(check_list(one, where, f"withdrawn of {path}")) != 2:
                    raise refusal(where, f"withdrawn samples of '{show(path)}' are not pairs of numbers")
                start, stop = (check_count(number, where, f"withdrawn of {path}", most=samples) for number in one)
                if not last <= start < stop:
                    raise refusal(where, f"withdrawn samples of '{show(path)}' are not in order")
                last = stop
    for label in check_list(values.get("labels", []), where, "labels"):
        check_text(label, where, "a label")
    if (number := len(values.get("labels", []))) > MAX_LABELS:
        raise refusal(where, f"{number} labels; at most {MAX_LABELS} labels are allowed")
    for name, count in check_group(values.get("counts", {}), where, "counts").items():
        check_count(count, where, f"counts.{show(name)}", most=MAX_FILE)
    for name, hours in check_group(values.get("hours", {}), where, "hours").items():
        check_number(hours, where, f"hours.{show(name)}")
    for name in ("config", "versions", "extra"):
        check_group(values.get(name, {}), where, name)
    config = values.get("config", {})
    for name in ("split", "preprocess", "hold_back"):
        check_group(config.get(name) or {}, where, f"config.{name}")
    for corpora in (config.get("corpora") or [], values.get("extra", {}).get("corpora") or []):
        for corpus in check_list(corpora, where, "corpora"):
            check_group(corpus, where, "a corpus")
    check_count(values.get("extra", {}).get("version", 1), where, "extra.version", least=1, most=999_999)


def version_folder(dataset: str | AnyPath, number: int) -> AnyPath:
    """Return the folder of a version of a dataset.

    Datasets from older versions of Dreamscale do not have this folder.
    """
    return as_path(dataset) / VERSIONS / f"{number:06d}"


def current_file(dataset: str | AnyPath, name: str) -> AnyPath:
    """Return the path of a file that describes the current version of a dataset, such as the ledger.

    In a dataset with several versions, the result is the file in the folder ``versions``; the file of the same name
    outside this folder is only a copy for users. A job first writes the manifest of a new version and then replaces the
    copies of the other files one by one, so an interrupted job may leave copies of the old version.
    """
    root = as_path(dataset)
    if (root / VERSIONS).is_dir() and (root / NAME).is_file():
        number = Manifest.read(root).version
        if number > 1:
            return version_folder(root, number) / name
    return root / name


def find_version(dataset: str | AnyPath, dataset_id: str) -> Manifest | None:
    """Find the version of a dataset with a given dataset id.

    Parameters
    ----------
    dataset : str, Path or UPath
        Directory of the dataset.
    dataset_id : str
        Id of the version.

    Returns
    -------
    Manifest or None
        Manifest of the version; None if the dataset never had a version with this id.

    Raises
    ------
    RequestError
        If shards of the version do not exist any more, because ``dreamscale shard --compact`` deleted them.
    """
    root = as_path(dataset)
    current = Manifest.read(root)
    if current.dataset_id == dataset_id:
        return current
    there = {shard.path for shards in current.splits.values() for shard in shards}
    for folder in sorted((root / VERSIONS).iterdir(), key=str) if (root / VERSIONS).is_dir() else ():
        manifest = Manifest.read(folder) if (folder / NAME).is_file() else None
        if manifest is None or manifest.dataset_id != dataset_id:
            continue
        if lost := [s.path for shards in manifest.splits.values() for s in shards if s.path not in there]:
            raise RequestError(
                f"{root}: version {manifest.version} (id {dataset_id[:16]}) cannot be read any more, because the "
                f"dataset was compacted and has lost {len(lost)} of its shards; start a new run with version "
                f"{current.version}"
            )
        return manifest
    return None
