"""Read and write files on this machine, or on an object store through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.core import split_protocol
from upath import UPath

from data_sharding.common.errors import RequestError, show

LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Largest number of bytes of a path, and of a name in a path, that a local file system accepts."""
AnyPath: TypeAlias = Path | UPath
"""Type of a path: a local path, or a remote path with the same methods."""


_held: list[list[Any]] = []
"""Clients of object stores that are kept alive while a process forks. In the forked process, the clients stay in this
list, so that they are never deleted."""


def _hold_clients() -> None:
    """Keep references to all clients of object stores during a fork.

    A forked process makes its own clients, because fsspec forgets the clients of the parent after the fork. The forked
    process must not delete a client of the parent: both processes use the same sockets and the same epoll file, so the
    deletion would close connections of the parent. The deletion would also use the event loop of a thread that does not
    exist in the forked process.
    """
    classes, clients = [fsspec.AbstractFileSystem], []
    for cls in classes:
        classes += cls.__subclasses__()
        clients += getattr(cls, "_cache", {}).values()
    _held.append(clients)


def _release_clients() -> None:
    _held.pop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_clients, after_in_parent=_release_clients)


def as_path(text: str | os.PathLike[str] | UPath) -> AnyPath:
    """Make a path object from a text in a config or on a command line.

    Parameters
    ----------
    text : str, Path or UPath
        A local path (``~`` is the home folder), which may begin with ``file://``; or a URL that fsspec supports, such
        as ``s3://bucket/folder`` or ``memory://folder``.

    Returns
    -------
    Path or UPath
        A `pathlib.Path` for a path on this machine, otherwise a `upath.UPath`.

    Raises
    ------
    RequestError
        If the protocol is unknown, if the library for the protocol is not installed, or if the path is too long or
        contains an unknown user (``~name``).
    """
    if isinstance(text, UPath):
        return text if is_remote(text) else Path(text.path)
    if isinstance(text, Path):
        return text
    protocol, rest = split_protocol(os.fspath(text))
    if protocol in (None, "", "file", "local"):
        path = rest if protocol else os.fspath(text)
        if len(os.fsencode(path)) > LONGEST_PATH or max(map(len, os.fsencode(path).split(b"/"))) > LONGEST_NAME:
            raise RequestError(f"'{show(path)}': this path is too long; use a shorter path")
        try:
            return Path(path).expanduser()
        except RuntimeError:
            raise RequestError(
                f"'{show(path)}': no user of this machine has the name after '~'; write the full path"
            ) from None
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise RequestError(
            f"'{text}': fsspec does not know the protocol '{protocol}://'; correct the address"
        ) from None
    except ImportError as error:
        raise RequestError(f"'{text}': {error}") from None
    return UPath(os.fspath(text))


def is_remote(path: AnyPath | str) -> bool:
    """Return whether a path is in a file system of fsspec (such as ``s3://`` or ``memory://``), not on a local disk."""
    if isinstance(path, str):
        path = as_path(path)
    return isinstance(path, UPath) and path.protocol not in ("", "file", "local")


def fresh(path: AnyPath) -> AnyPath:
    """Clear fsspec's cached listings for a path, so that the next listing is up to date; return the path."""
    if isinstance(path, UPath):
        path.fs.invalidate_cache()
    return path


def file_state(path: AnyPath) -> tuple[int, int, str]:
    """Return the size, modification time and checksum of a file.

    For a file on an object store, this function sends one request to the store.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    size : int
        Size in bytes.
    mtime_ns : int
        Time of the last change in nanoseconds; 0 if the store does not give this time.
    etag : str
        Checksum that the store gives for the file; empty for a local file.
    """
    if isinstance(path, UPath):
        info = path.fs.info(path.path)
        when = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
        seconds = when.timestamp() if hasattr(when, "timestamp") else float(when)
        return int(info["size"] or 0), int(seconds * 1e9), str(info.get("ETag") or info.get("etag") or "").strip('"')
    status = path.stat()
    return status.st_size, status.st_mtime_ns, ""


def check_scratch(base: Path) -> None:
    """Create the folder for temporary files if it is missing, and check that no other user can replace its content.

    Parameters
    ----------
    base : Path
        The folder.

    Raises
    ------
    RequestError
        If the folder belongs to another user (except root), or if every user can delete other users' files in it.
    """
    base.mkdir(parents=True, exist_ok=True)
    status = base.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise RequestError(f"DREAMSCALE_SCRATCH '{base}': belongs to another user; choose a folder that belongs to you")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise RequestError(
            f"DREAMSCALE_SCRATCH '{base}': every user can delete other users' files in it; run 'chmod +t' on it, or "
            "choose a folder that belongs to you"
        )


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder on this machine; it is deleted at the end of the context.

    Yields
    ------
    Path
        The temporary folder. The temporary folder is created in the folder given by the environment variable
        DREAMSCALE_SCRATCH (choose a fast local disk), or in the system's temporary folder if this variable is not set.
    """
    base = os.environ.get("DREAMSCALE_SCRATCH")
    if base:
        check_scratch(Path(base))
    with tempfile.TemporaryDirectory(prefix="dreamscale-", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def fetch(fs: Any, wanted: Mapping[str, Path]) -> None:
    """Download files in parallel.

    Parameters
    ----------
    fs : fsspec.AbstractFileSystem
        The store.
    wanted : mapping of str to Path
        For each path in the object store, the local path to which the file is downloaded. Missing local folders are
        created.

    Raises
    ------
    OSError
        If a file is missing, or if a downloaded file does not have the size of the file in the store.
    """
    for target in wanted.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    fs.get(list(wanted), [str(target) for target in wanted.values()])
    for path, target in wanted.items():
        size, got = fs.info(path)["size"], target.stat().st_size if target.is_file() else 0
        if got != size:
            raise OSError(errno.EIO, f"only {got} of {size} bytes were downloaded", path)


@contextlib.contextmanager
def localised(files: Sequence[AnyPath]) -> Iterator[list[Path]]:
    """Make files available as local files, because most readers cannot read from an object store.

    Parameters
    ----------
    files : sequence of Path or UPath
        Files or folders (``.mff``) of one recording. The files are all on this machine, or all in one store.

    Yields
    ------
    list of Path
        Local paths in the order of `files`. Remote files are downloaded to a temporary folder, with the same names and
        subfolders, and deleted at the end of the context. Local files are not copied.

    Raises
    ------
    OSError
        If a file cannot be downloaded.
    """
    remote = [f for f in files if isinstance(f, UPath)]
    if not remote:
        yield [Path(f) for f in files]  # type: ignore[arg-type]
        return
    with scratch_folder() as folder:
        # A recording can be a folder (``.mff``), and readers use the folder's name, so the local copy gets the same
        # name.
        parents = [posixpath.dirname(f.path) for f in remote]
        top = posixpath.dirname(posixpath.commonpath(parents))
        place = {f: folder / posixpath.relpath(f.path, top or posixpath.curdir) for f in remote}
        fs = remote[0].fs
        wanted: dict[str, Path] = {}
        for file, target in place.items():
            if file.is_dir():
                wanted |= {p: target / posixpath.relpath(p, file.path) for p in fs.find(file.path)}
            else:
                wanted[file.path] = target
        fetch(fs, wanted)
        yield [place[f] if isinstance(f, UPath) else Path(f) for f in files]


def put(local: Path, target: AnyPath) -> None:
    """Copy a local file to `target`; readers of `target` never see an incomplete file.

    Parameters
    ----------
    local : Path
        File to copy.
    target : Path or UPath
        Destination; an existing file is replaced.

    Raises
    ------
    OSError
        If the destination cannot be written.
    """
    if isinstance(target, UPath):
        if target.protocol == "memory":
            target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(str(local), target.path)
        fresh(target)
        if (size := target.fs.info(target.path)["size"]) != local.stat().st_size:
            raise OSError(errno.EIO, f"only {size} of {local.stat().st_size} bytes were written", str(target))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        shutil.copyfile(local, temporary)
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def deliver(local: Path, target: AnyPath) -> None:
    """Move a finished local file to `target`; readers of `target` never see an incomplete file.

    Parameters
    ----------
    local : Path
        File to move.
    target : Path or UPath
        Destination; an existing file is replaced.

    Raises
    ------
    OSError
        If the destination cannot be written.
    """
    if not isinstance(target, UPath):
        _sync(local)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            local.replace(target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    put(local, target)
    local.unlink()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def remove_tree(path: AnyPath) -> None:
    """Delete a folder and its content, if the folder exists."""
    if isinstance(path, UPath):
        fresh(path)
        with contextlib.suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def commit_folder(local: Path, target: AnyPath | str, last: str = "result.json") -> None:
    """Move a finished local folder to `target`. A folder is complete when its file `last` exists.

    Parameters
    ----------
    local : Path
        Folder to move.
    target : Path, UPath or str
        Destination. An existing folder without the file `last` comes from a process that died, and is replaced. An
        existing folder with the file `last` is kept, because folders with the same name have the same content.
    last : str
        File that marks a complete folder.

    Raises
    ------
    OSError
        If the destination cannot be written.
    FileNotFoundError
        If `local` has no file `last`.
    """
    target = as_path(target)
    if not (local / last).is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(local / last))
    if (fresh(target) / last).exists():
        shutil.rmtree(local, ignore_errors=True)
        return
    if isinstance(target, UPath):
        remove_tree(target)
        files = sorted(p for p in local.rglob("*") if p.is_file())
        for file in sorted(files, key=lambda p: p.relative_to(local).as_posix() == last):
            put(file, target / file.relative_to(local).as_posix())
        shutil.rmtree(local, ignore_errors=True)
        return
    for file in local.rglob("*"):
        if file.is_file():
            _sync(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        _move(local, target)
    except OSError as error:
        # Another worker has already written the folder `target`. This happens if the job loses contact with a worker
        # that still runs, and gives its task to a second worker.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (target / last).is_file():
            raise
        shutil.rmtree(local, ignore_errors=True)


def _move(local: Path, target: Path) -> None:
    try:
        local.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for file in sorted(local.rglob("*")):
                copy = beside / file.relative_to(local)
                if file.is_dir():
                    copy.mkdir(parents=True)
                else:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
                    _sync(copy)
            beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(local, ignore_errors=True)


def is_storage_error(error: BaseException) -> bool:
    """Return whether an error comes from a disk, a network folder or an object store, and not from the data.

    The result is True for `OSError` and for the errors of object stores' libraries, which are often not an `OSError`.
    """
    libraries = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "fsspec")
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries


def describe(error: BaseException) -> str:
    """Describe an error of a file system or store in one line, with the name of the file if it is known."""
    if isinstance(error, OSError) and error.strerror:
        name: Any = error.filename2 or error.filename
        return f"{error.strerror} ({name})" if name else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
