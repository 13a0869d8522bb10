"""Changed ledgers and fingerprints are refused with one error line that contains the file, the row and the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.fingerprints import Fingerprints, write_fingerprints
from data_sharding.common.errors import RequestError
from data_sharding.dataset.ledger import COLUMNS, NAME, LedgerRow, read_ledger, schema, write_ledger
from launch.cli import main

MAY_BE_NULL = {"age", "amplitude_uv", "bad_kinds", "line_freq", "reason_category", "recording_year", "subject_from"}
MAY_BE_NULL |= {"trial_tmax", "trial_tmin", "unit_factor"}


def make_row(key: str = "rec") -> LedgerRow:
    return LedgerRow(
        key=key, status="sharded", corpus="lab", path="a.edf", files=["a.edf"], bytes=9, sha256="0" * 64, format="edf",
        reader="edf", subject="s", sfreq=200.0, seconds=60.0, unit="plausible", unit_factor=-1.0, channels=["Cz"],
        channels_by_type={"eeg": 1}, trial_tmin=-0.2,
    )  # fmt: skip


def write_changed(root: Path, column: str, value: Any, kind: Any = None) -> None:
    """Write a ledger of two rows, with `value` in a column of the second row. If the type `kind` is given, the column
    has this type, and both rows have the value."""
    rows = [make_row("a").to_columns(), make_row("b").to_columns()]
    table = pa.Table.from_pylist(rows, schema=schema())
    first = rows[0][column] if kind is None else value
    field = pa.field(column, kind or schema().field(column).type)
    table = table.set_column(COLUMNS.index(column), field, pa.array([first, value], field.type))
    root.mkdir(exist_ok=True)
    pq.write_table(table, root / NAME)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_null_in_a_column_names_file_row_and_column(column: str, tmp_path: Path) -> None:
    write_changed(tmp_path, column, None)
    if column in MAY_BE_NULL:
        assert getattr(read_ledger(tmp_path)[1], column) is None
        return
    with pytest.raises(RequestError, match=rf"ledger\.parquet, row 2: .*\b{column}\b") as caught:
        read_ledger(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_another_type_is_refused(column: str, tmp_path: Path) -> None:
    value, kind = (
        ({"x": 1}, pa.struct([("x", pa.int64())])) if column == "key" else ([[1]], pa.list_(pa.list_(pa.int8())))
    )
    write_changed(tmp_path, column, value, kind)
    with pytest.raises(RequestError, match=rf"ledger\.parquet: column {column} has the type"):
        read_ledger(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("seconds", -5.0),
        ("windows", -1),
        ("bytes", -(2**63)),
        ("status", "lost"),
        ("windows_left_out", "{"),
        ("windows_left_out", "[" * 100_000),
        ("windows_left_out", "5"),
        ("windows_left_out", '{"flat": "2"}'),
        ("windows_left_out", '{"flat": null}'),
        ("windows_left_out", '{"flat": -2}'),
        ("seconds_left_out", '{"flat": NaN}'),
        ("seconds_left_out", '{"flat": 1e999}'),
        ("channels_left_out", '{"x": [1]}'),
        ("channels", ["Cz", None]),
    ],
)
def test_impossible_values_end_a_command_in_one_line(
    dataset: Any, column: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_changed(dataset.root, column, value)
    for words in (["inspect"], ["verify"]):
        assert main([*words, str(dataset.root)]) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if not line.startswith("verifying shards")]
        assert len(lines) == 1 and "ledger.parquet, row 2" in lines[0] and column in lines[0]


def test_texts_and_negative_onsets_are_read_as_before(tmp_path: Path) -> None:
    write_ledger(tmp_path / NAME, [make_row("a"), make_row("b")])
    assert read_ledger(tmp_path) == [make_row("a"), make_row("b")]
    table = pq.read_table(tmp_path / NAME)
    kinds = [pa.dictionary(pa.int32(), f.type) if pa.types.is_string(f.type) else f.type for f in table.schema]
    table = table.cast(pa.schema([(f.name, kind) for f, kind in zip(table.schema, kinds, strict=True)]))
    pq.write_table(table.append_column("unknown", pa.array([[b"x"], None])), tmp_path / NAME)
    assert read_ledger(tmp_path) == [make_row("a"), make_row("b")]


def repeat(value: Any, times: int, kind: Any) -> Any:
    """Return an array that repeats one value; Parquet stores this value once."""
    one = pa.array([value], kind)
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), one)


def write_bomb(path: Path, kind: str) -> None:
    """Write a table of a few hundred kB that unpacks to gigabytes."""
    count = 2 * 10**7
    if kind in ("channels", "names"):
        flat = repeat("Cz", count, pa.string())
        values = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), flat)
        table = pa.table({kind: values})
    elif kind == "rows":
        table = pa.table({"seconds": pa.array(np.zeros(count))})
    elif kind == "numbers":
        values = pa.array(np.zeros(count, np.int64))
        table = pa.table({"signature": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), values)})
    else:
        table = pa.table({kind: repeat(b"x" * 10**7 if kind == "points" else "x" * 10**7, 10**5, None)})
    rest = {field.name: pa.nulls(len(table), field.type) for field in schema() if field.name not in table.schema.names}
    if path.name == FINGERPRINTS:
        names = {"key": pa.string(), "sha256": pa.string(), "seconds": pa.float64(), "n_points": pa.int64()}
        names |= {"names": pa.list_(pa.string()), "signature": pa.list_(pa.int64()), "points": pa.binary()}
        names |= {"corpus": pa.string(), "subject": pa.string()}
        rest = {name: pa.nulls(len(table), kind) for name, kind in names.items() if name not in table.schema.names}
    for name, values in rest.items():
        table = table.append_column(name, values)
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 3 * 10**6


READ = """
from data_sharding.audit.fingerprints import Fingerprints
from data_sharding.common.errors import run_main
from data_sharding.dataset.ledger import read_ledger
sys.exit(run_main(lambda words: len((read_ledger if words[1] == "ledger" else Fingerprints)(words[0]).recordings)))
"""


@pytest.mark.parametrize("kind", ["key", "channels"])
def test_a_small_ledger_that_stands_for_gigabytes_is_refused(kind: str, tmp_path: Path, run_limited: Any) -> None:
    write_bomb(tmp_path / NAME, kind)
    done = run_limited(READ, tmp_path, "ledger")
    assert done.returncode == 2 and NAME in done.stderr and "unpack to" in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("kind", ["key", "channels"])
def test_pretraining_reads_the_ledger_with_the_same_checks(kind: str, dataset: Any, run_limited: Any) -> None:
    write_bomb(dataset.root / NAME, kind)
    code = (
        "from data_sharding.common.errors import run_main\nfrom data_sharding.dataset.dataset import EEGDataset\n"
        "from pretrain.training.data_summary import describe_people\n"
        "sys.exit(run_main(lambda words: describe_people(EEGDataset(words[0], 'train'))))"
    )
    done = run_limited(code, dataset.root)
    assert done.returncode == 2 and NAME in done.stderr and "unpack to" in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("kind", ["key", "names", "numbers", "rows"])
def test_small_fingerprints_that_stand_for_gigabytes_are_refused(kind: str, tmp_path: Path, run_limited: Any) -> None:
    write_bomb(tmp_path / FINGERPRINTS, kind)
    done = run_limited(READ, tmp_path, "fingerprints")
    assert done.returncode == 2 and FINGERPRINTS in done.stderr, done.stderr[-500:]
    assert "unpack to" in done.stderr or "row 1" in done.stderr, done.stderr


def change_fingerprints(path: Path, **values: Any) -> None:
    """Change values in the second row of a table of fingerprints."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1].update(values)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    "values",
    [
        {"key": None},
        {"key": "a"},
        {"seconds": None},
        {"seconds": float("nan")},
        {"names": None},
        {"names": [None]},
        {"signature": [None]},
        {"sha256": None},
        {"n_points": -1},
        {"n_points": 0},
        {"n_points": 2**62},
        {"n_points": 7},
        {"n_points": None},
        {"points": None},
        {"points": b"x" * 63},
    ],
    ids=str,
)
def test_changed_fingerprints_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(2, 32))
    path = tmp_path / FINGERPRINTS
    write_fingerprints(path, [make_row("a"), make_row("b")], lambda key: points)
    np.testing.assert_allclose(Fingerprints(tmp_path).load("b"), points, atol=2e-3)
    change_fingerprints(path, **values)

    def read() -> None:
        found = Fingerprints(tmp_path)
        if "n_points" in values and not values["n_points"] and values["n_points"] is not None:
            # Row 'b' of the fingerprints has no points, so it matches no recording.
            assert found.load("b").shape == (64, 1)
            raise RequestError(f"{path}: no points")
        found.load("b")

    with pytest.raises(RequestError, match=r"fingerprints\.parquet") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_fingerprints_of_another_layout_are_refused(tmp_path: Path) -> None:
    for table in (pa.table({"key": ["a"]}), pa.table({"key": [1], "points": [[b"x"]]})):
        pq.write_table(table, tmp_path / FINGERPRINTS)
        with pytest.raises(
            RequestError, match=r"fingerprints\.parquet: (the column 'corpus' is missing|column key has the type)"
        ):
            Fingerprints(tmp_path)
    for data in (b"", b"PAR1", json.dumps({}).encode(), b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / FINGERPRINTS).write_bytes(data)
        with pytest.raises(RequestError, match=r"fingerprints\.parquet: damaged"):
            Fingerprints(tmp_path)
