"""Read the events of an EEGLAB file with the channels of each event, because MNE does not read these channels."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from data_sharding.formats.marks.interruptions import Annotation, Effect, Found, find_row

CHANNEL_FIELDS = ("channel", "chanindex")
"""Fields of an event that name its channels. The import of BrainVision and BIDS into EEGLAB writes the field `channel`,
and the import through BioSig writes `chanindex`. The fields `channel` and `chanindex` contain numbers of channels,
counted from 1, or names of channels."""
NO_CHANNEL = ("", "n/a", "all", "none")
"""If an event has one of these texts (in lower case) in one of the fields `CHANNEL_FIELDS`, the event belongs to all
channels."""
REJECTIONS = ("manual", "thresh", "const", "jp", "kurt", "freq", "global")
"""Kinds of rejection in the structure EEG.reject. For each kind, the field ``rejKIND`` has one number for each epoch,
and the field ``rejKINDE`` has one number for each channel and epoch. The fields ``icarejKIND`` mark epochs that were
rejected because of their independent components."""


def list_entries(value: Any) -> list[dict[str, Any]]:
    """Return the entries of a MATLAB structure array, which MNE loads as a list or as a dictionary of lists.

    Parameters
    ----------
    value : Any
        The structure array.

    Returns
    -------
    list of dict
        The fields of each entry.
    """
    if isinstance(value, dict):
        columns = {
            key: column
            for key, column in value.items()
            if isinstance(column, list) or (isinstance(column, np.ndarray) and column.ndim)
        }
        length = max((len(column) for column in columns.values()), default=0)
        if not length and len(columns) == len(value):
            return []  # This is a structure array without entries: only the names of its fields are stored.
        if not length or any(len(column) != length for column in columns.values()):
            return [value]
        return [{key: value[key][i] for key in columns} for i in range(length)]
    found = []
    for entry in value if isinstance(value, list | np.ndarray) else [value]:
        if isinstance(entry, dict):
            found.append(dict(entry))
        elif isinstance(entry, np.void):
            found.append({key: entry[key] for key in entry.dtype.names or ()})
        else:
            found.append(dict(vars(entry)))
    return found


def read_number(value: Any) -> float | None:
    """Convert the value of a field of a MATLAB structure to a number.

    Parameters
    ----------
    value : Any
        The entry.

    Returns
    -------
    float or None
        The number; NaN if the value is empty or infinite; None if the value is not a number.
    """
    array = np.asarray(value)
    if array.size == 0 and array.dtype.kind != "U":
        return np.nan
    if array.size != 1 or array.dtype.kind not in "iufb":
        return None
    number = float(array.reshape(()))
    return number if np.isfinite(number) else np.nan


def read_channel_events(content: Any) -> tuple[list[Annotation] | None, list[str]]:
    """Read the events of an EEGLAB file, if at least one event belongs only to some of the channels.

    Parameters
    ----------
    content : Any
        The structure EEG, as MNE loads it, with the fields event, chanlocs, chaninfo and srate.

    Returns
    -------
    annotations : list of Annotation or None
        All events that have a valid latency (time). None if no event names a channel, or if the file does not list its
        channels.
    notes : list of str
        A note for the ledger if the channels of bad-span marks cannot be used. Such marks are used for all channels.
    """
    events, channels = list_entries(content.event), list_entries(content.chanlocs)
    if not any(field in event for event in events[:1] for field in CHANNEL_FIELDS) or not channels:
        return None, []
    numbers = _map_numbers(channels, getattr(content, "chaninfo", None))
    annotations, unclear = [], 0
    for event in events:
        latency, duration = read_number(event.get("latency")), read_number(event.get("duration", np.zeros(0)))
        if latency is None or math.isnan(latency):
            continue
        text, names = str(event.get("type")), _read_channels(event, numbers)
        if names is None:
            row = find_row("eeglab", text)
            unclear += row is not None and row.effect is Effect.BAD
        seconds = 0.0 if duration is None or math.isnan(duration) else duration / content.srate
        annotations.append(Annotation((latency - 1) / content.srate, seconds, text, names or ()))
    notes = []
    if unclear:
        notes.append(
            f"the channels of {unclear} bad-span marks are not known, because channels were removed from the file, or "
            "because the marks have numbers that are not channel numbers; these marks are used for all channels"
        )
    return (annotations if any(event.channels for event in annotations) else None), notes


def read_rejections(content: Any) -> tuple[list[Found], list[str]]:
    """Read which epochs of an EEGLAB file are marked for rejection.

    Parameters
    ----------
    content : Any
        The structure EEG, as MNE loads it, with the fields reject, chanlocs, trials, pnts, nbchan and srate.

    Returns
    -------
    marks : list of Found
        One mark for each marked epoch. If only some channels of the epoch are marked, the mark names these channels.
        Times are those of a signal in which all epochs follow each other without gaps.
    notes : list of str
        One note for the ledger about each field whose size does not fit the number of epochs. Such a field is not used.
    """
    fields = getattr(content, "reject", None)
    count, n, names = content.trials, content.nbchan, [str(c.get("labels")) for c in list_entries(content.chanlocs)]
    if not isinstance(fields, dict) or count < 2:
        return [], []
    whole, single, unfit = np.zeros(count, bool), np.zeros((n, count), bool), []
    for key in (f"{origin}rej{kind}" for origin in ("", "ica") for kind in REJECTIONS):
        for name, table in ((key, whole), (f"{key}E", single)):
            values = np.asarray(fields.get(name, ()))
            # The tables ``icarejKINDE`` are not used, because a row is an independent component and not a channel.
            if values.dtype.kind not in "iufb" or not values.any() or (table is single and key.startswith("ica")):
                continue
            values = values.T if values.shape == table.shape[::-1] else values
            if values.size != table.size:
                unfit.append(name)
            else:
                table |= np.nan_to_num(values.reshape(table.shape)) > 0
    spans: list[tuple[int, tuple[str, ...]]] = [(i, ()) for i in np.flatnonzero(whole).tolist()]
    if len(names) == n:
        for i in np.flatnonzero(single.any(axis=0) & ~whole).tolist():
            spans.append((i, tuple(names[row] for row in np.flatnonzero(single[:, i]))))
    length = content.pnts / content.srate
    notes = [f"EEG.reject.{name} does not fit {count} epochs, so its marks are not used" for name in unfit]
    return [Found("rejected epoch", i * length, length, "rejected epoch", of) for i, of in sorted(spans)], notes


def _map_numbers(channels: list[dict[str, Any]], info: Any) -> dict[int, str | None]:
    """Map each channel number to the name of the channel, or to None if the number can mean two channels.

    The number of a channel changes if a channel with a lower number is removed, and an event may contain the old or the
    new number. EEGLAB stores the original number of a channel in the field `urchan`, and the removed channels in
    `chaninfo.removedchans`.
    """
    names = [str(channel.get("labels")) for channel in channels]
    now: dict[int, str | None] = dict(enumerate(names, start=1))
    first = [read_number(channel.get("urchan", np.zeros(0))) or math.nan for channel in channels]
    if all(number >= 1 for number in first) and len(set(first)) == len(first):
        before = {int(number): name for number, name in zip(first, names, strict=True)}
        return {n: now[n] if now.get(n) == before.get(n) else None for n in now.keys() | before.keys()}
    removed = info.get("removedchans") if isinstance(info, dict) else getattr(info, "removedchans", None)
    return dict.fromkeys(now) if removed is not None and np.size(removed) else now


def _read_channels(event: dict[str, Any], numbers: dict[int, str | None]) -> tuple[str, ...] | None:
    """Return the names of an event's channels.

    An empty tuple means all channels; None means that the channels are unclear.

    If the event gives a number that no channel has, this number is returned as a name, and a later step writes a note.
    """
    names: list[str] = []
    for field in CHANNEL_FIELDS:
        values = _flatten(event.get(field))
        for value in values:
            if isinstance(value, str):
                words = (word.strip() for word in re.split(r"[,;|]", value))
                names += [word for word in words if word.lower() not in NO_CHANNEL]
                continue
            number = read_number(value)
            if number is None or math.isnan(number) or (number < 1 and len(values) == 1):
                continue  # The field names no channel. For example, 0 means that the event belongs to all channels.
            name = numbers.get(int(number), f"{number:g}") if number.is_integer() else f"{number:g}"
            if name is None or number < 1:
                return None
            names.append(name)
    return tuple(dict.fromkeys(names))


def _flatten(value: Any) -> list[Any]:
    """Return a flat list of the texts and numbers in a value. The value is a text, a number, an array or a list."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [item for part in value for item in _flatten(part)]
    return [value]
