"""A written dataset: random access to its samples, and a small writer for tests and tools.

Shapes: b samples, n true channels, T samples a window.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_directory, digest_of, sha256_file
from data_sharding.common.storage import AnyPath, as_path, commit_folder, is_remote, localised, remove_tree
from data_sharding.dataset.cache import ShardCache
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import Manifest, Shard
from data_sharding.dataset.samples import IMAGE_EXTENSIONS, Sample, ShardWriter
from data_sharding.dataset.shard_reader import HEADER, INDEX, Packed, Place, Reader, locate, pack, parse_index
from data_sharding.processing.preprocess import PreprocessSpec

_FETCH_SIDE_BY_SIDE = 16


class EEGDataset:
    """Samples of one split of a dataset, by number.

    Parameters
    ----------
    path : str, Path or UPath
        The dataset's directory, on this machine or on an object store (``s3://bucket/lab``). Shards of a remote one are
        fetched whole, checked, and kept in a bounded cache (`data_sharding.dataset.cache`).
    split : str
        train, val or test.
    cache_gb : float, optional
        Bound of the cache; DREAMSCALE_CACHE_GB by default, or 50 where that is not set.

    Attributes
    ----------
    shards : list of Shard
        The split's shards, as the manifest has them.
    first : ndarray of int, shape (shards + 1,)
        Number of each shard's first sample, and of samples.

    Raises
    ------
    RequestError
        If there is no complete dataset, no such split, the split is empty, or a shard is missing or of another size
        than the manifest says.
    """

    def __init__(self, path: str | Path | AnyPath, split: str = "train", *, cache_gb: float | None = None) -> None:
        self.path = as_path(path)
        self.split = split
        self.manifest = read_manifest(self.path)
        self.cache = ShardCache(cache_gb) if is_remote(self.path) else None
        self.shards = self.manifest.splits.get(split) or []
        if not self.manifest.samples(split):
            have = [name for name in ("train", "val", "test") if self.manifest.samples(name)]
            raise RequestError(f"{self.path}: no samples in split '{split}'; it has {', '.join(have) or 'none at all'}")
        self.first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.index = np.empty(self.first[-1], INDEX)
        with ThreadPoolExecutor(_FETCH_SIDE_BY_SIDE if self.cache else 1) as pool:
            for first, rows in zip(self.first, pool.map(self._index_of, self.shards), strict=False):
                self.index[first : first + len(rows)] = rows
        self._names = [str(self.path / shard.path) for shard in self.shards]
        self._local = threading.local()

    def _index_of(self, shard: Shard) -> np.ndarray:
        tar = self.path / shard.path
        index = tar.with_suffix(".idx")
        if self.cache:
            with os.fdopen(self.cache.open(index, shard.index_sha256), "rb") as stream:
                return parse_index(stream.read(), str(index), shard.samples)
        try:
            found, data = tar.stat().st_size, index.read_bytes()
        except OSError as error:
            raise RequestError(
                f"{error.filename}: cannot be read ({error.strerror}); run 'dreamscale verify {self.path}'"
            ) from None
        if found != shard.bytes:
            raise RequestError(
                f"{tar}: the manifest says {shard.bytes} bytes, found {found}; run 'dreamscale verify {self.path}'"
            )
        return parse_index(data, str(index), shard.samples)

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
        return bool(self.index["image"].all())

    @property
    def parts(self) -> list[EEGDataset]:
        """The dataset itself: a mixture has several (`data_sharding.dataset.mixture`)."""
        return [self]

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

    def require_preprocess(self, spec: PreprocessSpec, what: str) -> EEGDataset:
        """Refuse a dataset that was preprocessed in another way than a model's training data.

        Parameters
        ----------
        spec : PreprocessSpec
            The model's.
        what : str
            The model's name in the message.

        Returns
        -------
        EEGDataset
            The dataset itself.

        Raises
        ------
        RequestError
            If they differ, with every differing key named. `stride` and `reject_uv` may: they say which windows there
            are, and change nothing in one.
        """
        differ = spec.differences(self.spec)
        if what_differs := [text for key, text in differ.items() if key not in ("stride", "reject_uv")]:
            raise RequestError(
                f"{what} and {self.path} were preprocessed differently ({', '.join(what_differs)}); "
                f"shard the recordings with the model's preprocess settings"
            )
        return self

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    @property
    def reader(self) -> Reader:
        """Open shards and buffers of this thread."""
        reader = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = Reader(self)
        return reader

    def places(self, numbers: Sequence[int] | np.ndarray) -> list[Place]:
        """Where samples lie.

        Parameters
        ----------
        numbers : sequence of int
            Which samples; negative ones count from the end.

        Returns
        -------
        list of Place
            In the order of `numbers`.

        Raises
        ------
        IndexError
            If there is no such sample.
        """
        return locate(self.index, self.first, numbers)

    def shard_name(self, shard: int) -> str:
        """Whole path of a shard, for messages.

        Parameters
        ----------
        shard : int
            Its number in `shards`.

        Returns
        -------
        str
            The path.
        """
        return self._names[shard]

    def open_shard(self, shard: int) -> int:
        """Open a shard for reading, fetched first where it is remote.

        Parameters
        ----------
        shard : int
            Its number in `shards`.

        Returns
        -------
        int
            File descriptor, the caller's to close.
        """
        entry = self.shards[shard]
        if self.cache:
            return self.cache.open(self.path / entry.path, entry.sha256, entry.bytes)
        return os.open(str(self.path / entry.path), os.O_RDONLY)

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
        (place,) = self.places([number])
        return self.reader.key(place, self.reader.read(place, place.start, HEADER))

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
        (place,) = self.places([number])
        return self.reader.meta(place, bytes(self.reader.read(place, place.meta_at, place.meta)))

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

        Raises
        ------
        RequestError
            If one is damaged, with file and key.
        """
        reader = self.reader
        reader.let_go()
        return pack([(reader, place) for place in self.places(numbers)], self.spec.window, out)

    def __getitem__(self, number: int) -> Sample:
        (place,) = self.places([number])
        reader = self.reader
        key, text, n = reader.load(place)
        return Sample(
            key=key,
            eeg=reader.window[:n].copy(),
            meta=reader.meta(place, text, key),
            image=bytes(reader.read(place, place.image_at, place.image)) if place.image else None,
            image_ext=IMAGE_EXTENSIONS[place.ext] if place.image else "png",
        )


def read_manifest(path: AnyPath) -> Manifest:
    """Manifest of a dataset, wherever it lies.

    Parameters
    ----------
    path : Path or UPath
        The dataset.

    Returns
    -------
    Manifest
        What it holds.

    Raises
    ------
    RequestError
        If there is no complete dataset.
    """
    if not is_remote(path):
        return Manifest.read(path)  # type: ignore[arg-type]
    try:
        with localised([path / MANIFEST]) as (local,):
            return Manifest.read(local.parent)
    except FileNotFoundError:
        raise RequestError(
            f"{path}: no {MANIFEST}, so this is not a complete dataset; write it with 'dreamscale shard'"
        ) from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error})") from None


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
    path: str | Path | AnyPath,
    samples: Mapping[str, Iterable[Sample]],
    spec: PreprocessSpec,
    *,
    labels: list[str] | None = None,
    samples_per_shard: int = 256,
) -> Manifest:
    """Write a dataset from samples in memory; corpora on disk go through the Ray job (`data_sharding.job.run`).

    Parameters
    ----------
    path : str, Path or UPath
        The dataset to write, also on an object store; replaced once the new one is whole.
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
    target = as_path(path)
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="dreamscale-") as folder:
            root = Path(folder) / "dataset"
            root.mkdir()
            manifest = _write_into(root, samples, spec, labels or [], samples_per_shard)
            remove_tree(target)
            commit_folder(root, target, last=MANIFEST)
        return manifest
    with atomic_directory(target) as root:  # type: ignore[arg-type]
        return _write_into(root, samples, spec, labels or [], samples_per_shard)


def _write_into(
    root: Path, samples: Mapping[str, Iterable[Sample]], spec: PreprocessSpec, labels: list[str], samples_per_shard: int
) -> Manifest:
    splits: dict[str, list[Shard]] = {}
    for split, items in samples.items():
        splits[split] = []
        stream = iter(items)
        for number in itertools.count():
            chunk = list(itertools.islice(stream, samples_per_shard))
            if not chunk:
                break
            tar = root / split / f"{number:06d}.tar"
            with ShardWriter(tar) as writer:
                for sample in chunk:
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
        labels=labels,
        versions={"numpy": np.__version__},
    )
    manifest.write(root)
    return manifest
