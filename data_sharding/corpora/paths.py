"""Folders, paths and keys that the adapters of corpora share."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, as_path, describe, is_remote
from data_sharding.corpora.base import CorpusConfig
from data_sharding.corpora.item import Item
from data_sharding.dataset.samples import safe_key


def expand(text: str, key: str) -> AnyPath:
    """Expand ``${NAME}`` and ``~`` in a path.

    Parameters
    ----------
    text : str
        The path as it is written in the config.
    key : str
        The key of the config, for error messages.

    Returns
    -------
    Path or UPath
        The path.

    Raises
    ------
    RequestError
        If a variable is not set, or the path has an unknown protocol.
    """
    out = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", out):
        raise RequestError(
            f"{key} '{text}': the environment variable {unset.group(1)} is not set; export it or write the path out"
        )
    return as_path(out)


def check_folder(text: str, key: str) -> AnyPath:
    """Return a folder that the config names, after checking that it can be read.

    Parameters
    ----------
    text : str
        The path as it is written in the config.
    key : str
        The key of the config, for error messages.

    Returns
    -------
    Path or UPath
        The folder.

    Raises
    ------
    RequestError
        If it does not exist or cannot be read.
    """
    path = expand(text, key)
    try:
        found = path.is_dir()
    except Exception as error:  # each object store's library has its own errors
        raise RequestError(f"{key} '{path}': cannot be read ({describe(error)})") from None
    if not found:
        raise RequestError(f"{key} '{path}': no such folder")
    if not is_remote(path) and not os.access(str(path), os.R_OK | os.X_OK):
        raise RequestError(f"{key} '{path}': no permission to read it")
    return path


def check_local_folder(config: CorpusConfig) -> Path:
    """Return the root of a corpus whose files are memory-mapped.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.

    Returns
    -------
    Path
        The root.

    Raises
    ------
    RequestError
        If it does not exist, or is not on a local disk.
    """
    root = check_folder(config.root, "corpora: root")
    if is_remote(root):
        raise RequestError(
            f"corpora: root '{root}': kind {config.kind} memory-maps its files, which works on a local disk only; "
            "copy the folder there"
        )
    return Path(str(root))


def relative_path(path: AnyPath, root: AnyPath) -> str:
    """Return the path below a root, as it is stored in the ledger.

    Parameters
    ----------
    path, root : Path or UPath
        A file, and a folder above it.

    Returns
    -------
    str
        With forward slashes. Bytes of a name that are not valid UTF-8 are replaced by escapes, because the ledger can
        store UTF-8 only.
    """
    full, top = (p.path if is_remote(p) else p.as_posix() for p in (path, root))  # type: ignore[union-attr]
    relative = full[len(top.rstrip("/")) :].lstrip("/") if top != "." else full
    return relative.encode("utf-8", "backslashreplace").decode()


def recording_key(corpus: str, relative: str) -> str:
    """Make the key of a recording: readable, unique, and short enough for the header of a tar.

    Parameters
    ----------
    corpus : str
        The corpus's name.
    relative : str
        Path relative to the corpus's root.

    Returns
    -------
    str
        At most 69 characters of ``[A-Za-z0-9_-]``.
    """
    full = relative if relative.startswith(f"{corpus}/") else f"{corpus}/{relative}"
    slug = safe_key(full)[-60:].strip("-_")
    return f"{slug}-{hashlib.sha256(f'{corpus}/{relative}'.encode()).hexdigest()[:8]}"


def root_name(root: AnyPath) -> str:
    """Return the name of a root for the ledger.

    Parameters
    ----------
    root : Path or UPath
        The folder.

    Returns
    -------
    str
        Its last part.
    """
    return root.name if is_remote(root) else Path(str(root)).resolve().name


class Folders:
    """Lists folders, each of them only once."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, AnyPath]] = {}

    def __call__(self, folder: AnyPath) -> dict[str, AnyPath]:
        """Return the entries of a folder by name; nothing if the folder does not exist.

        Parameters
        ----------
        folder : Path or UPath
            The folder.

        Returns
        -------
        dict
            Name to path, sorted.
        """
        key = str(folder)
        if key not in self._names:
            try:
                self._names[key] = {path.name: path for path in sorted(folder.iterdir(), key=lambda p: p.name)}
            except OSError:
                self._names[key] = {}
        return self._names[key]


def read_text(path: AnyPath) -> str:
    """Read a text file whose encoding is not known.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    str
        Decoded as UTF-8, with or without a byte order mark, or else as Latin-1.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def check_images(items: Iterable[Item], images: AnyPath) -> None:
    """Refuse a corpus if images are missing.

    Parameters
    ----------
    items : iterable of Item
        The recordings of the corpus.
    images : Path or UPath
        Folder of the images.

    Raises
    ------
    RequestError
        With the number of missing images and the first of them.
    """
    shown = sorted({trial.image for item in items for trial in item.trials or () if trial.image})
    if is_remote(images):
        # One listing of the store: asking for each of 16,540 images by itself would take an hour.
        there = {p for p in images.fs.find(images.path)} if shown else set()  # type: ignore[union-attr]
        absent = [image for image in shown if as_path(image).path not in there]  # type: ignore[union-attr]
    else:
        absent = [image for image in shown if not Path(image).is_file()]
    if absent:
        raise RequestError(
            f"corpora: images '{images}': {len(absent)} of {len(shown)} images are missing, the first is {absent[0]}"
        )
