"""Read a recording without a sidecar file that MNE cannot parse."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def read_without_broken(
    read: Callable[[Path], Any], path: Path, optional: Sequence[str]
) -> tuple[Any, tempfile.TemporaryDirectory[str] | None, list[str]]:
    """Read a recording; if this fails, read it without one or more of its optional sidecars.

    Parameters
    ----------
    read : callable
        Function that opens a path.
    path : Path
        The recording. Its sidecars have the same name and another extension.
    optional : sequence of str
        Extensions of the sidecars without which the recording can be read, in lower case.

    Returns
    -------
    opened : Any
        Result of `read`.
    folder : TemporaryDirectory or None
        Folder with links to the other files, which must exist as long as the recording is open.
    notes : list of str
        Notes for the ledger.

    Raises
    ------
    Exception
        The first error of `read`, if the recording cannot be read without these sidecars either.
    """
    try:
        return read(path), None, []
    except Exception as error:
        first = error
    files = [file for file in path.parent.iterdir() if file.stem.lower() == path.stem.lower()]
    there = [file for file in files if file.suffix.lower() in optional]
    for count in range(1, len(there) + 1):
        for broken in itertools.combinations(there, count):
            folder = tempfile.TemporaryDirectory(prefix="eeg-")
            for file in files:
                if file not in broken:
                    (Path(folder.name) / file.name).symlink_to(file.absolute())
            try:
                opened = read(Path(folder.name) / path.name)
            except Exception:
                folder.cleanup()
                continue
            return opened, folder, [f"{file.name} cannot be read, and is not used" for file in broken]
    raise first
