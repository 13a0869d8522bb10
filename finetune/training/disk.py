"""Check that a disk has enough space for a run, before the run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_sharding.common.errors import RequestError


def check_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raise a `RequestError` if the disk of a folder has less free space than a run needs.

    Parameters
    ----------
    folder : str or Path
        Folder of the run, which may not exist yet. Files that it already holds count as part of the needed space.
    needed : int
        Number of bytes that the files of the run will need.
    what : str
        What the files are, for the message.
    """
    folder = Path(folder)
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if needed - present > free:
        raise RequestError(
            f"{folder}: {what} need about {needed / 1e9:.1f} GB, but this disk has only {free / 1e9:.1f} GB of free "
            "space; free some space, choose another 'output', or keep fewer checkpoints (training.checkpoint.keep)"
        )
