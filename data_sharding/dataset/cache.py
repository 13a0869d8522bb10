"""Local cache of limited size for the shards of remote datasets, shared by all processes of a machine.

The file cache of the library fsspec is not used. fsspec does not check checksums, and it cannot limit the total size of
the cached files of several processes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, describe
from data_sharding.common.untrusted import check_sha256, private_folder

DEFAULT_GB = 50.0
_TRIES = 2
_BLOCK = 1 << 24


def cache_folder() -> Path:
    """Return the folder of the cache.

    Returns
    -------
    Path
        DREAMSCALE_CACHE if that variable is set (best on a fast local disk), otherwise ``~/.cache/dreamscale``.
    """
    return Path(os.environ.get("DREAMSCALE_CACHE") or "~/.cache/dreamscale").expanduser()


class ShardCache:
    """Cache in a folder of limited size. Each file is named after its checksum.

    If the size limit is reached, the least recently used files are deleted. Any number of processes of a machine can
    share the folder. Each file has a lock: one process downloads the file, and other processes that need the same file
    wait.

    Parameters
    ----------
    gigabytes : float, optional
        Size limit in 10^9 bytes; by default DREAMSCALE_CACHE_GB, or 50 if that variable is not set.
    folder : Path, optional
        Folder of the cache; `cache_folder` by default.

    Raises
    ------
    RequestError
        If the size limit is not a positive number.
    """

    def __init__(self, gigabytes: float | None = None, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder()) / "shards"
        text = (os.environ.get("DREAMSCALE_CACHE_GB") or DEFAULT_GB) if gigabytes is None else gigabytes
        try:
            size = float(text)
        except ValueError:
            size = 0.0
        if not 0 < size < float("inf"):
            raise RequestError(f"cache_gb (or DREAMSCALE_CACHE_GB) is '{text}'; it must be a positive number")
        self.limit = int(size * 1e9)
        self._private = False

    def open(self, url: AnyPath, sha256: str, size: int | None = None) -> int:
        """Open a file for reading. If the file is not in the cache, it is downloaded first.

        Parameters
        ----------
        url : Path or UPath
            The remote file.
        sha256 : str
            Checksum of the file.
        size : int, optional
            Size of the file in bytes; if None, the object store is asked for the size.

        Returns
        -------
        int
            File descriptor of the cached file; the caller must close it. The file can be read through the descriptor
            even after the cache has deleted the file.

        Raises
        ------
        RequestError
            If the file is larger than the size limit of the cache, or if the download fails, or gives a wrong checksum,
            twice in a row.
        """
        check_sha256(sha256, str(url))
        self._make_private()
        path = self.folder / sha256[:2] / sha256
        while True:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(descriptor)
                return descriptor
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / "locks" / sha256):
                if not path.exists():
                    self._fetch(url, path, sha256, size)

    def _make_private(self) -> None:
        """Check once that no other user can change the cached files.

        This check is necessary because the checksum of a cached file is verified only once, after its download.
        """
        if not self._private:
            try:
                private_folder(self.folder)
            except OSError as error:
                raise RequestError(
                    f"{self.folder}: cannot be used ({describe(error)}); set DREAMSCALE_CACHE to a folder elsewhere"
                ) from None
            self._private = True

    def _fetch(self, url: AnyPath, path: Path, sha256: str, size: int | None) -> None:
        # Only the process that holds the lock of this checksum writes temporary files for the checksum, so temporary
        # files that already exist come from processes that died.
        for dead in path.parent.glob(f".{sha256}.*"):
            dead.unlink(missing_ok=True)
        found = ""
        for _ in range(_TRIES):
            temporary = path.with_name(f".{sha256}.{uuid.uuid4().hex[:8]}")
            try:
                expected = _size_of(url)
                if size is not None and expected != size:
                    found = f"the file has {expected} bytes, the manifest says {size}"
                    continue
                self._reserve(temporary, expected, url)
                got, digest = _download(url, temporary, expected)
                if digest == sha256:
                    # Hold the lock 'room' during the renaming: a process that lists the folder at this moment may see
                    # neither the old nor the new name.
                    with locked(self.folder / "locks" / "room"):
                        temporary.replace(path)
                    return
                found = f"{got} bytes of {expected}" if got != expected else "its sha256 differs from the manifest's"
            except RequestError:
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename == str(temporary):
                    raise RequestError(
                        f"{self.folder}: cannot hold {url} ({describe(error)}); free the disk, or set DREAMSCALE_CACHE "
                        f"to a folder elsewhere"
                    ) from None
                found = describe(error)
            except Exception as error:
                # Catch all errors, because each object store has its own classes of errors, for example for missing
                # credentials.
                found = describe(error)
            finally:
                temporary.unlink(missing_ok=True)
        raise RequestError(
            f"shard {url}: downloaded {_TRIES} times, each time with a fault ({found}); run 'dreamscale verify' on the "
            "dataset"
        )

    def _reserve(self, temporary: Path, size: int, url: AnyPath) -> None:
        """Reserve disk space for a file, so that simultaneous downloads do not together exceed the size limit."""
        if size > self.limit:
            raise RequestError(
                f"{url}: the file has {size / 1e9:.3g} GB, more than the whole cache of {self.limit / 1e9:.3g} GB; "
                f"raise DREAMSCALE_CACHE_GB"
            )
        while True:
            with locked(self.folder / "locks" / "room"):
                files = [(s.st_mtime_ns, s.st_size, p) for p, s in _files(self.folder)]
                free = self.limit - sum(bytes_ for _, bytes_, _ in files)
                for _, bytes_, path in sorted(f for f in files if not f[2].name.startswith(".")):
                    if free >= size:
                        break
                    path.unlink(missing_ok=True)
                    free += bytes_
                for _, bytes_, path in files:
                    if free < size and path.name.startswith(".") and self._is_dead(path):
                        path.unlink(missing_ok=True)
                        free += bytes_
                if free >= size:
                    with temporary.open("wb") as stream:
                        if size and hasattr(os, "posix_fallocate"):
                            os.posix_fallocate(stream.fileno(), 0, size)
                        else:
                            stream.truncate(size)
                    return
            # The remaining files are being downloaded by other processes, and can be deleted only when their download
            # is complete, so wait.
            time.sleep(0.05)

    def _is_dead(self, temporary: Path) -> bool:
        lock = self.folder / "locks" / temporary.name.split(".")[1]
        with contextlib.suppress(BlockingIOError), locked(lock, wait=False):
            return True
        return False


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a file during the ``with`` block, so that no other process of this machine can lock the file.

    The lock is released if the process dies.

    Parameters
    ----------
    path : Path
        Path of the lock file. The file is created if necessary.
    wait : bool
        Whether to wait if another process has locked the file.

    Yields
    ------
    None
        The file is locked during the ``with`` block.

    Raises
    ------
    BlockingIOError
        If another process has locked the file and `wait` is False.
    """
    # `_is_dead` needs a lock that the operating system releases when a process dies. Do not use the library filelock:
    # on a file system without flock, a lock of this library would remain after the process has died.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    _lock_files.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        # In a process that was forked inside the `with` block, `_close_lock_files` has already closed the lock file.
        if descriptor in _lock_files:
            _lock_files.remove(descriptor)
            os.close(descriptor)


_lock_files: set[int] = set()
"""File descriptors of the lock files that this process has open."""


def _close_lock_files() -> None:
    """In a forked process, close the lock files that the process inherited from its parent.

    A lock is released only when every process has closed its descriptor of the lock file. Without this function, a
    worker that is forked during a download of its parent would keep the lock until the worker ends.
    """
    for descriptor in _lock_files:
        os.close(descriptor)
    _lock_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_lock_files)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for sub in folder.iterdir():
        if sub.name == "locks":
            continue
        for path in sub.iterdir():
            # Ignore a missing file: another process may have renamed or deleted the file since it was listed.
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def _store(url: AnyPath) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in this file system.

    The cache object does not store the file system, because the connections of a file system do not survive a fork.
    """
    if isinstance(url, UPath):
        return fsspec.filesystem(url.protocol, **url.storage_options), url.path
    return fsspec.filesystem("file"), str(url)


def _size_of(url: AnyPath) -> int:
    fs, path = _store(url)
    return int(fs.size(path) or 0)


def _download(url: AnyPath, target: Path, expected: int) -> tuple[int, str]:
    """Copy a remote file to a local file, and return the size and the checksum of the copy.

    If the object store sends more bytes than expected, copying stops.
    """
    fs, path = _store(url)
    digest, got = hashlib.sha256(), 0
    with fs.open(path, "rb", cache_type="none", block_size=_BLOCK) as source, target.open("r+b") as stream:
        while got <= expected and (block := source.read(_BLOCK)):
            digest.update(block)
            stream.write(block)
            got += len(block)
        stream.truncate()
    return got, digest.hexdigest()
