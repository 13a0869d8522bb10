"""Manages a folder with kept signals (decoded signals on disk), and with the checksums of recordings' files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of, read_json, write_json
from data_sharding.common.storage import AnyPath, file_state, is_remote, is_storage_error
from data_sharding.common.untrusted import check_list, check_sha256

SETTLED_S = 2.0
"""A file's checksum is stored only if the last change of the file is more than this number of seconds ago. If two
changes follow each other quickly, the file can have the same modification time after both changes."""
State = tuple[int, int, str]


def signal_path(folder: Path, key: str) -> Path:
    """Return the path of a kept signal (a decoded signal that is stored on disk).

    Parameters
    ----------
    folder : Path
        Folder of the kept signals.
    key : str
        Checksum of everything that the signal depends on.
    """
    return folder / "signals" / key[:2] / f"{key}.kept"


def note_use(path: Path) -> None:
    """Set the modification time of a kept signal to now, so that `limit_size` knows when the signal was used last."""
    with contextlib.suppress(OSError):  # Another job may have deleted the signal; the recording is then decoded again.
        os.utime(path)


def limit_size(folder: Path, most_bytes: float) -> tuple[int, int]:
    """Delete the least recently used kept signals, until all remaining kept signals together have at most `most_bytes`.

    Parameters
    ----------
    folder : Path
        Folder of the kept signals.
    most_bytes : float
        Largest number of bytes of all kept signals.

    Returns
    -------
    deleted : int
        Number of deleted signals.
    left : int
        Size in bytes of all remaining kept signals.
    """
    found = []
    for path in (folder / "signals").glob("*/*.kept"):
        with contextlib.suppress(FileNotFoundError):  # Another job may have deleted this signal.
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    left, deleted = sum(size for _, size, _ in found), 0
    for _, size, path in sorted(found):
        if left <= most_bytes:
            break
        path.unlink(missing_ok=True)
        left, deleted = left - size, deleted + 1
    return deleted, left


def get_states(files: Sequence[AnyPath]) -> list[State] | None:
    """Return the state of each file (see `file_state`); None if the storage cannot report the state of a file."""
    try:
        return [file_state(file) for file in files]
    except Exception as error:
        if is_storage_error(error):
            return None
        raise


def _names(files: Sequence[AnyPath]) -> list[str]:
    return [str(file) if is_remote(file) else os.path.abspath(str(file)) for file in files]  # noqa: PTH100


def _table(folder: Path, files: Sequence[AnyPath]) -> Path:
    name = digest_of(_names(files))
    return folder / "checksums" / name[:2] / f"{name}.json"


def find_checksums(folder: Path, files: Sequence[AnyPath]) -> tuple[list[State], list[str]] | None:
    """Return the checksums that `store_checksums` stored for these files, if the files have not changed since then.

    Parameters
    ----------
    folder : Path
        Folder of the kept signals.
    files : sequence of Path or UPath
        Files of a recording.

    Returns
    -------
    tuple or None
        Two lists: the states of the files (size, modification time, and checksum that the object store reports), and
        the SHA-256 of the files. None if no checksums are stored. None also if a file has changed, that is, if its
        size, its modification time or the checksum that the object store reports is different.
    """
    try:
        values = check_list(read_json(_table(folder, files)), "checksums")
        known = [(list(state), check_sha256(checksum, "checksums")) for state, checksum in values]
    except (RequestError, ValueError, TypeError):
        return None
    states = get_states(files)
    if states is None or [list(state) for state in states] != [state for state, _ in known]:
        return None
    return states, [checksum for _, checksum in known]


def store_checksums(folder: Path, files: Sequence[AnyPath], states: list[State] | None, sums: Sequence[str]) -> None:
    """Store the checksums of files.

    Parameters
    ----------
    folder : Path
        Folder of the kept signals.
    files : sequence of Path or UPath
        Files of a recording.
    states : list or None
        States of the files before they were read. If a file has changed since then, nothing is stored.
    sums : sequence of str
        SHA-256 of each file.
    """
    if states is None or get_states(files) != states:
        return
    newest = time.time_ns() - int(SETTLED_S * 1e9)
    # Store nothing if the object store reports neither a modification time nor a checksum of a file, because a later
    # change of the file could not be noticed.
    if any(
        mtime > newest or (isinstance(f, UPath) and not (mtime or etag))
        for f, (_, mtime, etag) in zip(files, states, strict=True)
    ):
        return
    write_json(_table(folder, files), [[list(state), checksum] for state, checksum in zip(states, sums, strict=True)])
