"""The same signal in two files, whatever their formats: found by fingerprints of single channels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

HEAD = 16
"""Points that index a channel's fingerprint: recordings of unlike length agree on them."""
BIN = 2e-3
SAME = 0.99
"""Correlation from which two channels are the same."""
SHARE = 0.6
"""Share of the common channels that must be the same."""
LENGTH_S = 1.5
"""Formats with records of whole seconds pad the last one."""


@dataclass(kw_only=True)
class Print:
    """What is compared of a recording."""

    key: str
    """The recording's key."""
    sha256: str
    """Checksum over all its files."""
    seconds: float
    """Its length."""
    names: list[str]
    """Canonical names of the rows."""
    points: np.ndarray = field(repr=False)
    """[n, P] fingerprint of `data_sharding.units`."""


def same_signal(a: Print, b: Print) -> bool:
    """Whether two recordings hold the same signal.

    Parameters
    ----------
    a, b : Print
        Two recordings.

    Returns
    -------
    bool
        True where most of the channels that both have agree, and those are at least half of the smaller recording.
    """
    if abs(a.seconds - b.seconds) > LENGTH_S:
        return False
    rows_b = {name: i for i, name in enumerate(b.names) if np.any(b.points[i])}
    pairs = [(i, rows_b[name]) for i, name in enumerate(a.names) if name in rows_b and np.any(a.points[i])]
    if not pairs or len(pairs) < 0.5 * min(len(a.names), len(b.names)):
        return False
    n = min(a.points.shape[1], b.points.shape[1])
    x, y = a.points[[i for i, _ in pairs], :n], b.points[[j for _, j in pairs], :n]
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    correlation = (x * y).sum(axis=1) / np.maximum(norms, 1e-12)
    return float((correlation > SAME).mean()) >= SHARE


def find_duplicates(prints: list[Print]) -> dict[str, str]:
    """Recordings to leave out since another one holds the same.

    Parameters
    ----------
    prints : list of Print
        In order of preference: of equal recordings the first is kept.

    Returns
    -------
    dict
        Key of a duplicate to the key of the recording that is kept.
    """
    duplicate: dict[str, str] = {}
    by_bytes: dict[str, Print] = {}
    index: defaultdict[tuple[str, int], list[Print]] = defaultdict(list)
    for item in prints:
        if item.sha256 in by_bytes:
            duplicate[item.key] = by_bytes[item.sha256].key
            continue
        # A channel's scale-free shape as one number; neighbours in one bin or the next are compared in full.
        cells = []
        for name, row in zip(item.names, item.points, strict=True):
            head = row[:HEAD]
            norm = np.linalg.norm(head)
            if head.size >= 4 and norm > 0:
                cells.append((name, round(float(np.abs(head).sum() / norm) / BIN)))
        tried: set[str] = set()
        for name, cell in cells:
            for other in (o for near in (cell - 1, cell, cell + 1) for o in index.get((name, near), ())):
                if other.key not in tried:
                    tried.add(other.key)
                    if item.key not in duplicate and same_signal(other, item):
                        duplicate[item.key] = other.key
            if item.key in duplicate:
                break
        if item.key not in duplicate:
            by_bytes[item.sha256] = item
            for cell in cells:
                index[cell].append(item)
    return duplicate
