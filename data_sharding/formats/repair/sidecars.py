"""If MNE cannot parse a sidecar file or another optional part of a recording, read the recording without this part."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_sharding.formats.claims import files_beside


def read_without_broken(
    read: Callable[[Path], Any], path: Path, optional: Mapping[str, Sequence[Path]]
) -> tuple[Any, tempfile.TemporaryDirectory[str] | None, list[str]]:
    """Read a recording; if this fails, read it without one or more of its optional parts.

    Parameters
    ----------
    read : callable
        Function that opens a path.
    path : Path
        The file or folder of the recording.
    optional : mapping of str to sequence of Path
        Names and files of the optional parts. The ledger uses these names.

    Returns
    -------
    opened : Any
        Result of `read`.
    folder : TemporaryDirectory or None
        Folder with links to the files that were used; it must exist as long as the recording is open. None if no part
        was left out.
    notes : list of str
        Notes for the ledger.

    Raises
    ------
    Exception
        The first error of `read`, if the recording cannot be read even without its optional parts.
    """
    try:
        return read(path), None, []
    except Exception as error:
        first = error
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        near = (Path(str(file)) for file in files_beside(path).values())
        files = [file for file in near if file.stem.lower() == path.stem.lower()]
    for count in range(1, len(optional) + 1):
        for parts in itertools.combinations(optional, count):
            broken = {file for part in parts for file in optional[part]}
            folder = tempfile.TemporaryDirectory(prefix="eeg-")
            for file in files:
                if file not in broken:
                    link = Path(folder.name) / file.relative_to(path.parent)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.absolute())
            try:
                opened = read(Path(folder.name) / path.name)
            except Exception:
                folder.cleanup()
                continue
            return opened, folder, [f"{part} cannot be parsed, and is not used" for part in parts]
    raise first
