"""The list of batches on which a run does not train, because these batches led to a loss spike."""

from __future__ import annotations

from typing import Any

from data_sharding.common.files import read_json, write_json
from pretrain.runs.checkpoint import check_ranges
from pretrain.runs.directory import RunDirectory

LEFT_OUT = "left_out.json"
"""Name of the file in the run directory that holds the list of left-out batches. Each entry has ``batches`` (the number
of the first batch left out, and the number of the first batch after the range), ``step`` (where the spike occurred) and
``loss`` (a description of the spike)."""


def read_left_out(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the entries (ranges of batches) of the file `LEFT_OUT`; an empty list if there is no file."""
    path = run.path / LEFT_OUT
    return check_ranges(read_json(path), str(path)) if path.is_file() else []


def write_left_out(run: RunDirectory, entries: list[dict[str, Any]]) -> None:
    """Write the entries (ranges of batches) to the file `LEFT_OUT`; delete the file if there are no entries."""
    if entries:
        write_json(run.path / LEFT_OUT, entries)
    else:
        (run.path / LEFT_OUT).unlink(missing_ok=True)


def is_left_out(number: int, entries: list[dict[str, Any]]) -> bool:
    """Return whether batch `number` is left out; batches are numbered from the beginning of the run."""
    return any(first <= number < end for first, end in (entry["batches"] for entry in entries))
