"""The report of a dataset: an HTML page about the hours and recordings that were found, written and left out."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_sharding.audit.report_figures import (
    COLOURS,
    MAX_TRACES,
    draw_overview,
    draw_spectra,
    draw_traces,
    sample_windows,
)
from data_sharding.common.files import atomic_write_text
from data_sharding.common.html.render import Cell, Table, render_page
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.dataset.ledger import STATUSES, LedgerRow, count_windows_left_out
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_CORPORA = 25
"""The report's table of corpora shows at most this many corpora."""
MAX_RECORDINGS = 200
"""The report's table of recordings shows at most this many recordings."""
EXAMPLES = 3
"""Number of recordings that the report names as examples of each reason."""
WARN_QUARANTINED = 0.05
"""The report warns if more than this fraction of the recordings are quarantined."""


def format_hours(hours: float) -> str:
    """Format a duration in hours as a text with hours, minutes or seconds."""
    if hours == 0:
        return "0"
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
    return f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.3g} s"


def _hours_cell(hours: float) -> Cell:
    return Cell(text=format_hours(hours), is_number=True)


def sum_hours_by_fate(rows: Sequence[LedgerRow]) -> list[tuple[str, float]]:
    """Sum the hours of EEG that were found, that were left out (by status), and that were written to the dataset.

    Parameters
    ----------
    rows : sequence of LedgerRow
        Rows of the ledger.

    Returns
    -------
    list of (str, float)
        Names and hours. The first entry, "found", is the sum of all other entries.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        seconds["found"] += row.seconds
        if row.status == "sharded":
            seconds["written"] += row.seconds_written
            # `seconds_written` can be slightly larger than `seconds`: after resampling, the last window may end a
            # fraction of a sample after the recording.
            seconds["not in a window"] += max(row.seconds - row.seconds_written, 0.0)
        else:
            seconds[row.status] += row.seconds
    order = ("found", "quarantined", "excluded", "duplicate", "held back", "not in a window", "written")
    return [(name, seconds[name] / 3600) for name in order]


def _make_bars(rows: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    """Return the bars of a waterfall chart from hours found to hours written.

    The start and the length of a bar are in percent of the chart's width.
    """
    fates = sum_hours_by_fate(rows)
    total = max(fates[0][1], 1e-12)
    left = 100.0
    bars = []
    for name, hours in fates:
        share = 100 * hours / total
        if name in ("found", "written"):
            label, start = name, 0.0
        elif hours == 0:
            continue
        else:
            left = max(left - share, 0.0)
            label, start = f"less {name}", left
        text = format_hours(hours) + (f" ({share:.1f} %)" if name != "found" else "")
        geometry = {"start": f"{start:.2f}", "length": f"{min(share, 100 - start):.2f}"}
        bars.append({"name": label, "text": text, "colour": COLOURS[name], **geometry})
    return bars


def _known_subjects(rows: Iterable[LedgerRow]) -> set[tuple[str, str]]:
    """Return corpus and subject of each row with a known subject."""
    return {(row.corpus, row.subject) for row in rows if row.has_subject}


def _count_unnamed(rows: Iterable[LedgerRow]) -> int:
    return sum(not row.has_subject for row in rows)


def _count_recognised(rows: Iterable[LedgerRow]) -> int:
    return sum(row.subject_from == "recognised" for row in rows)


def _count_sessions(rows: Iterable[LedgerRow]) -> int:
    return len({(row.corpus, row.subject, row.session) for row in rows if row.session})


def _make_cards(rows: Sequence[LedgerRow], manifest: Manifest) -> list[tuple[str, str]]:
    """Return the most important numbers of the dataset, each with an explanation."""
    kept = [row for row in rows if row.status == "sharded"]
    unnamed = _count_unnamed(kept)
    cards = [
        (format_hours(manifest.hours["written"]), f"of EEG written, of {format_hours(manifest.hours['found'])} found"),
        (f"{len(kept):,}", f"of {len(rows):,} recordings sharded"),
        (
            f"{len(_known_subjects(kept)):,}",
            "subjects" + (f", and {unnamed:,} recordings without a subject's name" if unnamed else ""),
        ),
        (f"{len({row.corpus for row in kept}):,}", "corpora"),
        (f"{sum(manifest.samples(split) for split in SPLITS):,}", "samples in train, val and test"),
    ]
    if manifest.labels:
        cards.append((f"{len(manifest.labels):,}", "image labels"))
    return cards


def _designs_by_corpus(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return a dictionary from the name of each corpus to its entry in the manifest.

    An entry contains the kind and the experimental design of the corpus.
    """
    listed = manifest.extra.get("corpora") or []
    if isinstance(listed, dict):
        listed = [{"name": name, **value} for name, value in listed.items()]
    return {entry.get("name", ""): entry for entry in listed}


def find_warnings(rows: Sequence[LedgerRow], manifest: Manifest) -> list[str]:
    """Find problems of a dataset that can lead to wrong results.

    Parameters
    ----------
    rows : sequence of LedgerRow
        Rows of the ledger.
    manifest : Manifest
        The dataset's manifest.

    Returns
    -------
    list of str
        One text for each warning; empty if there is no warning.
    """
    warnings = []
    for name, entry in sorted(_designs_by_corpus(manifest).items()):
        if entry.get("design") == "block":
            warnings.append(
                f"{name}: block design. Trials of one class were shown one after the other, so the slow drift of the "
                "EEG alone reveals the class. With a split by image, the drift still reveals the class. "
                f"{entry.get('evidence', '')}".strip()
            )
    kept = [row for row in rows if row.status == "sharded"]
    unnamed = _count_unnamed(kept)
    if unnamed and any(manifest.samples(split) for split in ("val", "test")):
        warnings.append(
            f"{unnamed:,} of {len(kept):,} recordings have an unknown subject. Each recording with an unknown subject "
            "counts as a separate subject, so recordings of one person may be in several splits. Set subject_pattern, "
            "or a table "
            "in the key subjects, to name the subjects."
        )
    if recognised := _count_recognised(kept):
        warnings.append(
            f"The subjects of {recognised:,} of {len(kept):,} recordings were recognised from the paths, and are not "
            "confirmed. Set subject_pattern, or a table in the key subjects, to confirm the names."
        )
    for split in ("val", "test"):
        if not manifest.samples(split):
            warnings.append(f"The {split} split is empty.")
    quarantined = sum(row.status == "quarantined" for row in rows)
    if quarantined > WARN_QUARANTINED * len(rows):
        share = 100 * quarantined / len(rows)
        warnings.append(f"{quarantined:,} of {len(rows):,} recordings ({share:.1f} %) are quarantined.")
    unlocated = sum(row.montage_confidence < 0.5 for row in kept)
    if unlocated:
        warnings.append(f"{unlocated:,} recordings have electrode positions for less than half of their channels.")
    return warnings


def _format_range(values: Iterable[float]) -> str:
    """Format numbers as text: at most two different numbers as a list, more than two as a range (lowest to highest)."""
    found = sorted(set(values))
    if len(found) < 3:
        return ", ".join(f"{value:g}" for value in found)
    return f"{found[0]:g} to {found[-1]:g}"


def _make_corpus_table(rows: Sequence[LedgerRow], manifest: Manifest) -> Table:
    designs = _designs_by_corpus(manifest)
    groups: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        groups[row.corpus].append(row)

    def hours_written(group: Sequence[LedgerRow]) -> float:
        return sum(row.seconds_written for row in group) / 3600

    def describe_kind(name: str) -> str:
        entry = designs.get(name, {})
        return ", ".join(x for x in (entry.get("kind", ""), entry.get("design", "")) if x and x != "unknown")

    with_kind = any(describe_kind(name) for name in groups)

    def make_row(name: str, group: Sequence[LedgerRow]) -> list[Any]:
        kept = [row for row in group if row.status == "sharded"]
        status = Counter(row.status for row in group)
        return [
            name,
            *([describe_kind(name)] if with_kind else []),
            len(_known_subjects(kept)) or None,
            _count_sessions(kept) or None,
            _hours_cell(sum(row.seconds for row in group) / 3600),
            _hours_cell(hours_written(group)),
            _format_range(row.n_kept for row in kept),
            _format_range(row.sfreq for row in kept),
            *(status[s] or None for s in STATUSES),
        ]

    kind = ["kind"] if with_kind else []
    ordered = sorted(groups, key=lambda name: (-hours_written(groups[name]), name))
    return Table(
        head=["corpus", *kind, "subjects", "sessions", "found", "written", "channels", "Hz", *STATUSES],
        rows=[make_row(name, groups[name]) for name in ordered],
        total=make_row("all", rows),
        limit=MAX_CORPORA,
    )


def _make_split_table(rows: Sequence[LedgerRow], manifest: Manifest) -> tuple[Table, str, bool]:
    """Return the table of the splits, a sentence about shared subjects, and whether it is sure that none is shared."""
    rows_by_split: dict[str, list[LedgerRow]] = {split: [] for split in SPLITS}
    for row in rows:
        for split in row.splits:
            rows_by_split[split].append(row)
    lines = [
        [
            split,
            manifest.samples(split),
            _hours_cell(manifest.samples(split) * manifest.preprocess.window_s / 3600),
            len(manifest.splits.get(split, [])),
            len(members),
            len(_known_subjects(members)),
            _count_unnamed(members),
            _count_sessions(members),
        ]
        for split, members in rows_by_split.items()
    ]
    head = ["split", "samples", "in windows", "shards", "recordings", "subjects", "subject unknown", "sessions"]
    appearances = Counter(subject for members in rows_by_split.values() for subject in _known_subjects(members))
    crossing = sum(count > 1 for count in appearances.values())
    kept = [row for row in rows if row.status == "sharded"]
    filled = sum(manifest.samples(split) > 0 for split in SPLITS)
    unnamed, recognised = _count_unnamed(kept), _count_recognised(kept)
    if crossing:
        text, good = f"{crossing:,} subjects appear in more than one split.", False
    elif filled < 2:
        text, good = "Only one split has samples, so there are no splits to compare.", False
    elif unnamed:
        text, good = (
            f"It is not known whether a person appears in more than one split: the subjects of {unnamed:,} recordings "
            "are unknown.",
            False,
        )
    elif recognised:
        text, good = (
            f"No subject appears in more than one split, if the names of {recognised:,} recordings, which were "
            "recognised from the paths, are right.",
            False,
        )
    else:
        text, good = "No subject appears in more than one split.", True
    return Table(head=head, rows=lines), text, good


def _make_reason_table(rows: Sequence[LedgerRow]) -> Table:
    groups: defaultdict[tuple[str, str], list[LedgerRow]] = defaultdict(list)
    for row in rows:
        if row.status != "sharded":
            groups[row.status, row.category].append(row)
    lines = []
    for (status, reason), group in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        names = ", ".join(_full_path(row) for row in group[:EXAMPLES])
        more = f" and {len(group) - EXAMPLES:,} more" if len(group) > EXAMPLES else ""
        hours = sum(row.seconds for row in group) / 3600
        lines.append(
            [
                _status_cell(status),
                reason,
                len(group),
                _hours_cell(hours) if hours else None,
                group[0].reason,
                names + more,
            ]
        )
    return Table(
        head=["status", "reason", "recordings", "length", "full reason of the first recording", "examples"], rows=lines
    )


def _status_cell(status: str) -> Cell:
    return Cell(text=status, colour=COLOURS[status])


def _full_path(row: LedgerRow) -> str:
    """Return ``CORPUS/PATH`` of a recording, or only its path if the path already begins with the corpus."""
    return row.path if row.path.startswith(f"{row.corpus}/") else f"{row.corpus}/{row.path}"


def _make_held_back_table(rows: Sequence[LedgerRow]) -> Table:
    groups: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        if row.status == "held back":
            groups[row.held_back or row.category].append(row)
    lines = [
        [name, len(group), len(_known_subjects(group)), _hours_cell(sum(row.seconds for row in group) / 3600)]
        for name, group in sorted(groups.items())
    ]
    return Table(head=["held back by", "recordings", "subjects", "length"], rows=lines)


def _make_measured_table(rows: Sequence[LedgerRow]) -> Table:
    """Make a table of units, mains frequencies, references, devices and other properties of the sharded recordings."""
    kept = [row for row in rows if row.status == "sharded"]

    def mains(row: LedgerRow) -> str:
        return f"{row.line_freq:g} Hz ({row.line_freq_from})" if row.line_freq else row.line_freq_from

    columns = {
        "unit": [row.unit for row in kept],
        "factor to volts": ["" if row.unit_factor is None else f"{row.unit_factor:g}" for row in kept],
        "mains": [mains(row) for row in kept],
        "montage": [row.montage for row in kept],
        "selection of channels": [row.channel_selection for row in kept],
        "reference as recorded": [row.reference for row in kept],
        "device": [row.device for row in kept],
        "filters of the device": [row.device_filters for row in kept],
        "source of the subject's name": [row.subject_from or "" for row in kept],
        "sex": [row.sex for row in kept],
        "year": [str(row.recording_year or "") for row in kept],
        "task": [row.task for row in kept],
        "licence": [row.license for row in kept],
    }
    lines = [[name, _count_values(value or "unknown" for value in values)] for name, values in columns.items()]
    bad = _count_values(kind for row in kept for kind in row.bad_kinds or ["unknown"] * len(row.bads)) or "none"
    lines.append(["bad channels", f"{bad} (of {sum(row.n_kept for row in kept):,} channels)"])
    return Table(head=["measured", "values, with the number of recordings"], rows=lines)


def _count_values(values: Iterable[str], most: int = 6) -> str:
    """Return a text with the most frequent values and their counts."""
    count = Counter(values)
    text = ", ".join(f"{value}: {number:,}" for value, number in count.most_common(most))
    return text + (f", and {len(count) - most:,} other values" if len(count) > most else "")


def _make_recording_table(rows: Sequence[LedgerRow]) -> Table:
    """Make the table of recordings. Recordings that are not in the dataset come first."""
    listed = sorted(rows, key=lambda row: (row.status == "sharded", row.key))[:MAX_RECORDINGS]
    columns = ("format", "n_eeg", "n_kept", "sfreq", "seconds", "amplitude_uv")
    lines = [
        [_full_path(row), *(getattr(row, name) for name in columns), _status_cell(row.status), row.reason]
        for row in listed
    ]
    head = ["recording", "format", "EEG channels", "kept", "Hz", "seconds", "µV", "status", "reason"]
    return Table(head=head, rows=lines, limit=MAX_RECORDINGS)


def write_report(
    path: str | AnyPath, rows: Sequence[LedgerRow], manifest: Manifest, *, root: AnyPath | None = None
) -> None:
    """Write the report of a dataset.

    Parameters
    ----------
    path : str, Path or UPath
        The HTML file to write.
    rows : sequence of LedgerRow
        Rows of the ledger.
    manifest : Manifest
        The dataset's manifest.
    root : Path or UPath, optional
        Folder of the dataset, which contains the shards; by default, the folder of the HTML file. Without shards, the
        report has a note in place of the spectra and traces.
    """
    root = as_path(path).parent if root is None else root
    windows = sample_windows(root, rows, manifest.preprocess.window)
    splits, verdict, verdict_is_good = _make_split_table(rows, manifest)
    recordings = _make_recording_table(rows)
    held_back_request = {key: value for key, value in (manifest.config.get("hold_back") or {}).items() if value}
    made = {"preprocess": manifest.preprocess.to_dict(), "config": manifest.config, "versions": manifest.versions}
    page = render_page(
        TEMPLATE,
        dataset_id=manifest.dataset_id,
        spec=manifest.preprocess,
        hours_written=format_hours(manifest.hours["written"]),
        cards=_make_cards(rows, manifest),
        warnings=find_warnings(rows, manifest),
        bars=_make_bars(rows),
        corpora=_make_corpus_table(rows, manifest),
        n_corpora=len({row.corpus for row in rows if row.status == "sharded"}),
        splits=splits,
        verdict=verdict,
        verdict_is_good=verdict_is_good,
        reasons=_make_reason_table(rows),
        held_back=_make_held_back_table(rows),
        held_back_request=", ".join(f"{len(value)} {key}" for key, value in held_back_request.items()),
        windows_left_out=Table(head=["reason", "windows"], rows=count_windows_left_out(rows).most_common()),
        overview=draw_overview(rows),
        measured=_make_measured_table(rows),
        spectra=draw_spectra(windows, manifest),
        traces=draw_traces(windows, manifest),
        max_traces=MAX_TRACES,
        recordings=recordings,
        n_listed=len(recordings.rows),
        n_recordings=len(rows),
        made=json.dumps(made, indent=1, sort_keys=True),
    )
    atomic_write_text(path, page)
