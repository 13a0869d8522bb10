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

from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, as_path, commit_folder, describe, fresh, scratch_folder


def sha256_file(path: str | AnyPath) -> str:
    """Checksum of a file, read in blocks.

    Parameters
    ----------
    path : str, Path or UPath
        The file.

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    with as_path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


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


def atomic_write_bytes(path: str | AnyPath, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new one.

    Parameters
    ----------
    path : str, Path or UPath
        Destination; its folder is made.
    data : bytes
        Content.
    """
    path = as_path(path)
    if isinstance(path, UPath):  # A store shows whole objects only.
        if path.protocol == "memory":
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        fresh(path)
        return
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


def atomic_write_text(path: str | AnyPath, text: str) -> None:
    """Write a UTF-8 text file whole or not at all.

    Parameters
    ----------
    path : str, Path or UPath
        Destination.
    text : str
        Content.
    """
    atomic_write_bytes(path, text.encode())


def write_json(path: str | AnyPath, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all.

    Parameters
    ----------
    path : str, Path or UPath
        Destination.
    value : Any
        What to write; NaN and infinities are refused, since JSON has none.
    """
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | AnyPath) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : str, Path or UPath
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
    path = as_path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({describe(error)})") from None
    except ValueError as error:
        raise RequestError(
            f"{path}: not valid JSON ({error}); it is damaged or was not written by Dreamscale"
        ) from None


@contextlib.contextmanager
def atomic_directory(path: str | AnyPath, last: str = "manifest.json") -> Iterator[Path]:
    """Fill a directory under a temporary name and rename it into place at the end.

    Parameters
    ----------
    path : str, Path or UPath
        Destination; an existing directory there is replaced only once the new one is whole.
    last : str
        On an object store, which cannot rename: the file to go first from the old directory, and to come last of the
        new one, so that nobody takes a mixture of both for whole.

    Yields
    ------
    Path
        The temporary directory, on this machine, to write into.
    """
    path = as_path(path)
    if isinstance(path, UPath):
        with scratch_folder() as folder:
            temporary = folder / path.name
            temporary.mkdir()
            yield temporary
            (path / last).unlink(missing_ok=True)
            commit_folder(temporary, path, last)
        return
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
