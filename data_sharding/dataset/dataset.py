"""Random access to the samples of a dataset, and a function that writes a small dataset for tests and tools.

Letters in shapes: `b` samples, `n` recorded channels (without padding), `T` time points of a window.
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
from data_sharding.common.untrusted import MAX_JSON, open_regular, read_limited
from data_sharding.dataset.cache import ShardCache
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import Manifest, Shard, find_version
from data_sharding.dataset.samples import IMAGE_EXTENSIONS, Sample, ShardWriter
from data_sharding.dataset.shard_reader import (
    HEADER,
    PackedSamples,
    SampleLocation,
    ShardReader,
    locate,
    pack,
    parse_index,
    parse_meta,
)
from data_sharding.dataset.trials import TrialTable, digest_of_split, open_table
from data_sharding.processing.preprocess import PreprocessSpec

_PARALLEL_FETCHES = 16


class EEGDataset:
    """One split of a dataset, whose samples can be read by number in any order.

    Parameters
    ----------
    path : str, Path or UPath
        Directory of the dataset, on this machine or on an object store (``s3://bucket/lab``). Shards of a remote
        dataset are downloaded as whole files, checked, and kept in a cache of limited size
        (`data_sharding.dataset.cache`).
    split : str
        train, val or test.
    cache_gb : float, optional
        Size limit of the cache; by default DREAMSCALE_CACHE_GB, or 50 if that variable is not set.
    tmin, tmax : float, optional
        Part of each trial to read, in seconds from the onset of the image; for example -0.2 and 0.8. A trial is left
        out if its stored part does not cover the whole time from `tmin` to `tmax`; `left_out` is the number of such
        trials. By default, the part that is read begins at the onset and has the length of a window (`spec.window_s`).
        If only `tmin` is given, `tmax` is `tmin` plus the length of the window. If only `tmax` is given, `tmin` is 0.
    version : str
        Dataset id of the version to read (see `data_sharding.dataset.manifest`); by default the current version.

    Attributes
    ----------
    left_out : int
        Number of samples of the split that are left out, because their stored part does not cover `tmin` to `tmax`.
    shards : list of Shard
        Manifest entries of those shards of the split that contain samples to read.
    first : ndarray of int, shape (shards + 1,)
        Number of the first sample of each shard. The last entry of `first` is the number of samples of the split.

    Raises
    ------
    RequestError
        If the directory is not a complete dataset, if the split does not exist or is empty, if all samples would be
        left out because of `tmin` and `tmax`, or if a shard is missing or has another size than the manifest says.
    """

    def __init__(
        self,
        path: str | Path | AnyPath,
        split: str = "train",
        *,
        cache_gb: float | None = None,
        tmin: float | None = None,
        tmax: float | None = None,
        version: str = "",
    ) -> None:
        self.path = as_path(path)
        self.split = split
        self.manifest = read_manifest(self.path, version)
        self.cache = ShardCache(cache_gb) if is_remote(self.path) else None
        self.shards = [shard for shard in self.manifest.splits.get(split, []) if shard.served]
        if not self.manifest.samples(split):
            have = [name for name in ("train", "val", "test") if self.manifest.samples(name)]
            raise RequestError(
                f"{self.path}: no samples in split '{split}'; the dataset has {', '.join(have) or 'no samples'}"
            )
        with ThreadPoolExecutor(_PARALLEL_FETCHES if self.cache else 1) as pool:
            # Allocate memory only for the samples that the shards' indices list. Do not use the number of samples in
            # the manifest, because a damaged manifest can contain any number.
            parts = list(pool.map(self._read_index, self.shards))
        self.index = np.concatenate(parts)
        self.first = np.cumsum([0, *map(len, parts)])
        self._stored, self._kept = list(self.shards), np.ones(len(self.index), bool)
        self._trials: TrialTable | None = None
        self.tmin, self.tmax = tmin, tmax
        self.n_times, self._shift, self.left_out = self.spec.window, None, 0
        if tmin is not None or tmax is not None:
            self._choose_part(tmin or 0.0, tmax)
        self._names = [str(self.path / shard.path) for shard in self.shards]
        self._local = threading.local()

    def _choose_part(self, tmin: float, tmax: float | None) -> None:
        """Read each trial from `tmin` to `tmax`, and leave out trials whose stored part does not cover this time."""
        tmax = tmin + self.spec.window_s if tmax is None else tmax
        self._shift = self.spec.to_samples(tmin)
        self.n_times = self.spec.to_samples(tmax) - self._shift
        if self.n_times < 1:
            raise RequestError(f"'tmax' ({tmax:g} s) must be later than 'tmin' ({tmin:g} s)")
        # `samples` and `onset` are 0 if an older version of Dreamscale wrote the index: that version stored exactly one
        # window of each trial, which begins at the onset.
        stored = np.where(self.index["samples"], self.index["samples"], self.spec.window).astype(np.int64)
        begin = self.index["onset"].astype(np.int64) + self._shift
        whole = (begin >= 0) & (begin + self.n_times <= stored)
        if not whole.any():
            raise RequestError(
                f"{self.path} ({self.split}): no trial is stored from {tmin:g} to {tmax:g} s around the onset of its "
                "image; change tmin and tmax, or shard with other tmin and tmax in 'corpora'"
            )
        self.left_out, self._kept = int((~whole).sum()), whole
        shard = np.repeat(np.arange(len(self.shards)), np.diff(self.first))[whole]
        kept = np.bincount(shard, minlength=len(self.shards))
        self.index = self.index[whole]
        self.shards = [shard for shard, count in zip(self.shards, kept, strict=True) if count]
        self.first = np.cumsum([0, *kept[kept > 0]])

    def _read_index(self, shard: Shard) -> np.ndarray:
        tar = self.path / shard.path
        index = tar.with_suffix(".idx")
        if self.cache:
            with os.fdopen(self.cache.open(index, shard.index_sha256), "rb") as stream:
                data = stream.read(MAX_JSON + 1)
            return self._parse_index(data, index, shard)
        try:
            found, data = tar.stat().st_size, read_limited(index)
        except OSError as error:
            raise RequestError(
                f"{error.filename}: cannot be read ({error.strerror}); run 'dreamscale verify {self.path}'"
            ) from None
        if found != shard.bytes:
            raise RequestError(
                f"{tar}: the manifest says {shard.bytes} bytes, the file has {found}; "
                f"run 'dreamscale verify {self.path}'"
            )
        return self._parse_index(data, index, shard)

    def _parse_index(self, data: bytes, index: AnyPath, shard: Shard) -> np.ndarray:
        rows = parse_index(data, str(index), shard.samples, tar_bytes=shard.bytes, window=self.spec.window)
        return rows[shard.mask()] if shard.withdrawn else rows

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of every sample."""
        return self.manifest.preprocess

    @property
    def labels(self) -> list[str]:
        """Name of each label, in the order of the label numbers; empty if the dataset has no images."""
        return self.manifest.labels

    @property
    def paired(self) -> bool:
        """Whether every sample has an image."""
        return bool(self.index["image"].all())

    @property
    def parts(self) -> list[EEGDataset]:
        """List that contains only this dataset; `Mixture.parts` contains all datasets of a mixture."""
        return [self]

    def require_images(self) -> EEGDataset:
        """Raise an error if the dataset has samples without images.

        Returns
        -------
        EEGDataset
            This dataset.

        Raises
        ------
        RequestError
            If a sample has no image.
        """
        if not self.paired:
            raise RequestError(
                f"{self.path} ({self.split}): this dataset has no paired images; give an EEG-image dataset (from a "
                "corpus with the key 'images')"
            )
        return self

    def require_preprocess(self, spec: PreprocessSpec, what: str) -> EEGDataset:
        """Raise an error if this dataset and a model's training data were preprocessed differently.

        Parameters
        ----------
        spec : PreprocessSpec
            Preprocessing of the model.
        what : str
            Name of the model, for the error message.

        Returns
        -------
        EEGDataset
            This dataset.

        Raises
        ------
        RequestError
            If a setting of the preprocessing differs; the message names every such setting. The settings `stride`,
            `reject_uv` and `quality` may differ, because they change no values in a window without bad channels. The
            settings `scaling`, `scale_uv` and `clip` may differ, because samples are stored in microvolts, and the
            model scales them. `window` may differ if `tmax` says where the read part ends.
        """
        same = {"stride", "reject_uv", "quality", "scaling", "scale_uv", "clip"}
        if self.tmax is not None:
            same.add("window")
        if found := [text for key, text in spec.differences(self.spec).items() if key not in same]:
            raise RequestError(
                f"{what} and {self.path} were preprocessed differently ({', '.join(found)}); shard the recordings with "
                f"the model's preprocess settings (dreamscale shard CONFIG --encoder ENCODER does this for an encoder)"
            )
        return self

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_local": None, "_trials": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    @property
    def reader(self) -> ShardReader:
        """Reader of the current thread, with its open shards and buffers."""
        reader = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = ShardReader(self)
        return reader

    def locations(self, numbers: Sequence[int] | np.ndarray) -> list[SampleLocation]:
        """Compute the locations of samples in the shards.

        Parameters
        ----------
        numbers : sequence of int
            Numbers of the samples; negative numbers count from the end.

        Returns
        -------
        list of SampleLocation
            One location for each sample, in the order of `numbers`.

        Raises
        ------
        IndexError
            If one of the numbers does not belong to a sample of the split.
        """
        return locate(self.index, self.first, numbers, self._shift)

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard, for messages; `shard` is the shard's index in `shards`."""
        return self._names[shard]

    def open_shard(self, shard: int) -> int:
        """Open a shard for reading; a shard of a remote dataset is downloaded first.

        Parameters
        ----------
        shard : int
            Index of the shard in `shards`.

        Returns
        -------
        int
            File descriptor of the shard; the caller must close it.
        """
        entry = self.shards[shard]
        if self.cache:
            return self.cache.open(self.path / entry.path, entry.sha256, entry.bytes)
        return open_regular(str(self.path / entry.path))

    def key(self, number: int) -> str:
        """Read the key of a sample."""
        (location,) = self.locations([number])
        return self.reader.parse_key(location, self.reader.read(location, location.start, HEADER))

    def meta(self, number: int) -> dict[str, Any]:
        """Read the metadata of a sample without its EEG."""
        (location,) = self.locations([number])
        return self.reader.meta(location, bytes(self.reader.read(location, location.meta_at, location.meta)))

    @property
    def trials(self) -> TrialTable:
        """Metadata of all samples: a table whose file is shared by all processes of the machine.

        The first process that uses `trials` reads the JSON of every sample (see `data_sharding.dataset.trials`).
        """
        if self._trials is None:

            def open_whole() -> EEGDataset:
                if not self.left_out:
                    return self
                whole = EEGDataset(self.path, self.split, version=self.manifest.dataset_id)
                whole.cache = self.cache
                return whole

            digest = digest_of_split(self.path, self.split, self._stored)
            self._trials = TrialTable(open_table(digest, len(self._kept), open_whole), self._kept)
        return self._trials

    def image(self, number: int) -> bytes:
        """Read the image of a sample without its EEG.

        Parameters
        ----------
        number : int
            Number of the sample; negative numbers count from the end.

        Returns
        -------
        bytes
            Content of the image file, unchanged.

        Raises
        ------
        RequestError
            If the sample has no image, or its image cannot be read.
        """
        (location,) = self.locations([number])
        if not location.image:
            raise RequestError(
                f"{self.path}: sample {self.key(number)} has no image; "
                "images are in EEG-image datasets only (from a corpus with the key 'images')"
            )
        return self.reader.image(location)

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

        Raises
        ------
        RequestError
            If a sample is damaged; the message names the file and the sample's key.
        """
        reader = self.reader
        reader.close_evicted()
        return pack([(reader, location) for location in self.locations(numbers)], self.n_times, out)

    def read_stored(self, number: int) -> Sample:
        """Read a sample with all stored time points, including the baseline of a trial.

        Parameters
        ----------
        number : int
            Number of the sample; negative numbers count from the end.

        Returns
        -------
        Sample
            The sample as it is stored. In a trial, ``meta["onset"]`` is the time point at which the image appeared.
        """
        (location,) = self.locations([number])
        key, text, n = self.reader.load(location)
        return Sample(
            key=key,
            eeg=self.reader.stored[:n].copy(),
            meta=parse_meta(text, self.shard_name(location.shard), key),
            image=self.reader.image(location) if location.image else None,
            image_ext=IMAGE_EXTENSIONS[location.ext] if location.image else "png",
        )

    def __getitem__(self, number: int) -> Sample:
        (location,) = self.locations([number])
        reader = self.reader
        key, text, n = reader.load(location)
        return Sample(
            key=key,
            eeg=reader.window(location, n).copy(),
            meta=reader.meta(location, text, key),
            image=reader.image(location) if location.image else None,
            image_ext=IMAGE_EXTENSIONS[location.ext] if location.image else "png",
        )


def read_manifest(path: AnyPath, version: str = "") -> Manifest:
    """Read the manifest of a local or remote dataset.

    Parameters
    ----------
    path : Path or UPath
        Directory of the dataset.
    version : str
        Dataset id of the version to read; empty for the current version.

    Returns
    -------
    Manifest
        The manifest.

    Raises
    ------
    RequestError
        If the directory is not a complete dataset, if the dataset never had the version, or if ``dreamscale shard
        --compact`` deleted shards of the version.
    """
    if version:
        manifest = find_version(path, version)
        if manifest is None:
            raise RequestError(f"{path}: the dataset never had a version with the id {version[:16]}")
        return manifest
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
    """Make the manifest entry of a finished shard.

    Parameters
    ----------
    root : Path
        Directory of the dataset.
    tar : Path
        Path of the shard's tar in the directory `root`; the index of the shard is in the same folder.
    samples : int
        Number of samples in the shard.

    Returns
    -------
    Shard
        The manifest entry, with checksums of the tar and of its index.
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
    """Write a dataset from samples in memory (for recordings on disk, use the job in `data_sharding.job.run` instead).

    Parameters
    ----------
    path : str, Path or UPath
        Directory to write, on this machine or on an object store. An old dataset in this directory is replaced when the
        new dataset is complete.
    samples : mapping of str to iterable of Sample
        Samples of each split.
    spec : PreprocessSpec
        Settings with which the signals in `samples` were preprocessed.
    labels : list of str, optional
        Name of each label, in the order of the label numbers.
    samples_per_shard : int
        Number of samples in one tar; the last tar of a split may have fewer.

    Returns
    -------
    Manifest
        Manifest of the new dataset.
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
