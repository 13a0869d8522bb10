"""Folders, paths and keys, as adapters of corpora need them."""

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
        The path as in the config.
    key : str
        The config's key, for the message.

    Returns
    -------
    Path or UPath
        The path.

    Raises
    ------
    RequestError
        If a variable is not set, or the path is of an unknown protocol.
    """
    out = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", out):
        raise RequestError(
            f"{key} '{text}': the environment variable {unset.group(1)} is not set; export it or write the path out"
        )
    return as_path(out)


def folder_of(text: str, key: str) -> AnyPath:
    """Folder of a config that is there and can be read.

    Parameters
    ----------
    text : str
        The path as in the config.
    key : str
        The config's key, for the message.

    Returns
    -------
    Path or UPath
        The folder.

    Raises
    ------
    RequestError
        If it is not there, or not to be read.
    """
    path = expand(text, key)
    try:
        found = path.is_dir()
    except Exception as error:  # the stores' libraries have errors of their own
        raise RequestError(f"{key} '{path}': cannot be looked at ({describe(error)})") from None
    if not found:
        raise RequestError(f"{key} '{path}': no such folder")
    if not is_remote(path) and not os.access(str(path), os.R_OK | os.X_OK):
        raise RequestError(f"{key} '{path}': no permission to read it")
    return path


def local_folder(config: CorpusConfig) -> Path:
    """Root of a corpus that is read through memory maps.

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
        If it is not there, or not on a local disk.
    """
    root = folder_of(config.root, "corpora: root")
    if is_remote(root):
        raise RequestError(
            f"corpora: root '{root}': kind {config.kind} maps its files into memory and needs them on a disk; "
            "copy the folder there"
        )
    return Path(str(root))


def relative_path(path: AnyPath, root: AnyPath) -> str:
    """Path below a root, as it stands in the ledger.

    Parameters
    ----------
    path, root : Path or UPath
        A file, and a folder above it.

    Returns
    -------
    str
        With slashes; a name that is no UTF-8 is spelled in escapes, since it could not stand in the ledger.
    """
    full, top = (p.path if is_remote(p) else p.as_posix() for p in (path, root))  # type: ignore[union-attr]
    relative = full[len(top.rstrip("/")) :].lstrip("/") if top != "." else full
    return relative.encode("utf-8", "backslashreplace").decode()


def recording_key(corpus: str, relative: str) -> str:
    """Key of a recording: readable, unique, short enough for a tar's header.

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
    """Name of a root for the ledger.

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
    """What lies in folders, each listed once."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, AnyPath]] = {}

    def __call__(self, folder: AnyPath) -> dict[str, AnyPath]:
        """Entries of a folder by name; none where there is no such folder.

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
    """Text of a file from anyone's hand.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    str
        Decoded as UTF-8, with or without its mark, else as Latin-1.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def check_images(items: Iterable[Item], images: AnyPath) -> None:
    """Refuse a corpus whose images are not all there.

    Parameters
    ----------
    items : iterable of Item
        Its recordings.
    images : Path or UPath
        Folder of the images.

    Raises
    ------
    RequestError
        With the number that is missing, and the first.
    """
    shown = sorted({trial.image for item in items for trial in item.trials or () if trial.image})
    if is_remote(images):
        # One listing: a question for each of 16,540 images would take the store an hour.
        there = {p for p in images.fs.find(images.path)} if shown else set()  # type: ignore[union-attr]
        absent = [image for image in shown if as_path(image).path not in there]  # type: ignore[union-attr]
    else:
        absent = [image for image in shown if not Path(image).is_file()]
    if absent:
        raise RequestError(
            f"corpora: images '{images}': {len(absent)} of {len(shown)} images are missing, the first is {absent[0]}"
        )
