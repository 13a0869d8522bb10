"""Read the metrics of a training run from the file metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import describe
from data_sharding.common.untrusted import parse_json, read_limited

MAX_METRICS = 2**30
"""Largest size of a file of metrics in bytes."""
LONGEST_LINE = 2**20
"""Largest number of bytes of a line of metrics. Longer lines are ignored."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of metrics.

    Parameters
    ----------
    path : Path
        The file metrics.jsonl of a run directory.

    Returns
    -------
    list of dict
        One dictionary for each line: the number of its step (``step``), and all its metrics that are finite numbers or
        None. A line without a valid step is left out, because a run that was killed may have written only a part of its
        last line. The list is empty if there is no file.

    Raises
    ------
    RequestError
        If the file cannot be read or is too large.
    """
    if not path.is_file():
        return []
    try:
        lines = read_limited(path, MAX_METRICS).splitlines()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({describe(error)}); check the file and its permissions") from None
    return [found for line in lines if (found := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        values = parse_json(line) if len(line) <= LONGEST_LINE else None
    except ValueError:
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or not 0 <= values["step"] < 2**63:
        return None
    return {name: value for name, value in values.items() if value is None or _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
