"""Write the tables of ``docs/formats.md`` from the tables that the code uses.

``python -m data_sharding.formats.describe docs/formats.md`` replaces the text between the markers of each table. A test
fails if ``docs/formats.md`` is not up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_sharding.formats.marks.interruptions import TABLE
from data_sharding.formats.readers import find_formats


@dataclass(frozen=True)
class About:
    """Description of one or more formats for the user."""

    names: tuple[str, ...]
    """Names by which the ledger calls the formats."""
    title: str
    """Names of the formats for the user, with the file extensions."""
    recognised_by: str
    """Part of the file by which the format is recognised."""
    compared: str
    """Numbers in the header that are compared with the size of the file."""


FORMATS = (
    About(("edf", "bdf"), "EDF, EDF+, BDF (`.edf`, `.rec`, `.bdf`)", "version field", "records"),
    About(("gdf",), "GDF 1, 2", "`GDF `", "records"),
    About(("brainvision",), "BrainVision (`.vhdr`, `.ahdr`)", "first line", "whole samples, `DataPoints`"),
    About(
        ("eeglab",),
        "EEGLAB (`.set`, `.fdt`; MATLAB 5 and 7.3)",
        "MATLAB or HDF5, and `.set`",
        "samples in the `.fdt`",
    ),
    About(("neuroscan",), "Neuroscan (`.cnt`)", "`Version 3` and `.cnt`", "position of the event table"),
    About(("ant",), "ANT (`.cnt`)", "RIFF", "length in the RIFF header"),
    About(("mff",), "EGI (`.mff`)", "folder", "blocks of the signal files"),
    About(("egi",), "EGI simple binary (`.raw`)", "plausible version, date and counts", "samples"),
    About(("curry",), "Curry 7, 8 (`.dat`, `.cdt`)", "parameter file next to the signal file", "samples"),
    About(("nihon",), "Nihon Kohden (`.EEG`)", "name of the device", "data blocks"),
    About(("persyst",), "Persyst (`.lay`, `.dat`)", "`[FileInfo]`", "whole samples"),
    About(("nedf",), "Neuroelectrics (`.nedf`)", "`<NEDFversion>`", "records"),
    About(("fif",), "FIF (`_raw.fif`, `-epo.fif`, splits)", "first tag", "every tag"),
    About(("xdf",), "XDF (`.xdf`)", "`XDF:`", "every chunk"),
)
"""Formats with a reader in `data_sharding.formats.open_signal`. Each format in the folder `readers` contains its own
description."""


def list_formats() -> list[About]:
    """Return the descriptions of all formats that can be read."""
    more = [About((f.name,), f.title or f.name, f.recognised_by, f.compared) for f in find_formats()]
    return [*FORMATS, *more]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _formats() -> str:
    rows = [(about.title, about.recognised_by, about.compared) for about in list_formats()]
    return _table(("format", "recognised by", "compared with the file"), rows)


def _marks() -> str:
    title = {name: re.sub(r" \(.*", "", about.title) for about in list_formats() for name in about.names}
    title |= {"edf": "EDF+", "bdf": "BDF+", "mff": "EGI MFF", "bids": "BIDS `events.tsv`"}
    rows = []
    for mark in TABLE:
        where = ", ".join(title[name] for name in mark.formats) or "all formats with annotations, BIDS `events.tsv`"
        rows.append((where, mark.sign, mark.effect.value))
    return _table(("format", "mark in the file", "effect"), rows)


TABLES = {"formats": _formats, "interruptions": _marks}
"""For each name in a marker of ``docs/formats.md``: the function that returns the table."""


def update(text: str) -> str:
    """Return the text of ``docs/formats.md`` with its tables generated again from the code.

    Parameters
    ----------
    text : str
        The current text of the file. Each table is between the lines ``<!-- NAME: generated ... -->`` and ``<!-- end of
        NAME -->``.

    Returns
    -------
    str
        The text with tables from the current code.

    Raises
    ------
    ValueError
        If the two lines around a table are missing or occur more than once.
    """
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name}: generated[^\n]*-->\n).*?(\n<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda found, make=make: found[1] + make() + found[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the markers of the table '{name}' are missing")
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        Path(argument).write_text(update(Path(argument).read_text(encoding="utf-8")), encoding="utf-8")
