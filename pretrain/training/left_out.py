"""Batches that a run leaves out, because they led to a loss spike."""

from __future__ import annotations

from typing import Any

from data_sharding.common.files import read_json, write_json
from pretrain.runs.directory import RunDirectory

LEFT_OUT = "left_out.json"
"""File in the run directory. Each entry has ``batches`` (number of the first batch left out, and of the first batch
after them), ``step`` and ``loss`` (a description of the spike)."""


def read_left_out(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the entries of the file; none if there is no file."""
    path = run.path / LEFT_OUT
    return read_json(path) if path.is_file() else []


def write_left_out(run: RunDirectory, entries: list[dict[str, Any]]) -> None:
    """Write the file, or delete it if there are no entries."""
    if entries:
        write_json(run.path / LEFT_OUT, entries)
    else:
        (run.path / LEFT_OUT).unlink(missing_ok=True)


def is_left_out(number: int, entries: list[dict[str, Any]]) -> bool:
    """Whether a batch is left out; `number` counts the loader's batches from the beginning of the run."""
    return any(first <= number < end for first, end in (entry["batches"] for entry in entries))
