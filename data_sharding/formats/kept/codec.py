"""Compresses blocks of samples without loss, and decompresses them.

Each channel is stored in the smallest of three encodings: a table, float32 (optionally with a constant factor) or
float64. The encoding with a table stores each distinct value once, and for each sample an index into the table. (There
are few distinct values, because most amplifiers write at most 16 bits.) An encoding is used only if decoding restores
every bit. Before compression with zstandard, the bytes are reordered: first the first byte of every number, then the
second byte of every number, and so on.

In array shapes, n is the number of channels and b the number of samples of the block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

TABLE, FLOAT32, FLOAT64 = 0, 1, 2
MAX_VALUES = 2**27
"""Largest number of values in a block: 1 GiB as float64."""
_TABLE_LENGTH = 2**16
_FACTORS = (1.0, 1e-6, 1e-3, 1e-9)
# Many files store microvolts as float32, and their readers multiply the values by 1e-6 to get volts.
_HEAD = struct.Struct("<BI")


def pack(x: np.ndarray) -> bytes:
    """Compress a block.

    Parameters
    ----------
    x : ndarray, shape (n, b), float32 or float64
        The samples.

    Returns
    -------
    bytes
        The compressed block.
    """
    import zstandard

    packed = [_pack_channel(row) for row in x.astype("<f8")]
    heads = b"".join(_HEAD.pack(form, length) for form, length, _ in packed)
    return zstandard.ZstdCompressor(level=3).compress(b"".join([heads, *(data for _, _, data in packed)]))


def unpack(data: bytes, shape: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
    """Decompress some channels of a block.

    Parameters
    ----------
    data : bytes
        The compressed block.
    shape : tuple of int
        Number of channels, and number of samples of each channel.
    rows : sequence of int
        Channels to decompress.

    Returns
    -------
    ndarray, shape (len(rows), b), float64
        The samples.

    Raises
    ------
    ValueError
        If the block is damaged. A damaged block never needs more memory than a valid block of this shape.
    """
    import zstandard

    n, b = shape
    if n * b > MAX_VALUES:
        raise ValueError(f"a block of {n} channels and {b} samples is too large")
    most = n * (_HEAD.size + 8 * max(b, 1) + 8 * min(b, _TABLE_LENGTH))
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as stream:
            content = stream.read(most + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    heads = [_HEAD.unpack_from(content, i * _HEAD.size) for i in range(n)] if len(content) >= n * _HEAD.size else []
    sizes = [_size_of(form, length, b) for form, length in heads]
    if len(heads) != n or n * _HEAD.size + sum(sizes) != len(content):
        raise ValueError("the size of a block differs from the size in its header")
    starts = n * _HEAD.size + np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    out = np.empty((len(rows), b))
    for k, row in enumerate(rows):
        form, length = heads[row]
        out[k] = _unpack_channel(form, length, content[starts[row] : starts[row + 1]], b)
    return out


def _pack_channel(x: np.ndarray) -> tuple[int, int, bytes]:
    narrow, factor = _narrow(x)
    width = 8 if narrow is None else 4
    with np.errstate(all="ignore"):
        found = _find_steps(x) or _find_values(x)
    if found and 8 * len(found[0]) + 2 * len(x) < width * len(x):
        table, numbers = found
        return TABLE, len(table), _shuffle(table) + _shuffle(np.diff(numbers, prepend=0).astype("<u2"))
    return (FLOAT64, 0, _shuffle(x)) if narrow is None else (FLOAT32, factor, _shuffle(narrow))


def _narrow(x: np.ndarray) -> tuple[np.ndarray | None, int]:
    """Return the values divided by a factor, as float32, and the index of this factor in `_FACTORS`.

    Return None and 0 if no factor allows decoding without a change of values.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for i, factor in enumerate(_FACTORS):
            for part in (x[:100], x):
                narrow = (part / factor).astype("<f4")
                if not _same(narrow.astype("<f8") * factor, part):
                    break
            else:
                return narrow, i
    return None, 0


def _find_steps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a table of values and each sample's index in this table, if all values lie on a grid of equal steps."""
    some = np.unique(x[:4096])
    if len(some) < 2 or not (step := np.diff(some).min()) > 0 or not (x.max() - x.min()) / step < 2**20:
        return None
    places = np.rint((x - x.min()) / step).astype(np.int64)
    values, used = np.zeros(places.max() + 1), np.zeros(places.max() + 1, bool)
    values[places], used[places] = x, True
    table = values[used]
    if len(table) > _TABLE_LENGTH:
        return None
    numbers = (np.cumsum(used) - 1)[places]
    # Use the table only if decoding restores every bit. Decoding loses bits if two different values have the same
    # index, or if a value is a negative zero or an unusual NaN.
    return (table, numbers) if _same(table[numbers], x) else None


def _find_values(x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a table of the distinct values and the table index of each sample.

    Return None if there are too many distinct values for a table.
    """
    table = np.unique(x)
    if len(table) > _TABLE_LENGTH or 4 * len(table) >= 3 * len(x):
        return None
    numbers = np.minimum(np.searchsorted(table, x), len(table) - 1)
    return (table, numbers) if _same(table[numbers], x) else None


def _size_of(form: int, length: int, b: int) -> int:
    if form == TABLE and 0 < length <= min(b, _TABLE_LENGTH):
        return 8 * length + 2 * b
    if (form == FLOAT64 and not length) or (form == FLOAT32 and 0 <= length < len(_FACTORS)):
        return (4 if form == FLOAT32 else 8) * b
    raise ValueError("a block has an unknown encoding")


def _unpack_channel(form: int, length: int, data: bytes, b: int) -> np.ndarray:
    if form == FLOAT64:
        return _join(data, "<f8", b)
    if form == FLOAT32:
        return _join(data, "<f4", b).astype("<f8") * _FACTORS[length]
    table, steps = _join(data[: 8 * length], "<f8", length), _join(data[8 * length :], "<u2", b)
    numbers = np.cumsum(steps, dtype=np.uint16)
    if numbers.max(initial=0) >= length:
        raise ValueError("a block has an index outside its table")
    return table[numbers]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view("<u8") == b.view("<u8")).all())


def _shuffle(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), x.itemsize).T.tobytes()


def _join(data: bytes, dtype: str, count: int) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(size, count).T).view(dtype).reshape(count)
