"""What a dataset is made of: hours and recordings by corpus, and why the rest is not in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from data_sharding.config import parse_config
from data_sharding.errors import EXIT_DONE, run_main
from data_sharding.ledger import STATUSES, read_ledger, short_reason
from data_sharding.manifest import Manifest
from data_sharding.splits import SPLITS


@dataclass(kw_only=True)
class InspectConfig:
    """Show hours and recordings of a dataset by corpus, status and reason."""

    dataset: str
    """Folder of the dataset."""
    recordings: bool = False
    """Show every recording, too."""
    markdown: bool = False
    """Print Markdown, with every recording, for pages such as docs/real_corpus.md."""


def _by_corpus(rows: list[dict[str, Any]]) -> list[list[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    found_s: Counter[str] = Counter()
    written_s: Counter[str] = Counter()
    for row in rows:
        counts[row["corpus"]][row["status"]] += 1
        found_s[row["corpus"]] += row["seconds"]
        written_s[row["corpus"]] += row["seconds_written"]
    out = []
    for name, count in sorted(counts.items()):
        out.append([name, _hours(found_s[name]), _hours(written_s[name]), *(str(count[s]) for s in STATUSES)])
    total = Counter(row["status"] for row in rows)
    out.append(["all", _hours(found_s.total()), _hours(written_s.total()), *(str(total[s]) for s in STATUSES)])
    return out


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f}" if seconds > 36000 else f"{seconds / 3600:.3f}"


def _recordings(rows: list[dict[str, Any]]) -> list[list[str]]:
    out = []
    for row in rows:
        eeg = (
            f"{row['n_kept']} of {row['n_eeg']}"
            if row["n_kept"] != row["n_eeg"] and row["n_kept"]
            else str(row["n_eeg"] or "")
        )
        amplitude = "" if row["amplitude_uv"] is None else f"{row['amplitude_uv']:.3g}"
        rate = f"{row['sfreq']:g}" if row["sfreq"] else ""
        length = f"{row['seconds']:.1f}" if row["sfreq"] else ""
        path = row["path"] if row["path"].startswith(f"{row['corpus']}/") else f"{row['corpus']}/{row['path']}"
        bads = str(len(row["bads"])) if row["n_kept"] else ""
        line = "" if row["line_freq"] is None else f"{row['line_freq']:g}"
        values = [path, row["format"], eeg, bads, rate, length, amplitude, line]
        out.append([*values, str(row["windows"] or ""), row["status"], row["reason"]])
    return out


CORPUS_HEAD = ["corpus", "hours found", "hours written", *STATUSES]
RECORDING_HEAD = ["recording", "format", "EEG", "bad", "Hz", "s", "µV", "mains", "windows", "status", "reason"]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _main(argv: list[str]) -> int:
    for flag in ("--recordings", "--markdown"):
        # A flag alone means yes.
        argv = [
            f"{word}=true" if word == flag and argv[i + 1 : i + 2] not in (["true"], ["false"]) else word
            for i, word in enumerate(argv)
        ]
    config = parse_config(InspectConfig, argv, prog="dreamscale inspect", positionals=("dataset",))
    manifest = Manifest.read(config.dataset)
    rows = read_ledger(config.dataset)
    spec = manifest.preprocess
    about = (
        f"{spec.sfreq:g} Hz, {spec.highpass:g} to {spec.lowpass:g} Hz, windows of {spec.window_s:g} s; "
        + ", ".join(f"{manifest.samples(s)} {s}" for s in SPLITS)
        + " samples"
    )
    reasons = Counter((row["status"], short_reason(row["reason"])) for row in rows if row["reason"])
    table = [[status, why, str(number)] for (status, why), number in sorted(reasons.items())]
    left_out = [
        [k.removeprefix("left out: "), str(v)] for k, v in sorted(manifest.counts.items()) if k.startswith("left out: ")
    ]
    if config.markdown:
        parts = [
            about,
            _markdown(CORPUS_HEAD, _by_corpus(rows)),
            _markdown(RECORDING_HEAD, _recordings(rows)),
        ]
        if left_out:
            parts.append(_markdown(["windows left out", "number"], left_out))
        print("\n\n".join(parts))
        return EXIT_DONE
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(title: str, head: list[str], lines: list[list[str]]) -> None:
        grid = Table(title=title, title_justify="left")
        for name in head:
            grid.add_column(name, overflow="fold")
        for line in lines:
            grid.add_row(*line)
        console.print(grid)

    console.print(f"Dataset {manifest.dataset_id[:16]}: {about}")
    show("Corpora", CORPUS_HEAD, _by_corpus(rows))
    if table:
        show("Reasons", ["status", "reason", "recordings"], table)
    if left_out:
        show("Windows left out", ["reason", "windows"], left_out)
    if config.recordings:
        show("Recordings", RECORDING_HEAD, _recordings(rows))
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
        0, or 2 where there is no complete dataset with a ledger.
    """
    return run_main(_main, argv)
