"""Functions that several corpus adapters use, for folders, paths, recording keys and tables of events."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, as_path, describe, is_remote
from data_sharding.common.untrusted import is_special, read_limited
from data_sharding.corpora.base import CorpusConfig
from data_sharding.corpora.item import Item
from data_sharding.dataset.samples import safe_key
from data_sharding.formats.marks.interruptions import find_row

NOTHING = ("", "n/a")
"""Texts in a table cell that mean "no value" in BIDS."""
MARK_COLUMNS = ("trial_type", "value", "event_type", "type", "description")
"""Columns of an events table that may contain the text of a mark (an interruption or a bad span)."""


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
        The expanded path.

    Raises
    ------
    RequestError
        If an environment variable is not set, or if the path has an unknown protocol.
    """
    out = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", out):
        raise RequestError(
            f"{key} '{text}': the environment variable {unset.group(1)} is not set; set it, or write the full path"
        )
    return as_path(out)


def check_folder(text: str, key: str) -> AnyPath:
    """Check that a folder of the config can be read, and return its path.

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
        If the folder does not exist or cannot be read.
    """
    path = expand(text, key)
    try:
        found = path.is_dir()
    except Exception as error:  # Each object store has its own classes of errors, so catch all.
        raise RequestError(f"{key} '{path}': cannot be read ({describe(error)})") from None
    if not found:
        raise RequestError(f"{key} '{path}': no such folder")
    if not is_remote(path) and not os.access(str(path), os.R_OK | os.X_OK):
        raise RequestError(f"{key} '{path}': no permission to read it")
    return path


def check_local_folder(config: CorpusConfig) -> Path:
    """Return the root folder of a corpus with memory-mapped files. Refuse a folder on an object store.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.

    Returns
    -------
    Path
        The root folder.

    Raises
    ------
    RequestError
        If the folder does not exist, or is not on a local disk.
    """
    root = check_folder(config.root, "corpora: root")
    if is_remote(root):
        raise RequestError(
            f"corpora: root '{root}': kind {config.kind} memory-maps its files, and works on a local disk only; "
            "copy the folder there"
        )
    return Path(str(root))


def relative_path(path: AnyPath, root: AnyPath) -> str:
    """Return the path of a file relative to a root folder, in the form that the ledger stores.

    Parameters
    ----------
    path, root : Path or UPath
        Path of a file, and path of a folder above this file.

    Returns
    -------
    str
        Relative path with forward slashes. The ledger can only store UTF-8, so invalid bytes in a name are replaced by
        escape sequences.
    """
    full, top = (p.path if is_remote(p) else p.as_posix() for p in (path, root))  # type: ignore[union-attr]
    relative = full[len(top.rstrip("/")) :].lstrip("/") if top != "." else full
    return relative.encode("utf-8", "backslashreplace").decode()


def recording_key(corpus: str, relative: str) -> str:
    """Make the key of a recording. A key is readable, unique, and short enough for the header of a tar file.

    Parameters
    ----------
    corpus : str
        Name of the corpus.
    relative : str
        Path of the recording, relative to the root of the corpus.

    Returns
    -------
    str
        Key of at most 69 characters, all of them from ``[A-Za-z0-9_-]``.
    """
    full = relative if relative.startswith(f"{corpus}/") else f"{corpus}/{relative}"
    slug = safe_key(full)[-60:].strip("-_")
    return f"{slug}-{hashlib.sha256(f'{corpus}/{relative}'.encode()).hexdigest()[:8]}"


def root_name(root: AnyPath) -> str:
    """Return the name of a root folder for the ledger.

    Parameters
    ----------
    root : Path or UPath
        The root folder.

    Returns
    -------
    str
        The last part of the path.
    """
    return root.name if is_remote(root) else Path(str(root)).resolve().name


class Folders:
    """Lists the content of folders. The list of each folder is cached."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, AnyPath]] = {}

    def __call__(self, folder: AnyPath) -> dict[str, AnyPath]:
        """Return the files and folders in a folder; an empty dictionary if the folder does not exist.

        Parameters
        ----------
        folder : Path or UPath
            Folder to list.

        Returns
        -------
        dict
            Dictionary from name to path, sorted by name.
        """
        key = str(folder)
        if key not in self._names:
            try:
                found = [path for path in folder.iterdir() if is_remote(path) or not is_special(str(path))]
                self._names[key] = {path.name: path for path in sorted(found, key=lambda p: p.name)}
            except OSError:
                self._names[key] = {}
        return self._names[key]


def read_text(path: AnyPath) -> str:
    """Read a text file with an unknown encoding.

    Parameters
    ----------
    path : Path or UPath
        The text file.

    Returns
    -------
    str
        The text. A file with a byte order mark of UTF-16 (Excel writes such tables) is decoded as UTF-16. Any other
        file is decoded as UTF-8 if possible, otherwise as Latin-1.

    Raises
    ------
    OSError
        If the file cannot be read.
    RequestError
        If the file is larger than `MAX_JSON`, or is not a file.
    """
    data = read_limited(path)
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def parse_table(text: str) -> list[dict[Any, Any]]:
    """Read the rows of a tab-separated table, as `csv.DictReader` returns them.

    First, each line is read as one row, so that a single quotation mark in a text cannot hide the following lines. If
    some rows have too few or too many cells, the table is read again, as a table in which a text in quotation marks may
    contain tabs and line breaks. This second result is used only if all its rows have the right number of cells.

    Parameters
    ----------
    text : str
        The table.

    Returns
    -------
    list of dict
        The rows. Missing cells are None, and the cells after the last column have the key None.

    Raises
    ------
    csv.Error
        If the text is not a table.
    """
    lines, quoted = (
        list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=quoting))
        for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL)
    )

    def complete(rows: list[dict[Any, Any]]) -> bool:
        return all(None not in row and None not in row.values() for row in rows)

    rows = quoted if complete(quoted) and not complete(lines) else lines
    return [{_unquote(key): _unquote(cell) for key, cell in row.items()} for row in rows]


def _unquote(cell: Any) -> Any:
    """Remove white space around a cell, and the quotation marks around the whole cell."""
    if not isinstance(cell, str):
        return cell
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def find_events_file(recording: AnyPath, folders: Folders) -> AnyPath | None:
    """Find the table of events in the folder of a recording.

    Parameters
    ----------
    recording : Path or UPath
        The recording.
    folders : Folders
        Object that lists folders, with a cache.

    Returns
    -------
    Path, UPath or None
        Path of ``<stem>_events.tsv`` in the folder of the recording; None if there is no such file. The stem is the
        name of the recording, with or without its ending ``_eeg`` or ``_raw``.
    """
    stem = re.sub(r"\.fif$", "", recording.stem)
    near = folders(recording.parent)
    for name in (stem, re.sub(r"_(eeg|raw)$", "", stem)):
        if f"{name}_events.tsv" in near:
            return near[f"{name}_events.tsv"]
    return None


def read_marks(table: AnyPath) -> tuple[list[tuple[float, float, str, list[str]]], list[str]]:
    """Read the interruptions and bad spans in a table of events.

    Parameters
    ----------
    table : Path or UPath
        Tab-separated table with the columns onset and duration (seconds), and at least one of `MARK_COLUMNS`. The
        optional column ``channel`` has one or more names, with a comma, a semicolon or ``|`` between them.

    Returns
    -------
    marks : list of (float, float, str, list of str)
        For each row that marks an interruption or a bad span (`data_sharding.formats.marks.interruptions.TABLE` lists
        these marks): onset and duration in seconds, text, and channels. An empty list of channels means all channels.
    notes : list of str
        Notes for the ledger about marks without a usable onset.
    """
    marks, notes = [], []
    try:
        rows = parse_table(read_text(table))
    except csv.Error as error:
        return [], [f"{table.name}: {error}; its marks are not used"]
    for number, row in enumerate(rows, start=2):
        words = [str(row.get(column) or "").strip() for column in MARK_COLUMNS]
        text = next((word for word in words if word not in NOTHING and find_row("bids", word)), "")
        if not text:
            continue
        onset, duration = _seconds(row.get("onset")), _seconds(row.get("duration"))
        if onset is None:
            notes.append(f"{table.name}, line {number}: the mark '{text}' has no onset, and is not used")
        else:
            names = (name.strip() for name in re.split(r"[,;|]", str(row.get("channel") or "")))
            marks.append((onset, duration or 0.0, text, [name for name in names if name not in NOTHING]))
    return marks, notes[:5]


def _seconds(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def check_images(items: Iterable[Item], images: AnyPath) -> None:
    """Raise an error if images of a corpus are missing.

    Parameters
    ----------
    items : iterable of Item
        The recordings of the corpus.
    images : Path or UPath
        Folder of the images.

    Raises
    ------
    RequestError
        If images are missing. The message contains the number of missing images and the path of the first missing
        image.
    """
    shown = sorted({trial.image for item in items for trial in item.trials or () if trial.image})
    if is_remote(images):
        # On an object store, list the folder of the images once: a separate request for each of 16,540 images would
        # take an hour.
        there = {p for p in images.fs.find(images.path)} if shown else set()  # type: ignore[union-attr]
        absent = [image for image in shown if as_path(image).path not in there]  # type: ignore[union-attr]
    else:
        absent = [image for image in shown if not Path(image).is_file()]
    if absent:
        raise RequestError(
            f"corpora: images '{images}': {len(absent)} of {len(shown)} images are missing, the first is {absent[0]}"
        )
