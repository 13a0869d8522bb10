"""The progress display of a job."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from data_sharding.common.progress import JobProgress, progress


def test_figures_count_recordings_hours_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("data_sharding.common.progress.time.monotonic", lambda: now[0])
    shown = JobProgress({"a": 10, "b": 20, "c": 30, "d": 40})
    assert shown.figures()["left"] == "?"
    shown.add("a", "sharded", seconds=3600.0, channels=64, from_earlier_run=True)
    now[0] += 50
    shown.add("b", "sharded", seconds=3600.0, channels=64)
    shown.add("c", "quarantined", seconds=0.0, channels=0)
    shown.running = 1
    figures = shown.figures()
    assert figures["recordings"] == "3/4 (1 from an earlier run)" and figures["set aside"] == "1 quarantined"
    # 50 bytes were read in 50 s and 40 bytes are left. The speed excludes recordings of an earlier run.
    assert figures["left"] == "0:00:40" and figures["elapsed"] == "0:00:50"
    assert figures["hours"] == "2.00" and figures["channel-hours/s"] == f"{64 / 50:.2f}" and figures["in flight"] == "1"


def test_log_gets_one_line_at_each_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("data_sharding.common.progress.time.monotonic", lambda: now[0])
    with JobProgress({"a": 1, "b": 1}, every_s=10.0) as shown:
        for _ in range(100):
            now[0] += 0.5
            shown.look(2)
        shown.add("a", "sharded", seconds=3600.0, channels=64)
        shown.add("b", "sharded", seconds=3600.0, channels=64)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 + 1 and lines[-1].startswith("reading: recordings 2/2") and "in flight 2" in lines[0]


def test_terminal_shows_all_figures_in_a_table() -> None:
    shown = JobProgress({"a": 1, "b": 1})
    shown.add("a", "excluded", seconds=3600.0, channels=64)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(shown._table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(title in text for title in shown.figures()) and "1/2" in text and "1 excluded" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_names_of_files_cannot_change_a_terminal(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with progress("reading [/red]\x1b]0;title\x07", 2) as advance:
        advance(2, note="[bold]a.edf\x9b2J\u202e")
    output = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "reading [/red]\\x1b]0;title\\x07" in output and "[bold]a.edf\\x9b2J\\u202e" in output
    assert not {"\x1b]", "\x07", "\x9b", "\u202e"} & {*output, *(output[i : i + 2] for i in range(len(output)))}
