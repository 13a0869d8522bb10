"""Recognise text tables that hold a signal, such as ``.csv`` files with one column for each electrode.

Most text tables next to recordings are events, questionnaires or results. A table is reported as a signal if at least
four columns of numbers have the name of an electrode at the top, or if at least four long lines of numbers begin with
the name of an electrode. (In tables of electrode positions, such lines are short.) A large table that contains only
numbers is reported too, because it is probably a signal.
"""

from __future__ import annotations

import re
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import canonical_name, is_site
from data_sharding.formats.unread import Finding

SUFFIXES = (".csv", ".tsv", ".txt", ".asc", ".ascii")
MIN_ELECTRODES = 4
MIN_LINES = 16
LONG_LINE = 64
"""If a line begins with the name of an electrode and has more than this many numbers, the line is a signal."""
LARGE_BYTES = 1 << 20
"""A table without names of electrodes is reported if it contains only numbers and has at least this size in bytes."""
MOST_TEXT_LINES = 16
"""A table of numbers may begin with at most this many lines of text."""
DECIMAL_COMMA = re.compile(r"(?<=\d),(?=\d)")
PREFIX = re.compile(r"(RAW|EEG|Channel|Ch)[. _-]+(?=[A-Za-z])", re.IGNORECASE)
"""Prefix that some programs, for example those of Muse and Emotiv, write before the name of an electrode."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan", re.IGNORECASE)
TEXT = "a text table has no sampling rate and no unit; convert it to EDF, or to an array for a corpus of kind arrays"


def recognise_table(file: Any) -> Finding | None:
    """Recognise a text table that holds a signal.

    Parameters
    ----------
    file : sniffing.File
        The file.

    Returns
    -------
    Finding or None
        Kind of the file; None for other files.
    """
    if file.suffix not in SUFFIXES or b"\0" in file.head[:4096]:
        return None
    finding = Finding(format="table", reason=Reason("no reader for signals in text tables", TEXT))
    if file.head[:20].startswith(b"%OpenBCI Raw"):
        return finding
    text = file.head.decode("latin-1")
    if ";" in text[:4096] or ("\t" in text[:4096] and "." not in text[:4096]):
        text = DECIMAL_COMMA.sub(".", text)
    lines = text.splitlines()
    rows = [[entry.strip(" \"'") for entry in re.split(r"[,;\t]|\s{1,}", line.strip())] for line in lines[:64] if line]
    for i, row in enumerate(rows[:8]):
        if sum(_is_electrode(entry) for entry in row) >= MIN_ELECTRODES:
            below = [r for r in rows[i + 1 :] if sum(map(_is_number, r)) >= MIN_ELECTRODES]
            return finding if len(below) >= MIN_LINES and len(below) >= 0.8 * len(rows[i + 1 :]) else None
    long = [row for row in rows if _is_electrode(row[0]) and sum(map(_is_number, row[1:])) > LONG_LINE]
    if len(long) >= MIN_ELECTRODES or (long and len(lines) == 1):
        return finding
    return finding if _is_large_matrix(file, rows) else None


def _is_large_matrix(file: Any, rows: list[list[str]]) -> bool:
    """Return whether a table is large and, after its first lines, has only lines with the same number of numbers."""
    numbers = [row for row in rows if len(row) >= MIN_ELECTRODES and all(_is_number(entry) for entry in row if entry)]
    same = len({len(row) for row in numbers}) == 1
    large = int(file.path.stat().st_size) >= LARGE_BYTES
    return same and len(numbers) >= len(rows) - MOST_TEXT_LINES and len(numbers) > MIN_LINES and large


def _is_electrode(text: str) -> bool:
    name = canonical_name(PREFIX.sub("", text.removesuffix("(uV)").strip()))
    return 2 <= len(name) <= 12 and is_site(name)


def _is_number(text: str) -> bool:
    return bool(NUMBER.fullmatch(text))
