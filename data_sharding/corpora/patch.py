"""Replaces metadata from the header of a recording by metadata from its sidecar files."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import INTRACRANIAL, canonical_name, kind_of
from data_sharding.formats.marks.interruptions import Annotation, divide, find_marks, match_channels
from data_sharding.formats.mne_signal import NotContinuous
from data_sharding.formats.signal import ScaledSignal, Signal, SignalInfo
from data_sharding.formats.units import to_volts

SNAP = 0.3
"""Onsets in a table are often rounded to milliseconds. If an onset differs from the time of a sample by less than this
fraction of the sample interval, the onset is moved to the time of the sample."""


def patch_signal(signal: Signal, patch: dict[str, Any]) -> Signal:
    """Replace metadata of a signal, such as channel types, by metadata from sidecar files.

    Parameters
    ----------
    signal : Signal
        Signal that a reader returned. The function replaces the attribute `info` of the signal.
    patch : dict
        The metadata from the sidecar files. A channel in `patch` is found in the recording by its exact name or by its
        canonical name. For example, the name Fp1 also finds the channel ``EEG Fp1-REF``. All keys are optional:

        - ``types`` maps channels to MNE channel types.
        - ``positions`` maps channels to x, y and z in metres.
        - ``units`` maps channels to units. A unit is used only if the recording's own file gives no known unit for the
          channel.
        - ``bads`` lists more bad channels.
        - ``line_freq`` is the mains frequency in Hz.
        - ``reference`` is the reference of the recording.
        - ``notes`` lists notes for the ledger.
        - ``intracranial`` is true if electrodes inside the skull are used.
        - ``inside`` is seeg or ecog for a recording made inside the skull. A channel that is EEG according to the
          header, and is missing in ``types``, gets the type in ``inside``.
        - ``marks`` lists interruptions and bad spans: onset and duration in seconds, text, and names of channels. A
          mark without channel names applies to all channels.

    Returns
    -------
    Signal
        The signal. If a unit changes, the values of the signal change as well.
    """
    if not patch:
        return signal
    info = signal.info
    number = {canonical_name(name): i for i, name in reversed(list(enumerate(info.ch_names)))}
    number |= {name: i for i, name in reversed(list(enumerate(info.ch_names)))}

    def find(name: str) -> int | None:
        return number.get(name, number.get(canonical_name(name)))

    types, positions = list(info.ch_types), list(info.positions)
    bads, notes = list(info.bads), [*info.notes, *patch.get("notes", [])]
    given: dict[str, str] = patch.get("types", {})
    if absent := [name for name in given if find(name) is None]:
        notes.append(f"{len(absent)} channels of the sidecar are not in the recording, for example {absent[0]}")
    for name, kind in given.items():
        if (i := find(name)) is not None:
            types[i] = kind
    if inside := patch.get("inside"):
        listed = {find(name) for name in given}
        for i, kind in enumerate(types):
            # Most file formats do not distinguish EEG from SEEG. So a channel of the type EEG gets the type in
            # ``inside``, unless its name shows another kind of channel. With grid=True, `kind_of` regards A1 and A2 as
            # contacts of a grid, not as electrodes at the ears.
            if kind == "eeg" and i not in listed and kind_of(canonical_name(info.ch_names[i]), grid=True) is None:
                types[i] = inside
    for name, place in patch.get("positions", {}).items():
        if (i := find(name)) is not None:
            positions[i] = place
    gains, units = _read_units(
        info,
        {
            i: unit
            for name, unit in patch.get("units", {}).items()
            if (i := find(name)) is not None and types[i] in ("eeg", *INTRACRANIAL)
        },
    )
    for name in patch.get("bads", []):
        if (i := find(name)) is not None and info.ch_names[i] not in bads:
            bads.append(info.ch_names[i])
    notes += units.pop("notes")
    segments, bad_spans, single = info.segments, info.bad_spans, info.bad_channel_spans
    if patch.get("marks"):
        marks = [Annotation(_snap(onset, info.sfreq), *more) for onset, *more in patch["marks"]]
        found, unknown = match_channels(find_marks("bids", marks), info.ch_names, info.left_out)
        divided = divide(segments, info.sfreq, found)
        if segments and not divided.segments:
            raise NotContinuous(Reason("no signal", "the events table marks the whole recording as interrupted"))
        segments, bad_spans = divided.segments, sorted([*bad_spans, *divided.bad_spans])
        single = sorted([*single, *divided.bad_channel_spans])
        notes += [*unknown, *divided.notes]
    signal.info = dataclasses.replace(
        info,
        segments=segments,
        bad_spans=bad_spans,
        bad_channel_spans=single,
        **units,
        ch_types=types,
        positions=positions,
        bads=bads,
        notes=notes,
        line_freq=patch.get("line_freq") or info.line_freq,
        reference=patch.get("reference") or info.reference,
        intracranial=bool(patch.get("intracranial", info.intracranial)),
    )
    return signal if (gains == 1).all() else ScaledSignal(signal, gains)


def _snap(seconds: float, sfreq: float) -> float:
    nearest = round(seconds * sfreq)
    return nearest / sfreq if abs(seconds * sfreq - nearest) < SNAP else seconds


def _read_units(info: SignalInfo, given: dict[int, str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the factors that convert channels to the units in the sidecar, and the changed fields of `SignalInfo`.

    Parameters
    ----------
    info : SignalInfo
        Metadata from the header of the recording.
    given : dict of int to str
        Unit of each EEG channel in the sidecar.

    Returns
    -------
    gains : ndarray, shape (n,)
        Factor by which the values of each channel are multiplied; 1 for a channel without a unit in the sidecar.
    fields : dict
        New values of `named_units` and `unknown_units`, and ``notes`` for the ledger.
    """
    gains, named, unknown = np.ones(len(info.ch_names)), dict(info.named_units), dict(info.unknown_units)
    used: dict[str, list[str]] = {}
    for i, unit in given.items():
        name, factor = info.ch_names[i], to_volts(unit)
        if factor is None:
            unknown[name] = unit
            named.pop(name, None)
        elif name in info.unknown_units or name in info.assumed_units:
            gains[i] = factor / info.assumed_units.get(name, 1.0)
            named[name] = factor
            unknown.pop(name, None)
            if not np.isclose(gains[i], 1.0):
                used.setdefault(f"unit {unit} from the sidecar", []).append(name)
        elif not np.isclose(named.get(name, factor) / factor, 1.0):
            used.setdefault(f"the sidecar has the unit {unit}, but the unit in the file is used", []).append(name)
    gains[np.isclose(gains, 1.0, rtol=1e-9)] = 1.0
    notes = [
        f"{what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"
        for what, names in used.items()
    ]
    return gains, {"named_units": named, "unknown_units": unknown, "notes": notes}
