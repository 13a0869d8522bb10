"""A written dataset: random access to its samples, and a small writer for tests and tools.

Shapes: b samples, n true channels, T samples a window.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_sharding.cache import ShardCache
from data_sharding.errors import RequestError
from data_sharding.files import atomic_directory, digest_of, sha256_file
from data_sharding.manifest import NAME as MANIFEST
from data_sharding.manifest import Manifest, Shard
from data_sharding.preprocess import PreprocessSpec
from data_sharding.samples import IMAGE_EXTENSIONS, N_PADDED, Sample, ShardWriter
from data_sharding.storage import AnyPath, as_path, commit_folder, is_remote, localised, remove_tree

INDEX = np.dtype(
    [("start", "<i8"), ("eeg", "<u4"), ("image", "<u4"), ("json", "<u4"), ("ext", "u1"), ("n", "u1")],
)
"""What is kept in memory of a sample, 22 bytes: where its first tar header is, its members' bytes, and n.

Everything else follows from the layout of a tar, or is read with the sample: ten million samples take 0.2 GB.
"""
_EEG = "eeg.npy.zst"
_SUFFIX = b".eeg.npy.zst"
_HEADER = 512
_OPEN_FILES = 128
_FETCH_SIDE_BY_SIDE = 16


@dataclass(kw_only=True)
class Packed:
    """Samples as they come off the disk: true channels only, one after another."""

    eeg: np.ndarray
    """[sum of n, T] float16 microvolts."""
    channels: list[int]
    """n of each sample."""
    keys: list[str]
    """Their keys."""
    json: list[bytes]
    """Their metadata, not parsed yet."""
    shards: list[str]
    """The shard that each lies in, with its whole path."""


class Place(NamedTuple):
    """Where a sample lies; all but `number` within its shard, in bytes from the beginning."""

    number: int
    """In the dataset."""
    shard: int
    """Number of the shard."""
    start: int
    """Its first tar header."""
    eeg: int
    """Length of the signal, which begins after that header."""
    image_at: int
    """Offset of the image, where there is one."""
    image: int
    """Length of the image; 0 where there is none."""
    meta_at: int
    """Offset of the JSON."""
    meta: int
    """Length of the JSON."""
    ext: int
    """Kind of the image, by its place in IMAGE_EXTENSIONS."""
    n: int
    """True channels; 0 where the index does not know."""


def _padded(size: Any) -> Any:
    """Bytes that a member of this size takes in a tar, without its header."""
    return (size + _HEADER - 1) // _HEADER * _HEADER


def parse_index(data: bytes, name: str, samples: int) -> np.ndarray:
    """Read a shard's index into an array.

    Parameters
    ----------
    data : bytes
        The ``.idx`` file.
    name : str
        What it is called in a message.
    samples : int
        Samples that the manifest says.

    Returns
    -------
    ndarray of `INDEX`, shape (samples,)
        Its rows, in order.

    Raises
    ------
    RequestError
        If it is damaged, or is no index of a shard that Dreamscale wrote.
    """
    try:
        entries = json.loads(data)
        members = [entry["members"] for entry in entries]
        eeg = np.array([m[_EEG] for m in members], np.int64).reshape(-1, 2)
        meta = np.array([m["json"] for m in members], np.int64).reshape(-1, 2)
        image = np.zeros((len(members), 2), np.int64)
        ext = np.zeros(len(members), np.uint8)
        for number, entry in enumerate(members):
            if len(entry) > 2:
                found = next(i for i, ext in enumerate(IMAGE_EXTENSIONS) if f"image.{ext}" in entry)
                ext[number], image[number] = found, entry[f"image.{IMAGE_EXTENSIONS[found]}"]
        n = np.array([entry.get("n", 0) for entry in entries], np.int64)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise RequestError(
            f"{name}: no index of a shard ({type(error).__name__}: {error}); it is damaged, copy the dataset again"
        ) from None
    if len(entries) != samples:
        raise RequestError(f"{name}: {len(entries)} samples, the manifest says {samples}")
    has_image = image[:, 1] > 0
    after_eeg = eeg[:, 0] + _padded(eeg[:, 1]) + _HEADER
    after_image = np.where(has_image, after_eeg + _padded(image[:, 1]) + _HEADER, after_eeg)
    fits = (~has_image | (image[:, 0] == after_eeg)) & (meta[:, 0] == after_image) & (n >= 0) & (n <= N_PADDED)
    if not fits.all():
        key = entries[int(np.argmin(fits))]["key"]
        raise RequestError(f"{name}: sample {key} does not lie as Dreamscale writes it; copy the dataset again")
    rows = np.empty(samples, INDEX)
    rows["start"], rows["eeg"], rows["image"], rows["json"] = eeg[:, 0] - _HEADER, eeg[:, 1], image[:, 1], meta[:, 1]
    rows["ext"], rows["n"] = ext, n
    return rows


def damaged(shard: str, sample: str | int, what: str) -> RequestError:
    """Error for a sample that cannot be read.

    Parameters
    ----------
    shard : str
        Path of its shard.
    sample : str or int
        Its key, or its place in the shard where the key cannot be read.
    what : str
        What is wrong.

    Returns
    -------
    RequestError
        To be raised.
    """
    root = shard.rsplit("/", 2)[0]
    return RequestError(
        f"{shard}: sample {sample}: {what}; run 'dreamscale verify {root}', and copy or shard the dataset again"
    )


def parse_meta(text: bytes, shard: str, sample: str | int) -> dict[str, Any]:
    """Parse a sample's JSON.

    Parameters
    ----------
    text : bytes
        As it is stored.
    shard : str
        Path of its shard, for the message.
    sample : str or int
        Its key or place, for the message.

    Returns
    -------
    dict
        Its metadata.

    Raises
    ------
    RequestError
        If it is damaged.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise damaged(shard, sample, f"its JSON is damaged ({error})") from None


class _Reader:
    """Open shards and buffers of one thread: nothing is opened or allocated twice."""

    def __init__(self, dataset: EEGDataset) -> None:
        import zstandard

        self.dataset = dataset
        self.files: OrderedDict[int, int] = OrderedDict()
        self.zstd, self.zstd_error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        # The .npy header is the same for every sample of a dataset.
        shape = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({N_PADDED}, {dataset.spec.window}), }}"
        self.npy = b"\x93NUMPY\x01\x00v\x00" + shape.ljust(117).encode() + b"\n"
        self.size = len(self.npy) + N_PADDED * dataset.spec.window * 2
        # Longer than a sample, so that the decompressor reaches the checksum at the frame's end.
        self.plain = bytearray(self.size + 64)
        self.window = np.frombuffer(self.plain, np.float16, N_PADDED * dataset.spec.window, len(self.npy))
        self.window = self.window.reshape(N_PADDED, -1)
        self.raw = bytearray(1 << 18)

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)

    def file(self, shard: int) -> int:
        """Descriptor of an open shard."""
        descriptor = self.files.get(shard)
        if descriptor is None:
            descriptor = self.dataset.open_shard(shard)
            # Room for it may have been made of what is open here.
            self.let_go()
            self.files[shard] = descriptor
            if len(self.files) > _OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        else:
            self.files.move_to_end(shard)
        return descriptor

    def let_go(self) -> None:
        """Close what the cache has evicted: its bytes stay on the disk as long as somebody has it open."""
        if not self.dataset.cache:
            return
        for shard, descriptor in list(self.files.items()):
            if not os.fstat(descriptor).st_nlink:
                os.close(self.files.pop(shard))

    def read(self, place: Place, start: int, size: int) -> memoryview:
        """Bytes of a shard, in a buffer that the next call writes over."""
        if size > len(self.raw):
            self.raw = bytearray(size)
        view = memoryview(self.raw)[:size]
        done = 0
        try:
            while done < size:
                got = os.preadv(self.file(place.shard), [view[done:]], start + done)
                if not got:
                    raise self.fault(place, f"the file ends {size - done} bytes early")
                done += got
        except OSError as error:
            raise self.fault(place, f"cannot be read: {error.strerror}") from None
        return view

    def name(self, place: Place, key: str) -> str | int:
        """Key of a sample, or its number in the shard where the key is not known."""
        return key or place.number - int(self.dataset.first[place.shard])

    def fault(self, place: Place, what: str, key: str = "") -> RequestError:
        """Error that names file and sample."""
        return damaged(self.dataset.shard_name(place.shard), self.name(place, key), what)

    def key(self, place: Place, header: memoryview) -> str:
        """Key of a sample, from the tar header of its signal."""
        name = bytes(header[:100]).rstrip(b"\0")
        if header[257:262] != b"ustar" or not name.endswith(_SUFFIX):
            raise self.fault(place, "the index does not point at a sample")
        return name[: -len(_SUFFIX)].decode("ascii", "replace")

    def load(self, place: Place) -> tuple[str, bytes, int]:
        """Key, JSON and true channels of a sample, whose signal then is in `window`."""
        start, size, meta_at = place.start, place.eeg, place.meta_at
        # Signal and JSON are neighbours: one call reads both. An image in between is not worth reading.
        whole = self.read(place, start, _HEADER + size if place.image else meta_at + place.meta - start)
        key = self.key(place, whole)
        try:
            got = self.zstd.stream_reader(whole[_HEADER : _HEADER + size]).readinto(self.plain)
        except self.zstd_error as error:
            raise self.fault(place, f"damaged ({error})", key) from None
        if got != self.size or not self.plain.startswith(self.npy):
            window = self.dataset.spec.window
            raise self.fault(place, f"damaged, or not float16 [{N_PADDED}, {window}]", key)
        text = bytes(self.read(place, meta_at, place.meta) if place.image else whole[meta_at - start :])
        return key, text, place.n or int(self.meta(place, text, key)["n"])

    def meta(self, place: Place, text: bytes, key: str = "") -> dict[str, Any]:
        """Parse a sample's JSON."""
        return parse_meta(text, self.dataset.shard_name(place.shard), self.name(place, key))


def pack(samples: Sequence[tuple[_Reader, Place]], window: int) -> Packed:
    """Read samples of one or several datasets, without their images.

    Parameters
    ----------
    samples : sequence of (EEGDataset.reader, Place)
        Where from.
    window : int
        T, the same in all of them.

    Returns
    -------
    Packed
        True channels one after another, in the order of `samples`.

    Raises
    ------
    RequestError
        If one is damaged, with file and key.
    """
    # An index from before it knew n says 0: room for all.
    room = sum(place.n or N_PADDED for _, place in samples)
    eeg = np.empty((room, window), np.float16)
    packed = Packed(eeg=eeg, channels=[], keys=[], json=[], shards=[])
    at = 0
    for reader, place in samples:
        key, text, n = reader.load(place)
        eeg[at : at + n] = reader.window[:n]
        at += n
        packed.channels.append(n)
        packed.keys.append(key)
        packed.json.append(text)
        packed.shards.append(reader.dataset.shard_name(place.shard))
    packed.eeg = eeg[:at]
    return packed


class EEGDataset:
    """Samples of one split of a dataset, by number.

    Parameters
    ----------
    path : str, Path or UPath
        The dataset's directory, on this machine or on an object store (``s3://bucket/lab``). Shards of a remote one are
        fetched whole, checked, and kept in a bounded cache (`data_sharding.cache`).
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
        """The dataset itself: a mixture has several (`data_sharding.mixture`)."""
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

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    @property
    def reader(self) -> _Reader:
        """Open shards and buffers of this thread."""
        reader = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = _Reader(self)
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
        at = np.asarray(numbers, np.int64)
        rows = self.index[at]
        at = np.where(at < 0, at + len(self), at)
        shard = np.searchsorted(self.first, at, side="right") - 1
        start, image = rows["start"], rows["image"].astype(np.int64)
        image_at = start + 2 * _HEADER + _padded(rows["eeg"].astype(np.int64))
        meta_at = np.where(image > 0, image_at + _HEADER + _padded(image), image_at)
        columns = at, shard, start, rows["eeg"], image_at, image, meta_at, rows["json"], rows["ext"], rows["n"]
        return list(map(Place._make, zip(*(column.tolist() for column in columns), strict=True)))

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
        return self.reader.key(place, self.reader.read(place, place.start, _HEADER))

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

    def pack(self, numbers: Sequence[int]) -> Packed:
        """Read samples without their images.

        Parameters
        ----------
        numbers : sequence of int
            Which samples.

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
        return pack([(reader, place) for place in self.places(numbers)], self.spec.window)

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
    """Write a dataset from samples in memory; corpora on disk go through the Ray job (`data_sharding.job`).

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
