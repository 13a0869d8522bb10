"""The ledger: one row for every recording found, and what became of it."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_sharding.errors import RequestError
from data_sharding.files import atomic_write_bytes

NAME = "ledger.parquet"
STATUSES = ("sharded", "duplicate", "quarantined", "excluded")


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
            ("subject", text),
            ("session", text),
            ("split", text),
            ("status", text),
            ("reason", text),
            ("channels_by_type", text),
            ("channels_left_out", text),
            ("channels", words),
            ("n_eeg", number),
            ("n_kept", number),
            ("channel_selection", text),
            ("bads", words),
            ("montage", text),
            ("montage_confidence", real),
            ("sfreq", real),
            ("seconds", real),
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


def write_ledger(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the ledger, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    rows : iterable of dict
        One for each recording; keys that are no column are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write_bytes(path, buffer.getvalue())


def read_ledger(dataset: str | Path) -> list[dict[str, Any]]:
    """Read a dataset's ledger.

    Parameters
    ----------
    dataset : str or Path
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

    path = Path(dataset) / NAME
    if not path.is_file():
        raise RequestError(f"{path}: no such file; only 'dreamscale shard' writes a ledger")
    try:
        return pq.read_table(path).to_pylist()
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
