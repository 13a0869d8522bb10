"""The report of a dataset: one self-contained page with what was found, written and set aside, and why."""

from __future__ import annotations

import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from data_sharding.audit.report_figures import (
    COLOURS,
    CORPORA,
    funnel,
    hours_text,
    overview,
    sample_windows,
    spectra,
    traces,
)
from data_sharding.common.files import atomic_write_text
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.dataset.ledger import STATUSES, short_reason
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS

TOP = 40
"""Most lines of a table; what is left is counted."""
CORPORA_LISTED = 25
RECORDINGS = 200
"""Most recordings that are listed."""
EXAMPLES = 3
"""Recordings named for a reason."""
COLUMNS = ("format", "n_eeg", "n_kept", "sfreq", "seconds", "amplitude_uv", "status", "reason")
"""Of the list of recordings."""
STYLE = """
:root { color-scheme: light; } * { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; max-width: 80rem; margin: 2rem auto;
padding: 0 1.2rem; color: #1f2430; background: #fff; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-bottom: .25rem;
border-bottom: 2px solid #e6e8ee; } p.lead { font-size: 1.05rem; max-width: 52rem; } p.note { color: #5b6270;
font-size: 13px; margin: .3rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { border: 1px solid #e6e8ee; border-radius: 8px; padding: .6rem .9rem; } .card b { display: block;
font-size: 1.35rem; line-height: 1.3; } .card span { color: #5b6270; font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-size: 13.5px; }
td, th { padding: .28rem .65rem .28rem 0; text-align: left; border-bottom: 1px solid #eceef3; vertical-align: top; }
th { color: #5b6270; font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right;
font-variant-numeric: tabular-nums; white-space: nowrap; } td.k { white-space: nowrap; }
td.w { overflow-wrap: anywhere; min-width: 9rem; }
tr.all td { font-weight: 600; border-top: 2px solid #c9cdd8; } img { max-width: 100%; height: auto; }
.s { border-radius: 4px; padding: .05rem .45rem; color: #fff; white-space: nowrap; font-size: 12.5px; }
.warn { border-left: 4px solid #c44536; background: #fdf3f1; padding: .5rem .9rem; margin: .5rem 0;
border-radius: 4px; }
.ok { border-left-color: #2a7f62; background: #f0f7f4; }
code, pre { font-size: 12.5px; } pre { background: #f6f7fa; padding: .7rem; overflow-x: auto; }
summary { cursor: pointer; color: #3d5a80; } nav a { margin-right: 1rem; color: #3d5a80; font-size: 13.5px; }
"""


class _Hours(float):
    """Hours, shown with a unit that suits them."""


def _cell(value: Any, column: str = "") -> str:
    if value is None or value == "":
        return "<td></td>"
    if isinstance(value, _Hours):
        return f"<td class=n>{hours_text(value)}</td>"
    if isinstance(value, int | float):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f"<td class=n>{text}</td>"
    text = str(value)
    if column == "status" and text in STATUSES:
        return f'<td><span class="s" style="background:{COLOURS[text]}">{text}</span></td>'
    return f"<td class={'w' if len(text) > 24 else 'k'}>{html.escape(text)}</td>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, total: Sequence[Any] | None = None, most: int = TOP
) -> str:
    """Table with numbers to the right."""
    rows = list(rows)
    shown = rows[:most]
    number = [bool(shown) and all(isinstance(r[i], int | float | None) for r in shown) for i in range(len(head))]
    names = (f"<th{' class=n' if right else ''}>{html.escape(h)}</th>" for h, right in zip(head, number, strict=True))
    lines = [f"<tr>{''.join(names)}</tr>", *(f"<tr>{''.join(map(_cell, row, head))}</tr>" for row in shown)]
    if total is not None:
        lines.append(f"<tr class=all>{''.join(map(_cell, total))}</tr>")
    more = f"<p class=note>... and {len(rows) - most:,} more.</p>" if len(rows) > most else ""
    return f"<div class=scroll><table>{''.join(lines)}</table></div>{more}"


def _section(title: str, *parts: str) -> str:
    """Section with an anchor; nothing where there is no content."""
    body = "\n".join(part for part in parts if part)
    return f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>\n{body}' if body else ""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def _image(url: str, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="{url}">'


def _known_people(rows: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["corpus"], row["subject"]) for row in rows if row["subject"] and row["subject"] != row["key"]}


def _cards(rows: Sequence[dict[str, Any]], manifest: Manifest) -> str:
    kept = [row for row in rows if row["status"] == "sharded"]
    unnamed = sum(row["subject"] == row["key"] for row in kept)
    values = [
        (hours_text(manifest.hours["written"]), f"of EEG written, of {hours_text(manifest.hours['found'])} found"),
        (f"{len(kept):,}", f"of {len(rows):,} recordings sharded"),
        (f"{len(_known_people(kept)):,}", "subjects" + (f", and {unnamed:,} recordings unnamed" if unnamed else "")),
        (f"{len({r['corpus'] for r in kept}):,}", "corpora"),
        (f"{sum(manifest.samples(s) for s in SPLITS):,}", "samples in train, val and test"),
    ]
    if manifest.labels:
        values.append((f"{len(manifest.labels):,}", "image labels"))
    cards = (f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>" for v, t in values)
    return f"<div class=cards>{''.join(cards)}</div>"


def _corpora_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What the corpora say about their design, by name."""
    listed = manifest.extra.get("corpora") or []
    if isinstance(listed, dict):
        listed = [{"name": name, **value} for name, value in listed.items()]
    return {entry.get("name", ""): entry for entry in listed}


def warnings_of(rows: Sequence[dict[str, Any]], manifest: Manifest) -> list[str]:
    """What a reader must know before believing results on this dataset.

    Parameters
    ----------
    rows : sequence of dict
        The ledger.
    manifest : Manifest
        The dataset's manifest.

    Returns
    -------
    list of str
        Sentences; empty where there is nothing to warn of.
    """
    out = []
    for name, entry in sorted(_corpora_of(manifest).items()):
        if entry.get("design") == "block":
            out.append(
                f"{name}: block design. Trials of one class were shown together, so that slow drift alone tells the "
                f"class, and a split by image does not undo it. {entry.get('evidence', '')}".strip()
            )
    kept = [row for row in rows if row["status"] == "sharded"]
    unnamed = sum(row["subject"] == row["key"] for row in kept)
    if unnamed and any(manifest.samples(split) for split in ("val", "test")):
        out.append(
            f"Of {unnamed:,} of {len(kept):,} recordings nobody says whose they are: each counts as a subject of its "
            "own, and one person may stand on both sides of a split (subject_pattern names them)."
        )
    for split in ("val", "test"):
        if not manifest.samples(split):
            out.append(f"The {split} split is empty.")
    found = len(rows)
    quarantined = sum(row["status"] == "quarantined" for row in rows)
    if quarantined > 0.05 * found:
        out.append(f"{quarantined:,} of {found:,} recordings ({100 * quarantined / found:.1f} %) are quarantined.")
    bare = sum(row["montage_confidence"] < 0.5 for row in kept)
    if bare:
        out.append(f"{bare:,} recordings have positions for less than half of their channels.")
    return out


def _range(values: Iterable[float]) -> str:
    """One or two values as they are, more as a range."""
    found = sorted(set(values))
    if len(found) < 3:
        return ", ".join(f"{v:g}" for v in found)
    return f"{found[0]:g} to {found[-1]:g}"


def _corpora(rows: Sequence[dict[str, Any]], manifest: Manifest) -> str:
    designs = _corpora_of(manifest)
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["corpus"]].append(row)

    def line(name: str, group: Sequence[dict[str, Any]]) -> list[Any]:
        kept = [row for row in group if row["status"] == "sharded"]
        status = Counter(row["status"] for row in group)
        entry = designs.get(name, {})
        return [
            name,
            ", ".join(x for x in (entry.get("kind", ""), entry.get("design", "")) if x and x != "unknown"),
            len(_known_people(kept)) or None,
            len({(row["corpus"], row["subject"], row["session"]) for row in kept if row["session"]}) or None,
            _Hours(sum(row["seconds"] for row in group) / 3600),
            _Hours(sum(row["seconds_written"] for row in group) / 3600),
            _range(row["n_kept"] for row in kept),
            _range(row["sfreq"] for row in kept),
            *(status[s] or None for s in STATUSES),
        ]

    head = ["corpus", "kind", "subjects", "sessions", "found", "written", "channels", "Hz", *STATUSES]
    lines = sorted((line(name, group) for name, group in groups.items()), key=lambda x: (-x[5], x[0]))
    total = line("all", rows)
    if not any(line[1] for line in lines):
        head, total = head[:1] + head[2:], total[:1] + total[2:]
        lines = [line[:1] + line[2:] for line in lines]
    return _table(head, lines, total=total, most=CORPORA_LISTED)


def _splits(rows: Sequence[dict[str, Any]], manifest: Manifest) -> str:
    spec = manifest.preprocess
    of_split: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for split in row["split"].split("+") if row["split"] else ():
            of_split[split].append(row)
    lines = []
    for split in SPLITS:
        there = of_split[split]
        unnamed = sum(row["subject"] == row["key"] for row in there)
        samples = manifest.samples(split)
        lines.append(
            [
                split,
                samples,
                _Hours(samples * spec.window_s / 3600),
                len(manifest.splits.get(split, [])),
                len(there),
                len(_known_people(there)),
                unnamed,
                len({(row["corpus"], row["subject"], row["session"]) for row in there if row["session"]}),
            ]
        )
    head = ["split", "samples", "in windows", "shards", "recordings", "subjects", "unnamed recordings", "sessions"]
    sets = {split: _known_people(of_split[split]) for split in SPLITS}
    crossing = (sets["train"] & sets["val"]) | (sets["train"] & sets["test"]) | (sets["val"] & sets["test"])
    if crossing:
        words = f"{len(crossing):,} subjects stand in several splits: this dataset is split within subjects."
        return f"{_table(head, lines)}<p class=warn>{words}</p>"
    return f"{_table(head, lines)}<p class='warn ok'>No subject stands in two splits.</p>"


def _reasons(rows: Sequence[dict[str, Any]]) -> str:
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] != "sharded":
            groups[row["status"], short_reason(row["reason"])].append(row)
    lines = []
    for (status, why), group in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        names = ", ".join(_path(row) for row in group[:EXAMPLES])
        more = f" and {len(group) - EXAMPLES:,} more" if len(group) > EXAMPLES else ""
        hours = _Hours(sum(row["seconds"] for row in group) / 3600)
        lines.append([status, why, len(group), hours or None, group[0]["reason"], names + more])
    head = ["status", "reason", "recordings", "length", "for example", "which"]
    note = "<p class=note>Recordings that could not be opened have no length.</p>"
    return _table(head, lines) + note if lines else "<p>Nothing was set aside.</p>"


def _path(row: dict[str, Any]) -> str:
    return row["path"] if row["path"].startswith(f"{row['corpus']}/") else f"{row['corpus']}/{row['path']}"


def _held_back(rows: Sequence[dict[str, Any]], manifest: Manifest) -> str:
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "held back":
            groups[row["held_back"] or short_reason(row["reason"])].append(row)
    lines = [
        [name, len(group), len(_known_people(group)), _Hours(sum(row["seconds"] for row in group) / 3600)]
        for name, group in sorted(groups.items())
    ]
    asked = manifest.config.get("hold_back") or {}
    words = ", ".join(f"{len(v)} {k}" for k, v in asked.items() if v)
    note = f"<p class=note>The request holds back: {html.escape(words)}.</p>" if words else ""
    return (_table(["held back by", "recordings", "subjects", "length"], lines) if lines else "") + note


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    """Units, mains, montages and references of what was written."""
    kept = [row for row in rows if row["status"] == "sharded"]
    parts = []
    columns = (
        ("unit", lambda r: r["unit"]),
        ("factor to volts", lambda r: None if r["unit_factor"] is None else f"{r['unit_factor']:g}"),
        (
            "mains",
            lambda r: f"{r['line_freq']:g} Hz ({r['line_freq_from']})" if r["line_freq"] else r["line_freq_from"],
        ),
        ("montage", lambda r: r["montage"]),
        ("selection of channels", lambda r: r["channel_selection"]),
        ("reference as recorded", lambda r: r["reference"]),
    )
    for name, value in columns:
        count = Counter(str(value(row) or "not said") for row in kept)
        words = ", ".join(f"{what}: {number:,}" for what, number in count.most_common(6))
        parts.append([name, words + (f", and {len(count) - 6:,} others" if len(count) > 6 else "")])
    bad = Counter(word.rpartition(": ")[2] for row in kept for word in row["bads"])
    channels = sum(row["n_kept"] for row in kept)
    words = ", ".join(f"{what}: {number:,}" for what, number in bad.most_common(6)) or "none"
    parts.append(["bad channels", f"{words} (of {channels:,})"])
    return _table(["measured", "recordings"], parts)


def write_report(
    path: str | AnyPath, rows: Sequence[dict[str, Any]], manifest: Manifest, *, root: AnyPath | None = None
) -> None:
    """Write the report.

    Parameters
    ----------
    path : str, Path or UPath
        The page.
    rows : sequence of dict
        The ledger.
    manifest : Manifest
        The dataset's manifest.
    root : Path or UPath, optional
        Where the shards are; by default the page's folder. Without them spectra and traces are left out, and the page
        says so.
    """
    root = as_path(path).parent if root is None else root
    rows = [{"held_back": "", "reference": "", **row} for row in rows]
    spec = manifest.preprocess
    windows = sample_windows(root, rows)
    left_out = sorted(
        ((k.removeprefix("left out: "), v) for k, v in manifest.counts.items() if k.startswith("left out: ")),
        key=lambda pair: -pair[1],
    )
    alarms = "".join(f"<p class=warn>{html.escape(text)}</p>" for text in warnings_of(rows, manifest))
    corpora = len({row["corpus"] for row in rows if row["status"] == "sharded"})
    chosen = (
        "<p class=note>From a few windows of each corpus, after preprocessing: "
        f"{min(CORPORA, corpora)} of {corpora} corpora, by hours; in brackets the number of recordings looked at. "
        "The band around the line is the middle half of them, grey is the band kept, dotted are 50 and 60 Hz; where "
        "these still stand out twofold, it is written out.</p>"
    )
    drawn = (
        "<p class=note>The middle window of one recording of each corpus, some of its channels, bad ones in grey; what "
        "goes beyond one and a half lines is cut off in the drawing only.</p>"
    )
    absent = "<p class=note>Not drawn: the shards were not at hand when this page was written.</p>"
    listed = sorted(rows, key=lambda r: (r["status"] == "sharded", r["key"]))[:RECORDINGS]
    head = ("recording", "format", "EEG", "kept", "Hz", "s", "µV", "status", "reason")
    recordings = _table(head, [[_path(r), *(r[name] for name in COLUMNS)] for r in listed], most=RECORDINGS)
    shown = [_image(traces(windows, manifest), "A window of each corpus"), drawn] if windows else [absent]
    sections = [
        _section("Hours", _image(funnel(rows), "Hours found, taken away, and written")),
        _section("Corpora", _corpora(rows, manifest)),
        _section("Splits", _splits(rows, manifest)),
        _section("Set aside, and why", _reasons(rows)),
        _section("Held back", _held_back(rows, manifest)),
        _section("Windows left out", _table(["reason", "windows"], left_out) if left_out else ""),
        _section("Channels, rates, amplitudes", _image(overview(rows), "Channels, rates, amplitudes"), _measured(rows)),
        _section("Spectra", _image(spectra(windows, manifest), "Spectra by corpus") + chosen if windows else absent),
        _section("Examples", *shown),
        _section(
            "Recordings",
            f"<details><summary>{len(listed):,} of {len(rows):,}, those set aside first; the rest: dreamscale inspect "
            "DATASET --recordings</summary>"
            f"{recordings}</details>",
        ),
        _section(
            "How it was made",
            f"<details><summary>Preprocessing, request and versions</summary><pre>{html.escape(_made(manifest))}</pre>"
            "</details>",
        ),
    ]
    titles = [s.split('id="')[1].split('">')[1].split("</h2>")[0] for s in sections if s]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Dataset {manifest.dataset_id[:12]}</title><style>{STYLE}</style>",
        f"<h1>Dataset <code>{manifest.dataset_id[:16]}</code></h1>",
        f"<p class=lead>{hours_text(manifest.hours['written'])} of EEG in windows of {spec.window_s:g} s at "
        f"{spec.sfreq:g} Hz, {spec.highpass:g} to {spec.lowpass:g} Hz, reference: {html.escape(str(spec.reference))}."
        "</p>",
        _cards(rows, manifest),
        alarms,
        f"<nav>{''.join(f'<a href=#{_anchor(html.unescape(t))}>{t}</a>' for t in titles)}</nav>",
        *sections,
        "</html>",
    ]
    atomic_write_text(path, "\n".join(part for part in parts if part) + "\n")


def _made(manifest: Manifest) -> str:
    values = {"preprocess": manifest.preprocess.to_dict(), "config": manifest.config, "versions": manifest.versions}
    return json.dumps(values, indent=1, sort_keys=True)
