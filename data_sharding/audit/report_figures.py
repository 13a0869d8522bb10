"""Charts for the report of a dataset: channels, sampling rates, amplitudes, spectra and traces, as embedded PNG.

In array shapes, `n` is the number of channels, `T` the number of time samples of a window, and `F` the number of
frequencies.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.common.errors import figure_text
from data_sharding.common.html.render import Picture, embed_png
from data_sharding.common.storage import AnyPath
from data_sharding.common.untrusted import check_meta, parse_json
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.samples import decode_eeg
from data_sharding.dataset.shard_reader import read_entries
from data_sharding.processing.survey import PLAUSIBLE_UV

COLOURS = {
    "found": "#4a4e69",
    "sharded": "#2a7f62",
    "duplicate": "#6c7a8f",
    "quarantined": "#c44536",
    "excluded": "#b7791f",
    "held back": "#6a4c93",
    "not in a window": "#a8c5b9",
    "written": "#1d5c46",
}
"""Colours of the statuses of recordings, and of the other bars in the report's chart of hours."""
MAX_CORPORA = 12
"""Spectra and traces are drawn for at most this many corpora."""
RECORDINGS = 10
"""The spectrum of a corpus is computed from at most this many recordings."""
WINDOWS = 3
"""The spectrum of a recording is computed from at most this many windows."""
MAX_TRACES = 12
"""Maximum number of channels in a chart of EEG traces."""
WIDTH = 3.7
"""Width of a chart in inches. At 96 pixels per inch, a chart fits on the screen of a phone."""


def _make_figure(height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure, axis


def _to_picture(figure: Any, text: str, caption: str = "") -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return Picture(url=embed_png(buffer.getvalue()), text=text, caption=caption)


def draw_overview(rows: Sequence[LedgerRow]) -> list[Picture]:
    """Draw hours by number of channels, hours by sampling rate, and recordings by amplitude.

    Parameters
    ----------
    rows : sequence of LedgerRow
        Rows of the ledger.

    Returns
    -------
    list of Picture
        Three charts.
    """
    kept = [row for row in rows if row.status == "sharded"]
    return [
        _draw_hours(kept, "n_kept", "channels kept"),
        _draw_hours(kept, "sfreq", "sampling rate of the recording, Hz"),
        _draw_amplitudes(rows),
    ]


def _draw_hours(rows: Sequence[LedgerRow], column: str, title: str) -> Picture:
    """Draw how many hours were written for each value of a ledger column."""
    figure, axis = _make_figure(2.6)
    hours: defaultdict[float, float] = defaultdict(float)
    for row in rows:
        hours[getattr(row, column)] += row.seconds_written / 3600
    values = sorted(hours)
    if len(values) > 14:  # There are too many values for one bar per value, so draw a histogram.
        edges = np.linspace(values[0], values[-1], 21)
        axis.hist(values, bins=edges, weights=[hours[v] for v in values], color=COLOURS["sharded"])
    else:
        axis.bar([f"{v:g}" for v in values], [hours[v] for v in values], color=COLOURS["sharded"])
        axis.tick_params(axis="x", rotation=60 if len(values) > 7 else 0)
    axis.set_xlabel(title, fontsize=9)
    axis.set_ylabel("hours written", fontsize=9)
    return _to_picture(figure, f"hours written by {title}")


def _draw_amplitudes(rows: Sequence[LedgerRow]) -> Picture:
    figure, axis = _make_figure(2.6)
    axis.axvspan(*PLAUSIBLE_UV, color=COLOURS["sharded"], alpha=0.08)
    groups = {
        status: values
        for status in ("sharded", "duplicate", "held back", "quarantined", "excluded")
        if (values := [row.amplitude_uv for row in rows if row.status == status and row.amplitude_uv])
    }
    values = np.array([v for group in groups.values() for v in group] or [1.0])
    edges = np.geomspace(min(values.min(), PLAUSIBLE_UV[0]) / 1.5, max(values.max(), PLAUSIBLE_UV[1]) * 1.5, 41)
    colours = [COLOURS[name] for name in groups]
    axis.hist(list(groups.values()), bins=edges, stacked=True, label=list(groups), color=colours)
    axis.set_xscale("log")
    axis.set_xlabel("amplitude, µV (shaded: plausible)", fontsize=9)
    axis.set_ylabel("recordings", fontsize=9)
    axis.yaxis.get_major_locator().set_params(integer=True)
    if groups:
        axis.legend(fontsize=8, frameon=False)
    return _to_picture(figure, "recordings by amplitude and status")


@dataclass(kw_only=True)
class Window:
    """Window of a dataset that is drawn in a chart."""

    eeg: np.ndarray
    """Signal in microvolts, shape (n, T): the window, or the part of a trial that models read by default."""
    meta: dict[str, Any]
    """The JSON metadata of the sample."""
    stored: np.ndarray | None = None
    """Whole stored signal in microvolts, such as a trial with its baseline; None if this signal is equal to `eeg`."""


def _pick_evenly(values: Sequence[Any], n: int) -> list[Any]:
    """Return at most `n` values, at evenly spaced positions in the list."""
    if len(values) <= n:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, n).round().astype(int)]


def sample_windows(root: AnyPath, rows: Sequence[LedgerRow], length: int) -> dict[str, list[list[Window]]]:
    """Read a few windows of each corpus, from recordings at even distances in the list of recordings sorted by key.

    Parameters
    ----------
    root : Path or UPath
        Folder of the dataset.
    rows : sequence of LedgerRow
        Rows of the ledger.
    length : int
        Number of time points that models read from a window.

    Returns
    -------
    dict
        The key is the name of a corpus; the value is a list of recordings, and each recording is a list of windows.
        Corpora are sorted by hours, beginning with the most hours. A corpus is left out if none of its shards can be
        found.
    """
    hours: defaultdict[str, float] = defaultdict(float)
    rows_by_corpus: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        if row.status == "sharded" and row.shards:
            hours[row.corpus] += row.seconds_written
            rows_by_corpus[row.corpus].append(row)
    indices: dict[str, list[dict[str, Any]]] = {}
    windows: dict[str, list[list[Window]]] = {}
    for corpus in sorted(hours, key=lambda name: (-hours[name], name))[:MAX_CORPORA]:
        recordings = []
        for row in _pick_evenly(sorted(rows_by_corpus[corpus], key=lambda row: row.key), RECORDINGS):
            shard = row.shards[len(row.shards) // 2]
            tar = root / shard
            if not tar.is_file():
                continue
            if shard not in indices:
                # Keep only the index of the shard that was read last, because consecutive rows are usually in the same
                # shard.
                indices = {shard: read_entries(tar.with_suffix(".idx"), tar.stat().st_size)}
            entries = [entry for entry in indices[shard] if entry["key"].rpartition("-")[0] == row.key]
            if entries:
                recordings.append(_read_windows(tar, _pick_evenly(entries, WINDOWS), length))
        if recordings:
            windows[corpus] = recordings
    return windows


def _read_windows(tar: AnyPath, entries: Sequence[dict[str, Any]], length: int) -> list[Window]:
    """Read some windows of a shard; `entries` are the entries of these windows in the shard's index."""
    windows = []
    with tar.open("rb") as stream:
        for entry in entries:
            members = {}
            for name in ("json", "eeg.npy.zst"):
                offset, size = entry["members"][name][:2]
                stream.seek(offset)
                members[name] = stream.read(size)
            meta = check_meta(parse_json(members["json"]))
            stored = decode_eeg(members["eeg.npy.zst"], meta["n"], entry.get("samples", length)).astype(float)
            begin = max(int(meta.get("onset", 0)), 0)
            windows.append(Window(eeg=stored[:, begin : begin + length], meta=meta, stored=stored))
    return windows


def compute_spectrum(windows: Sequence[Window], sfreq: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the power spectrum of a recording: the median over all windows and good channels.

    Parameters
    ----------
    windows : sequence of Window
        Windows of one recording.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    frequency : ndarray, shape (F,)
        Frequencies in Hz.
    power : ndarray, shape (F,)
        Power density in square microvolts per Hz.
    """
    from scipy.signal import welch

    powers, frequency = [], np.zeros(0)
    for window in windows:
        good = [i for i, name in enumerate(window.meta["ch_names"]) if name not in window.meta.get("bads", ())]
        x = window.eeg[good or slice(None)]
        frequency, power = welch(x, sfreq, nperseg=min(int(2 * sfreq), x.shape[1]), axis=-1)
        powers.append(power)
    return frequency, np.median(np.concatenate(powers), axis=0)


def measure_mains_peaks(frequency: np.ndarray, power: np.ndarray) -> dict[float, float]:
    """Measure how much larger the power at 50 and 60 Hz is than the power at neighbouring frequencies.

    Parameters
    ----------
    frequency, power : ndarray, shape (F,)
        Spectrum of a recording, from `compute_spectrum`.

    Returns
    -------
    dict
        The keys are 50 and 60 Hz, if the spectrum contains them. The value is the power of the peak, divided by the
        median power at a distance of 3 to 8 Hz from the peak. This median is computed below and above the peak, and the
        larger value is used. With the smaller value, there would be a false peak if a filter removed the frequencies on
        one side.
    """
    peaks = {}
    for line in (50.0, 60.0):
        offset = frequency - line
        sides = [power[(way * offset > 3) & (way * offset < 8)] for way in (-1, 1)]
        around = max((float(np.median(side)) for side in sides if len(side)), default=0.0)
        if len(frequency) and frequency[-1] > line + 3 and around > 0:
            peaks[line] = float(power[np.abs(offset) <= 1].max() / around)
    return peaks


def draw_spectra(windows: dict[str, list[list[Window]]], manifest: Manifest) -> list[Picture]:
    """Draw the spectrum of each corpus: the median over its recordings, and a band between the quartiles.

    Parameters
    ----------
    windows : dict
        Windows of each corpus, from `sample_windows`.
    manifest : Manifest
        The dataset's manifest.

    Returns
    -------
    list of Picture
        One chart for each corpus; all charts have the same axes.
    """
    spec = manifest.preprocess
    quartiles = {}
    frequency = np.zeros(0)
    for corpus, recordings in windows.items():
        powers = []
        for recording in recordings:
            frequency, power = compute_spectrum(recording, spec.sfreq)
            powers.append(power)
        quartiles[corpus] = np.quantile(np.maximum(np.stack(powers), 1e-6), [0.25, 0.5, 0.75], axis=0)
    top = max((float(np.nanmax(median)) for _, median, _ in quartiles.values()), default=1.0)

    pictures = []
    for corpus, (low, median, high) in quartiles.items():
        figure, axis = _make_figure(2.3)
        axis.axvspan(spec.highpass, spec.lowpass, color="#000", alpha=0.04)
        axis.fill_between(frequency, low, high, color=COLOURS["sharded"], alpha=0.25, linewidth=0)
        axis.semilogy(frequency, median, color=COLOURS["sharded"], linewidth=1.2)
        for line in (50.0, 60.0):
            axis.axvline(line, color=COLOURS["quarantined"], linewidth=0.6, linestyle=":")
        peaks = measure_mains_peaks(frequency, median)
        notes = [f"{line:g} Hz: {ratio:.1f} times" for line, ratio in peaks.items() if ratio > 2]
        axis.text(0.97, 0.95, "\n".join(notes), transform=axis.transAxes, ha="right", va="top", fontsize=8)
        axis.set_xlim(0, min(spec.sfreq / 2, 1.3 * spec.lowpass))
        axis.set_ylim(top * 1e-5, top * 3)
        axis.set_xlabel("Hz", fontsize=9)
        axis.set_ylabel("µV²/Hz", fontsize=9)
        caption = f"{corpus} ({len(windows[corpus])})"
        pictures.append(_to_picture(figure, f"power spectrum of {corpus}", caption))
    return pictures


def draw_traces(windows: dict[str, list[list[Window]]], manifest: Manifest) -> list[Picture]:
    """Draw the EEG traces of one window of each corpus.

    Parameters
    ----------
    windows : dict
        Windows of each corpus, from `sample_windows`.
    manifest : Manifest
        The dataset's manifest.

    Returns
    -------
    list of Picture
        One chart for each corpus.
    """
    pictures = []
    for corpus, recordings in windows.items():
        figure, axis = _make_figure(3.1)
        recording = recordings[len(recordings) // 2]
        window = recording[len(recording) // 2]
        channels = _pick_evenly(range(len(window.eeg)), MAX_TRACES)
        names, bads = window.meta["ch_names"], window.meta.get("bads", ())
        good = [i for i in channels if names[i] not in bads]
        step = 6 * float(np.median(window.eeg[good or channels].std(axis=1))) or 1.0
        stored = window.eeg if window.stored is None else window.stored
        time = (np.arange(stored.shape[1]) - window.meta.get("onset", 0)) / manifest.preprocess.sfreq
        for place, i in enumerate(channels):
            trace = np.clip(stored[i], -1.5 * step, 1.5 * step) - place * step
            axis.plot(time, trace, linewidth=0.7, color="#bbb" if names[i] in bads else COLOURS["found"])
        labels = [figure_text(names[i][:12]) for i in channels]
        axis.set_yticks([-place * step for place in range(len(channels))], labels)
        axis.set_xlim(time[0], time[-1])
        if "onset" in window.meta:
            axis.axvline(0.0, color=COLOURS["quarantined"], linewidth=0.8, linestyle=":")
        axis.tick_params(axis="y", left=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("seconds from the onset" if "onset" in window.meta else "seconds", fontsize=9)
        caption = f"{corpus}: {window.meta['subject']}, {step:.0f} µV a line"
        pictures.append(_to_picture(figure, f"EEG traces of {corpus}", caption))
    return pictures
