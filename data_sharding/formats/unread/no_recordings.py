"""Recognise files that are often stored next to recordings but are not recordings, such as events or covariances.

The blocks inside a FIF file show whether the file is a recording. Its name does not show this, because files are often
renamed.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.headers import read_range
from data_sharding.formats.unread import Finding

RAW_BLOCKS = {102, 112, 119, 373}
"""Blocks of FIF files with raw data or epochs."""
BLOCKS = (
    (374, "an independent component analysis"),
    (104, "averages (evoked responses)"),
    (356, "an inverse operator"),
    (352, "a forward solution"),
    (355, "a covariance (noise) matrix"),
    (362, "a morph map"),
    (310, "a boundary element model"),
    (351, "a source space"),
    (361, "events"),
    (115, "events"),
    (3810, "annotations"),
    (101, "information about a measurement, without its signal"),
    (313, "projections"),
    (107, "digitised positions"),
)
"""Blocks of FIF files without a recording, with the kind of the file. If a file has several of these blocks, the first
of them in this table determines the kind of the file."""
TRANSFORMATION = 222
BLOCK_START = 104
MOST_TAGS = 20_000
"""Largest number of tags that are read from a FIF file."""
POSITIONS = (".elp", ".hsp", ".sfp", ".elc", ".pos", ".bvef", ".hpts", ".ced", ".locs", ".eloc", ".bvct", ".dig")
"""Extensions of files with the positions of electrodes."""
MOST_POSITIONS_BYTES = 1 << 22
MOST_PACKED_BYTES, MOST_UNPACKED_BYTES = 1 << 20, 1 << 23
"""Limits for a compressed FIF file: number of bytes that are read, and number of bytes that are decompressed."""


def recognise_no_recording(file: Any) -> Finding | None:
    """Recognise a file that is not a recording.

    Parameters
    ----------
    file : sniffing.File
        The file.

    Returns
    -------
    Finding or None
        Kind of the file; None if the file may be a recording.
    """
    if file.head[:4] == b"\0\0\0\x64" and file.suffix == ".fif":
        what = _describe_fif(file.path, file.head, _size(file.path))
        return _exclude("fif", f"a FIF file with {what}") if what else None
    if file.head[:2] == b"\x1f\x8b" and file.path.name.lower().endswith(".fif.gz"):
        data, whole = _unpack(read_range(file.path, 0, MOST_PACKED_BYTES, file.head))
        what = _describe_fif(None, data, len(data) if whole else 1 << 62)
        return _exclude("fif", f"a FIF file with {what}") if what else None
    if b"SR_RESEARCH" in file.head[:64] and file.suffix == ".edf":
        return _exclude("eyelink", "an EyeLink file of eye movements, whose extension is also .edf")
    if file.suffix in POSITIONS and len(file.head) > 0 and _size(file.path) < MOST_POSITIONS_BYTES:
        return _exclude("positions", f"positions of electrodes ({file.suffix})")
    return None


def _exclude(format_: str, what: str) -> Finding:
    return Finding(format=format_, reason=Reason("no recording", what), excluded=True)


def _size(path: Any) -> int:
    return int(path.stat().st_size)


def _unpack(data: bytes) -> tuple[bytes, bool]:
    """Return the first decompressed bytes of gzip data, and True if all data were decompressed."""
    unpacker = zlib.decompressobj(31)
    try:
        out = unpacker.decompress(data, MOST_UNPACKED_BYTES)
    except zlib.error:
        return b"", False
    return out, unpacker.eof


def _describe_fif(path: Any, head: bytes, size: int) -> str:
    """Return a description of a FIF file that contains no recording.

    Return an empty text for a damaged file, and for a file that may be a recording.
    """
    blocks: set[int] = set()
    kinds: set[int] = set()
    stream = path.open("rb") if isinstance(path, Path) else None
    try:
        at = 0
        for _ in range(MOST_TAGS):
            if at >= size:
                break
            if at + 20 <= len(head) or size == len(head):
                tag = head[at : at + 20]
            elif stream is not None:
                stream.seek(at)
                tag = stream.read(20)
            else:
                # The rest of the file is unknown, so the file may be a recording. If the file is not a recording, the
                # reader fails later.
                return ""
            if len(tag) < 16:
                return ""
            kind, _, length, following = struct.unpack(">4i", tag[:16])
            if length < 0 or at + 16 + length > size:
                return ""
            kinds.add(kind)
            if kind == BLOCK_START and len(tag) == 20:
                (block,) = struct.unpack(">i", tag[16:])
                if block in RAW_BLOCKS:
                    return ""
                blocks.add(block)
            if following < 0:
                break
            if 0 < following <= at:
                return ""
            at = following or at + 16 + length
        else:
            return ""
    finally:
        if stream is not None:
            stream.close()
    for block, what in BLOCKS:
        if block in blocks:
            return what
    return "a transformation of coordinates" if TRANSFORMATION in kinds else "no measurement"
