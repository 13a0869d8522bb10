"""Read samples from shards.

The index of a dataset is kept in memory. Each thread that reads has its own open files and buffers.

Python's `tarfile` is not used for reading, because it reads the headers of the whole tar. The index of a shard gives
the offset of each sample, so one or two system calls read a sample.

Letters in shapes: `n` recorded channels of a sample (without padding), `T` time points of a window.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json
from data_sharding.common.storage import AnyPath
from data_sharding.common.untrusted import MAX_IMAGE, MAX_WINDOW, check_entries, check_key, check_meta, parse_json
from data_sharding.dataset.samples import IMAGE_EXTENSIONS, N_PADDED
from data_sharding.processing.preprocess import PreprocessSpec

INDEX = np.dtype(
    [
        ("start", "<i8"),
        ("eeg", "<u4"),
        ("image", "<u4"),
        ("json", "<u4"),
        ("ext", "u1"),
        ("n", "u1"),
        ("onset", "<i4"),
        ("samples", "<u4"),
    ],
)
"""Data type of an entry of the index: 30 bytes for each sample. The fields are the offset of the sample's first tar
header, the sizes of its members, the file type of its image, its number of channels, and for a trial the index of its
onset and its number of time points (0 for a window of the usual length).

The reader computes the offsets of all members of a sample from its entry. The index of ten million samples takes 0.3 GB
of memory.
"""
LONGEST = MAX_WINDOW
"""Largest number of time points of a stored trial. An index that states a larger number is rejected as damaged."""
MAX_META = 2**24
"""Largest size of a sample's JSON in bytes."""
_EEG = "eeg.npy.zst"
_SUFFIX = b".eeg.npy.zst"
HEADER = 512
"""Size of a member's header in a tar, in bytes. The content of a member is padded to a multiple of this size."""
_OPEN_FILES = 128


class ShardSource(Protocol):
    """Protocol with the attributes and methods of `EEGDataset` that a `ShardReader` uses."""

    first: np.ndarray
    """Number of the first sample of each shard, shape (shards + 1,); the last entry is the number of samples."""

    @property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of every sample."""
        ...

    @property
    def n_times(self) -> int:
        """Number of time points that are read from each sample."""
        ...

    @property
    def cache(self) -> object | None:
        """Local cache of the shards; None if the dataset is on this machine."""
        ...

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard, for error messages."""
        ...

    def open_shard(self, shard: int) -> int:
        """Open a shard and return its file descriptor."""
        ...


@dataclass(kw_only=True)
class PackedSamples:
    """Samples that were read from disk: one array contains the recorded channels of all samples."""

    eeg: np.ndarray
    """Signals as float16 in microvolts; shape (sum of `n` over all samples, `T`)."""
    channels: list[int]
    """Number of recorded channels of each sample."""
    keys: list[str]
    """Key of each sample."""
    json: list[bytes]
    """JSON text with the metadata of each sample."""
    shards: list[str]
    """Path of the shard of each sample."""
    begins: list[int]
    """For each sample, index of the first stored time point that was read; 0 except for trials stored with a
    baseline."""


class SampleLocation(NamedTuple):
    """Location of a sample. Offsets are in bytes from the beginning of the shard; sizes are in bytes."""

    number: int
    """Number of the sample in the dataset."""
    shard: int
    """Number of the shard."""
    start: int
    """Offset of the sample's first tar header; this header belongs to the EEG of the sample."""
    eeg: int
    """Size of the compressed EEG."""
    image_at: int
    """Offset of the sample's image, if the sample has an image."""
    image: int
    """Size of the sample's image; 0 if the sample has no image."""
    meta_at: int
    """Offset of the sample's JSON metadata."""
    meta: int
    """Size of the sample's JSON metadata."""
    ext: int
    """File type of the image, as an index of IMAGE_EXTENSIONS."""
    n: int
    """Number of recorded channels; 0 if an older version of Dreamscale wrote the index without this number."""
    samples: int
    """Number of stored time points of a trial; 0 for a window with the length that the preprocessing settings give."""
    begin: int
    """Index of the first stored time point to read."""


def most_bytes(samples: Any) -> Any:
    """Return an upper limit for the size of the compressed EEG of a sample with `samples` time points, in bytes."""
    size = 128 + N_PADDED * samples * 2
    return size + size // 128 + 1024


def member_limits(samples: int) -> dict[str, int]:
    """Return the largest allowed size in bytes of each tar member, for a sample with `samples` time points."""
    return {_EEG: most_bytes(samples), "json": MAX_META, **{f"image.{ext}": MAX_IMAGE for ext in IMAGE_EXTENSIONS}}


def padded_size(size: Any) -> Any:
    """Return the number of bytes that the content of a member takes in a tar, including padding."""
    return (size + HEADER - 1) // HEADER * HEADER


def read_entries(index: AnyPath, tar_bytes: int) -> list[dict[str, Any]]:
    """Read and check the entries of a shard's index.

    Parameters
    ----------
    index : Path or UPath
        The ``.idx`` file.
    tar_bytes : int
        Size of the tar in bytes.

    Returns
    -------
    list of dict
        One entry for each sample, as `ShardWriter` writes the entry: the sample's key, and the offset and size of each
        member.

    Raises
    ------
    RequestError
        If the index is damaged.
    """
    return check_entries(read_json(index), str(index), member_limits(LONGEST), tar_bytes=tar_bytes, longest=LONGEST)


def parse_index(data: bytes, name: str, samples: int, *, tar_bytes: int, window: int) -> np.ndarray:
    """Read the index of a shard into an array.

    Parameters
    ----------
    data : bytes
        Content of the ``.idx`` file.
    name : str
        Path of the file, for error messages.
    samples : int
        Number of samples according to the manifest.
    tar_bytes : int
        Size of the tar in bytes.
    window : int
        Number of time points of a window.

    Returns
    -------
    ndarray of `INDEX`, shape (samples,)
        One entry for each sample, in the order of the tar.

    Raises
    ------
    RequestError
        If the index is damaged, or if Dreamscale did not write the shard.
    """
    try:
        entries = parse_json(data)
        members = [entry["members"] for entry in entries]
        eeg = np.array([m[_EEG] for m in members], np.int64).reshape(len(members), 2)
        meta = np.array([m["json"] for m in members], np.int64).reshape(len(members), 2)
        image = np.zeros((len(members), 2), np.int64)
        ext = np.zeros(len(members), np.uint8)
        for number, entry in enumerate(members):
            if len(entry) > 2:
                found = next(i for i, ext in enumerate(IMAGE_EXTENSIONS) if f"image.{ext}" in entry)
                ext[number], image[number] = found, entry[f"image.{IMAGE_EXTENSIONS[found]}"]
        n = np.array([entry.get("n", 0) for entry in entries], np.int64)
        onset = np.array([entry.get("onset", 0) for entry in entries], np.int64)
        count = np.array([entry.get("samples", 0) for entry in entries], np.int64)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, OverflowError) as error:
        raise RequestError(
            f"{name}: the file is damaged and not the index of a shard ({type(error).__name__}: {show(error)}); "
            "copy the dataset again"
        ) from None
    if len(entries) != samples:
        raise RequestError(
            f"{name}: the index lists {len(entries)} samples, the manifest says {samples}; copy the dataset again"
        )
    # Check that every member is inside the tar and not too large, before the offsets and sizes are used.
    longest = np.where((count > 0) & (count <= LONGEST), count, window)
    limits = np.stack([most_bytes(longest), np.full(samples, MAX_META), np.full(samples, MAX_IMAGE)], axis=1)
    places = np.stack([eeg, meta, image], axis=1)
    inside = ((places >= 0) & (places <= tar_bytes)).all(axis=(1, 2))
    inside &= ((places[:, :, 1] <= limits) & (places[:, :, 0] <= tar_bytes - places[:, :, 1])).all(axis=1)
    has_image = image[:, 1] > 0
    after_eeg = eeg[:, 0] + padded_size(eeg[:, 1]) + HEADER
    after_image = np.where(has_image, after_eeg + padded_size(image[:, 1]) + HEADER, after_eeg)
    fits = inside & (~has_image | (image[:, 0] == after_eeg)) & (meta[:, 0] == after_image) & (n >= 0) & (n <= N_PADDED)
    fits &= (count >= 0) & (count <= LONGEST) & (abs(onset) <= LONGEST)
    if not fits.all():
        key = entries[int(np.argmin(fits))]["key"]
        raise RequestError(
            f"{name}: the index gives impossible offsets for the sample {show(key)}; copy the dataset again"
        )
    rows = np.empty(samples, INDEX)
    rows["start"], rows["eeg"], rows["image"], rows["json"] = eeg[:, 0] - HEADER, eeg[:, 1], image[:, 1], meta[:, 1]
    rows["ext"], rows["n"], rows["onset"], rows["samples"] = ext, n, onset, count
    return rows


def damage_error(shard: str, sample: str | int, fault: str) -> RequestError:
    """Make the error for a sample that cannot be read.

    Parameters
    ----------
    shard : str
        Path of the shard.
    sample : str or int
        Key of the sample, or its number in the shard if the key cannot be read.
    fault : str
        Description of the fault of the sample.

    Returns
    -------
    RequestError
        The error, for the caller to raise.
    """
    root = shard.rsplit("/", 2)[0]
    return RequestError(
        f"{shard}: sample {sample}: {fault}; run 'dreamscale verify {root}', and copy or shard the dataset again"
    )


def parse_meta(text: bytes, shard: str, sample: str | int) -> dict[str, Any]:
    """Parse the JSON of a sample.

    Parameters
    ----------
    text : bytes
        The stored JSON.
    shard : str
        Path of the shard, for the error message.
    sample : str or int
        Key or number of the sample, for the error message.

    Returns
    -------
    dict
        Metadata of the sample.

    Raises
    ------
    RequestError
        If the JSON is damaged.
    """
    try:
        return check_meta(parse_json(text))
    except ValueError as error:
        raise damage_error(shard, sample, f"its JSON is damaged ({show(error)})") from None


def crop_meta(meta: dict[str, Any], begin: int) -> dict[str, Any]:
    """Adjust the metadata of a stored trial to the part of the trial that was read.

    Parameters
    ----------
    meta : dict
        Metadata of the stored trial.
    begin : int
        Index of the first stored time point that was read.

    Returns
    -------
    dict
        Metadata of the part that was read: ``start`` is the time of the first time point of this part, and ``onset`` is
        the index of the onset, counted from this time point.
    """
    if not begin:
        return meta
    return {**meta, "start": round(meta["start"] + begin / meta["sfreq"], 6), "onset": meta.get("onset", 0) - begin}


def locate(
    index: np.ndarray, first: np.ndarray, numbers: Sequence[int] | np.ndarray, shift: int | None = None
) -> list[SampleLocation]:
    """Compute the locations of samples in the shards.

    Parameters
    ----------
    index : ndarray of `INDEX`, shape (samples,)
        Index entries of all samples of a split.
    first : ndarray of int, shape (shards + 1,)
        Number of the first sample of each shard; the last entry is the number of samples.
    numbers : sequence of int
        Numbers of the samples; negative numbers count from the end.
    shift : int, optional
        Number of time points from the onset of a trial to the first time point that is read. By default a trial is read
        from its onset, or from its first stored time point if the onset was not stored.

    Returns
    -------
    list of SampleLocation
        One location for each sample, in the order of `numbers`.

    Raises
    ------
    IndexError
        If one of the numbers does not belong to a sample of the split.
    """
    at = np.asarray(numbers, np.int64)
    rows = index[at]
    at = np.where(at < 0, at + len(index), at)
    shard = np.searchsorted(first, at, side="right") - 1
    start, image = rows["start"], rows["image"].astype(np.int64)
    image_at = start + 2 * HEADER + padded_size(rows["eeg"].astype(np.int64))
    meta_at = np.where(image > 0, image_at + HEADER + padded_size(image), image_at)
    onset = rows["onset"].astype(np.int64)
    begin = np.maximum(onset, 0) if shift is None else onset + shift
    columns = at, shard, start, rows["eeg"], image_at, image, meta_at, rows["json"], rows["ext"], rows["n"]
    columns = *columns, rows["samples"], begin
    return list(map(SampleLocation._make, zip(*(column.tolist() for column in columns), strict=True)))


class ShardReader:
    """Reader of one thread, with open shards and buffers that are reused from sample to sample."""

    def __init__(self, dataset: ShardSource) -> None:
        import zstandard

        self.dataset = dataset
        self.files: OrderedDict[int, int] = OrderedDict()
        self.zstd, self.zstd_error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self.samples = 0
        self._prepare_buffer(dataset.spec.window)
        self.raw = bytearray(1 << 18)

    def _prepare_buffer(self, samples: int) -> None:
        """Prepare the buffer and the expected .npy header for stored samples of `samples` time points.

        The attribute `stored` becomes a view of the buffer, with the shape (128, samples).
        """
        if samples == self.samples:
            return
        shape = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({N_PADDED}, {samples}), }}"
        self.npy = b"\x93NUMPY\x01\x00v\x00" + shape.ljust(117).encode() + b"\n"
        self.size = len(self.npy) + N_PADDED * samples * 2
        # Make the buffer longer than a sample. The checksum is at the end of the compressed data, and the decompressor
        # reads to this end, and verifies the checksum, only if space is left in the buffer.
        self.plain = bytearray(self.size + 64)
        self.stored = np.frombuffer(self.plain, np.float16, N_PADDED * samples, len(self.npy)).reshape(N_PADDED, -1)
        self.samples = samples

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)

    def file(self, shard: int) -> int:
        """Return the file descriptor of a shard, and open the shard if it is not open."""
        descriptor = self.files.get(shard)
        if descriptor is None:
            descriptor = self.dataset.open_shard(shard)
            # To make room for this shard, the cache may have deleted files that this reader still has open; close these
            # files.
            self.close_evicted()
            self.files[shard] = descriptor
            if len(self.files) > _OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        else:
            self.files.move_to_end(shard)
        return descriptor

    def close_evicted(self) -> None:
        """Close open files that the cache has deleted, because a deleted file uses disk space until it is closed."""
        if not self.dataset.cache:
            return
        for shard, descriptor in list(self.files.items()):
            if not os.fstat(descriptor).st_nlink:
                os.close(self.files.pop(shard))

    def start_readahead(self, location: SampleLocation) -> None:
        """Ask the operating system to load a sample early, so that it loads the samples of a batch in parallel."""
        if not hasattr(os, "posix_fadvise"):
            return  # macOS does not have the function posix_fadvise.
        # Ignore an error of the readahead, because the actual reading of the sample will raise the same error.
        with contextlib.suppress(OSError):
            length = location.meta_at + location.meta - location.start
            os.posix_fadvise(self.file(location.shard), location.start, length, os.POSIX_FADV_WILLNEED)

    def read(self, location: SampleLocation, start: int, size: int) -> memoryview:
        """Read bytes of a sample's shard into a buffer of this reader; the next call overwrites the buffer."""
        if size > len(self.raw):
            self.raw = bytearray(size)
        view = memoryview(self.raw)[:size]
        done = 0
        try:
            while done < size:
                got = os.preadv(self.file(location.shard), [view[done:]], start + done)
                if not got:
                    raise self.damage(location, f"the file ends {size - done} bytes early")
                done += got
        except OSError as error:
            raise self.damage(location, f"cannot be read: {error.strerror}") from None
        return view

    def name(self, location: SampleLocation, key: str) -> str | int:
        """Return the key of a sample; if the key is unknown (empty), return the sample's number in the shard."""
        return key or location.number - int(self.dataset.first[location.shard])

    def damage(self, location: SampleLocation, fault: str, key: str = "") -> RequestError:
        """Make the error for a damaged sample; its message names the file and the sample."""
        return damage_error(self.dataset.shard_name(location.shard), self.name(location, key), fault)

    def parse_key(self, location: SampleLocation, header: memoryview, suffix: bytes = _SUFFIX) -> str:
        """Read the key of a sample from the tar header of its EEG, or of the member with the given suffix."""
        name = bytes(header[:100]).rstrip(b"\0")
        if header[257:262] != b"ustar" or not name.endswith(suffix):
            raise self.damage(location, "the index does not point at a sample")
        try:
            return check_key(name[: -len(suffix)].decode("ascii", "replace"), "")
        except RequestError:
            raise self.damage(location, f"its name in the tar is '{show(name)}', which has no valid key") from None

    def load(self, location: SampleLocation) -> tuple[str, bytes, int]:
        """Read a sample into `stored`, and return the sample's key, JSON and number of recorded channels."""
        self._prepare_buffer(location.samples or self.dataset.spec.window)
        start, size, meta_at = location.start, location.eeg, location.meta_at
        # If a sample has no image, its JSON directly follows its EEG, so read EEG and JSON with one call. If an image
        # is between EEG and JSON, use two calls, so that the image is not read.
        whole = self.read(location, start, HEADER + size if location.image else meta_at + location.meta - start)
        key = self.parse_key(location, whole)
        try:
            got = self.zstd.stream_reader(whole[HEADER : HEADER + size]).readinto(self.plain)
        except self.zstd_error as error:
            raise self.damage(location, f"damaged ({error})", key) from None
        if got != self.size or not self.plain.startswith(self.npy):
            raise self.damage(location, f"damaged, or not float16 [{N_PADDED}, {self.samples}]", key)
        if not 0 <= location.begin <= self.samples - self.dataset.n_times:
            need = f"{self.dataset.n_times} time points from number {location.begin} on are needed"
            text = f"has {self.samples} time points, but {need}"
            raise self.damage(location, text, key)
        text = bytes(self.read(location, meta_at, location.meta) if location.image else whole[meta_at - start :])
        n = location.n or self.meta(location, text, key).get("n")
        if type(n) is not int or not 1 <= n <= N_PADDED:
            raise self.damage(location, f"its JSON does not state the number of channels, from 1 to {N_PADDED}", key)
        return key, text, n

    def window(self, location: SampleLocation, n: int) -> np.ndarray:
        """Return the requested part of the sample that `load` read last, as a view of the buffer with shape (n, T)."""
        return self.stored[:n, location.begin : location.begin + self.dataset.n_times]

    def image(self, location: SampleLocation) -> bytes:
        """Read the image of a sample without its EEG; the sample must have an image."""
        whole = self.read(location, location.image_at - HEADER, HEADER + location.image)
        self.parse_key(location, whole, f".image.{IMAGE_EXTENSIONS[location.ext]}".encode())
        return bytes(whole[HEADER:])

    def meta(self, location: SampleLocation, text: bytes, key: str = "") -> dict[str, Any]:
        """Parse the JSON of a sample, and adjust the metadata to the part of the sample that is read."""
        meta = parse_meta(text, self.dataset.shard_name(location.shard), self.name(location, key))
        return crop_meta(meta, location.begin)


def pack(
    samples: Sequence[tuple[ShardReader, SampleLocation]], n_times: int, out: np.ndarray | None = None
) -> PackedSamples:
    """Read samples of one or several datasets, without their images.

    Parameters
    ----------
    samples : sequence of (EEGDataset.reader, SampleLocation)
        Reader and location of each sample to read.
    n_times : int
        Number of time points `T` that are read from each sample; the number must be equal in all datasets.
    out : ndarray of float16, shape (rows, n_times), optional
        Memory for the signals. If `out` is too small, new memory is allocated.

    Returns
    -------
    PackedSamples
        The recorded channels of all samples, concatenated in the order of `samples`.

    Raises
    ------
    RequestError
        If a sample is damaged; the message names the file and the sample's key.
    """
    # `location.n` is 0 if an older version of Dreamscale wrote the index; the sample can then have up to 128 channels.
    rows = sum(location.n or N_PADDED for _, location in samples)
    eeg = out if out is not None and len(out) >= rows else np.empty((rows, n_times), np.float16)
    packed = PackedSamples(eeg=eeg, channels=[], keys=[], json=[], shards=[], begins=[])
    for reader, location in samples:
        reader.start_readahead(location)
    at = 0
    for reader, location in samples:
        key, text, n = reader.load(location)
        eeg[at : at + n] = reader.window(location, n)
        at += n
        packed.channels.append(n)
        packed.keys.append(key)
        packed.json.append(text)
        packed.shards.append(reader.dataset.shard_name(location.shard))
        packed.begins.append(location.begin)
    packed.eeg = eeg[:at]
    return packed
