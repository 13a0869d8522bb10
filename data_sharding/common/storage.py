"""Paths wherever they lie: this machine's folders, or an object store through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.core import split_protocol
from upath import UPath

from data_sharding.common.errors import RequestError

AnyPath: TypeAlias = Path | UPath
"""A local path, or a remote one that offers the same methods."""


def as_path(text: str | os.PathLike[str] | UPath) -> AnyPath:
    """Path of a text from a config or a command line.

    Parameters
    ----------
    text : str, Path or UPath
        A local path (``~`` stands for home), ``file://`` with one, or a URL that fsspec knows: ``s3://bucket/folder``,
        ``memory://folder``.

    Returns
    -------
    Path or UPath
        `pathlib.Path` for what lies on this machine, `upath.UPath` for the rest.

    Raises
    ------
    RequestError
        If the protocol is unknown, or its library is not installed.
    """
    if isinstance(text, UPath):
        return text if is_remote(text) else Path(text.path)
    if isinstance(text, Path):
        return text
    protocol, rest = split_protocol(os.fspath(text))
    if protocol in (None, "", "file", "local"):
        return Path(rest if protocol else os.fspath(text)).expanduser()
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise RequestError(f"'{text}': the protocol '{protocol}://' is unknown to fsspec") from None
    except ImportError as error:
        raise RequestError(f"'{text}': {error}") from None
    return UPath(os.fspath(text))


def is_remote(path: AnyPath | str) -> bool:
    """Whether a path is not this machine's.

    Parameters
    ----------
    path : Path, UPath or str
        The path.

    Returns
    -------
    bool
        True for object stores, and for fsspec's ``memory://``.
    """
    if isinstance(path, str):
        path = as_path(path)
    return isinstance(path, UPath) and path.protocol not in ("", "file", "local")


def fresh(path: AnyPath) -> AnyPath:
    """Forget what listings of a store were kept, so that the next look is at the store itself.

    Parameters
    ----------
    path : Path or UPath
        Any path.

    Returns
    -------
    Path or UPath
        The same path.
    """
    if isinstance(path, UPath):
        path.fs.invalidate_cache()
    return path


def file_state(path: AnyPath) -> tuple[int, int, str]:
    """What changes when a file's content does, at the price of one look at it.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    size : int
        Bytes.
    mtime_ns : int
        Time of its last change; 0 where the store has none.
    etag : str
        The store's own checksum; empty for local files.
    """
    if isinstance(path, UPath):
        info = path.fs.info(path.path)
        when = info.get("mtime") or info.get("LastModified") or info.get("created") or 0
        seconds = when.timestamp() if hasattr(when, "timestamp") else float(when)
        return int(info["size"] or 0), int(seconds * 1e9), str(info.get("ETag") or info.get("etag") or "").strip('"')
    status = path.stat()
    return status.st_size, status.st_mtime_ns, ""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Temporary folder on this machine, gone at the end.

    Yields
    ------
    Path
        Under DREAMSCALE_SCRATCH where that is set (a fast local disk), else under the system's own place.
    """
    base = os.environ.get("DREAMSCALE_SCRATCH")
    if base:
        Path(base).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dreamscale-", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def fetch(fs: Any, wanted: Mapping[str, Path]) -> None:
    """Copy remote files here, side by side.

    Parameters
    ----------
    fs : fsspec.AbstractFileSystem
        The store.
    wanted : mapping of str to Path
        Path in the store to where the file goes; folders are made.

    Raises
    ------
    OSError
        If one is missing, or ends before the size that the store says.
    """
    for target in wanted.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    fs.get(list(wanted), [str(target) for target in wanted.values()])
    for path, target in wanted.items():
        size, got = fs.info(path)["size"], target.stat().st_size if target.is_file() else 0
        if got != size:
            raise OSError(errno.EIO, f"fetched {got} of {size} bytes", path)


@contextlib.contextmanager
def localised(files: Sequence[AnyPath]) -> Iterator[list[Path]]:
    """Files as local ones: readers in C know no object store.

    Parameters
    ----------
    files : sequence of Path or UPath
        Files of one recording, or folders (``.mff``). All on one side: this machine or one store.

    Yields
    ------
    list of Path
        In the order of `files`. Remote ones lie in a scratch folder under their own names, in the layout that they
        have to each other and to the folder around them, and are gone at the end; local ones are where they were.

    Raises
    ------
    OSError
        If a file cannot be fetched.
    """
    remote = [f for f in files if isinstance(f, UPath)]
    if not remote:
        yield [Path(f) for f in files]  # type: ignore[arg-type]
        return
    with scratch_folder() as folder:
        # The folder around the files stays: a recording may be a folder, and readers look at its name.
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
    """Copy a local file to its place so that readers see the whole file or none.

    Parameters
    ----------
    local : Path
        The file.
    target : Path or UPath
        Where it goes; what is there is replaced.

    Raises
    ------
    OSError
        If it cannot be written there.
    """
    if isinstance(target, UPath):
        if target.protocol == "memory":
            target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(str(local), target.path)
        fresh(target)
        if (size := target.fs.info(target.path)["size"]) != local.stat().st_size:
            raise OSError(errno.EIO, f"{size} of {local.stat().st_size} bytes arrived", str(target))
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
    """Move a finished local file to its place so that readers see the whole file or none.

    Parameters
    ----------
    local : Path
        The file; gone afterwards.
    target : Path or UPath
        Where it goes; what is there is replaced.

    Raises
    ------
    OSError
        If it cannot be written there.
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
    """Delete a folder and what is in it, if it is there.

    Parameters
    ----------
    path : Path or UPath
        The folder.
    """
    if isinstance(path, UPath):
        fresh(path)
        with contextlib.suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def commit_folder(local: Path, target: AnyPath | str, last: str = "result.json") -> None:
    """Move a finished local folder to its place; it counts as there once its file `last` is.

    Parameters
    ----------
    local : Path
        The folder; gone afterwards.
    target : Path, UPath or str
        Its place. What is there without `last` is an attempt that died, and is replaced; with it, the folder is
        finished already, and stays as it is: folders are named after their content.
    last : str
        File that says that the folder is whole.

    Raises
    ------
    OSError
        If it cannot be written.
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
        # Another worker, lost and found again, was faster.
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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Nothing more can be written, however often it is tried."""


def is_storage_error(error: BaseException) -> bool:
    """Whether a disk, a network folder or a store is at fault, rather than what was to be written there.

    Parameters
    ----------
    error : Exception
        What was raised.

    Returns
    -------
    bool
        True for `OSError` and for the errors of the stores' own libraries, which are none.
    """
    libraries = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "fsspec")
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries


def describe(error: BaseException) -> str:
    """One line for an error of a file system or store.

    Parameters
    ----------
    error : Exception
        What was raised.

    Returns
    -------
    str
        What the system says, with the file where it is known.
    """
    if isinstance(error, OSError) and error.strerror:
        name: Any = error.filename2 or error.filename
        return f"{error.strerror} ({name})" if name else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
