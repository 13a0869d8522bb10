"""Read recordings in Neurodata Without Borders files (``.nwb``). Only channels with names of scalp electrodes are EEG.

In array shapes, n is the number of channels, and S the number of samples.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import is_electrode
from data_sharding.formats.edf import unique_names
from data_sharding.formats.marks.interruptions import Found, divide
from data_sharding.formats.mne_signal import NotContinuous, ReadError
from data_sharding.formats.readers import Format
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.formats.units import read_units

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording

NAMES = ("label", "channel_name", "electrode_name", "name")
"""Columns of the electrode table that can contain the names of the electrodes."""


def _recognise(file: File) -> Recording | None:
    if file.suffix != ".nwb":
        return None
    whole = file.head.startswith(b"\x89HDF\r\n\x1a\n")
    fault = Reason("unreadable", "not NWB: it is not an HDF5 file")
    return file.recording("nwb", problem=None if whole else fault)


class NWBSignal:
    """The electrical series of an NWB file.

    Parameters
    ----------
    path : Path
        File to read.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self._file = h5py.File(path, "r")
        series = _find_series(self._file)
        self._data = series["data"]
        n = self._data.shape[1] if self._data.ndim == 2 else 1
        attributes = self._data.attrs
        labels = _read_names(self._file, series, n)
        names, twice = unique_names(labels)
        types = ["eeg" if named else "seeg" for named in is_electrode(labels)]
        units = read_units(names, types, [_text(attributes.get("unit", "volts"))] * n, [1.0] * n)
        conversion = float(attributes.get("conversion", 1.0)) * np.ones(n)
        if "channel_conversion" in series:
            conversion = conversion * np.asarray(series["channel_conversion"], float)
        self._conversion, self._offset = conversion[:, None], float(attributes.get("offset", 0.0))
        self._gains = units.gains[:, None]
        sfreq, begin, segments = _read_times(series, len(self._data))
        invalid, faults = _read_invalid_times(self._file, begin)
        divided = divide(segments, sfreq, invalid)
        self.info = SignalInfo(
            **{**units.fields, "notes": [*twice, *units.notes, *faults, *divided.notes]},
            ch_names=names,
            positions=[None] * n,
            sfreq=sfreq,
            n_samples=len(self._data),
            segments=divided.segments,
            bad_spans=divided.bad_spans,
        )

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        x_Sn = np.asarray(self._data[start:stop], float).reshape(stop - start, -1)
        return (x_Sn.T[picks] * self._conversion[picks] + self._offset) * self._gains[picks]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _find_series(file: Any) -> Any:
    """Find the electrical series (NWB's name for a voltage signal).

    If the raw data (``acquisition``) have no electrical series, search the processed data (``processing``).
    """
    for where in ("acquisition", "processing"):
        found: list[Any] = []

        def look(name: str, node: Any, found: list[Any] = found) -> None:
            if _text(node.attrs.get("neurodata_type", "")) == "ElectricalSeries" and "data" in node:
                found.append(node)

        if where in file:
            file[where].visititems(look)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(node.name.rsplit("/", 1)[-1] for node in found[:4])
            text = f"{len(found)} electrical series ({names}); export each series as a file"
            raise ReadError(Reason("several electrical series", text=text))
    raise NotContinuous(Reason("no electrical series", "the NWB file contains no electrical series"))


def _read_names(file: Any, series: Any, n: int) -> list[str]:
    """Return the names of the channels from the electrode table; numbers if there is no table."""
    table = file.get("general/extracellular_ephys/electrodes")
    rows = np.asarray(series["electrodes"]).ravel().tolist() if "electrodes" in series else list(range(n))
    if table is None or len(rows) != n:
        return [str(i) for i in range(1, n + 1)]
    column = next((name for name in NAMES if name in table), "id")
    values = table[column][()]
    return [_text(values[row]).strip() for row in rows]


def _read_invalid_times(file: Any, begin: float) -> tuple[list[Found], list[str]]:
    """Return the spans in the table of invalid times, and notes for the ledger.

    Parameters
    ----------
    file : h5py.File
        The NWB file.
    begin : float
        Time of the first sample of the series. All times of an NWB file are seconds from the same moment.
    """
    table = file.get("intervals/invalid_times")
    if table is None:
        return [], []
    try:
        spans = np.stack([np.asarray(table[name], float).ravel() for name in ("start_time", "stop_time")], axis=1)
    except (KeyError, TypeError, ValueError):
        return [], ["the table invalid_times has no usable times, so its bad spans are not known"]
    good = np.isfinite(spans).all(axis=1) & (spans[:, 1] >= spans[:, 0])
    notes = (
        [f"{(~good).sum()} rows of the table invalid_times have no usable times; not used"] if not good.all() else []
    )
    found = [Found("NWB invalid times", a - begin, b - a, "invalid times") for a, b in spans[good].tolist()]
    return found, notes


def _read_times(series: Any, n_samples: int) -> tuple[float, float, list[Segment]]:
    """Return the sampling rate, the time of the first sample, and the segments.

    A new segment begins after each jump of the time stamps.
    """
    if "starting_time" in series:
        start = series["starting_time"]
        begin = float(np.asarray(start[()], float))
        segments = [Segment(start=0, stop=n_samples, onset=0.0)]
        return float(start.attrs["rate"]), begin if np.isfinite(begin) else 0.0, segments
    stamps = np.asarray(series["timestamps"], float) if "timestamps" in series else np.zeros(0)
    if len(stamps) != n_samples or n_samples < 2:
        raise ReadError(Reason("no sampling rate", "the electrical series has neither a sampling rate nor time stamps"))
    steps = np.diff(stamps)
    median = float(np.median(steps))
    whole = steps[np.abs(steps - median) < median / 2]
    if not median > 0 or len(whole) < 0.75 * len(steps):
        raise ReadError(Reason("the series has no steady rate", "its time stamps are irregular"))
    sfreq = 1.0 / float(whole.mean())
    sfreq = float(round(sfreq)) if abs(round(sfreq) / sfreq - 1) < 1e-4 else round(sfreq, 4)
    edges = [0, *(np.flatnonzero(np.abs(steps - median) >= median / 2) + 1).tolist(), n_samples]
    segments = []
    for a, b in itertools.pairwise(edges):
        # If the clock was set back, the segment begins at the end of the previous segment.
        earliest = segments[-1].onset + (a - segments[-1].start) / sfreq if segments else 0.0
        segments.append(Segment(start=a, stop=b, onset=max(float(stamps[a] - stamps[0]), earliest)))
    return sfreq, float(stamps[0]), segments


FORMAT = Format(
    name="nwb",
    recognise=_recognise,
    open=NWBSignal,
    title="Neurodata Without Borders (`.nwb`)",
    recognised_by="HDF5, and `.nwb`",
    compared="nothing, because the HDF5 library detects a truncated file",
    package="h5py",
)
