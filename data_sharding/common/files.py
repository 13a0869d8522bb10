"""Write files so that readers never see an incomplete file, and compute checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, as_path, commit_folder, describe, fresh, scratch_folder
from data_sharding.common.untrusted import open_regular, parse_json, read_limited


def sha256_file(path: str | AnyPath) -> str:
    """Return the SHA-256 of a file of any size as hexadecimal text. Refuse named pipes and devices."""
    path = as_path(path)
    with path.open("rb") if isinstance(path, UPath) else os.fdopen(open_regular(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def digest_of(value: Any) -> str:
    """Return a checksum of a JSON value. The order of keys in dictionaries does not change the checksum.

    Parameters
    ----------
    value : Any
        Any value that `json` can write.

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def atomic_write_bytes(path: str | AnyPath, data: bytes) -> None:
    """Write a file so that readers see either the complete old content or the complete new content.

    Parameters
    ----------
    path : str, Path or UPath
        File to write; its folder is created if necessary.
    data : bytes
        New content.
    """
    path = as_path(path)
    if isinstance(path, UPath):  # On an object store, readers see an object only after the upload is complete.
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


def open_to_append(path: Path) -> int:
    """Open a local file, such as a log, for reading and appending; the file is created if it is missing.

    In a folder from another person, the file may be a symbolic link to a file elsewhere. Such a link is refused, so
    that no file outside the folder is changed.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    int
        File descriptor; the caller must close it.

    Raises
    ------
    RequestError
        If the path is a symbolic link, a folder, a device, a socket or a named pipe.
    OSError
        If the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise RequestError(f"{path}: not a file, but a link, a folder, a device or a named pipe; remove it") from None


def atomic_write_text(path: str | AnyPath, text: str) -> None:
    """Write a UTF-8 text file, so that readers see either the complete old or the complete new content."""
    atomic_write_bytes(path, text.encode())


def write_json(path: str | AnyPath, value: Any) -> None:
    """Write JSON with sorted keys, so that readers see either the complete old or the complete new content.

    Parameters
    ----------
    path : str, Path or UPath
        File to write.
    value : Any
        Value to write. NaN and infinite values raise an error, because JSON does not have them.
    """
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | AnyPath) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : str, Path or UPath
        File to read.

    Returns
    -------
    Any
        Content of the file.

    Raises
    ------
    RequestError
        If the file is missing, unreadable, larger than `MAX_JSON`, or refused by `parse_json`.
    """
    path = as_path(path)
    try:
        return parse_json(read_limited(path))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({describe(error)})") from None
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(
            f"{path}: not valid JSON ({error}); it is damaged or was not written by Dreamscale"
        ) from None


@contextlib.contextmanager
def atomic_directory(path: str | AnyPath, last: str = "manifest.json") -> Iterator[Path]:
    """Write a directory under a temporary name, and rename it when it is complete.

    Parameters
    ----------
    path : str, Path or UPath
        Final path. An existing directory is replaced only when the new directory is complete.
    last : str
        Name of a file in the directory; a directory with this file is complete. An object store cannot rename a
        directory. So on an object store, the file `last` of the old directory is deleted first, and the file `last` of
        the new directory is written after all other files.

    Yields
    ------
    Path
        Temporary directory on this machine. The caller writes the files to the temporary directory.
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
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Rename a complete directory to its final path, and delete the old directory at this path.

    Parameters
    ----------
    new : Path
        The complete directory, on the same disk as `path`.
    path : Path
        Final path of the directory.
    """
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)
