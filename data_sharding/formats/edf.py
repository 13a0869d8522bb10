"""Open EDF, BDF and GDF files, in which channels can have different sampling rates and units, and which can have gaps.

In array shapes, n is the number of channels, and S the number of time points at the recording's sampling rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.channels import canonical_name, is_electrode, kind_of
from data_sharding.formats.marks import records
from data_sharding.formats.mne_signal import NotContinuous, RawSignal, ReadError
from data_sharding.formats.repair.records import copy_with_patches, find_patches
from data_sharding.formats.signal import Segment, Signal
from data_sharding.formats.units import names_no_unit, read_units, to_volts

if TYPE_CHECKING:
    from mne.io import BaseRaw

LOWEST_HZ = 100.0
"""A channel with a sampling rate below 100 Hz cannot represent the EEG band, so this channel is marked as bad if other
channels have a higher rate."""


class RecordsSignal(RawSignal):
    """A recording with electrodes of different sampling rates.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        Channels with the main sampling rate.
    others : list of (mne.io.BaseRaw, Fraction)
        Groups of channels with other sampling rates, each with the ratio of the main rate to the rate of the group. All
        groups are resampled to the main rate. `read` may get only a part of a segment; the values are the same as if
        the whole segment were resampled.
    **more : Any
        Further arguments of `RawSignal`.
    """

    def __init__(
        self, raw: BaseRaw, others: list[tuple[BaseRaw, Fraction]], gains: np.ndarray | None = None, **more: Any
    ) -> None:
        self._n_main = len(raw.ch_names)
        super().__init__(raw, gains=None if gains is None else gains[: self._n_main], **more)
        self._other_gains = None if gains is None else gains[self._n_main :]
        self._others = [(other, ratio, i) for other, ratio in others for i in range(len(other.ch_names))]

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        out = np.zeros((len(picks), stop - start))
        main = [row for row, pick in enumerate(picks) if pick < self._n_main]
        if main:
            out[main] = super().read(start, stop, [picks[row] for row in main])
        for row, pick in enumerate(picks):
            if pick >= self._n_main:
                for segment in self.info.segments:
                    a, b = max(start, segment.start), min(stop, segment.stop)
                    if a < b:
                        out[row, a - start : b - start] = self._resampled(pick - self._n_main, a, b, segment)
        return out

    def _resampled(self, number: int, start: int, stop: int, segment: Segment) -> np.ndarray:
        from scipy.signal import resample_poly

        raw, ratio, pick = self._others[number]
        up, down = ratio.numerator, ratio.denominator
        # `reach` is at least half the length of resample_poly's filter, in input samples. An output sample depends only
        # on input samples that are at most `reach` samples away.
        reach = 10 * max(up, down) // up + down + 1
        first, last = segment.start * down // up, segment.stop * down // up
        a = max(first, first + (start * down // up - reach - first) // down * down)
        b = min(last, -(-stop * down // up) + reach)
        y = resample_poly(raw[[pick], a:b][0][0], up, down, padtype="edge")
        gain = 1.0 if self._other_gains is None else self._other_gains[number]
        return gain * y[start - a * up // down :][: stop - start]

    def close(self) -> None:
        """Close the files of the recording."""
        super().close()
        for other, _, _ in self._others:
            other.close()


class MissingSignal(RawSignal):
    """A GDF recording in which some channels have missing values. Missing values are read as NaN.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.
    path : Path
        The file.
    layout : Layout
        Layout of the records.
    numbers : list of int
        For each channel of `raw`: number of the channel in the header.
    **more : Any
        Further arguments of `RawSignal`.
    """

    def __init__(self, raw: BaseRaw, path: Path, layout: headers.Layout, numbers: list[int], **more: Any) -> None:
        super().__init__(raw, **more)
        self._path, self._layout, self._numbers = path, layout, numbers

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        x = super().read(start, stop, picks)
        if picks and stop > start:
            records.set_missing(x, self._path, self._layout, [self._numbers[pick] for pick in picks], start)
        return x


def open_records(format_: str) -> Callable[[Path], Signal]:
    """Make the reader for EDF, BDF or GDF.

    Parameters
    ----------
    format_ : str
        edf, bdf or gdf.

    Returns
    -------
    callable
        Function that opens a path and returns the signal.
    """

    def read(path: Path) -> Signal:
        layout = headers.gdf_layout(path) if format_ == "gdf" else headers.edf_layout(path)
        count = _rate_of_eeg(layout)
        signals = [i for i, label in enumerate(layout.labels) if label not in headers.ANNOTATIONS]
        # Do not let MNE resample. MNE would resample each block separately to the highest rate, which causes errors at
        # the edges of the blocks.
        electrodes = is_electrode(layout.labels)
        rates: dict[int, list[int]] = {}
        left_out: dict[str, str] = {}
        for i in signals:
            rate = layout.per_record[i] / (layout.record_s or 1)
            if i in layout.unscaled:
                left_out[layout.labels[i]] = layout.unscaled[i]
            elif layout.per_record[i] == count or (electrodes[i] and layout.per_record[i]):
                rates.setdefault(layout.per_record[i], []).append(i)
            else:
                left_out[layout.labels[i]] = f"another rate: {rate:g} Hz"
        left_out |= _separate(layout, rates)
        if count not in rates:
            raise ReadError(Reason("channels with the same name have different sampling rates", next(iter(left_out))))
        main = rates.pop(count)
        source, keep = path, None
        if patches := find_patches(path, layout, format_):
            source, keep = copy_with_patches(path, patches)
        groups = [main, *(rates[n] for n in sorted(rates))]
        opened = [_open_with_mne(format_, source, layout, group) for group in groups]
        raw, others = (
            opened[0].raw,
            [(part.raw, Fraction(count, n)) for part, n in zip(opened[1:], sorted(rates), strict=True)],
        )
        kept = [i for part in opened for i in part.numbers]
        types = [kind for part in opened for kind in part.raw.get_channel_types()]
        names, twice = unique_names([layout.labels[i].strip("\0 ") for i in kept])
        units = read_units(names, types, [layout.units[i] for i in kept], [f for part in opened for f in part.factors])
        more: dict[str, Any] = {
            **units.fields,
            "ch_names": names,
            "gains": units.gains,
            "keep": keep,
            "left_out": left_out,
            "notes": [*_say_unscaled(layout), *twice, *units.notes],
        }
        marks, missing = _find_marks(format_, path, layout, opened[0].numbers, count)
        more |= {**marks, "notes": [*more["notes"], *marks["notes"]]}
        if not others:
            return MissingSignal(raw, path, layout, opened[0].numbers, **more) if missing else RawSignal(raw, **more)
        slow = [n for n in sorted(rates) if n / layout.record_s < LOWEST_HZ]
        more["positions"] = [None] * len(names)
        more["bads"] = [name for name, i in zip(names, kept, strict=True) if layout.per_record[i] in slow]
        told = ", ".join(f"{layout.labels[i]} {n / layout.record_s:g} Hz" for n in sorted(rates) for i in rates[n][:3])
        more["notes"] += [f"recorded at other rates, resampled to {count / layout.record_s:g} Hz: {told}"]
        return RecordsSignal(raw, others, **more)

    return read


def _say_records(layout: headers.Layout, held: int) -> str:
    told = f"says {layout.n_records} records" if layout.n_records > 0 else "does not give the number of records"
    return f"the header {told}, the file holds {held}; all of them are read"


def _find_marks(
    format_: str, path: Path, layout: headers.Layout, main: list[int], per_record: int
) -> tuple[dict[str, Any], bool]:
    """Return the segments, annotations, marks and notes of a file, as arguments of `RawSignal`.

    The second returned value is True if at some time, values are missing in some channels, but not in all channels.
    """
    notes: list[str] = []
    if format_ == "gdf":
        events = records.read_gdf_events(path, layout)
        found, some = records.find_missing(path, layout, main)
        if layout.n_records <= 0:
            notes.append(_say_records(layout, headers.count_gdf_records(path, layout)))
        return {"format_": format_, "annotations": events, "marks": found, "notes": notes}, some
    if (held := headers.count_records(path, layout)) != layout.n_records:
        notes.append(_say_records(layout, held))
    out: dict[str, Any] = {"format_": format_, "notes": notes}
    if layout.annotated or layout.interrupted:
        # Do not use MNE's annotations. MNE joins the records without gaps, and drops annotations after the end of the
        # joined signal.
        onsets, annotations = records.read_annotations(path, layout)
        runs, more = records.find_runs(onsets, layout)
        first = onsets[0] if len(onsets) and np.isfinite(onsets[0]) else 0.0
        out["segments"] = records.segments_of_runs(runs, per_record)
        out["annotations"] = [mark._replace(onset=mark.onset - first) for mark in annotations]
        notes += more
    if format_ == "bdf":
        out["marks"], more = records.find_status_marks(path, layout)
        notes += more
    return out, False


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Result of opening some channels of a file with MNE."""

    raw: BaseRaw
    """The channels."""
    numbers: list[int]
    """Index of each channel in the header of the file."""
    factors: list[float]
    """Factor by which MNE multiplies the values of each channel."""


def _separate(layout: headers.Layout, rates: dict[int, list[int]]) -> dict[str, str]:
    """Remove from `rates` the channels that MNE cannot open alone; return their names, each with the reason.

    MNE selects channels by name. If two channels with different rates have the same name, MNE would open both, and
    resample the slower channel. So the slower channel is left out.
    """
    left_out = {}
    for rate, numbers in list(rates.items()):
        faster = {label for label, n in zip(layout.labels, layout.per_record, strict=True) if n > rate}
        rates[rate] = [i for i in numbers if layout.labels[i] not in faster]
        for i in set(numbers) - set(rates[rate]):
            left_out[layout.labels[i]] = "a channel with the same name has a higher rate"
        if not rates[rate]:
            del rates[rate]
    return left_out


def _say_unscaled(layout: headers.Layout) -> list[str]:
    """Return the note about channels whose header gives no scale."""
    if not layout.unscaled:
        return []
    names = [layout.labels[i] for i in layout.unscaled]
    told = f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"
    return [f"left out, because the header gives no scale: {told}; {next(iter(layout.unscaled.values()))}"]


def _open_with_mne(format_: str, path: Path, layout: headers.Layout, numbers: list[int]) -> _Opened:
    """Open some channels of a file, selected by their indices in the header."""
    import mne

    wanted = {layout.labels[i] for i in numbers}
    exclude = sorted(set(layout.labels) - wanted - set(headers.ANNOTATIONS))
    if format_ == "gdf":
        exclude = [] if len(set(layout.per_record)) == 1 else exclude
        raw = mne.io.read_raw_gdf(path, exclude=exclude)
        opened = [i for i, label in enumerate(layout.labels) if label not in exclude]
        if exclude:
            _mend_selection(raw, layout, opened)
    else:
        raw = getattr(mne.io, f"read_raw_{format_}")(path, exclude=exclude, encoding="latin1")
        opened = [int(i) for i in raw._raw_extras[0]["sel"]]
    extras = raw._raw_extras[0]
    rows = [row for row, i in enumerate(opened) if i in numbers]
    factors = [float(extras["units"][row]) for row in rows]
    if len(rows) < len(opened):
        raw.pick(rows)
    return _Opened(raw=raw, numbers=[opened[row] for row in rows], factors=factors)


def _mend_selection(raw: BaseRaw, layout: headers.Layout, opened: list[int]) -> None:
    """Correct the channels of a GDF recording, after MNE has opened it without some channels of the file.

    MNE 1.13 forgets which channels were selected, and reads as many channels from the beginning of the file instead.
    """
    extras = raw._raw_extras[0]
    count = max(layout.per_record[i] for i in opened)
    extras["sel"] = np.array(opened)
    for key in ("cal", "offsets"):
        extras[key] = extras[key][opened]
    extras["max_samp"], extras["nsamples"] = count, int(extras["n_records"]) * count
    with raw.info._unlock():
        raw.info["sfreq"] = count / layout.record_s
    raw._last_samps = np.array([extras["nsamples"] - 1])


def unique_names(labels: list[str]) -> tuple[list[str], list[str]]:
    """Return unique names for channels with equal labels, and a note for each label that exists several times.

    Channels with equal labels get numbers as in MNE (``EEG-0``, ``EEG-1``). If the label is the name of an electrode,
    the first channel keeps this label, so it keeps the position of the electrode too.
    """
    counts, seen, names, notes = Counter(labels), Counter(), [], []
    electrodes = is_electrode(labels)
    for label, electrode in zip(labels, electrodes, strict=True):
        number, name = seen[label], label
        if counts[label] > 1 and not (electrode and number == 0):
            while (name := f"{label}-{number}") in counts or name in names:
                number += 1
        seen[label] = number + 1
        names.append(name)
    for label, count in counts.items():
        if count > 1:
            kept = "the first keeps its name and position, the others get" if label in names else "all get"
            notes.append(f"{count} channels are named '{label}': {kept} a number")
    return names, notes


def _rate_of_eeg(layout: headers.Layout) -> int:
    """Return how many samples an EEG channel has in a record; if EEG channels differ, the most frequent number."""
    counts: Counter[int] = Counter()
    electrodes = is_electrode(layout.labels)
    for i, (label, unit, count) in enumerate(zip(layout.labels, layout.units, layout.per_record, strict=True)):
        if label in headers.ANNOTATIONS or count < 1 or i in layout.unscaled:
            continue
        other = kind_of(canonical_name(label)) is not None or not (names_no_unit(unit) or to_volts(unit))
        # The most frequent rate is chosen. Channels with electrode names count most, other channels that may be EEG
        # count less, and all other channels count least.
        counts[count] += 1 if other else 10**6 if electrodes[i] else 1000
    usable = [electrodes[i] for i in range(len(layout.labels)) if i not in layout.unscaled]
    if layout.unscaled and not (any(usable) if any(electrodes) else counts):
        number, fault = next(iter(layout.unscaled.items()))
        name = layout.labels[number]
        text = f"{len(layout.unscaled)} channels have no scale, for example {name}: {fault}; correct the header"
        raise ReadError(Reason("no physical range", text))
    if not counts:
        raise NotContinuous(Reason("no signal", "no channel has samples"))
    return max(counts, key=lambda count: (counts[count], count))
