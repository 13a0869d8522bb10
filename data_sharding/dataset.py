"""A written dataset: random access to its samples, and a small writer for tests and tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.errors import RequestError
from data_sharding.files import atomic_directory, digest_of, read_json, sha256_file
from data_sharding.manifest import Manifest, Shard
from data_sharding.preprocess import PreprocessSpec
from data_sharding.samples import IMAGE_EXTENSIONS, Sample, ShardWriter, decode_eeg


class EEGDataset:
    """Samples of one split of a dataset, by number.

    Parameters
    ----------
    path : str or Path
        The dataset's directory.
    split : str
        train, val or test.

    Raises
    ------
    RequestError
        If there is no complete dataset, no such split, the split is empty, or a shard is missing or of another size
        than the manifest says.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path = Path(path)
        self.split = split
        self.manifest = Manifest.read(self.path)
        shards = self.manifest.splits.get(split)
        if not shards or not self.manifest.samples(split):
            have = [name for name in ("train", "val", "test") if self.manifest.samples(name)]
            raise RequestError(f"{self.path}: no samples in split '{split}'; it has {', '.join(have) or 'none at all'}")
        self._entries: list[tuple[int, dict[str, Any]]] = []
        self._tars: list[Path] = []
        for number, shard in enumerate(shards):
            tar = self.path / shard.path
            if not tar.is_file() or tar.stat().st_size != shard.bytes:
                found = f"{tar.stat().st_size} bytes" if tar.is_file() else "nothing"
                raise RequestError(
                    f"{tar}: the manifest says {shard.bytes} bytes, found {found}; run 'dreamscale verify {self.path}'"
                )
            index = read_json(tar.with_suffix(".idx"))
            if len(index) != shard.samples:
                raise RequestError(
                    f"{tar.with_suffix('.idx')}: {len(index)} samples, the manifest says {shard.samples}"
                )
            self._tars.append(tar)
            self._entries += [(number, entry) for entry in index]

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of every sample."""
        return self.manifest.preprocess

    @property
    def labels(self) -> list[str]:
        """Names of the labels by number; empty where the dataset has no images."""
        return self.manifest.labels

    @property
    def paired(self) -> bool:
        """True where every sample has an image."""
        return bool(self._entries) and all(any(m.startswith("image.") for m in e["members"]) for _, e in self._entries)

    def require_images(self) -> EEGDataset:
        """Refuse a dataset without images.

        Returns
        -------
        EEGDataset
            The dataset itself.

        Raises
        ------
        RequestError
            If a sample has no image.
        """
        if not self.paired:
            raise RequestError(
                f"{self.path} ({self.split}): no paired images; "
                "this stage needs an EEG-image dataset (a corpus of kind 'events')"
            )
        return self

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, number: int) -> str:
        """Key of a sample.

        Parameters
        ----------
        number : int
            Which sample.

        Returns
        -------
        str
            Its key.
        """
        return self._entries[number][1]["key"]

    def _members(self, number: int, only: tuple[str, ...] | None = None) -> dict[str, bytes]:
        shard, entry = self._entries[number]
        with self._tars[shard].open("rb") as stream:
            out = {}
            for name, (offset, size) in entry["members"].items():
                if only is None or name in only:
                    stream.seek(offset)
                    out[name] = stream.read(size)
            return out

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
        return json.loads(self._members(number, ("json",))["json"])

    def __getitem__(self, number: int) -> Sample:
        members = self._members(number)
        meta = json.loads(members["json"])
        image = next((ext for ext in IMAGE_EXTENSIONS if f"image.{ext}" in members), None)
        return Sample(
            key=self.key(number),
            eeg=decode_eeg(members["eeg.npy.zst"], meta["n"]),
            meta=meta,
            image=members[f"image.{image}"] if image else None,
            image_ext=image or "png",
        )


def shard_record(root: Path, tar: Path, samples: int) -> Shard:
    """Manifest entry of a finished shard.

    Parameters
    ----------
    root : Path
        The dataset's directory.
    tar : Path
        The shard inside it, its index beside it.
    samples : int
        Samples in it.

    Returns
    -------
    Shard
        The entry, with checksums.
    """
    return Shard(
        path=tar.relative_to(root).as_posix(),
        sha256=sha256_file(tar),
        index_sha256=sha256_file(tar.with_suffix(".idx")),
        bytes=tar.stat().st_size,
        samples=samples,
    )


def write_dataset(
    path: str | Path,
    samples: Mapping[str, Iterable[Sample]],
    spec: PreprocessSpec,
    *,
    labels: list[str] | None = None,
    samples_per_shard: int = 256,
) -> Manifest:
    """Write a dataset from samples in memory; corpora on disk go through the Ray job (`data_sharding.job`).

    Parameters
    ----------
    path : str or Path
        The dataset to write; replaced once the new one is whole.
    samples : mapping of str to iterable of Sample
        Samples of each split.
    spec : PreprocessSpec
        What was applied to them.
    labels : list of str, optional
        Names of the labels by number.
    samples_per_shard : int
        Samples a tar.

    Returns
    -------
    Manifest
        What was written.
    """
    with atomic_directory(path) as root:
        splits: dict[str, list[Shard]] = {}
        for split, items in samples.items():
            splits[split] = []
            items = list(items)
            for number, start in enumerate(range(0, len(items), samples_per_shard)):
                tar = root / split / f"{number:06d}.tar"
                with ShardWriter(tar) as writer:
                    for sample in items[start : start + samples_per_shard]:
                        writer.write(sample)
                splits[split].append(shard_record(root, tar, len(writer)))
        plan = {
            "preprocess": spec.to_dict(),
            "shards": {s: [x.sha256 for x in shards] for s, shards in splits.items()},
        }
        manifest = Manifest(
            dataset_id=digest_of(plan),
            preprocess=spec,
            splits=splits,
            labels=labels or [],
            versions={"numpy": np.__version__},
        )
        manifest.write(root)
    return manifest
