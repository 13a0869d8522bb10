"""Samples out of shards: the index in memory, and what a thread needs to read by it.

Shapes: b samples, n true channels, T samples a window.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.dataset.samples import IMAGE_EXTENSIONS, N_PADDED

if TYPE_CHECKING:
    from data_sharding.dataset.dataset import EEGDataset

INDEX = np.dtype(
    [("start", "<i8"), ("eeg", "<u4"), ("image", "<u4"), ("json", "<u4"), ("ext", "u1"), ("n", "u1")],
)
"""What is kept in memory of a sample, 22 bytes: where its first tar header is, its members' bytes, and n.

Everything else follows from the layout of a tar, or is read with the sample: ten million samples take 0.2 GB.
"""
_EEG = "eeg.npy.zst"
_SUFFIX = b".eeg.npy.zst"
HEADER = 512
"""Bytes of a member's header in a tar, and what members are rounded up to."""
_OPEN_FILES = 128


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
    return (size + HEADER - 1) // HEADER * HEADER


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
    after_eeg = eeg[:, 0] + _padded(eeg[:, 1]) + HEADER
    after_image = np.where(has_image, after_eeg + _padded(image[:, 1]) + HEADER, after_eeg)
    fits = (~has_image | (image[:, 0] == after_eeg)) & (meta[:, 0] == after_image) & (n >= 0) & (n <= N_PADDED)
    if not fits.all():
        key = entries[int(np.argmin(fits))]["key"]
        raise RequestError(f"{name}: sample {key} does not lie as Dreamscale writes it; copy the dataset again")
    rows = np.empty(samples, INDEX)
    rows["start"], rows["eeg"], rows["image"], rows["json"] = eeg[:, 0] - HEADER, eeg[:, 1], image[:, 1], meta[:, 1]
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


def locate(index: np.ndarray, first: np.ndarray, numbers: Sequence[int] | np.ndarray) -> list[Place]:
    """Where samples lie.

    Parameters
    ----------
    index : ndarray of `INDEX`, shape (samples,)
        Of a whole split.
    first : ndarray of int, shape (shards + 1,)
        Number of each shard's first sample.
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
    rows = index[at]
    at = np.where(at < 0, at + len(index), at)
    shard = np.searchsorted(first, at, side="right") - 1
    start, image = rows["start"], rows["image"].astype(np.int64)
    image_at = start + 2 * HEADER + _padded(rows["eeg"].astype(np.int64))
    meta_at = np.where(image > 0, image_at + HEADER + _padded(image), image_at)
    columns = at, shard, start, rows["eeg"], image_at, image, meta_at, rows["json"], rows["ext"], rows["n"]
    return list(map(Place._make, zip(*(column.tolist() for column in columns), strict=True)))


class Reader:
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

    def announce(self, place: Place) -> None:
        """Tell the system what will be read: it fetches a whole batch side by side, where the disk is what is slow."""
        if not hasattr(os, "posix_fadvise"):
            return  # macOS has none
        # Who reads the sample will find the same fault, and say so.
        with contextlib.suppress(OSError):
            length = place.meta_at + place.meta - place.start
            os.posix_fadvise(self.file(place.shard), place.start, length, os.POSIX_FADV_WILLNEED)

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
        whole = self.read(place, start, HEADER + size if place.image else meta_at + place.meta - start)
        key = self.key(place, whole)
        try:
            got = self.zstd.stream_reader(whole[HEADER : HEADER + size]).readinto(self.plain)
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


def pack(samples: Sequence[tuple[Reader, Place]], window: int, out: np.ndarray | None = None) -> Packed:
    """Read samples of one or several datasets, without their images.

    Parameters
    ----------
    samples : sequence of (EEGDataset.reader, Place)
        Where from.
    window : int
        T, the same in all of them.
    out : ndarray of float16, shape (rows, window), optional
        Where signals go if they find room there.

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
    eeg = out if out is not None and len(out) >= room else np.empty((room, window), np.float16)
    packed = Packed(eeg=eeg, channels=[], keys=[], json=[], shards=[])
    for reader, place in samples:
        reader.announce(place)
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
