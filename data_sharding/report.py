"""The report of a dataset: one self-contained page with what was found, written and set aside."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_sharding.files import atomic_write_text
from data_sharding.ledger import STATUSES, short_reason
from data_sharding.manifest import Manifest
from data_sharding.splits import SPLITS

COLOURS = {"sharded": "#2a7f62", "duplicate": "#8d99ae", "quarantined": "#c44536", "excluded": "#e0a458"}
RECORDING_COLUMNS = (
    "corpus",
    "path",
    "format",
    "n_eeg",
    "n_kept",
    "sfreq",
    "seconds",
    "amplitude_uv",
    "status",
    "reason",
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; } td, th { padding: .25rem .7rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top; } td.n, th.n { text-align: right; } img { max-width: 100%; }
.s { border-radius: 3px; padding: 0 .4rem; color: #fff; } code { font-size: 13px; }
"""


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any, tag: str = "td") -> str:
        number = isinstance(value, int | float)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if text in COLOURS and tag == "td":
            return f'<td><span class="s" style="background:{COLOURS[text]}">{text}</span></td>'
        return f"<{tag}{' class=n' if number else ''}>{html.escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell(h, "th") for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell(v) for v in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _picture(rows: list[dict[str, Any]]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    kept = [row for row in rows if row["status"] == "sharded"]
    seconds = {s: sum(r["seconds"] for r in rows if r["status"] == s) / 3600 for s in STATUSES}
    names = ["found", *STATUSES]
    values = [sum(seconds.values()), *seconds.values()]
    bars = axes[0, 0].barh(names[::-1], values[::-1], color=["#444", *COLOURS.values()][::-1])
    axes[0, 0].bar_label(bars, fmt="%.3g h", padding=3)
    axes[0, 0].set_title("Hours found, and what became of them")
    axes[0, 0].margins(x=0.2)
    for axis, column, title in (
        (axes[0, 1], "n_kept", "Channels of sharded recordings"),
        (axes[1, 0], "sfreq", "Recorded at, Hz"),
    ):
        count = sorted(Counter(f"{row[column]:g}" for row in kept).items(), key=lambda pair: float(pair[0]))
        axis.bar([c[0] for c in count], [c[1] for c in count], color="#3d5a80")
        axis.set_title(title)
        axis.set_ylabel("recordings")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(axis="x", rotation=45)
    axis = axes[1, 1]
    for status in ("sharded", "duplicate", "quarantined"):
        found = [row["amplitude_uv"] for row in rows if row["status"] == status and row["amplitude_uv"]]
        axis.scatter(found, [status] * len(found), color=COLOURS[status], alpha=0.7)
    axis.set_xscale("log")
    axis.axvspan(0.2, 500, color="#2a7f62", alpha=0.1)
    axis.set_title("Amplitude 1 to 40 Hz, µV (shaded: plausible)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def write_report(path: str | Path, rows: list[dict[str, Any]], manifest: Manifest) -> None:
    """Write the report.

    Parameters
    ----------
    path : str or Path
        The page.
    rows : list of dict
        The ledger.
    manifest : Manifest
        The dataset's manifest.
    """
    corpora: defaultdict[str, Counter[str]] = defaultdict(Counter)
    hours: Counter[str] = Counter()
    for row in rows:
        corpora[row["corpus"]][row["status"]] += 1
        hours[row["corpus"]] += row["seconds_written"] / 3600
    reasons = Counter((row["status"], short_reason(row["reason"])) for row in rows if row["reason"])
    spec = manifest.preprocess
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Dataset report</title>",
        f"<style>{STYLE}</style><h1>Dataset report</h1>",
        f"<p>Dataset <code>{manifest.dataset_id[:16]}</code>: {manifest.counts['sharded']} of "
        f"{manifest.counts['found']} recordings, "
        f"{manifest.hours['written']:.3f} hours in windows of {spec.window_s:g} s at {spec.sfreq:g} Hz, "
        f"{spec.highpass:g} to {spec.lowpass:g} Hz.</p>",
        f'<img alt="Hours, channels, rates and amplitudes" src="data:image/png;base64,{_picture(rows)}">',
        "<h2>Splits</h2>",
        _table(
            ["split", "samples", "shards", "subjects"],
            [
                [
                    split,
                    manifest.samples(split),
                    len(manifest.splits.get(split, [])),
                    len({r["subject"] for r in rows if split in r["split"].split("+")}),
                ]
                for split in SPLITS
            ],
        ),
        "<h2>Corpora</h2>",
        _table(
            ["corpus", "hours written", *STATUSES],
            [[name, float(hours[name]), *(count[s] for s in STATUSES)] for name, count in sorted(corpora.items())],
        ),
        "<h2>Reasons</h2>",
        _table(["status", "reason", "recordings"], [[s, why, n] for (s, why), n in sorted(reasons.items())]),
        "<h2>Windows left out</h2>",
        _table(
            ["reason", "windows"],
            [
                [k.removeprefix("left out: "), v]
                for k, v in sorted(manifest.counts.items())
                if k.startswith("left out: ")
            ],
        ),
        "<h2>Recordings</h2>",
        _table(
            ["corpus", "path", "format", "EEG", "kept", "Hz", "s", "µV", "status", "reason"],
            [["" if r[name] is None else r[name] for name in RECORDING_COLUMNS] for r in rows[:500]],
        ),
        f"<p>The first 500 of {len(rows)}; the rest is in ledger.parquet.</p>" if len(rows) > 500 else "",
        "</html>",
    ]
    atomic_write_text(path, "\n".join(parts))
