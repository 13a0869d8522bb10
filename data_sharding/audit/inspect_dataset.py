"""``dreamscale inspect``: show the recordings and hours of a dataset, and why other recordings are left out."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, one_line, printable
from data_sharding.dataset.ledger import COLUMNS, STATUSES, LedgerRow, count_windows_left_out, read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS

FLAGS = ("recordings", "markdown", "json")
"""Command-line options whose value may be left out. Without a value, the option is true."""
MOST_VALUES = 8
"""The table about people shows at most this many values of each property."""


@dataclass(kw_only=True)
class InspectConfig:
    """Show the hours and recordings of a dataset by corpus, number of channels, sampling rate, status and reason."""

    dataset: str
    """Folder of the dataset."""
    recordings: bool = False
    """Also show a table of all recordings."""
    recording: str = ""
    """Key, path or CORPUS/PATH of a recording. Show all ledger columns of this recording."""
    json: bool = False
    """Print JSON instead of tables."""
    markdown: bool = False
    """Print tables in Markdown, with a table of all recordings, for pages such as docs/real_corpus.md."""


@dataclass(kw_only=True)
class Grid:
    """Table that ``dreamscale inspect`` prints."""

    title: str
    """Title above the table. In JSON, this title is the key of the table."""
    head: list[str]
    """Names of the columns."""
    lines: list[list[str | int | float]]
    """Cells of each line of the table. A float is a duration in hours."""

    def to_text(self) -> list[list[str]]:
        """Format all cells of the table as text."""
        return [[_format_cell(cell) for cell in line] for line in self.lines]


def _format_cell(cell: str | int | float) -> str:
    if isinstance(cell, float):
        return f"{cell:.1f}" if cell > 10 else f"{cell:.3f}"
    return printable(one_line(cell))


def _status_counts(rows: Iterable[LedgerRow], statuses: Sequence[str]) -> list[int]:
    count = Counter(row.status for row in rows)
    return [count[status] for status in statuses]


def _make_group_grid(
    title: str,
    rows: Sequence[LedgerRow],
    value: Callable[[LedgerRow], Any],
    statuses: Sequence[str] = STATUSES,
) -> Grid:
    """Make a table of hours and recordings.

    The ledger rows for which the function `value` returns the same result form one line of the table. The last line is
    the sum of all lines.
    """
    groups: defaultdict[Any, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        groups[value(row)].append(row)

    def line(name: str, group: Sequence[LedgerRow]) -> list[str | int | float]:
        found, written = sum(row.seconds for row in group) / 3600, sum(row.seconds_written for row in group) / 3600
        return [name, float(found), float(written), *_status_counts(group, statuses)]

    lines = [line(f"{v:g}" if isinstance(v, float) else str(v), groups[v]) for v in sorted(groups)]
    lines.append(line("all", rows))
    return Grid(title=title, head=[title, "hours found", "hours written", *statuses], lines=lines)


def _make_split_grid(rows: Sequence[LedgerRow], manifest: Manifest) -> Grid:
    lines: list[list[str | int | float]] = []
    for split in SPLITS:
        there = [row for row in rows if split in row.splits]
        people = {(row.corpus, row.subject) for row in there if row.has_subject}
        recognised = {(row.corpus, row.subject) for row in there if row.subject_from == "recognised"}
        unknown = sum(not row.has_subject for row in there)
        shards = len(manifest.splits.get(split, []))
        lines.append([split, manifest.samples(split), shards, len(there), len(people), len(recognised), unknown])
    head = ["split", "samples", "shards", "recordings", "subjects", "not confirmed", "subject unknown"]
    return Grid(title="split", head=head, lines=lines)


def _make_people_grid(rows: Sequence[LedgerRow]) -> Grid:
    """Make a table of the people, devices, tasks and licences of the recordings in the dataset."""
    lines: list[list[str | int | float]] = []
    for name in ("subject_from", "sex", "group", "age", "recording_year", "device", "task", "license"):
        values = Counter(_describe_value(name, getattr(row, name)) for row in rows)
        if set(values) == {"unknown"} and name != "license":
            continue
        shown = sorted(values.items(), key=lambda pair: (pair[0] == "unknown", -pair[1], pair[0]))
        lines += [[name.replace("_", " "), value, number] for value, number in shown[:MOST_VALUES]]
        if len(shown) > MOST_VALUES:
            lines.append([name.replace("_", " "), "other values", sum(number for _, number in shown[MOST_VALUES:])])
    return Grid(title="people", head=["about", "value", "recordings"], lines=lines)


def _describe_value(name: str, value: Any) -> str:
    if value is None or value == "":
        return "unknown"
    if name == "age":
        decade = 10 * int(value // 10)
        return "90 or older" if decade >= 90 else f"{decade} to {decade + 9}"
    return str(value)


def _make_reason_grid(rows: Sequence[LedgerRow]) -> Grid:
    count: Counter[tuple[str, str]] = Counter()
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        if row.reason:
            what = row.status, row.category
            count[what] += 1
            seconds[what] += row.seconds
    lines: list[list[str | int | float]] = [[*what, n, seconds[what] / 3600] for what, n in sorted(count.items())]
    return Grid(title="reasons", head=["status", "reason", "recordings", "hours"], lines=lines)


def _make_held_back_grid(rows: Sequence[LedgerRow]) -> Grid:
    count = Counter(row.held_back or row.reason for row in rows if row.status == "held back")
    lines: list[list[str | int | float]] = [[name, number] for name, number in sorted(count.items())]
    return Grid(title="held back", head=["by", "recordings"], lines=lines)


def _make_left_out_grid(rows: Sequence[LedgerRow]) -> Grid:
    found = sorted(count_windows_left_out(rows).items())
    return Grid(title="windows left out", head=["windows left out", "number"], lines=[[k, v] for k, v in found])


def _path(row: LedgerRow) -> str:
    return row.path if row.path.startswith(f"{row.corpus}/") else f"{row.corpus}/{row.path}"


def _make_recordings_grid(rows: Sequence[LedgerRow]) -> Grid:
    lines = []
    for row in rows:
        eeg = f"{row.n_kept} of {row.n_eeg}" if row.n_kept != row.n_eeg and row.n_kept else str(row.n_eeg or "")
        amplitude = "" if row.amplitude_uv is None else f"{row.amplitude_uv:.3g}"
        rate = f"{row.sfreq:g}" if row.sfreq else ""
        length = f"{row.seconds:.1f}" if row.sfreq else ""
        bads = str(len(row.bads)) if row.n_kept else ""
        line = "" if row.line_freq is None else f"{row.line_freq:g}"
        values = [_path(row), row.format, eeg, bads, rate, length, amplitude, line]
        lines.append([*values, str(row.windows or ""), row.status, row.reason])
    head = ["recording", "format", "EEG", "bad", "Hz", "s", "µV", "mains", "windows", "status", "reason"]
    return Grid(title="recordings", head=head, lines=lines)


def find_recording(rows: Sequence[LedgerRow], name: str) -> LedgerRow:
    """Find the ledger row of a recording by key or path.

    Parameters
    ----------
    rows : sequence of LedgerRow
        Rows of the ledger.
    name : str
        Key of the recording, path of the recording, or CORPUS/PATH.

    Returns
    -------
    LedgerRow
        Ledger row of the recording.

    Raises
    ------
    RequestError
        If no recording has this key or path, or if several recordings have this path.
    """
    exact = [row for row in rows if row.key == name]
    found = exact or [row for row in rows if name in (row.path, f"{row.corpus}/{row.path}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"recording '{name}': {len(found)} recordings have this path; use a key, such as {found[0].key}"
        )
    near = [row.key for row in rows if name.lower() in f"{row.key} {_path(row)}".lower()][:5]
    hint = f"did you mean {', '.join(near)}?" if near else "use --recordings to list all recordings"
    raise RequestError(f"recording '{name}': not in the ledger; {hint}")


def _make_recording_grid(row: LedgerRow) -> Grid:
    lines = []
    for name in COLUMNS:
        value = getattr(row, name)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = "; ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in value.items())
        lines.append([name, "" if value is None else str(value)])
    return Grid(title="recording", head=["column", "value"], lines=lines)


def _describe(manifest: Manifest) -> str:
    spec = manifest.preprocess
    return (
        f"{spec.sfreq:g} Hz, {spec.highpass:g} to {spec.lowpass:g} Hz, windows of {spec.window_s:g} s; "
        + ", ".join(f"{manifest.samples(s)} {s}" for s in SPLITS)
        + " samples"
    )


def _print_markdown(grids: Iterable[Grid]) -> None:
    for grid in grids:
        lines = [grid.head, ["---"] * len(grid.head), *grid.to_text()]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        print(f"\n{text}")


def _print_tables(grids: Iterable[Grid]) -> None:
    """Print tables.

    On a terminal, the tables have frames. If the output goes to a pipe or a file, the tables are plain aligned text,
    which other programs can read.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    for grid in grids:
        lines = grid.to_text()
        table = Table(
            title=None if grid.title == grid.head[0] else grid.title.capitalize(),
            title_justify="left",
            box=box.ROUNDED if terminal else None,
            pad_edge=terminal,
        )
        for number, name in enumerate(grid.head):
            cells = [line[number] for line in lines]
            right = number > 0 and all(cell.replace(".", "", 1).isdigit() or not cell for cell in cells)
            table.add_column(name, overflow="fold", justify="right" if right else "left")
        for line in lines:
            # Escape brackets in names, because rich interprets them as markup.
            table.add_row(*(cell.replace("[", "\\[") for cell in line))
        if terminal:
            Console(highlight=False).print(table)
            continue
        # Use a large width, so that rich does not break lines, because other programs may read the output line by line.
        width = 20 + sum(max(map(len, column)) + 4 for column in zip(grid.head, *lines, strict=True))
        text = io.StringIO()
        Console(file=text, width=width, highlight=False).print(table)
        print("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _to_json(rows: Sequence[LedgerRow], manifest: Manifest, grids: Iterable[Grid]) -> str:
    values = {
        "dataset_id": manifest.dataset_id,
        "preprocess": manifest.preprocess.to_dict(),
        "counts": manifest.counts,
        "hours": manifest.hours,
        "corpora": manifest.extra.get("corpora", []),
        **{
            g.title: [dict(zip(g.head, line, strict=True)) for line in g.lines]
            for g in grids
            if g.title != "recordings"
        },
    }
    return json.dumps(values | {"recordings": [row.to_columns() for row in rows]}, indent=2)


def inspect(config: InspectConfig) -> int:
    """Print the tables of a dataset.

    Parameters
    ----------
    config : InspectConfig
        Options of the command.

    Returns
    -------
    int
        Exit code, always 0.

    Raises
    ------
    RequestError
        If the folder is not a complete dataset with a ledger, or if the requested recording does not exist.
    """
    manifest = Manifest.read(config.dataset)
    rows = read_ledger(config.dataset)
    if config.recording:
        row = find_recording(rows, config.recording)
        if config.json:
            print(json.dumps(row.to_columns(), indent=2))
        else:
            _print_tables([_make_recording_grid(row)])
        return EXIT_DONE
    kept = [row for row in rows if row.status == "sharded"]
    corpora = _make_group_grid("corpus", rows, lambda row: row.corpus)
    if config.markdown:
        print(_describe(manifest))
        _print_markdown([corpora, _make_recordings_grid(rows), *(g for g in [_make_left_out_grid(rows)] if g.lines)])
        return EXIT_DONE
    grids = [
        corpora,
        _make_split_grid(rows, manifest),
        _make_group_grid("channels kept", kept, lambda row: row.n_kept, ["sharded"]),
        _make_group_grid("recorded Hz", kept, lambda row: row.sfreq, ["sharded"]),
        _make_reason_grid(rows),
        _make_held_back_grid(rows),
        _make_people_grid(kept),
        _make_left_out_grid(rows),
        *([_make_recordings_grid(rows)] if config.recordings else []),
    ]
    if config.json:
        print(_to_json(rows if config.recordings else [], manifest, grids))
        return EXIT_DONE
    version = f", version {manifest.version}" if manifest.version > 1 else ""
    print(f"Dataset {manifest.dataset_id[:16]}{version}: {_describe(manifest)}\n")
    _print_tables(grid for grid in grids if grid.lines)
    print("next: --recordings lists all recordings, --recording NAME shows one recording; report.html has charts")
    return EXIT_DONE


_command = command(InspectConfig, inspect, prog="dreamscale inspect", positionals=("dataset",))


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale inspect DATASET`` and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for flag in FLAGS:
        words = [
            f"{word}=true" if word == f"--{flag}" and words[i + 1 : i + 2] not in (["true"], ["false"]) else word
            for i, word in enumerate(words)
        ]
    try:
        return _command(words)
    except BrokenPipeError:
        # The program that reads the output (for example `head`) has closed the pipe. Redirect the output to /dev/null,
        # because otherwise Python prints an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
