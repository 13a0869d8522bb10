"""The figures of a dataset's report: hours, channels, amplitudes, spectra and traces, as inline PNG.

Shapes: C corpora shown, n channels, T samples a window, F frequencies.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.common.files import read_json
from data_sharding.common.storage import AnyPath
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.samples import decode_eeg
from data_sharding.processing.survey import PLAUSIBLE_UV

COLOURS = {
    "found": "#4a4e69",
    "sharded": "#2a7f62",
    "duplicate": "#8d99ae",
    "quarantined": "#c44536",
    "excluded": "#e0a458",
    "held back": "#6a4c93",
    "not in a window": "#a8c5b9",
    "written": "#1d5c46",
}
"""Of the statuses, and of the funnel's other bars."""
CORPORA = 12
"""Most corpora with a spectrum and a trace."""
RECORDINGS = 10
"""Recordings of a corpus that its spectrum is made of."""
WINDOWS = 3
"""Windows of each of them."""
TRACES = 12
"""Most channels of a trace."""


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _grid(n: int, *, columns: int, height: float, margin: float = 0.0, shared: bool = False) -> tuple[Any, Any]:
    """A figure with at least n axes, of which n are seen."""
    columns = min(columns, n)
    lines = -(-n // columns)
    figure = _figure(10, margin + height * lines)
    axes = figure.subplots(lines, columns, sharex=shared, sharey=shared, squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes


def _plain(text: str) -> str:
    """Names of corpora and channels are data: a dollar sign in them begins no formula."""
    return text.replace("$", r"\$")


def _bare(axis: Any, *, left: bool = False) -> None:
    for side in ("top", "right", *(("left",) if left else ())):
        axis.spines[side].set_visible(False)


def funnel_steps(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Hours found, what was taken away, and what is left.

    Parameters
    ----------
    rows : sequence of dict
        The ledger.

    Returns
    -------
    list of (str, float)
        Name and hours: found, then what is taken away, then written. What is taken away and written add up to found.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        seconds["found"] += row["seconds"]
        if row["status"] == "sharded":
            seconds["written"] += row["seconds_written"]
            # A window of a resampled recording may end a fraction of a sample after it.
            seconds["not in a window"] += max(row["seconds"] - row["seconds_written"], 0.0)
        else:
            seconds[row["status"]] += row["seconds"]
    order = ("found", "quarantined", "excluded", "duplicate", "held back", "not in a window", "written")
    return [(name, seconds[name] / 3600) for name in order]


def hours_text(hours: float) -> str:
    """Hours in words.

    Parameters
    ----------
    hours : float
        Hours.

    Returns
    -------
    str
        In hours, minutes or seconds, with three digits.
    """
    if hours == 0:
        return "0"
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
    return f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.3g} s"


def funnel(rows: Sequence[dict[str, Any]]) -> str:
    """Waterfall of hours from found to written.

    Parameters
    ----------
    rows : sequence of dict
        The ledger.

    Returns
    -------
    str
        PNG as a data URL.
    """
    steps = [(name, hours) for name, hours in funnel_steps(rows) if hours > 0 or name in ("found", "written")]
    figure = _figure(10, 0.8 + 0.32 * len(steps))
    axis = figure.subplots()
    scale, unit = (1.0, "hours") if steps[0][1] >= 2 else (60.0, "minutes")
    left = scale * steps[0][1]
    total = max(left, 1e-12)
    for place, (name, hours) in enumerate(steps):
        length = scale * hours
        if name in ("found", "written"):
            start = 0.0
        else:
            start = left = left - length
        axis.barh(place, length, left=start, color=COLOURS[name], height=0.7)
        share = f"  {hours_text(hours)}" + (f" ({100 * length / total:.1f} %)" if place else "")
        axis.text(start + length, place, share, va="center", fontsize=9)
    axis.set_yticks(range(len(steps)), [n if n in ("found", "written") else f"less {n}" for n, _ in steps])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * total)
    axis.set_xlabel(unit)
    _bare(axis)
    return _png(figure)


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """Hours by channels and by rate, and recordings by amplitude.

    Parameters
    ----------
    rows : sequence of dict
        The ledger.

    Returns
    -------
    str
        PNG as a data URL.
    """
    figure = _figure(10, 3.2)
    axes = figure.subplots(1, 3)
    kept = [row for row in rows if row["status"] == "sharded"]
    for axis, column, title in ((axes[0], "n_kept", "channels kept"), (axes[1], "sfreq", "recorded at, Hz")):
        hours: defaultdict[float, float] = defaultdict(float)
        for row in kept:
            hours[row[column]] += row["seconds_written"] / 3600
        values = sorted(hours)
        if len(values) > 14:  # Many different values: as a histogram.
            edges = np.linspace(values[0], values[-1], 21)
            axis.hist(values, bins=edges, weights=[hours[v] for v in values], color=COLOURS["sharded"])
        else:
            axis.bar([f"{v:g}" for v in values], [hours[v] for v in values], color=COLOURS["sharded"])
            axis.tick_params(axis="x", rotation=60 if len(values) > 7 else 0)
        axis.set_xlabel(title)
        axis.set_ylabel("hours written")
        _bare(axis)
    axis = axes[2]
    axis.axvspan(*PLAUSIBLE_UV, color=COLOURS["sharded"], alpha=0.08)
    shown = ("sharded", "duplicate", "held back", "quarantined", "excluded")
    groups = {s: [r["amplitude_uv"] for r in rows if r["status"] == s and r["amplitude_uv"]] for s in shown}
    values = np.array([v for group in groups.values() for v in group] or [1.0])
    edges = np.geomspace(min(values.min(), PLAUSIBLE_UV[0]) / 1.5, max(values.max(), PLAUSIBLE_UV[1]) * 1.5, 41)
    there = {name: group for name, group in groups.items() if group}
    axis.hist(
        list(there.values()), bins=edges, stacked=True, label=list(there), color=[COLOURS[name] for name in there]
    )
    axis.set_xscale("log")
    axis.set_xlabel("amplitude, µV (shaded: plausible)")
    axis.set_ylabel("recordings")
    axis.yaxis.get_major_locator().set_params(integer=True)
    if there:
        axis.legend(fontsize=8, frameon=False)
    _bare(axis)
    return _png(figure)


@dataclass(kw_only=True)
class Window:
    """A window that the report looks at."""

    eeg: np.ndarray
    """[n, T] microvolts."""
    meta: dict[str, Any]
    """Its JSON."""


def _spread(values: Sequence[Any], n: int) -> list[Any]:
    """At most n of the values, evenly over the list, the same for the same list."""
    if len(values) <= n:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, n).round().astype(int)]


def sample_windows(root: AnyPath, rows: Sequence[dict[str, Any]]) -> dict[str, list[list[Window]]]:
    """Some windows of each corpus, chosen by order alone.

    Parameters
    ----------
    root : Path or UPath
        The dataset.
    rows : sequence of dict
        The ledger.

    Returns
    -------
    dict
        Corpus, by hours written, to a list of recordings, each a list of windows. Corpora whose shards are not there
        are left out.
    """
    hours: defaultdict[str, float] = defaultdict(float)
    of_corpus: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "sharded" and row["shards"]:
            hours[row["corpus"]] += row["seconds_written"]
            of_corpus[row["corpus"]].append(row)
    indices: dict[str, list[dict[str, Any]]] = {}
    out: dict[str, list[list[Window]]] = {}
    for corpus in sorted(hours, key=lambda name: (-hours[name], name))[:CORPORA]:
        recordings = []
        for row in _spread(sorted(of_corpus[corpus], key=lambda r: r["key"]), RECORDINGS):
            shard = row["shards"][len(row["shards"]) // 2]
            tar = root / shard
            if not tar.is_file():
                continue
            if shard not in indices:
                # A few at a time: the rows come in the order of the shards.
                indices = {shard: read_json(tar.with_suffix(".idx"))}
            entries = [e for e in indices[shard] if e["key"].rpartition("-")[0] == row["key"]]
            with tar.open("rb") as stream:
                windows = []
                for entry in _spread(entries, WINDOWS):
                    members = {}
                    for name in ("json", "eeg.npy.zst"):
                        stream.seek(entry["members"][name][0])
                        members[name] = stream.read(entry["members"][name][1])
                    meta = json.loads(members["json"])
                    windows.append(Window(eeg=decode_eeg(members["eeg.npy.zst"], meta["n"]).astype(float), meta=meta))
            if windows:
                recordings.append(windows)
        if recordings:
            out[corpus] = recordings
    return out


def spectrum(windows: Sequence[Window], sfreq: float) -> tuple[np.ndarray, np.ndarray]:
    """Power spectrum of a recording: the median over windows and good channels.

    Parameters
    ----------
    windows : sequence of Window
        Of one recording.
    sfreq : float
        Hz.

    Returns
    -------
    frequency : ndarray, shape (F,)
        Hz.
    power : ndarray, shape (F,)
        Square microvolts per Hz.
    """
    from scipy.signal import welch

    powers, frequency = [], np.zeros(0)
    for window in windows:
        good = [i for i, name in enumerate(window.meta["ch_names"]) if name not in window.meta.get("bads", ())]
        x = window.eeg[good or slice(None)]
        frequency, power = welch(x, sfreq, nperseg=min(int(2 * sfreq), x.shape[1]), axis=-1)
        powers.append(power)
    return frequency, np.median(np.concatenate(powers), axis=0)


def line_peaks(frequency: np.ndarray, power: np.ndarray) -> dict[float, float]:
    """How far mains stand out of a spectrum.

    Parameters
    ----------
    frequency, power : ndarray, shape (F,)
        See `spectrum`.

    Returns
    -------
    dict
        50 and 60 Hz, where they lie in the spectrum, to power over the median of 3 to 8 Hz around.
    """
    out = {}
    for line in (50.0, 60.0):
        distance = np.abs(frequency - line)
        around = power[(distance > 3) & (distance < 8)]
        if frequency[-1] > line + 3 and len(around) and np.median(around) > 0:
            out[line] = float(power[distance <= 1].max() / np.median(around))
    return out


def spectra(windows: dict[str, list[list[Window]]], manifest: Manifest) -> str:
    """Median spectrum of each corpus, with the middle half of its recordings.

    Parameters
    ----------
    windows : dict
        See `sample_windows`.
    manifest : Manifest
        The dataset's.

    Returns
    -------
    str
        PNG as a data URL.
    """
    spec = manifest.preprocess
    figure, axes = _grid(len(windows), columns=4, height=2.1, margin=0.5, shared=True)
    for axis, (corpus, recordings) in zip(axes.flat, windows.items(), strict=False):
        found = [spectrum(recording, spec.sfreq) for recording in recordings]
        frequency = found[0][0]
        powers = np.maximum(np.stack([power for _, power in found]), 1e-6)
        middle = np.median(powers, axis=0)
        low, high = np.quantile(powers, [0.25, 0.75], axis=0)
        axis.fill_between(frequency, low, high, color=COLOURS["sharded"], alpha=0.25, linewidth=0)
        axis.semilogy(frequency, middle, color=COLOURS["sharded"], linewidth=1.2)
        axis.axvspan(spec.highpass, spec.lowpass, color="#000", alpha=0.04)
        notes = [
            f"{line:g} Hz: {ratio:.1f} times" for line, ratio in line_peaks(frequency, middle).items() if ratio > 2
        ]
        for line in (50.0, 60.0):
            axis.axvline(line, color=COLOURS["quarantined"], linewidth=0.6, linestyle=":")
        axis.set_title(_plain(f"{corpus[:36]} ({len(recordings)})"), fontsize=9)
        axis.text(0.97, 0.95, "\n".join(notes), transform=axis.transAxes, ha="right", va="top", fontsize=8)
        _bare(axis)
    top = max(float(np.nanmax(line.get_ydata())) for axis in axes.flat for line in axis.get_lines()[:1])
    axes[0, 0].set_ylim(top * 1e-5, top * 3)
    axes[0, 0].set_xlim(0, min(spec.sfreq / 2, 1.3 * spec.lowpass))
    figure.supxlabel("Hz", fontsize=9)
    figure.supylabel("µV²/Hz", fontsize=9)
    return _png(figure)


def traces(windows: dict[str, list[list[Window]]], manifest: Manifest) -> str:
    """One window of each corpus.

    Parameters
    ----------
    windows : dict
        See `sample_windows`.
    manifest : Manifest
        The dataset's.

    Returns
    -------
    str
        PNG as a data URL.
    """
    figure, axes = _grid(len(windows), columns=3, height=2.9)
    for axis, (corpus, recordings) in zip(axes.flat, windows.items(), strict=False):
        several = recordings[len(recordings) // 2]
        window = several[len(several) // 2]
        picks = _spread(range(len(window.eeg)), TRACES)
        bads = window.meta.get("bads", ())
        good = [i for i in picks if window.meta["ch_names"][i] not in bads]
        step = 6 * float(np.median(window.eeg[good or picks].std(axis=1))) or 1.0
        time = np.arange(window.eeg.shape[1]) / manifest.preprocess.sfreq
        for place, i in enumerate(picks):
            bad = window.meta["ch_names"][i] in bads
            trace = np.clip(window.eeg[i], -1.5 * step, 1.5 * step) - place * step
            axis.plot(time, trace, linewidth=0.6, color="#bbb" if bad else COLOURS["found"])
        names = [_plain(window.meta["ch_names"][i][:12]) for i in picks]
        axis.set_yticks([-place * step for place in range(len(picks))], names, fontsize=7)
        axis.set_title(_plain(f"{corpus[:24]}: {window.meta['subject'][:20]}, {step:.0f} µV a line"), fontsize=8)
        axis.set_xlim(0, time[-1])
        axis.tick_params(labelsize=7, left=False)
        _bare(axis, left=True)
    figure.supxlabel("seconds", fontsize=9)
    return _png(figure)
