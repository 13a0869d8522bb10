"""Open EDF, BDF and GDF files. Channels may differ in rate and unit, and records may have gaps between them.

In array shapes, n is the number of channels, and S the number of samples at the recording's rate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.channels import GRID_NAME, NET_NAME, canonical_name, is_grid, is_net, is_site, kind_of
from data_sharding.formats.mne_signal import BAD, NotContinuous, RawSignal, ReadError, interruptions, segments_of
from data_sharding.formats.signal import Segment, Signal

if TYPE_CHECKING:
    from mne.io import BaseRaw

VOLTS = re.compile(r"[munpµμ\x83\xca�?]{0,2}v(olts?)?|(micro|milli|nano)volts?", re.IGNORECASE)
"""Units that are a voltage. The Greek letter micro has different codes in different text encodings."""
NEW_SEGMENT = "32766"
"""GDF event code (0x7ffe) that marks the beginning of a new run."""
LOWEST_HZ = 100.0
"""A channel with a lower sampling rate cannot hold the EEG band. If other channels are faster, it is marked as bad."""


class RecordsSignal(RawSignal):
    """A recording with electrodes of different sampling rates.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        Channels with the main sampling rate.
    others : list of (mne.io.BaseRaw, Fraction)
        The channels with other rates, and the ratio of the main rate to their rate. They are resampled to the main
        rate; the result equals resampling each segment as a whole.
    **more : Any
        Further arguments of `RawSignal`.
    """

    def __init__(self, raw: BaseRaw, others: list[tuple[BaseRaw, Fraction]], **more: Any) -> None:
        super().__init__(raw, **more)
        self._n_main = len(raw.ch_names)
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
        # The filter of resample_poly has this many samples. Samples further away do not change the result.
        reach = 10 * max(up, down) // up + down + 1
        first, last = segment.start * down // up, segment.stop * down // up
        a = max(first, first + (start * down // up - reach - first) // down * down)
        b = min(last, -(-stop * down // up) + reach)
        y = resample_poly(raw[[pick], a:b][0][0], up, down, padtype="edge")
        return y[start - a * up // down :][: stop - start]

    def close(self) -> None:
        """Close the files of the recording."""
        super().close()
        for other, _, _ in self._others:
            other.close()


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
        signals = [i for i, label in enumerate(layout.labels) if i != layout.notes and "Annotations" not in label]
        # Do not let MNE resample: it resamples block by block to the highest rate, with errors at each block's edges.
        electrodes = _electrodes(layout)
        rates: dict[int, list[int]] = {}
        left_out = {}
        for i in signals:
            rate = layout.per_record[i] / (layout.record_s or 1)
            if layout.per_record[i] == count or (i in electrodes and layout.per_record[i]):
                rates.setdefault(layout.per_record[i], []).append(i)
            else:
                left_out[layout.labels[i]] = f"another rate: {rate:g} Hz"
        main = rates.pop(count)
        raw = _open_with_mne(format_, path, layout, main)
        others = [(_open_with_mne(format_, path, layout, rates[n]), Fraction(count, n)) for n in sorted(rates)]
        kept = [*main, *(i for n in sorted(rates) for i in rates[n])]
        names = [name for part in [raw, *(other for other, _ in others)] for name in part.ch_names]
        types = [kind for part in [raw, *(other for other, _ in others)] for kind in part.get_channel_types()]
        if len(kept) != len(names):
            raise ReadError(
                Reason("damaged header", "several channels have the same name, and the reader cannot separate them")
            )
        for row, i in enumerate(kept):
            if types[row] == "eeg" and layout.units[i] and not VOLTS.fullmatch(layout.units[i]):
                types[row] = "misc"
        more: dict[str, Any] = {"ch_types": types, "left_out": left_out}
        if layout.interrupted:
            # MNE joins the records without gaps, and drops annotations after the end of the joined signal.
            runs, notes = headers.edf_runs(path, layout)
            more["segments"] = [Segment(start=a * count, stop=b * count, onset=onset) for a, b, onset in runs]
            more["bad_spans"] = [(a, b, word) for a, b, word in notes if BAD.match(word) and b > a]
        elif format_ == "gdf":
            cuts, skips = interruptions(raw, NEW_SEGMENT)
            more["segments"] = segments_of(int(raw.n_times), float(raw.info["sfreq"]), cuts, skips)
        if not others:
            return RawSignal(raw, **more)
        slow = [n for n in sorted(rates) if n / layout.record_s < LOWEST_HZ]
        more |= {"ch_names": names, "positions": [None] * len(names)}
        more["bads"] = [layout.labels[i] for n in slow for i in rates[n]]
        told = ", ".join(f"{layout.labels[i]} {n / layout.record_s:g} Hz" for n in sorted(rates) for i in rates[n][:3])
        more["notes"] = [f"recorded at other rates, brought to {count / layout.record_s:g} Hz: {told}"]
        return RecordsSignal(raw, others, **more)

    return read


def _open_with_mne(format_: str, path: Path, layout: headers.Layout, numbers: list[int]) -> BaseRaw:
    """Open some channels of a file, selected by their indices in the header."""
    import mne

    wanted = {layout.labels[i] for i in numbers}
    exclude = sorted(set(layout.labels) - wanted - {"EDF Annotations", "BDF Annotations"})
    if clash := [i for i, label in enumerate(layout.labels) if label in wanted and i not in numbers]:
        text = f"two channels are named '{layout.labels[clash[0]]}', and their rates differ"
        raise ReadError(Reason("a channel name exists at several rates", text=text))
    options: dict[str, Any] = {} if format_ == "gdf" else {"encoding": "latin1"}
    return getattr(mne.io, f"read_raw_{format_}")(path, exclude=exclude, **options)


def _electrodes(layout: headers.Layout) -> set[int]:
    """Return the indices of the channels that are named after electrodes."""
    names = [canonical_name(label) for label in layout.labels]
    grid, net = is_grid(names), is_net(names)

    def named(label: str, name: str) -> bool:
        whole = (grid and GRID_NAME.fullmatch(name)) or (net and NET_NAME.fullmatch(name))
        return bool(whole) or is_site(name) or label.upper().startswith("EEG ")

    return {
        i
        for i, (label, name) in enumerate(zip(layout.labels, names, strict=True))
        if kind_of(name, grid=grid, net=net) is None and named(label, name)
    }


def _rate_of_eeg(layout: headers.Layout) -> int:
    """Return the number of samples per record of the EEG channels; if they differ, the most frequent number."""
    counts: Counter[int] = Counter()
    electrodes = _electrodes(layout)
    for i, (label, unit, count) in enumerate(zip(layout.labels, layout.units, layout.per_record, strict=True)):
        if "Annotations" in label or count < 1:
            continue
        other = kind_of(canonical_name(label)) is not None or bool(unit and not VOLTS.fullmatch(unit))
        # Use channels with electrode names; without such channels, use names that may be EEG; otherwise all channels.
        counts[count] += 1 if other else 10**6 if i in electrodes else 1000
    if not counts:
        raise NotContinuous(Reason("no signal", "no channel has samples"))
    return max(counts, key=lambda count: (counts[count], count))
