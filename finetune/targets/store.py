"""Write features to a file and read them back; a file is checked before its content is used.

Tensor shapes: M rows of a table of features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from data_sharding.common.errors import show

NAME = "features"
"""Name of the only tensor of a file."""
_HEADER_BYTES = 1024


def write_features(path: Path, parts: Iterable[Tensor], digest: str) -> None:
    """Write features to a safetensors file, so that readers see either no file or the complete file.

    Parameters
    ----------
    path : Path
        File to write.
    parts : iterable of Tensor of float32
        Consecutive rows of the table. Only one part is in memory at a time.
    digest : str
        Digest of everything on which the features depend; it is stored in the file.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as stream:
            checksum, shape, size = hashlib.sha256(), [0], 0
            # The header holds the checksum, so it is written last. Leave space for it.
            stream.write(bytes(_HEADER_BYTES))
            for part in parts:
                data = part.contiguous().numpy().data.cast("B")
                checksum.update(data)
                stream.write(data)
                shape, size = [shape[0] + part.shape[0], *part.shape[1:]], size + len(data)
            stream.seek(0)
            stream.write(_make_header(shape, size, {"digest": digest, "sha256": checksum.hexdigest()}))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _make_header(shape: list[int], size: int, metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file with one tensor, with spaces at its end."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, NAME: entry}).encode()
    length = _HEADER_BYTES - 8
    assert len(text) <= length
    return length.to_bytes(8, "little") + text.ljust(length)


def read_features(path: Path, rows: int, digest: str, *, verify: bool) -> Tensor | str:
    """Read the features of a file by memory map, or say why the file cannot be used.

    Parameters
    ----------
    path : Path
        File that `write_features` wrote.
    rows : int
        Number of rows that the table must have.
    digest : str
        Digest that the file must contain.
    verify : bool
        True: read the whole file, and compare its checksum with the stored checksum.

    Returns
    -------
    Tensor of float32, shape (M, ...), or str
        The features. Their memory belongs to the page cache, so all processes of a machine share it. If the file cannot
        be used, the reason; the reason is empty if there is no file.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() or (path.exists() and not path.is_file()):
        return "not a file, but a link, a folder, a device or a named pipe"
    if not path.exists():
        return ""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if names != [NAME] or metadata.get("digest") != digest:
                return "it holds other features"
            part = file.get_slice(NAME)
            shape = part.get_shape()
            if part.get_dtype() != "F32" or len(shape) < 2 or shape[0] != rows or 0 in shape:
                return f"it holds no features of {rows} rows"
            found: Tensor = file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        return f"it is damaged ({show(error)})"
    if verify and hashlib.sha256(found.numpy().data.cast("B")).hexdigest() != metadata.get("sha256"):
        return "it is damaged (its checksum is wrong)"
    return found


def check_features(features: Tensor) -> int | None:
    """Return the first row of features that contains NaN or infinite values; None if all values are finite."""
    bad = ~torch.isfinite(features.flatten(1)).all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None
