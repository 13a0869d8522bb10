"""Check MATLAB 5 files before a library reads them.

SciPy reads nested values of a MATLAB file recursively. Before SciPy reads the values of an array, it allocates memory
for the size that the file states. So a file of a few kB can crash the process or use all memory. `check_matlab` reads
only the structure of the file.

A MATLAB 5 file is a list of elements. An element has a tag (its type and its size in bytes) and its data. Every MATLAB
value is an element of the type `MATRIX`. The data of a matrix are again elements: the flags (with the MATLAB class of
the matrix), the dimensions, the name, and the values. The values of a cell array or of a structure are again matrices.
An element of the type `COMPRESSED` contains one other element, compressed by zlib.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from typing import IO

from data_sharding.common.untrusted import FREE_UNPACKED, MAX_UNPACKED, open_regular, refusal

MAX_DEPTH = 100
"""Largest depth of cell arrays and structures inside each other."""
MATRIX, COMPRESSED = 14, 15
CELL, STRUCTURE, OBJECT, CHARACTERS, SPARSE, FUNCTION, OPAQUE = 1, 2, 3, 4, 5, 16, 17
_BLOCK = 2**20


class _End(Exception):
    """The file ends inside an element. SciPy reads the file after this check, and reports this fault."""


class _Content:
    """The uncompressed content of one variable of a file, read in blocks.

    Parameters
    ----------
    stream : binary file
        The file, at the start of the variable's data.
    size : int
        Size of the variable's data in the file.
    compressed : bool
        Whether the data are compressed.
    """

    def __init__(self, stream: IO[bytes], size: int, compressed: bool) -> None:
        self._stream, self._left = stream, size
        self._held, self._at = b"", 0  # the current block, and the position in this block
        self._unpacker = zlib.decompressobj() if compressed else None

    def _next(self) -> bytes:
        if self._unpacker is not None and self._unpacker.unconsumed_tail:
            return self._unpacker.decompress(self._unpacker.unconsumed_tail, _BLOCK)
        block = self._stream.read(min(_BLOCK, self._left))
        self._left -= len(block)
        if not block:
            raise _End
        return block if self._unpacker is None else self._unpacker.decompress(block, _BLOCK)

    def read(self, count: int) -> bytes:
        """Read `count` bytes; `count` must be small."""
        while len(self._held) - self._at < count:
            self._held, self._at = self._held[self._at :] + self._next(), 0
        self._at += count
        return self._held[self._at - count : self._at]

    def skip(self, count: int) -> None:
        """Read `count` bytes and drop them."""
        while len(self._held) - self._at < count:
            count -= len(self._held) - self._at
            self._held, self._at = self._next(), 0
        self._at += count


class _Walker:
    """Reads the structure of the variables of one file, and counts the memory that their values need.

    Parameters
    ----------
    where : str
        Path of the file, for messages.
    size : int
        Size of the file in bytes.
    order : str
        Byte order of the file, as in `struct`.
    """

    def __init__(self, where: str, size: int, order: str) -> None:
        self._where, self._order, self._size = where, order, size
        self._most, self._total = max(FREE_UNPACKED, MAX_UNPACKED * size), 0

    def _count(self, amount: int) -> None:
        self._total += amount
        if self._total > self._most:
            raise refusal(self._where, f"the {self._size} bytes of the file unpack to more than {self._most} bytes")

    def _tag(self, content: _Content) -> tuple[int, int, bytes | None]:
        """Read the tag of an element: type, size, and the element's data if they are inside the tag (or else None)."""
        head = content.read(8)
        kind, size = struct.unpack(f"{self._order}2I", head)
        if kind >> 16:  # An element of up to 4 bytes has its data inside its tag.
            return kind & 0xFFFF, kind >> 16, head[4 : 4 + (kind >> 16)]
        return kind, size, None

    def _small(self, content: _Content) -> bytes:
        """Read an element with few bytes, such as the dimensions."""
        _, size, data = self._tag(content)
        if data is not None:
            return data
        if size > 2**16:
            raise refusal(self._where, f"the header of a variable has {size} bytes, which is too many")
        return content.read(size + -size % 8)[:size]

    def _values(self, content: _Content) -> int:
        """Skip an element with values, and return its size in bytes."""
        _, size, data = self._tag(content)
        if data is None:
            self._count(size)
            content.skip(size + -size % 8)
        return size

    def variable(self, content: _Content, tag: tuple[int, int]) -> None:
        """Read the structure of one variable. `tag` (type and size of the variable's element) has already been read."""
        # For each level of nesting, the number of matrices that are still to be read.
        todo = [1]
        while todo:
            if not todo[-1]:
                todo.pop()
                continue
            todo[-1] -= 1
            kind, size = tag if tag[0] else self._tag(content)[:2]
            tag = (0, 0)
            if kind != MATRIX:
                content.skip(size + -size % 8)
            elif size:
                todo.append(self._matrix(content))
                if len(todo) > MAX_DEPTH:
                    raise refusal(self._where, f"cell arrays and structures are nested over {MAX_DEPTH} levels deep")

    def _matrix(self, content: _Content) -> int:
        """Read a matrix's header, and skip plain values; return how many matrices follow as its values (0 if plain)."""
        flags = self._small(content)
        if len(flags) < 4:
            raise _End
        (flag,) = struct.unpack(f"{self._order}I", flags[:4])
        kind, is_complex = flag & 0xFF, bool(flag & 0x800)
        if kind == OPAQUE:
            for _ in range(3):
                self._small(content)
            return 1
        shape = self._small(content)
        count = math.prod(struct.unpack(f"{self._order}{len(shape) // 4}I", shape[: len(shape) // 4 * 4]))
        self._small(content)  # skip the name
        if kind == FUNCTION:
            return 1
        if kind in (CELL, STRUCTURE, OBJECT):
            self._count(8 * count)
            return count if kind == CELL else count * self._fields(content, kind)
        if kind == CHARACTERS:
            self._count(4 * count)
        for _ in range((2 if kind == SPARSE else 0) + 1 + is_complex):
            self._values(content)
        return 0

    def _fields(self, content: _Content, kind: int) -> int:
        if kind == OBJECT:
            self._small(content)  # skip the name of the object's class
        length, size = self._small(content), self._values(content)
        (longest,) = struct.unpack(f"{self._order}I", length[:4]) if len(length) >= 4 else (0,)
        if not longest:
            raise _End
        return size // longest


def check_matlab(path: str | os.PathLike[str]) -> None:
    """Refuse a MATLAB 5 file whose values are nested very deeply, or need far more memory than the file's size.

    Parameters
    ----------
    path : str or Path
        The file. A file that is not a MATLAB 5 file is not checked.

    Raises
    ------
    RequestError
        If the values are nested too deeply, or if they need more than `MAX_UNPACKED` times the size of the file, and
        more than `FREE_UNPACKED` bytes.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        size, head = os.fstat(stream.fileno()).st_size, stream.read(128)
        order = {b"IM": "<", b"MI": ">"}.get(head[126:128], "")
        if not order or head[:4] == bytes(4):
            return
        walker, at = _Walker(str(path), size, order), 128
        while at + 8 <= size:
            stream.seek(at)
            kind, length = struct.unpack(f"{order}2I", stream.read(8))
            packed = kind == COMPRESSED
            content = _Content(stream, length, packed)
            try:
                inner = struct.unpack(f"{order}2I", content.read(8)) if packed else (kind, length)
                walker.variable(content, inner)
            except (_End, zlib.error, struct.error):
                pass  # The file is damaged. SciPy reads the file after this check, and reports the damage.
            at += 8 + length
