"""Replaces information from the header of a recording by information from its sidecar files."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_sharding.formats.channels import canonical_name
from data_sharding.formats.signal import Signal


def patch_signal(signal: Signal, patch: dict[str, Any]) -> Signal:
    """Replace information about a signal, such as channel types, by information from sidecar files.

    Parameters
    ----------
    signal : Signal
        Signal that a reader returned. The function replaces the attribute `info` of the signal.
    patch : dict
        May contain these keys: ``types`` (channel to MNE channel type), ``positions`` (channel to x, y, z in metres),
        ``bads`` (more bad channels), ``line_freq`` (Hz), ``reference``, ``notes``. A channel is found by its exact name
        or by its canonical name. For example, the name Fp1 also finds the channel ``EEG Fp1-REF``.

    Returns
    -------
    Signal
        The same signal object.
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
        notes.append(f"{len(absent)} channels of the sidecar are not in the recording, the first is {absent[0]}")
    for name, kind in given.items():
        if (i := find(name)) is not None:
            types[i] = kind
    for name, place in patch.get("positions", {}).items():
        if (i := find(name)) is not None:
            positions[i] = place
    for name in patch.get("bads", []):
        if (i := find(name)) is not None and info.ch_names[i] not in bads:
            bads.append(info.ch_names[i])
    signal.info = dataclasses.replace(
        info,
        ch_types=types,
        positions=positions,
        bads=bads,
        notes=notes,
        line_freq=patch.get("line_freq") or info.line_freq,
        reference=patch.get("reference") or info.reference,
    )
    return signal
