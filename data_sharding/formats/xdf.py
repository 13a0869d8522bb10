"""Open the EEG stream of an XDF file (LabStreamingLayer), in which each sample has a time stamp.

In array shapes, n is the number of channels, and S the number of time points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import clean_position
from data_sharding.formats.edf import unique_names
from data_sharding.formats.marks.interruptions import Annotation, divide, find_marks
from data_sharding.formats.mne_signal import NotContinuous, ReadError
from data_sharding.formats.signal import Signal, SignalInfo
from data_sharding.formats.stamps import Clock, fit_clock
from data_sharding.formats.units import Units, read_units

EVENT_TYPES = ("markers", "marker", "events", "event", "stim", "stimulus", "trigger", "triggers")
"""Types of streams whose numbers are event codes, in lower case. The XDF specification has the type `Markers`, and
EEGLAB also reads `Events`; devices write the other types."""
NUMBER_FORMATS = ("int8", "int16", "int32", "int64", "float32", "double64")
"""Formats of numbers in the XDF specification."""
TYPES = {"eeg": "eeg", "eog": "eog", "ecg": "ecg", "ekg": "ecg", "emg": "emg", "": "eeg"}


class ArraySignal:
    """A recording in memory. The whole file is loaded, because files of this format cannot be read in blocks.

    Parameters
    ----------
    x : ndarray, shape (S, n)
        Samples in the unit of the file.
    factors : ndarray, shape (n,)
        Factor of each channel that converts its samples to volts.
    info : SignalInfo
        Metadata of the recording.
    """

    def __init__(self, x: np.ndarray, factors: np.ndarray, info: SignalInfo) -> None:
        self.x, self.factors, self.info = x, factors, info

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        return self.x[start:stop, picks].T.astype(np.float64) * self.factors[picks, None]

    def close(self) -> None:
        """Do nothing, because the recording is in memory and no file is open."""


def open_xdf(path: Path) -> Signal:
    """Open the EEG stream of an XDF file.

    Parameters
    ----------
    path : Path
        File to read.

    Returns
    -------
    Signal
        The stream, with the sampling rate from the time stamps. If samples are missing, a new segment begins after the
        gap (see `data_sharding.formats.stamps`). The texts of marker streams can divide the recording at interruptions,
        like annotations of other formats. Numbers in marker streams are event codes, and never divide the recording.

    Raises
    ------
    NotContinuous
        If the file has no stream of type EEG, or if marks cover the whole recording.
    ReadError
        If the file has several streams of type EEG, or if the stream has no steady rate or no time stamps.
    """
    import pyxdf

    streams = pyxdf.resolve_streams(str(path))
    eeg = [
        s for s in streams if str(s.get("type", "")).strip().lower() == "eeg" and s.get("channel_format") != "string"
    ]
    if not eeg:
        kinds = sorted({str(s.get("type") or "untyped") for s in streams}) or ["none"]
        raise NotContinuous(Reason("no stream of type EEG", f"only {', '.join(kinds)}"))
    own, notes = _choose_stream(path, eeg)
    markers = [s["stream_id"] for s in streams if _has_events(s)]
    sizes: list[int] = []

    def count(values: Any, times: Any, info: Any, number: int) -> tuple[Any, Any, Any]:
        if number == own:
            sizes.append(len(times))
        return values, times, info

    # Do not let pyxdf correct the time stamps, because its correction would hide gaps that are shorter than a second.
    streams, _ = pyxdf.load_xdf(
        str(path),
        select_streams=[own, *markers],
        on_chunk=count,
        synchronize_clocks=False,
        dejitter_timestamps=False,
    )
    stream = next(s for s in streams if s["info"]["stream_id"] == own)
    x, stamps = np.asarray(stream["time_series"]), np.asarray(stream["time_stamps"], float)
    if x.ndim != 2 or len(x) < 2:
        raise NotContinuous(Reason("no signal", f"{len(x)} samples"))
    nominal = float(stream["info"]["nominal_srate"][0] or 0)
    offsets = _offsets(stream)
    clock = fit_clock(stamps, nominal, x, sizes, offsets)
    if clock.order is not None:
        x = x[clock.order]
    others = [s for s in streams if s is not stream]
    divided = divide(clock.segments, clock.sfreq, find_marks("xdf", read_markers(others, clock, offsets)))
    if not divided.segments:
        raise NotContinuous(Reason("no signal", "the marker streams mark the whole recording as interrupted"))
    names, twice, units, positions = _channels(stream["info"].get("desc"), x.shape[1])
    fields: dict[str, Any] = {**units.fields, "notes": [*notes, *clock.notes, *twice, *units.notes, *divided.notes]}
    return ArraySignal(
        x,
        units.gains,
        SignalInfo(
            ch_names=names,
            **fields,
            positions=positions,
            sfreq=clock.sfreq,
            n_samples=len(x),
            segments=divided.segments,
            bad_spans=divided.bad_spans,
        ),
    )


def _choose_stream(path: Path, streams: Sequence[Any]) -> tuple[int, list[str]]:
    """Return the id of the stream with samples (there must be one only), and notes about streams without samples.

    A recorder also writes the header of a device that is switched on but sends nothing.
    """
    import pyxdf

    names = {stream["stream_id"]: str(stream.get("name") or stream["stream_id"]) for stream in streams}
    if len(names) == 1:
        return next(iter(names)), []
    loaded, _ = pyxdf.load_xdf(
        str(path), select_streams=list(names), synchronize_clocks=False, dejitter_timestamps=False
    )
    full = {s["info"]["stream_id"]: names[s["info"]["stream_id"]] for s in loaded if len(s["time_stamps"])}
    empty = [f"the stream {name} of type EEG has no samples" for number, name in names.items() if number not in full]
    if not full:
        raise NotContinuous(Reason("no signal", f"the {len(names)} streams of type EEG have no samples"))
    if len(full) > 1:
        listed = ", ".join(full.values())
        text = (
            f"{len(full)} streams of type EEG ({listed}), and the reader cannot choose a stream; export one EEG stream"
        )
        raise ReadError(Reason("several streams of type EEG", text=text))
    return next(iter(full)), empty


def _has_events(stream: Any) -> bool:
    """Return whether a stream contains events: texts, or event codes.

    Numbers are event codes if the stream has no sampling rate. Numbers in a stream with a sampling rate are the samples
    of a trigger signal, which is not read.
    """
    if stream["channel_format"] == "string":
        return True
    kind, numbers = str(stream["type"] or "").strip().lower(), stream["channel_format"] in NUMBER_FORMATS
    return numbers and kind in EVENT_TYPES and stream["nominal_srate"] == 0


def _event_text(value: Any) -> str:
    """Return the text of an event, or its event code as a text; an empty text for NaN."""
    if isinstance(value, str | np.integer):
        return str(value).strip()
    return f"{value:.15g}" if np.isfinite(value) else ""


def _offsets(stream: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return the measured differences between the clock of a stream and the clock of the computer: times and values."""
    return stream.get("clock_times", ()), stream.get("clock_values", ())


def _offset_at(offsets: tuple[Sequence[float], Sequence[float]], stamps: np.ndarray) -> np.ndarray:
    """Interpolate the measured differences between stream clock and computer clock at the given time stamps.

    The time stamps plus the result (in seconds) are times of the computer's clock.
    """
    at, by = (np.asarray(values, float) for values in offsets)
    kept = np.isfinite(at) & np.isfinite(by)
    if not kept.any():
        return np.zeros_like(stamps)
    order = np.argsort(at[kept], kind="stable")
    return np.interp(stamps, at[kept][order], by[kept][order])


def read_markers(streams: Any, clock: Clock, offsets: tuple[Sequence[float], Sequence[float]]) -> list[Annotation]:
    """Read the texts and event codes of marker streams.

    Parameters
    ----------
    streams : list of dict
        Marker streams, as pyxdf returns them, with the time stamps of the file.
    clock : Clock
        Clock of the EEG stream.
    offsets : pair of sequences of float
        Measured differences between the clock of the EEG stream and the clock of the recording computer: the times of
        the measurements and the differences, both in seconds.

    Returns
    -------
    list of Annotation
        Annotations without duration, on the amplifier's clock. An event code is converted to a text.

    Notes
    -----
    The marker streams and the EEG stream have different clocks. The measured offsets of each stream are relative to the
    clock of the recording computer. Therefore marker times are converted to the clock of the recording computer, and
    then to the clock of the EEG stream.
    """
    found = []
    for stream in streams:
        stamps, rows = np.asarray(stream["time_stamps"], float), stream["time_series"]
        common = stamps + _offset_at(_offsets(stream), stamps)
        if clock.offset is None:
            # The offset depends on the time of the event on the clock of the EEG stream, but this time is not known
            # yet. Clock offsets change slowly, so it is enough to compute the offset at an estimate of this time.
            about = common - _offset_at(offsets, common)
            common -= _offset_at(offsets, about)
        else:
            common -= clock.offset
        for stamp, row in zip(common.tolist(), rows, strict=True):
            if np.isfinite(stamp):
                seconds = clock.time_of_stamp(stamp)
                found += [Annotation(seconds, 0.0, text) for value in row if (text := _event_text(value))]
    return found


def _channels(desc: Any, n: int) -> tuple[list[str], list[str], Units, list[list[float] | None]]:
    """Return the names, notes about equal names, types and units, and positions of the channels of a stream.

    Values without a unit are read as volts; a later check of the amplitudes finds values with another unit.
    """
    try:
        declared = desc[0]["channels"][0]["channel"]
    except (TypeError, KeyError, IndexError):
        declared = []
    if len(declared) != n:
        declared = [{}] * n

    def word(channel: Any, key: str) -> str:
        value = (channel.get(key) or [""])[0]
        return value.strip() if isinstance(value, str) else ""

    names, twice = unique_names([word(channel, "label") or str(i) for i, channel in enumerate(declared, start=1)])
    types = [TYPES.get(word(channel, "type").lower(), "misc") for channel in declared]
    units = read_units(names, types, [word(channel, "unit") for channel in declared], [1.0] * n)
    return names, twice, units, [_place(channel) for channel in declared]


def _place(channel: Any) -> list[float] | None:
    try:
        location = channel["location"][0]
        return clean_position([float(location[axis][0]) / 1000 for axis in ("X", "Y", "Z")])  # XDF stores millimetres.
    except (TypeError, KeyError, IndexError, ValueError):
        return None
