"""Files written whole or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_sharding.errors import RequestError


def sha256_file(path: str | Path) -> str:
    """Checksum of a file, read in blocks.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Checksum of a JSON-like value, the same for the same content whatever the order of its keys.

    Parameters
    ----------
    value : Any
        Anything that `json` can write.

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new one.

    Parameters
    ----------
    path : str or Path
        Destination; its folder is made.
    data : bytes
        Content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Parameters
    ----------
    path : str or Path
        Destination.
    text : str
        Content.
    """
    atomic_write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all.

    Parameters
    ----------
    path : str or Path
        Destination.
    value : Any
        What to write; NaN and infinities are refused, since JSON has none.
    """
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    Any
        Its content.

    Raises
    ------
    RequestError
        If the file is missing, unreadable or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RequestError(
            f"{path}: not valid JSON ({error}); it is damaged or was not written by Dreamscale"
        ) from None


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory under a temporary name and rename it into place at the end.

    Parameters
    ----------
    path : str or Path
        Destination; an existing directory there is replaced only once the new one is whole.

    Yields
    ------
    Path
        The temporary directory to write into.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
