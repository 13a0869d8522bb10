"""The ledger: one row for every recording found, and what became of it."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_write_bytes
from data_sharding.common.storage import AnyPath, as_path

NAME = "ledger.parquet"
STATUSES = ("sharded", "duplicate", "quarantined", "excluded", "held back")
MAY_MISS = {"reader": "", "reference": "", "segments": 1, "duplicate_of": "", "held_back": ""}
"""Columns that a row need not have, with what stands for them."""


def _schema() -> Any:
    import pyarrow as pa

    text, number, real, words = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.string())
    return pa.schema(
        [
            ("key", text),
            ("corpus", text),
            ("path", text),
            ("files", words),
            ("bytes", number),
            ("sha256", text),
            ("fingerprint", text),
            ("format", text),
            ("reader", text),
            ("subject", text),
            ("session", text),
            ("split", text),
            ("status", text),
            ("reason", text),
            ("duplicate_of", text),
            ("held_back", text),
            ("channels_by_type", text),
            ("channels_left_out", text),
            ("channels", words),
            ("n_eeg", number),
            ("n_kept", number),
            ("channel_selection", text),
            ("bads", words),
            ("montage", text),
            ("montage_confidence", real),
            ("reference", text),
            ("sfreq", real),
            ("seconds", real),
            ("segments", number),
            ("amplitude_uv", real),
            ("unit", text),
            ("unit_factor", real),
            ("line_freq", real),
            ("line_freq_from", text),
            ("windows", number),
            ("seconds_written", real),
            ("windows_left_out", text),
            ("shards", words),
            ("notes", words),
        ]
    )


def write_ledger(path: str | AnyPath, rows: Iterable[dict[str, Any]]) -> None:
    """Write the ledger, whole or not at all.

    Parameters
    ----------
    path : str, Path or UPath
        The file.
    rows : iterable of dict
        One for each recording; keys that are no column are left out.

    Raises
    ------
    KeyError
        If a row lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    full = [{**MAY_MISS, "reader": row["format"], **row} for row in rows]
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in full], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write_bytes(path, buffer.getvalue())


def set_aside(row: dict[str, Any], status: str, reason: str, **columns: str) -> None:
    """Take a recording that was read out of the dataset, and keep what was learned of it.

    Parameters
    ----------
    row : dict
        Its row, changed in place.
    status : str
        duplicate or held back.
    reason : str
        Why, in words.
    **columns : str
        Further columns, such as ``duplicate_of``.

    Raises
    ------
    ValueError
        If the ledger knows no such status.
    """
    if status not in STATUSES:
        raise ValueError(f"status '{status}' is none of {STATUSES}")
    row |= {"status": status, "reason": reason, "split": "", "windows": 0, "seconds_written": 0.0, **columns}
    row["split_samples"] = {}


def read_ledger(dataset: str | AnyPath) -> list[dict[str, Any]]:
    """Read a dataset's ledger.

    Parameters
    ----------
    dataset : str, Path or UPath
        The dataset's directory.

    Returns
    -------
    list of dict
        One for each recording.

    Raises
    ------
    RequestError
        If there is none, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = as_path(dataset) / NAME
    if not path.is_file():
        raise RequestError(f"{path}: no such file; only 'dreamscale shard' writes a ledger")
    try:
        # Without arrow's own threads: they were seen to abort the interpreter at its end on a busy machine.
        table = pq.ParquetFile(io.BytesIO(path.read_bytes()), pre_buffer=False).read(use_threads=False)
        names = list(dict.fromkeys([*_schema().names, *table.column_names]))
        found = [{**MAY_MISS, **row} for row in table.to_pylist()]
        return [{name: row[name] for name in names if name in row} for row in found]
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{path}: damaged ({error}); shard the corpus again") from None


def totals(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, int], dict[str, float]]:
    """Recordings and hours by status.

    Parameters
    ----------
    rows : iterable of dict
        The ledger.

    Returns
    -------
    counts : dict of str to int
        Recordings found and of each status.
    hours : dict of str to float
        The same in hours; recordings that could not be opened count zero.
    """
    counts = {"found": 0, **dict.fromkeys(STATUSES, 0)}
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for name in ("found", row["status"]):
            counts[name] += 1
            seconds[name] += row["seconds"]
    return counts, {name: round(seconds[name] / 3600, 6) for name in counts}


def short_reason(reason: str) -> str:
    """Reason without what is particular to one recording, to count by.

    Parameters
    ----------
    reason : str
        As in the ledger.

    Returns
    -------
    str
        The part before the colon.
    """
    return reason.split(":")[0].split(" of ")[0] if reason else ""
