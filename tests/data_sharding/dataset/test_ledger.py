"""Every field of a ledger row can be written and read again, and ledgers from older versions of Dreamscale can be
read."""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import pickle
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.dataset.ledger import (
    ADDED_LATER,
    COLUMNS,
    JSON_COLUMNS,
    STATUSES,
    LedgerRow,
    count_by_status,
    count_windows_left_out,
    read_ledger,
    schema,
    write_ledger,
)

DOCS = Path(__file__).parents[3] / "docs" / "data_format.md"


class TestReason:
    def test_reason_is_one_printable_line_with_a_category(self) -> None:
        reason = Reason("unreadable", "ValueError:\n  bad\x00 byte")
        assert reason == "unreadable: ValueError: bad? byte" and reason.category == "unreadable"
        assert Reason("no signal") == "no signal" and Reason("killed", text="killed 4 times") == "killed 4 times"

    def test_copies_of_a_reason_keep_the_category(self) -> None:
        reason = Reason("too short", "0.45 s")
        for same in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason)), reason.shortened(100)):
            assert same == reason and same.category == "too short"
        assert reason.shortened(5) == "too s" and reason.shortened(5).category == "too short"


class TestRow:
    def test_written_row_is_read_back_unchanged(self, make_row, tmp_path: Path) -> None:
        row = make_row(
            "a",
            status="quarantined",
            reason=Reason("unit unknown", "set aside"),
            channels_by_type={"eeg": 19},
            channels_left_out={"trigger, by its signal": ["Line"]},
            windows_left_out={"flat": 2},
            channels=["Fz"],
            bads=["Fz: flat"],
            bad_kinds=["flat"],
            amplitude_uv=None,
        )
        write_ledger(tmp_path / "ledger.parquet", [row])
        assert read_ledger(tmp_path) == [row] and row.category == "unit unknown"

    def test_set_aside_row_keeps_facts_about_the_recording(self, make_row) -> None:
        row = make_row("a", windows=9, seconds_written=9.0, split="train+val", sfreq=500.0)
        assert row.splits == ["train", "val"]
        row.set_aside("held back", Reason("held back", "x"), held_back="x")
        assert (row.windows, row.seconds_written, row.splits, row.reason) == (0, 0.0, [], "held back: x")
        assert row.sfreq == 500.0 and row.held_back == "x" and row.category == "held back"
        with pytest.raises(ValueError, match="lost"):
            row.set_aside("lost", Reason("x"))

    def test_recordings_and_hours_are_counted_by_status(self, make_row) -> None:
        rows = [make_row("a", seconds=3600.0), make_row("b", seconds=1800.0, status="held back", reason=Reason("x"))]
        counts, hours = count_by_status(rows)
        assert counts["found"] == 2 and counts["held back"] == 1 and hours["held back"] == 0.5 and hours["found"] == 1.5

    def test_windows_left_out_are_counted_by_reason(self, make_row) -> None:
        rows = [make_row("a", windows_left_out={"flat": 2}), make_row("b", windows_left_out={"flat": 1, "gap": 3})]
        assert count_windows_left_out(rows) == {"flat": 3, "gap": 3}


class TestOlderLedgers:
    def write(self, folder: Path, rows: list[LedgerRow], without: set[str]) -> None:
        table = pa.Table.from_pylist([row.to_columns() for row in rows], schema=schema())
        pq.write_table(table.drop_columns(sorted(without)), folder / "ledger.parquet")

    def test_columns_that_were_added_later_may_be_missing(self, make_row, tmp_path: Path) -> None:
        rows = [
            make_row("a", bads=["Fz: flat"], bad_kinds=["flat"]),
            make_row("b", status="duplicate", reason=Reason("duplicate", text="duplicate of a"), duplicate_of="a"),
            make_row("c", status="excluded", reason=Reason("too short", "0.45 s")),
        ]
        self.write(tmp_path, rows, {"reason_category", "bad_kinds"})
        old = read_ledger(tmp_path)
        assert [row.reason_category for row in old] == [None] * 3 and old[0].bad_kinds is None
        assert [row.category for row in old] == ["", "duplicate", "too short: 0.45 s"] and old[0].bads == ["Fz: flat"]
        self.write(tmp_path, rows, set(ADDED_LATER))
        oldest = read_ledger(tmp_path)[1]
        assert (oldest.segments, oldest.duplicate_of, oldest.reference) == (1, "", "")

    def test_missing_required_column_is_refused(self, make_row, tmp_path: Path) -> None:
        self.write(tmp_path, [make_row("a")], {"seconds"})
        with pytest.raises(RequestError, match="no column 'seconds'; run 'dreamscale shard'"):
            read_ledger(tmp_path)

    def test_damaged_ledger_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "ledger.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(RequestError, match=r"ledger\.parquet: damaged"):
            read_ledger(tmp_path)


def read_field_docstrings() -> dict[str, str]:
    """Read the docstring under each field of `LedgerRow`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(LedgerRow)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    pairs = [(a, b) for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    return {a.target.id: " ".join(b.value.value.split()) for a, b in pairs}  # type: ignore[attr-defined]


def test_documentation_lists_all_columns_with_type_and_meaning() -> None:
    text = DOCS.read_text()
    table = text[text.index("## Ledger") :].split("\n## ")[0]
    documented = [line for line in table.splitlines() if line.startswith("| `") and line.count("|") == 4]
    kinds = {"int64": "integer", "double": "number", "string": "text", "list<element: string>": "list of texts"}
    meanings = read_field_docstrings()
    wanted = []
    for field in schema():
        kind = "JSON" if field.name in JSON_COLUMNS else kinds[str(field.type).replace("item:", "element:")]
        wanted.append(f"| `{field.name}` | {kind} | {meanings[field.name].replace('``', '`')} |")
    assert tuple(schema().names) == COLUMNS
    assert [line for line in documented if line.split("`")[1] in COLUMNS] == wanted
    assert all(f"| `{status}` |" in table for status in STATUSES)
