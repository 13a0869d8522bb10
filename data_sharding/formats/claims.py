"""Find all files of a recording. Their names are read from its main file, not guessed."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from data_sharding.common.storage import AnyPath, is_remote
from data_sharding.common.untrusted import is_special
from data_sharding.formats import headers

TAIL_BYTES = 1 << 18
"""The name of the next part of a split FIF file is searched in the first bytes of the file, and in this number of bytes
at its end."""
MOST_SET_BYTES = 1 << 26
"""A ``.set`` file with more bytes than this contains the signal itself, so no ``.fdt`` file is searched for."""
REF_ROLE, REF_FILE_NUMBER, REF_FILE_NAME, NEXT_FILE = 115, 117, 118, 2
"""Codes of the three FIF tags that refer to another file. The value `NEXT_FILE` in a tag `REF_ROLE` means: the next
part of a split file."""
INTEGER, TEXT = 3, 10
"""FIF codes of the data types integer and text."""
ROLE = struct.pack(">3i", REF_ROLE, INTEGER, 4)
CHARACTERS = 512
"""A tag whose value (for example a file name) has more bytes than this is ignored."""
COMPRESSED = 15
"""Code of a compressed variable in MATLAB files."""
ONE_BYTE = re.compile(rb"[^\x00-\x1f/\\:*?\"<>|']{1,200}\.fdt", re.IGNORECASE)
TWO_BYTES = re.compile(rb"(?:[^\x00-\x1f/\\:*?\"<>|']\x00){1,200}\.\x00f\x00d\x00t\x00", re.IGNORECASE)
"""Patterns of the names of ``.fdt`` files. MATLAB stores text with one or two bytes for each character."""
Near = Mapping[str, AnyPath]
"""Files of a folder. The keys are lower-case names, because headers often write file names in another case."""


def files_beside(path: AnyPath) -> Near:
    """List the folder of a file.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    mapping of str to path
        Entries of the folder, including `path` itself, but without pipes, sockets and devices. The keys are the names
        in lower case.
    """
    entries = [entry for entry in path.parent.iterdir() if is_remote(entry) or not is_special(str(entry))]
    return {entry.name.lower(): entry for entry in entries}


def next_fif_part(path: AnyPath, head: bytes = b"") -> str | None:
    """Return the name of the next part of a split FIF file. Each part contains the name of the next part.

    Parameters
    ----------
    path : Path or UPath
        The FIF file.
    head : bytes
        The first bytes of the file, if the caller has already read them.

    Returns
    -------
    str or None
        Name of the next part, without folder. None for the last part, and for a file that is not split.
    """
    if path.name.lower().endswith(".gz"):
        data = _end_of_gzip(path)
        return _next_name(data, path.name)
    size = headers.size_of(path)
    tail = headers.read_range(path, max(0, size - TAIL_BYTES), TAIL_BYTES, head)
    return _next_name(tail, path.name) or (_next_name(head, path.name) if size > TAIL_BYTES else None)


def _end_of_gzip(path: AnyPath) -> bytes:
    end = b""
    with path.open("rb") as stream, gzip.open(stream) as data:
        while block := data.read(TAIL_BYTES):
            end = (end + block)[-TAIL_BYTES:]
    return end


def _next_name(data: bytes, own: str) -> str | None:
    """Find the name of the next part of a split FIF file in the bytes of a part.

    A FIF tag consists of four integers (kind, type, size and next), followed by the value.
    """
    at = -1
    while (at := data.find(ROLE, at + 1)) >= 0:
        if data[at + 16 : at + 20] != struct.pack(">i", NEXT_FILE):
            continue
        place, number = at + 20, None
        for _ in range(4):
            if place + 16 > len(data):
                break
            kind, type_, size, _ = struct.unpack_from(">4i", data, place)
            value = data[place + 16 : place + 16 + size] if 0 <= size <= CHARACTERS else b""
            if kind == REF_FILE_NAME and type_ == TEXT and value:
                return re.split(r"[\\/]", value.decode("latin-1"))[-1]
            if kind == REF_FILE_NUMBER and type_ == INTEGER and len(value) == 4:
                number = struct.unpack(">i", value)[0]
            place += 16 + max(0, size)
        if number is not None:
            # Some programs store only the number of the next part, not its name.
            stem, _, ending = own.partition(".")
            return f"{re.sub(r'-[0-9]+$', '', stem)}-{number}.{ending}"
    return None


def eeglab_signal_name(path: AnyPath, near: Collection[str]) -> str | None:
    """Find the name of the ``.fdt`` file (the signal) in an EEGLAB ``.set`` file.

    Parameters
    ----------
    path : Path or UPath
        The ``.set`` file.
    near : collection of str
        Names of all files in the same folder, in lower case.

    Returns
    -------
    str or None
        Name of the ``.fdt`` file. None if the ``.set`` file does not contain the name of exactly one ``.fdt`` file in
        this folder.

    Notes
    -----
    This function searches the bytes of the ``.set`` file for the name. A MATLAB library would load the signal too, and
    could allocate gigabytes for a damaged file.
    """
    if headers.size_of(path) > MOST_SET_BYTES:
        return None
    found: set[str] = set()
    kept = b""
    for block in _plain_blocks(path.read_bytes()):
        text = kept + block
        found |= {match.group().decode("utf-8", "replace").strip() for match in ONE_BYTE.finditer(text)}
        found |= {match.group().decode("utf-16-le", "replace").strip() for match in TWO_BYTES.finditer(text)}
        kept = text[-CHARACTERS:]
    names = {name.lower() for name in found} & set(near)
    return names.pop() if len(names) == 1 else None


def _plain_blocks(content: bytes) -> Iterator[bytes]:
    """Yield the content of a MATLAB file in blocks. Compressed variables of MATLAB 5 files are decompressed."""
    if content.startswith(b"\x89HDF"):
        yield content
        return
    at, total = 128, 0
    while at + 8 <= len(content) and total < MOST_SET_BYTES:
        kind, size = struct.unpack_from("<2I", content, at)
        data = content[at + 8 : at + 8 + size]
        at += 8 + size
        if kind != COMPRESSED:
            yield data
            continue
        unpacker = zlib.decompressobj()
        try:
            while data and total < MOST_SET_BYTES:
                block = unpacker.decompress(data, TAIL_BYTES)
                data, total = unpacker.unconsumed_tail, total + len(block)
                yield block
        except zlib.error:
            return


def link_files(files: tuple[Path, ...], folder: Path, names: dict[Path, str]) -> None:
    """Make a folder of links to the files of a recording, so that a reader can open only these files.

    Parameters
    ----------
    files : tuple of Path
        Files of the recording.
    folder : Path
        The folder.
    names : dict
        Name of the link to each file. The link to a file that is not in `names` has the name of the file.
    """
    for file in files:
        (folder / names.get(file, file.name)).symlink_to(file.absolute())
