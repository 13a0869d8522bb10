"""Find the EEG channels of a recording, their standard names and their positions, and choose at most 128 of them.

In array shapes, n is the number of channels.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_sharding.formats.positions import fit_positions
from data_sharding.formats.signal import SignalInfo

OLD_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
"""Electrode names of the 10-20 system before 1991, each with its current name."""
NOT_EEG = {
    "eog": r"[a-z]{0,2}eog.*|eye.*|[lr]eye|[hv]eo[lrud]?|[lr]oc|[lsi]o[12]|io",
    "ecg": r"(ecg|ekg).*|.*[ _-](ecg|ekg)\d*",
    "emg": r".*emg.*|chin.*|(left|right)?[ _-]?leg.*|[lr]at\d?",
    "trigger": r"sti.*|stim.*|trig.*|gate.*|(biosemi )?status|marker.*|event.*|mkr.*|tal|dc\d+|sync|photic|din\d*"
    r"|[be]df annotations|digital.*|ttl.*",
    "physiology": r"gsr\d*|resp.*|plet.*|temp.*|spo2.*|pulse.*|ergo.*|osat|pr|sao2.*|nasal.*|thor.*|ab[d].*"
    r"|airflow.*|snor.*|hr|h\.r\.?|etco2|bp\d+|body.*|[cp]?flow|effort.*|therm.*|cannula.*|cpap.*|chest.*|ox[ _]?stat"
    r"|new[ _]?air|heart.*|eda|ppg.*|breath.*|capno.*",
    "movement": r"acc[xyz_ ]?.*|gyr.*|mag[xyz]|quat.*|battery.*|counter|gnd|ground|pos(ition)?|light|sound|mic.*"
    r"|audio.*",
    "quality": r"cq_.*|eq_.*|raw_cq|interpolated|time_?stamp.*|sample[ _](counter|number)|packet.*|imp(edance)?.*"
    r"|ibi|bursts|suppr",
    "reference": r"left[_ ]?ear|right[_ ]?ear|na\d+|ref(erence)?\d*|cms|drl",
    "external": r"exg\d+|ext?\d+|aux.*|(left|right)[_ ]?aux.*|misc.*|x\d+|bip\d+|pat|tech|mark\d*|\$.*|bn\d+|nr\d+"
    r"|e|z|sdb|unused.*|[-.]+\d*",
}
"""Patterns for the names of channels that are not EEG, even if the file gives these channels the type EEG. A pattern
must match the whole name; case is ignored."""
EARS = ("A1", "A2", "M1", "M2")
"""Names of electrodes on earlobes and mastoids. These are references and not scalp electrodes, except on caps whose
electrodes are named A1 .. A32."""
GRID_NAME = re.compile(r"[A-I]\d{1,2}")
NET_NAME = re.compile(r"E0*(\d{1,3})", re.IGNORECASE)
"""Pattern of the electrode names of an EGI net. In a sleep recording, E1 and E2 are eye electrodes (EOG)."""
VERTEX = ("CZ", "VREF", "VERTEX REFERENCE")
"""Names of the vertex electrode of an EGI net. In some files the vertex electrode has a number instead of a name."""
NETS = {
    32: "GSN-HydroCel-32",
    64: "GSN-HydroCel-65_1.0",
    128: "GSN-HydroCel-129",
    256: "GSN-HydroCel-257",
}
"""MNE's name of each EGI net. The key is the number of electrodes without the vertex electrode."""
DECORATION = re.compile(r"(EEG|POL)[ _:-]+(?=\S*[A-Za-z$])", re.IGNORECASE)
"""Pattern of the prefix (EEG or POL) that Nihon Kohden and other clinical files write before channel names. The prefix
is removed, except if only a number follows."""
REFERENCE = re.compile(
    r"(?<!\bEEG)(?<!\bPOL)[-_ :/]+(REF|LE|AR|AVG|AV|CAR|CZREF|CAZ|G2|VREF|LINKED|A1\+A2|M1\+M2"
    r"|[AM][12]([AM][12])?)\d?$",
    re.IGNORECASE,
)
"""Pattern of the reference electrode at the end of a channel name. The reference is removed: channel C3-A2 becomes
C3."""
INTRACRANIAL = ("seeg", "ecog", "dbs")
"""Types of electrodes inside the skull, in MNE's terms."""
MIN_STANDARD = 0.5
"""Standard positions are used only if at least this fraction of the channels have the name of a standard electrode."""


@dataclass(kw_only=True)
class Channels:
    """EEG channels of a recording; all lists have the same order as the rows of the signal."""

    picks: list[int]
    """Indices of the EEG channels among all channels of the file."""
    names: list[str]
    """Canonical names of the EEG channels."""
    positions: list[list[float] | None]
    """Head coordinates in metres; None for an unknown position."""
    montage: str
    """Source of the positions: "file", the name of a standard montage, or "none"."""
    confidence: float
    """Fraction of the channels that have a position."""
    by_type: dict[str, int] = field(default_factory=dict)
    """Number of channels of each type in the file."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of the channels that are not used, grouped by the kind of channel (such as eog) or by the reason."""
    unknown_unit: str = ""
    """Text of the unknown unit if no channel has a known unit (such a recording cannot be used); otherwise empty."""
    selection: str = "all"
    """Text for the ledger that says which channels are kept, such as "120 good of 140"; "all" if no channel is
    dropped."""
    notes: list[str] = field(default_factory=list)
    """Notes about the channels for the ledger."""


@functools.lru_cache(maxsize=4096)
def canonical_name(name: str) -> str:
    """Return the canonical name of an electrode. File formats and amplifiers write the same name in different ways.

    Parameters
    ----------
    name : str
        Name of the channel in the file, e.g. ``Fc5.``, ``EEG FP1-REF``, ``T3``, ``FP1-F7``.

    Returns
    -------
    str
        Canonical name, e.g. ``FC5``, ``Fp1``, ``T7``, ``Fp1-F7``. If the name is not that of a standard electrode, only
        its prefix and its reference are removed.
    """
    text = " ".join(name.replace("\0", " ").split()).strip(". ")
    text = REFERENCE.sub("", text).strip(". ") or text
    text = DECORATION.sub("", text, count=1) if DECORATION.match(text) else text
    if standard := _standard_names().get(text.lower()):
        return OLD_NAMES.get(standard, standard)
    if pair := _bipolar(re.sub(r"-\d$", "", text)):
        return "-".join(pair)
    return text or name.strip()


def _bipolar(text: str) -> tuple[str, str] | None:
    """Return the two electrodes of a bipolar channel such as ``F7-T3``.

    A bipolar channel is the difference of its two electrodes.
    """
    parts = [_standard_names().get(part.lower()) for part in re.split(r"[-/]", text)]
    if len(parts) != 2 or not (parts[0] and parts[1]) or parts[0] == parts[1]:
        return None
    return OLD_NAMES.get(parts[0], parts[0]), OLD_NAMES.get(parts[1], parts[1])


def is_site(name: str) -> bool:
    """Return whether a canonical name means an electrode of the 10-05 system, or a difference of two of them."""
    return name.lower() in _standard_names() or _bipolar(name) is not None


@functools.cache
def _montage(name: str) -> dict[str, list[float]]:
    """Return the positions of a standard montage, in the head coordinates that files use.

    MNE's montage templates use MRI coordinates. Recordings use head coordinates, which are defined by ears and nose.
    The position of Cz in MRI coordinates is five centimetres away from its position in head coordinates.
    """
    import warnings

    import mne
    from mne.channels.montage import transform_to_head

    with warnings.catch_warnings():
        # MNE 1.14 renames standard_1005 to colin27_1005; older versions have only the old name.
        warnings.simplefilter("ignore")
        if name == "standard_1005" and "colin27_1005" in mne.channels.get_builtin_montages():
            name = "colin27_1005"
        positions = transform_to_head(mne.channels.make_standard_montage(name)).get_positions()["ch_pos"]
    return {key: [round(float(v), 5) for v in value] for key, value in positions.items()}


@functools.cache
def _standard_names() -> dict[str, str]:
    return {name.lower(): name for name in _montage("standard_1005")}


@functools.lru_cache(maxsize=4096)
def kind_of(name: str, *, grid: bool = False, net: bool = True) -> str | None:
    """Return the kind of a channel that is not EEG (such as EOG), judged by its name; None if it may be EEG.

    Parameters
    ----------
    name : str
        Canonical name.
    grid : bool
        Whether the channel names of the recording are those of a BioSemi cap (A1 .. D32). On a BioSemi cap, ``A1`` is a
        scalp electrode.
    net : bool
        Whether the recording was made with an EGI net. Without an EGI net, ``E1`` and ``E2`` are eye electrodes.

    Returns
    -------
    str or None
        Kind of the channel (a key of `NOT_EEG`), or None if the channel may be EEG.
    """
    if not grid and name.upper() in EARS:
        return "reference"
    if not net and name.upper() in ("E1", "E2"):
        return "eog"
    for kind, pattern in NOT_EEG.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return kind
    return None


def is_grid(names: list[str]) -> bool:
    """Return whether channel names form a grid, as on a BioSemi cap (A1 .. D32).

    Some names of a BioSemi grid, such as C3, are also names of the 10-20 system.

    Parameters
    ----------
    names : list of str
        Canonical names.

    Returns
    -------
    bool
        True if at least half of the names consist of a letter from A to I and a number, and if one of the names is A3
        or B1. (The 10-20 system has no electrode A3 or B1.)
    """
    upper = [name.upper() for name in names]
    return sum(bool(GRID_NAME.fullmatch(n)) for n in upper) >= len(upper) / 2 and bool({"A3", "B1"} & set(upper))


def is_net(names: list[str]) -> bool:
    """Return whether channel names are the electrode numbers of an EGI net.

    At least three names must have the form E1, E2 and so on, because E1 and E2 alone can be eye electrodes.
    """
    return sum(bool(NET_NAME.fullmatch(name)) for name in names) > 2


def is_electrode(labels: Sequence[str]) -> list[bool]:
    """For each channel name, return whether it is the name of a scalp electrode."""
    names = [canonical_name(label) for label in labels]
    grid, net = is_grid(names), is_net(names)

    def named(label: str, name: str) -> bool:
        whole = (grid and GRID_NAME.fullmatch(name)) or (net and NET_NAME.fullmatch(name))
        return bool(whole) or is_site(name) or label.upper().startswith("EEG ")

    return [
        kind_of(name, grid=grid, net=net) is None and named(label, name)
        for label, name in zip(labels, names, strict=True)
    ]


def clean_position(xyz: list[float]) -> list[float] | None:
    """Check and round a channel position from a file.

    Parameters
    ----------
    xyz : list of float
        Head coordinates in metres.

    Returns
    -------
    list of float or None
        The position, rounded to a hundredth of a millimetre. None if the position cannot be on a head, because its
        distance from the origin is less than 2 cm or at least 50 cm. (The position zero means "not measured".)
    """
    good = len(xyz) == 3 and np.isfinite(xyz).all() and 0.02 < np.linalg.norm(xyz) < 0.5
    return [round(float(v), 5) for v in xyz] if good else None


def _are_plausible(positions: list[list[float] | None]) -> bool:
    """Return whether the positions in a file are usable: most of them must differ from each other."""
    known = [tuple(p) for p in positions if p is not None]
    return bool(known) and len(set(known)) > 0.8 * len(known)


def _standard_positions(names: list[str]) -> tuple[list[list[float] | None], str]:
    """Look up channel positions in standard montages; return positions and the montage's name (or "none")."""
    nothing: list[list[float] | None] = [None] * len(names)
    if is_grid(names):
        letters = {n[0].upper() for n in names}
        full = {f"{a}{i}" for a in sorted(letters) for i in range(1, 33)}
        size = {frozenset("AB"): 64, frozenset("ABCD"): 128, frozenset("ABCDE"): 160, frozenset("ABCDEFGH"): 256}.get(
            frozenset(letters)
        )
        # Caps of different sizes use the same names, such as A1, so a cap is recognised only if the file has all
        # electrodes of this cap.
        if size in (128, 160, 256) and set(names) == full:
            table = _montage(f"biosemi{size}")
            return [table.get(n) for n in names], f"biosemi{size}"
        return nothing, "none"
    numbers = [int(m.group(1)) for m in map(NET_NAME.fullmatch, names) if m]
    if len(numbers) >= 25 and len(numbers) + sum(n.upper() in VERTEX for n in names) == len(names):
        # The vertex electrode of a net has the highest number. If more than a fifth of the electrodes of a net are
        # missing, no positions are returned.
        size = next((s for s in NETS if max(numbers) <= s + 1), 0)
        if len(set(numbers)) < 0.8 * size or not size:
            return nothing, "none"
        table = _montage(NETS[size])
        out = []
        for name in names:
            match = NET_NAME.fullmatch(name)
            vertex = match is None or int(match.group(1)) == size + 1
            out.append(table.get("Cz") if vertex or match is None else table.get(f"E{int(match.group(1))}"))
        return out, f"GSN-HydroCel-{size}"
    table = _montage("standard_1005")
    found = [table.get(name) for name in names]
    single = [p for name, p in zip(names, found, strict=True) if _bipolar(name) is None]
    if not any(found) or sum(p is not None for p in single) < MIN_STANDARD * len(single):
        return nothing, "none"
    return found, "standard_1005"


def pick_channels(info: SignalInfo) -> Channels:
    """Find the EEG channels of a recording.

    Contacts inside the skull are used only if `SignalInfo.intracranial` is set. Names of contacts inside the skull are
    not changed, because a contact of a depth electrode can be named T3 or A1, but is not the scalp electrode T3 or A1.
    Positions of contacts inside the skull come only from the file, and never from a standard montage.

    Parameters
    ----------
    info : SignalInfo
        Metadata of the recording.

    Returns
    -------
    Channels
        All EEG channels in the order of the file, even if there are more than 128. If the recording has no EEG channel,
        `picks` is empty.
    """
    by_type = Counter(info.ch_types)
    inside = {i for i, kind in enumerate(info.ch_types) if info.intracranial and kind in INTRACRANIAL}
    eeg = [i for i, kind in enumerate(info.ch_types) if kind == "eeg" or i in inside]
    names = [info.ch_names[i].strip() if i in inside else canonical_name(info.ch_names[i]) for i in eeg]
    scalp = [name for i, name in zip(eeg, names, strict=True) if i not in inside]
    grid, net = is_grid(scalp), is_net(scalp)
    kinds = [None if i in inside else kind_of(name, grid=grid, net=net) for i, name in zip(eeg, names, strict=True)]
    units = [info.unknown_units.get(info.ch_names[i], "") for i, kind in zip(eeg, kinds, strict=True) if kind is None]
    # Leave out channels with an unknown unit. If no channel has a known unit, keep all channels, and let the caller
    # report the unit.
    unknown_unit = next(iter(units), "") if all(units) else ""
    picks, kept, left_out, notes = [], [], {}, []
    for i, name, kind in zip(eeg, names, kinds, strict=True):
        label = info.ch_names[i]
        if kind is None and label in info.unknown_units and not unknown_unit:
            kind = f"unit '{info.unknown_units[label]}' unknown"
            notes.append(f"{label} left out: {kind}")
        if kind:
            left_out.setdefault(kind, []).append(label)
            continue
        if name in kept:
            # If two channels get the same canonical name (T3 and T7), the second channel keeps its name from the file.
            other = label if label not in kept else f"{label}-{i}"
            notes.append(f"{label} has the same name as another channel ({name}), and is named {other}")
            name = other
        picks.append(i)
        kept.append(name)
    for name, why in info.left_out.items():
        left_out.setdefault(why, []).append(name)
    positions, montage = [info.positions[i] for i in picks], "file"
    outside = [name for i, name in zip(picks, kept, strict=True) if i not in inside]
    pairs = [name for name in outside if _bipolar(name)]
    if not _are_plausible(positions):
        found, montage = _standard_positions(outside)
        table = dict(zip(outside, found, strict=True))
        positions = [None if i in inside else table[name] for i, name in zip(picks, kept, strict=True)]
    elif not is_grid(kept):
        table = {name: place for name, place in _montage("standard_1005").items() if name in outside}
        positions, told = fit_positions(positions, [table.get(name) for name in kept])
        notes += told
    # A bipolar channel is the difference of two electrodes, so it does not have one position.
    positions = [None if name in pairs else p for name, p in zip(kept, positions, strict=True)]
    told = f"{', '.join(pairs[:4])}{', ...' if len(pairs) > 4 else ''} ({len(pairs)})"
    return Channels(
        picks=picks,
        names=kept,
        positions=positions,
        montage=montage,
        confidence=round(sum(p is not None for p in positions) / len(picks), 3) if picks else 0.0,
        by_type=dict(sorted(by_type.items())),
        left_out=left_out,
        unknown_unit=unknown_unit,
        notes=_shorten(notes) + ([f"bipolar, without a position: {told}"] if pairs else []),
    )


def _shorten(notes: list[str]) -> list[str]:
    """Shorten a list of notes, one note for each channel, to at most four notes."""
    return notes if len(notes) <= 4 else [*notes[:3], f"the same holds for {len(notes) - 3} other channels"]


def _natural(name: str) -> list[Any]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name) if part]


def choose(channels: Channels, bads: list[int], limit: int = 128) -> tuple[list[int], str]:
    """Choose which channels to keep if a recording has more channels than a window can hold.

    Parameters
    ----------
    channels : Channels
        EEG channels of the recording.
    bads : list of int
        Rows of bad channels. Good channels are dropped only after all bad channels are dropped.
    limit : int
        Largest number of channels to keep.

    Returns
    -------
    rows : list of int
        Rows to keep, in ascending order.
    rule : str
        Text for the ledger that says which channels are kept, such as "120 good of 140".
    """
    n = len(channels.names)
    if n <= limit:
        return list(range(n)), "all"
    good = [i for i in range(n) if i not in set(bads)]
    if len(good) <= limit:
        return good, f"{len(good)} good of {n}"
    placed = [i for i in good if channels.positions[i] is not None]
    if len(placed) < limit:
        chosen = sorted(good, key=lambda i: _natural(channels.names[i]))[:limit]
        return sorted(chosen), f"first {limit} of {n} by name"
    xyz = np.array([channels.positions[i] for i in placed], float)
    # Farthest point sampling: begin at the top of the head, then repeatedly add the electrode that is farthest from all
    # electrodes chosen so far.
    first = int(np.argmax(xyz[:, 2]))
    order, distance = [first], np.linalg.norm(xyz - xyz[first], axis=1)
    while len(order) < limit:
        following = int(np.argmax(distance))
        order.append(following)
        distance = np.minimum(distance, np.linalg.norm(xyz - xyz[following], axis=1))
    return sorted(placed[i] for i in order), f"{limit} of {n} by scalp coverage"


def restrict(channels: Channels, rows: list[int], rule: str) -> Channels:
    """Keep only some of the channels.

    Parameters
    ----------
    channels : Channels
        EEG channels of the recording.
    rows : list of int
        Rows to keep.
    rule : str
        Text for the ledger that says which channels are kept, such as "120 good of 140".

    Returns
    -------
    Channels
        The channels in `rows`.
    """
    return Channels(
        picks=[channels.picks[i] for i in rows],
        names=[channels.names[i] for i in rows],
        positions=[channels.positions[i] for i in rows],
        montage=channels.montage,
        confidence=channels.confidence,
        by_type=channels.by_type,
        left_out=channels.left_out,
        unknown_unit=channels.unknown_unit,
        selection=rule,
        notes=channels.notes,
    )
