"""Repair the channels and events of an EEGLAB file. One invalid entry makes MNE refuse the whole file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.formats.marks.eeglab import list_entries, read_channel_events, read_number, read_rejections
from data_sharding.formats.marks.files import read_epoch_events
from data_sharding.formats.marks.interruptions import Annotation, Found, find_marks
from data_sharding.formats.mne_signal import EpochsSignal, RawSignal
from data_sharding.formats.signal import Signal

FAR = 5.0
"""If the distance of an electrode from the centre of the head is more than 5 times the median distance, the position of
this electrode is removed."""
MOST_NAMED = 5


def with_repairs(read: Callable[[Path], Any]) -> Callable[[Path], Signal]:
    """Return a reader of EEGLAB files that repairs the channels and events before MNE uses them.

    Parameters
    ----------
    read : callable
        Function that opens a ``.set`` file with MNE, and returns a raw or epochs object.

    Returns
    -------
    callable
        Function that returns a `Signal` with a note for each repair.
    """

    def read_repaired(path: Path) -> Signal:
        import mne

        with _repairing() as found:
            opened = read(path)
            if isinstance(opened, mne.BaseEpochs):
                events, faults = read_epoch_events(path)
                marks = [*find_marks("eeglab", found.events or events), *found.rejected]
                signal: Signal = EpochsSignal(opened, marks=marks, notes=faults)
            else:
                signal = RawSignal(opened, format_="eeglab", annotations=found.events or None)
        said = list(dict.fromkeys(found.notes))  # Remove duplicates, because MNE may load the file twice.
        signal.info = dataclasses.replace(signal.info, notes=[*signal.info.notes, *said])
        return signal

    return read_repaired


@dataclass
class _Found:
    """Notes, events and marks that were found in a ``.set`` file while MNE loaded the file."""

    notes: list[str] = field(default_factory=list)
    """Notes about the repairs."""
    events: list[Annotation] = field(default_factory=list)
    """All events of the file, if at least one event belongs only to some of the channels; otherwise an empty list."""
    rejected: list[Found] = field(default_factory=list)
    """Epochs that are marked for rejection."""


@contextlib.contextmanager
def _repairing() -> Iterator[_Found]:
    """Replace the function with which MNE loads a ``.set`` file, so that the loaded content can be repaired.

    Yields
    ------
    _Found
        Notes, events and marks of the file. The lists are complete after MNE has loaded the file.
    """
    from mne.io.eeglab import eeglab

    load, found = eeglab._check_load_mat, _Found()

    def load_repaired(*args: Any, **kwargs: Any) -> Any:
        content = load(*args, **kwargs)

        def read_events(content: Any, notes: list[str]) -> None:
            events, said = read_channel_events(content)
            found.events = events or []
            notes += said

        def read_rejected(content: Any, notes: list[str]) -> None:
            found.rejected, said = read_rejections(content)
            notes += said

        # `_repair_events` removes the field with the channels from each event, so read the channels before this call.
        for repair in (_repair_channels, read_rejected, read_events, _repair_events):
            with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
                repair(content, found.notes)
        return content

    eeglab._check_load_mat = load_repaired
    try:
        yield found
    finally:
        eeglab._check_load_mat = load


def _repair_channels(content: Any, notes: list[str]) -> None:
    if not len(content.chanlocs):
        return
    rows = content.data.shape[0] if isinstance(content.data, np.ndarray) and content.data.ndim > 1 else content.nbchan
    channels = list_entries(content.chanlocs)
    if len(channels) != rows:
        notes.append(f"the file names {len(channels)} channels, but contains {rows}: names and positions are not used")
        content.chanlocs, content.nbchan = [], rows
        return
    unnamed, unplaced, twice = [], [], []
    names: list[str] = []
    for i, channel in enumerate(channels, start=1):
        label = channel.get("labels")
        if not isinstance(label, str) or not label.strip():
            number = read_number(label)
            channel["labels"] = f"{number:g}" if number is not None and np.isfinite(number) else f"Ch{i}"
            unnamed.append(channel["labels"])
        label, number = channel["labels"], 2
        while channel["labels"] in names:
            channel["labels"], number = f"{label}-{number}", number + 1
        twice += [label] if channel["labels"] != label else []
        names.append(channel["labels"])
    if all(axis in channels[0] for axis in "XYZ"):
        places = [[read_number(channel.get(axis)) for axis in "XYZ"] for channel in channels]
        known = [float(np.linalg.norm(np.array(place, float))) for place in places if None not in place]
        usual = float(np.nanmedian(known)) if np.isfinite(np.array(known)).any() else np.nan
        for channel, place in zip(channels, places, strict=True):
            if None in place or np.linalg.norm(np.array(place, float)) > FAR * usual > 0:
                channel |= dict.fromkeys("XYZ", np.zeros(0))
                unplaced.append(channel["labels"])
    if unnamed or unplaced or twice:
        content.chanlocs = channels
    for what, found in (
        ("names that are not text", unnamed),
        ("positions that are not numbers, or that are far from the head", unplaced),
        ("a name that another channel has, so a number is added", twice),
    ):
        if found:
            notes.append(f"channels with {what}: {', '.join(found[:MOST_NAMED])} ({len(found)})")


def _repair_events(content: Any, notes: list[str]) -> None:
    if not len(getattr(content, "event", [])):
        return
    events = list_entries(content.event)
    kept, lost, endless = [], 0, 0
    for event in events:
        latency, duration = read_number(event.get("latency")), read_number(event.get("duration", np.zeros(0)))
        if latency is None or np.isnan(latency):
            lost += 1
            continue
        endless += duration is None
        kept.append(
            {"type": event.get("type"), "latency": latency, "duration": np.nan if duration is None else duration}
        )
    if lost or endless:
        content.event = kept
    if lost:
        notes.append(f"{lost} events without a latency are not used")
    if endless:
        notes.append(f"{endless} events have a duration that is not a number")
