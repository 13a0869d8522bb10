"""Repair the header in a copy of an EDF, BDF or GDF file. One field that is not a number makes MNE refuse the file."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path

from data_sharding.formats import headers
from data_sharding.formats.headers import Layout

LIMITS = {104: "-1", 112: "1", 120: "-1", 128: "1"}
"""Offset of each physical or digital limit in the header of a channel, and a valid number to write there if the limit
is not a number. (Such a channel has no scale and is left out, but MNE must be able to parse its header.)"""


def find_patches(path: Path, layout: Layout, format_: str) -> dict[int, bytes]:
    """Find the header fields that MNE cannot parse.

    Parameters
    ----------
    path : Path
        The file.
    layout : Layout
        Layout of the records.
    format_ : str
        edf, bdf or gdf.

    Returns
    -------
    dict of int to bytes
        Corrections: the key is the offset of a field that MNE cannot parse, the value is its corrected content.
    """
    if format_ == "gdf":
        count = headers.count_gdf_records(path, layout)
        return {236: struct.pack("<q", count)} if layout.n_records != count else {}
    fixed = headers.read_range(path, 0, 256)
    patches = {}
    for at, right in ((236, headers.count_records(path, layout)), (184, layout.header_bytes)):
        try:
            int(fixed[at : at + 8])
        except ValueError:
            patches[at] = str(right).ljust(8).encode()
    n = len(layout.labels)
    for i in layout.unscaled:
        for offset, value in LIMITS.items():
            at = 256 + offset * n + 8 * i
            if headers.parse_number(headers.read_range(path, at, 8).decode("latin-1")) is None:
                patches[at] = value.ljust(8).encode()
    return patches


def copy_with_patches(path: Path, patches: dict[int, bytes]) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """Copy a file to a temporary folder, and change some of its bytes.

    Parameters
    ----------
    path : Path
        The file.
    patches : dict of int to bytes
        Result of `find_patches`.

    Returns
    -------
    path : Path
        The copy.
    folder : TemporaryDirectory
        The folder, which must exist as long as the copy is used.
    """
    folder = tempfile.TemporaryDirectory(prefix="eeg-")
    copy = Path(folder.name) / path.name
    shutil.copyfile(path, copy)
    with copy.open("r+b") as stream:
        for at, content in patches.items():
            stream.seek(at)
            stream.write(content)
    return copy, folder
