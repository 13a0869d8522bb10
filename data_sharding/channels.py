"""Which channels of a recording are EEG, what they are called, where they sit, and which 128 are kept.

Shapes: n channels.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mne.io import BaseRaw

OLD_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
"""10-20 names of before 1991 and the ones they became."""
NOT_EEG = {
    "eog": r"(v|h|l|r|le|re|ve|he)?eog.*|eye.*",
    "ecg": r"ecg.*|ekg.*",
    "emg": r".*emg.*|chin.*",
    "trigger": r"sti.*|stim.*|trig.*|gate.*|status|marker.*|event.*|mkr.*|tal|dc\d+|sync|photic"
    r"|[be]df annotations",
    "physiology": r"gsr\d*|resp.*|plet.*|temp.*|spo2.*|pulse.*|ergo.*|osat|pr|sao2.*|nasal.*|thor.*|ab[d].*"
    r"|airflow.*|snore.*|hr|etco2|bp\d+|body.*",
    "movement": r"acc[xyz_ ]?.*|gyr.*|mag[xyz]|battery.*|counter|gnd|ground",
    "reference": r"left[_ ]?ear|right[_ ]?ear|na\d+|ref\d*",
    "external": r"exg\d+|ext?\d+|aux.*|misc.*|x\d+|bip\d+|pat|tech|mark\d*|\$.*|bn\d+|nr\d+|e|z|sdb",
}
"""Names that are no EEG whatever type the file gives them, by kind; whole name, case ignored."""
EARS = ("A1", "A2", "M1", "M2")
"""Earlobes and mastoids: references rather than scalp, unless the names are a cap's grid (A1 .. A32)."""
GRID_NAME = re.compile(r"[A-I]\d{1,2}")
MIN_STANDARD = 0.5
"""Share of names that must be standard before any of them is believed."""


@dataclass(kw_only=True)
class Channels:
    """The EEG channels of a recording, in the order of the rows."""

    picks: list[int]
    """Their numbers in the file."""
    names: list[str]
    """Canonical names."""
    positions: list[list[float] | None]
    """Head coordinates in metres, where they are known."""
    montage: str
    """Where the positions come from: file, a standard montage, or none."""
    confidence: float
    """Share of the channels with a position."""
    by_type: dict[str, int] = field(default_factory=dict)
    """How many channels of the file are of which type."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names that are not EEG, by kind."""
    selection: str = "all"
    """How the channels were chosen where there were more than 128."""


def canonical_name(name: str) -> str:
    """One name for one place, however the maker writes it.

    Parameters
    ----------
    name : str
        As in the file, e.g. ``Fc5.``, ``EEG FP1-REF``, ``T3``.

    Returns
    -------
    str
        E.g. ``FC5``, ``Fp1``, ``T7``; names that are no standard place lose only decoration.
    """
    text = name.strip().strip(".").strip()
    text = re.sub(r"^(EEG|POL)[ _:-]+(?=\S*[A-Za-z$])", "", text, flags=re.IGNORECASE)
    text = re.sub(r"[-_ ](REF|LE|AR|AVG|AV|A1A2|M1M2|CZREF|G2)\d*$", "", text, flags=re.IGNORECASE).strip(". ")
    if standard := _standard_names().get(text.lower()):
        return OLD_NAMES.get(standard, standard)
    return text or name.strip()


@functools.cache
def _montage(name: str) -> dict[str, list[float]]:
    import warnings

    import mne

    with warnings.catch_warnings():
        # MNE 1.14 renames standard_1005 to colin27_1005; older versions know the old name only.
        warnings.simplefilter("ignore")
        if name == "standard_1005" and "colin27_1005" in mne.channels.get_builtin_montages():
            name = "colin27_1005"
        positions = mne.channels.make_standard_montage(name).get_positions()["ch_pos"]
    return {key: [round(float(v), 5) for v in value] for key, value in positions.items()}


@functools.cache
def _standard_names() -> dict[str, str]:
    return {name.lower(): name for name in _montage("standard_1005")}


def kind_of(name: str, *, grid: bool = False) -> str | None:
    """Why a channel is not scalp EEG, going by its name.

    Parameters
    ----------
    name : str
        Canonical name.
    grid : bool
        True where the names are a cap's own grid, so that ``A1`` is a scalp electrode.

    Returns
    -------
    str or None
        The kind, or None for what may be EEG.
    """
    if not grid and name.upper() in EARS:
        return "reference"
    for kind, pattern in NOT_EEG.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return kind
    return None


def is_grid(names: list[str]) -> bool:
    """True where names are a cap's own grid (BioSemi's A1 .. D32), some of which look like 10-20 places.

    Parameters
    ----------
    names : list of str
        Canonical names.

    Returns
    -------
    bool
        Whether at least half of the names are letter A to I with a number, and A3 or B1 is one of them: neither is a
        10-20 place.
    """
    upper = [name.upper() for name in names]
    return sum(bool(GRID_NAME.fullmatch(n)) for n in upper) >= len(upper) / 2 and bool({"A3", "B1"} & set(upper))


def _file_positions(raw: BaseRaw, picks: list[int]) -> list[list[float] | None]:
    from mne.io.constants import FIFF

    out: list[list[float] | None] = []
    for pick in picks:
        channel = raw.info["chs"][pick]
        xyz = np.asarray(channel["loc"][:3], float)
        known = channel["coord_frame"] in (FIFF.FIFFV_COORD_HEAD, FIFF.FIFFV_COORD_UNKNOWN)
        # Zero is how files say "not measured"; a head is less than half a metre across.
        good = known and np.isfinite(xyz).all() and 0.02 < np.linalg.norm(xyz) < 0.5
        out.append([round(float(v), 5) for v in xyz] if good else None)
    return out


def _standard_positions(names: list[str]) -> tuple[list[list[float] | None], str]:
    nothing: list[list[float] | None] = [None] * len(names)
    if is_grid(names):
        letters = {n[0].upper() for n in names}
        full = {f"{a}{i}" for a in sorted(letters) for i in range(1, 33)}
        size = {frozenset("AB"): 64, frozenset("ABCD"): 128, frozenset("ABCDE"): 160, frozenset("ABCDEFGH"): 256}.get(
            frozenset(letters)
        )
        # The letters alone do not say which cap it was: only a complete one is believed, and 64 has 10-20 names too.
        if size in (128, 160, 256) and set(names) == full:
            table = _montage(f"biosemi{size}")
            return [table.get(n) for n in names], f"biosemi{size}"
        return nothing, "none"
    net = [re.fullmatch(r"E(\d+)", n) for n in names]
    if len(names) >= 32 and all(net):
        size = next((s for s in (32, 64, 128, 256) if len(names) in (s, s + 1)), None)
        if size:
            table = _montage(f"GSN-HydroCel-{size + (len(names) > size)}" if size != 32 else "GSN-HydroCel-32")
            # The last one is the vertex reference, which the montage calls Cz.
            return [
                table.get(n) or (table.get("Cz") if n == f"E{size + 1}" else None) for n in names
            ], f"GSN-HydroCel-{size}"
    table = _montage("standard_1005")
    found = [table.get(name) for name in names]
    if sum(p is not None for p in found) < MIN_STANDARD * len(names):
        return nothing, "none"
    return found, "standard_1005"


def pick_channels(raw: BaseRaw) -> Channels:
    """Find the scalp EEG of a recording.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.

    Returns
    -------
    Channels
        EEG channels in the file's order, not yet limited in number; `picks` is empty where there are none.
    """
    types: list[str] = raw.get_channel_types()  # type: ignore[assignment]
    by_type: dict[str, int] = {}
    for kind in types:
        by_type[kind] = by_type.get(kind, 0) + 1
    eeg = [i for i, kind in enumerate(types) if kind == "eeg"]
    names = [canonical_name(raw.ch_names[i]) for i in eeg]
    grid = is_grid(names)
    picks, kept, left_out = [], [], {}
    for i, name in zip(eeg, names, strict=True):
        kind = kind_of(name, grid=grid)
        if kind is None and name in kept:
            # Canonical names can meet (T3 beside T7): the file's own name tells them apart.
            name = raw.ch_names[i] if raw.ch_names[i] not in kept else f"{raw.ch_names[i]}-{i}"
        if kind:
            left_out.setdefault(kind, []).append(raw.ch_names[i])
        else:
            picks.append(i)
            kept.append(name)
    positions, montage = _file_positions(raw, picks), "file"
    if not any(positions):
        positions, montage = _standard_positions(kept)
    return Channels(
        picks=picks,
        names=kept,
        positions=positions,
        montage=montage,
        confidence=round(sum(p is not None for p in positions) / len(picks), 3) if picks else 0.0,
        by_type=dict(sorted(by_type.items())),
        left_out=left_out,
    )


def _natural(name: str) -> list[Any]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name) if part]


def choose(channels: Channels, bads: list[int], limit: int = 128) -> tuple[list[int], str]:
    """Which channels to keep where there are more than a window holds.

    Parameters
    ----------
    channels : Channels
        The EEG channels.
    bads : list of int
        Rows that are flat, clipped or out of range: the first to go.
    limit : int
        Channels that fit.

    Returns
    -------
    rows : list of int
        Rows to keep, ascending.
    rule : str
        What was done, for the ledger.
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
    # Farthest point sampling from the vertex down: each next electrode is the one farthest from all chosen ones.
    first = int(np.argmax(xyz[:, 2]))
    order, distance = [first], np.linalg.norm(xyz - xyz[first], axis=1)
    while len(order) < limit:
        following = int(np.argmax(distance))
        order.append(following)
        distance = np.minimum(distance, np.linalg.norm(xyz - xyz[following], axis=1))
    return sorted(placed[i] for i in order), f"{limit} of {n} by scalp coverage"


def restrict(channels: Channels, rows: list[int], rule: str) -> Channels:
    """Keep some rows.

    Parameters
    ----------
    channels : Channels
        All EEG channels.
    rows : list of int
        Rows to keep.
    rule : str
        Why, for the ledger.

    Returns
    -------
    Channels
        Those channels.
    """
    return Channels(
        picks=[channels.picks[i] for i in rows],
        names=[channels.names[i] for i in rows],
        positions=[channels.positions[i] for i in rows],
        montage=channels.montage,
        confidence=channels.confidence,
        by_type=channels.by_type,
        left_out=channels.left_out,
        selection=rule,
    )
