"""What a dataset is made of: hours and recordings by corpus, and why the rest is not in it."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.dataset.ledger import COLUMNS, STATUSES, LedgerRow, count_windows_left_out, read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS

FLAGS = ("recordings", "markdown", "json")
"""Options that need no value."""


@dataclass(kw_only=True)
class InspectConfig:
    """Show hours and recordings of a dataset by corpus, channels, rate, status and reason."""

    dataset: str
    """Folder of the dataset."""
    recordings: bool = False
    """Show every recording, too."""
    recording: str = ""
    """Show one recording in full: its key, its path, or CORPUS/PATH."""
    json: bool = False
    """Print JSON: totals, or the recording."""
    markdown: bool = False
    """Print Markdown, with every recording, for pages such as docs/real_corpus.md."""


@dataclass(kw_only=True)
class Grid:
    """A table."""

    title: str
    """Above it, and its name in JSON."""
    head: list[str]
    """Names of the columns."""
    lines: list[list[str | int | float]]
    """Its cells; floats are hours."""

    def text(self) -> list[list[str]]:
        """Cells as they are printed."""
        return [[_text(cell) for cell in line] for line in self.lines]


def _text(cell: str | int | float) -> str:
    return (f"{cell:.1f}" if cell > 10 else f"{cell:.3f}") if isinstance(cell, float) else str(cell)


def _status_counts(rows: Iterable[LedgerRow], statuses: Sequence[str]) -> list[int]:
    count = Counter(row.status for row in rows)
    return [count[status] for status in statuses]


def _grouped(
    title: str,
    rows: Sequence[LedgerRow],
    value: Callable[[LedgerRow], Any],
    statuses: Sequence[str] = STATUSES,
) -> Grid:
    """Hours and recordings by a property, with a last line for all."""
    groups: defaultdict[Any, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        groups[value(row)].append(row)

    def line(name: str, group: Sequence[LedgerRow]) -> list[str | int | float]:
        found, written = sum(row.seconds for row in group) / 3600, sum(row.seconds_written for row in group) / 3600
        return [name, float(found), float(written), *_status_counts(group, statuses)]

    lines = [line(f"{v:g}" if isinstance(v, float) else str(v), groups[v]) for v in sorted(groups)]
    lines.append(line("all", rows))
    return Grid(title=title, head=[title, "hours found", "hours written", *statuses], lines=lines)


def _splits(rows: Sequence[LedgerRow], manifest: Manifest) -> Grid:
    lines: list[list[str | int | float]] = []
    for split in SPLITS:
        there = [row for row in rows if split in row.splits]
        people = {(row.corpus, row.subject) for row in there}
        shards = len(manifest.splits.get(split, []))
        lines.append([split, manifest.samples(split), shards, len(there), len(people)])
    return Grid(title="split", head=["split", "samples", "shards", "recordings", "subjects"], lines=lines)


def _reasons(rows: Sequence[LedgerRow]) -> Grid:
    count: Counter[tuple[str, str]] = Counter()
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        if row.reason:
            what = row.status, row.category
            count[what] += 1
            seconds[what] += row.seconds
    lines: list[list[str | int | float]] = [[*what, n, seconds[what] / 3600] for what, n in sorted(count.items())]
    return Grid(title="reasons", head=["status", "reason", "recordings", "hours"], lines=lines)


def _held_back(rows: Sequence[LedgerRow]) -> Grid:
    count = Counter(row.held_back or row.reason for row in rows if row.status == "held back")
    lines: list[list[str | int | float]] = [[name, number] for name, number in sorted(count.items())]
    return Grid(title="held back", head=["by", "recordings"], lines=lines)


def _left_out(rows: Sequence[LedgerRow]) -> Grid:
    found = sorted(count_windows_left_out(rows).items())
    return Grid(title="windows left out", head=["windows left out", "number"], lines=[[k, v] for k, v in found])


def _path(row: LedgerRow) -> str:
    return row.path if row.path.startswith(f"{row.corpus}/") else f"{row.corpus}/{row.path}"


def _recordings(rows: Sequence[LedgerRow]) -> Grid:
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
    """Row of a recording by its key or path.

    Parameters
    ----------
    rows : sequence of LedgerRow
        The ledger.
    name : str
        Key, path, or CORPUS/PATH.

    Returns
    -------
    LedgerRow
        Its row.

    Raises
    ------
    RequestError
        If there is none, or several have that path.
    """
    exact = [row for row in rows if row.key == name]
    found = exact or [row for row in rows if name in (row.path, f"{row.corpus}/{row.path}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"recording '{name}': {len(found)} have that path; use a key: {found[0].key} ...")
    near = [row.key for row in rows if name.lower() in f"{row.key} {_path(row)}".lower()][:5]
    hint = f"did you mean {', '.join(near)}?" if near else "'--recordings' lists them all"
    raise RequestError(f"recording '{name}': not in the ledger; {hint}")


def _in_full(row: LedgerRow) -> Grid:
    lines = []
    for name in COLUMNS:
        value = getattr(row, name)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = "; ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in value.items())
        lines.append([name, "" if value is None else str(value)])
    return Grid(title="recording", head=["column", "value"], lines=lines)


def _about(manifest: Manifest) -> str:
    spec = manifest.preprocess
    return (
        f"{spec.sfreq:g} Hz, {spec.highpass:g} to {spec.lowpass:g} Hz, windows of {spec.window_s:g} s; "
        + ", ".join(f"{manifest.samples(s)} {s}" for s in SPLITS)
        + " samples"
    )


def _show_markdown(grids: Iterable[Grid]) -> None:
    for grid in grids:
        lines = [grid.head, ["---"] * len(grid.head), *grid.text()]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        print(f"\n{text}")


def _show(grids: Iterable[Grid]) -> None:
    """Tables with frames on a terminal; aligned text without frames or line breaks elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    for grid in grids:
        lines = grid.text()
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
            # Brackets in names are names, no markup.
            table.add_row(*(cell.replace("[", "\\[") for cell in line))
        if terminal:
            Console(highlight=False).print(table)
            continue
        # As wide as it needs to be: what reads this cuts or searches lines.
        width = 20 + sum(max(map(len, column)) + 4 for column in zip(grid.head, *lines, strict=True))
        text = io.StringIO()
        Console(file=text, width=width, highlight=False).print(table)
        print("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _as_json(rows: Sequence[LedgerRow], manifest: Manifest, grids: Iterable[Grid]) -> str:
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


def _main(argv: list[str]) -> int:
    for flag in FLAGS:
        # A flag alone means yes.
        argv = [
            f"{word}=true" if word == f"--{flag}" and argv[i + 1 : i + 2] not in (["true"], ["false"]) else word
            for i, word in enumerate(argv)
        ]
    config = parse_config(InspectConfig, argv, prog="dreamscale inspect", positionals=("dataset",))
    manifest = Manifest.read(config.dataset)
    rows = read_ledger(config.dataset)
    if config.recording:
        row = find_recording(rows, config.recording)
        if config.json:
            print(json.dumps(row.to_columns(), indent=2))
        else:
            _show([_in_full(row)])
        return EXIT_DONE
    kept = [row for row in rows if row.status == "sharded"]
    corpora = _grouped("corpus", rows, lambda row: row.corpus)
    if config.markdown:
        print(_about(manifest))
        _show_markdown([corpora, _recordings(rows), *(g for g in [_left_out(rows)] if g.lines)])
        return EXIT_DONE
    grids = [
        corpora,
        _splits(rows, manifest),
        _grouped("channels kept", kept, lambda row: row.n_kept, ["sharded"]),
        _grouped("recorded Hz", kept, lambda row: row.sfreq, ["sharded"]),
        _reasons(rows),
        _held_back(rows),
        _left_out(rows),
        *([_recordings(rows)] if config.recordings else []),
    ]
    if config.json:
        print(_as_json(rows if config.recordings else [], manifest, grids))
        return EXIT_DONE
    print(f"Dataset {manifest.dataset_id[:16]}: {_about(manifest)}\n")
    _show(grid for grid in grids if grid.lines)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale inspect DATASET``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        0, or 2 where there is no complete dataset with a ledger, or no such recording.
    """
    try:
        return run_main(_main, argv)
    except BrokenPipeError:
        # Whoever reads, say `head`, has seen enough; without this the interpreter complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
