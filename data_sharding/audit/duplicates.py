"""Find the same signal in two files of any format, by fingerprints of the single channels.

A fingerprint is the signal of each channel between 1 and 40 Hz, with one point each 0.1 s (see
`data_sharding.processing.survey`). Comparing the fingerprints of all pairs of a hundred thousand recordings would take
too long. So there are two steps. First, a *signature* of a few numbers for each recording says which pairs may be the
same. Then only the fingerprints of these pairs are loaded and compared.

Shapes: n channels, P points of a fingerprint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from data_sharding.dataset.ledger import LedgerRow

SAME = 0.99
"""Two channels are the same if their correlation is above this value."""
SHARE = 0.6
"""Two recordings are the same if at least this share of the smaller recording's channels is in the other one."""
LENGTH_S = 1.5
"""Two lengths are the same if they differ by at most these seconds: some formats pad the last second."""
MIN_POINTS = 16
"""Fewer points can agree by chance. Recordings with fewer points are compared by the checksums of their files only."""
ALIKE = 0.95
"""A recording may be a calibration signal if the median correlation between its own channels is above this value."""
BANDS = ((0, 32), (16, 48), (32, 64))
"""Ranges of points that are hashed separately, so that one changed sign changes the hashes of at most two ranges."""
SKETCH = 16
"""Largest number of hashes in a signature."""
NEIGHBOURS = 64
"""If very many recordings share a hash, each is compared with at most this many others, of similar length."""

MOST_RANK = 40
"""Channels may have at most this many independent dimensions, or 64 points cannot show that one recording is a linear
combination of another."""
RANK = 2e-3
"""A dimension counts if its singular value is at least this share of the largest one; smaller ones are rounding."""
CODE_BITS = 62
NEAR_BITS = 12
"""Number of bits in which the mixing codes of the same signal under two references may differ."""
MIXED = 0.1
"""Share of a channel's norm that may be left after the linear fit by the other recording's channels."""

Relation = Literal["same", "beginning", "remixed"]
HOW: dict[Relation, str] = {
    "same": "same signal",
    "beginning": "same beginning",
    "remixed": "same signal under another reference",
}
"""Text for each relation."""


@dataclass(kw_only=True)
class RecordingFingerprint:
    """Data of a recording that is compared with other recordings."""

    key: str
    """Key of the recording."""
    sha256: str
    """Checksum over all files of the recording; empty if it is not known."""
    seconds: float
    """Length of the recording."""
    names: list[str] = field(default_factory=list)
    """Canonical channel names, for messages. Names are not compared, because formats disagree about them."""
    signature: list[int] | None = None
    """Result of the function `signature`; if None, it is computed from `points`."""
    points: np.ndarray | None = field(default=None, repr=False)
    """[n, P] fingerprint, if it is in memory."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A recording that is left out because another recording holds the same signal."""

    kept: str
    """Key of the recording that is kept."""
    difference: str = ""
    """How the two recordings differ, if their lengths or references differ."""

    def __str__(self) -> str:
        return f"{self.kept} ({self.difference})" if self.difference else self.kept


def signature(points: np.ndarray) -> list[int]:
    """Compute a few numbers that recordings of the same signal share, and that other recordings hardly ever share.

    Parameters
    ----------
    points : ndarray, shape (n, P)
        Fingerprint.

    Returns
    -------
    list of int
        At most `SKETCH` hashes (positive, below 2**63), sorted; the list is empty if there are too few points. If there
        are enough points for the number of channels, one negative number comes first: the mixing code.

    Notes
    -----
    *Hashes.* The signs of 32 points of a channel are one number, and each number is hashed. Of the hashes of all
    channels only the smallest are kept (a bottom-k sketch, Broder 1997). So the number of hashes that two recordings
    share grows with the number of channels that they share. Order and names of the channels do not matter.

    *Mixing code.* It recognises recordings whose channels are linear mixtures of each other's channels. The channels
    are vectors over time; they span a space. The diagonal of the projection onto this space (the leverage of each
    point) stays the same if the channels are replaced by invertible linear combinations of the channels. The code has
    one bit for each point: whether its leverage is above the median. So another reference, a bipolar montage, or the
    removal of a few components changes only a few bits.
    """
    points = np.asarray(points, np.float32)
    if points.ndim != 2 or points.shape[1] < MIN_POINTS:
        return []
    rows = points[np.linalg.norm(points, axis=1) > 0]
    positive = rows > 0
    bands = [band for band in BANDS if band[1] <= points.shape[1]] or [(0, MIN_POINTS)]
    numbers = []
    for place, (start, stop) in enumerate(bands):
        bits = positive[:, start:stop]
        ups = bits.sum(axis=1)
        # In a slow drift almost all signs are equal. Any recording can have a drift, so such words identify nothing.
        telling = (ups >= 4) & (ups <= bits.shape[1] - 4)
        word = (bits * (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))).sum(axis=1, dtype=np.uint64)
        numbers.append(word[telling] + np.uint64((place + 1) << 32))
    sketch = np.unique(_hash(np.concatenate(numbers)))[:SKETCH]
    return [*_mixing_code(rows), *(int(number) for number in sketch)]


def _span(rows: np.ndarray) -> np.ndarray:
    """Orthonormal basis [r, P] of the space that channels [n, P] span over time."""
    _, size, basis = np.linalg.svd(_normalize_rows(rows), full_matrices=False)
    return basis[size > RANK * size[0]]


def _mixing_code(rows: np.ndarray) -> list[int]:
    """Return the mixing code of channels [n, P] in a list, or an empty list if there are too few points for it."""
    if len(rows) < 2 or rows.shape[1] < BANDS[-1][1]:
        return []
    basis = _span(rows)
    if len(basis) > MOST_RANK:
        return []
    leverage = (basis**2).sum(axis=0)
    bits = (leverage > np.median(leverage))[:CODE_BITS]
    return [-1 - int((bits * (1 << np.arange(CODE_BITS, dtype=np.int64))).sum())]


def _is_linear_combination(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the channels of one recording are linear combinations of the channels of the other one."""
    if min(len(x), len(y)) < 2 or x.shape[1] < BANDS[-1][1]:
        return False
    spaces = [(len(_span(rows)), rows) for rows in (x, y)]
    (_, part), (rank, whole) = sorted(spaces, key=lambda pair: pair[0])
    if rank > MOST_RANK:
        return False
    # Scale all points to the same size. Otherwise only the largest points would decide: artefacts, and the transient at
    # the start.
    weight = 1 / np.maximum(np.linalg.norm(_normalize_rows(whole), axis=0), 1e-6)
    basis = _span(whole * weight)
    part = _normalize_rows(part * weight)
    outside = np.linalg.norm(part - (part @ basis.T) @ basis, axis=1)
    return bool((outside < MIXED).mean() >= SHARE)


def _hash(x: np.ndarray) -> np.ndarray:
    """Hash with SplitMix64's finaliser (Steele et al. 2014); 63 bits, so that JSON and int64 columns can hold it."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _normalize_rows(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def compare(a: np.ndarray, b: np.ndarray, seconds_a: float, seconds_b: float) -> Relation | None:
    """Decide whether two recordings hold the same signal.

    Parameters
    ----------
    a : ndarray, shape (n, P)
        Fingerprint of the first recording.
    b : ndarray, shape (n', P')
        Fingerprint of the second recording.
    seconds_a, seconds_b : float
        Lengths of the recordings.

    Returns
    -------
    str or None
        same: most channels of the smaller recording are in the other one, and the lengths agree. beginning: the
        channels agree, but one recording is longer. remixed: the lengths agree, and the channels of one recording are
        linear combinations of the other's channels, as after a change of the reference. None: the signals differ.

    Notes
    -----
    The first and the second half of the points must agree separately. When an amplifier is switched on, it makes a
    large transient that looks the same in every recording. Over the whole length this transient would hide all
    differences that follow.
    """
    n_points = min(a.shape[1], b.shape[1])
    if n_points < MIN_POINTS:
        return None
    x, y = (np.asarray(p[:, :n_points], np.float32) for p in (a, b))
    x, y = (p[np.linalg.norm(p, axis=1) > 0] for p in (x, y))
    if not len(x) or not len(y):
        return None
    if len(x) > len(y):
        x, y = y, x
    cuts = [0, n_points // 2, n_points] if n_points >= 2 * MIN_POINTS else [0, n_points]
    agree = np.ones((len(x), len(y)), bool)
    for start, stop in pairwise(cuts):
        agree &= _normalize_rows(x[:, start:stop]) @ _normalize_rows(y[:, start:stop]).T > SAME
    same_length = abs(seconds_a - seconds_b) <= LENGTH_S
    if agree.any(axis=1).mean() < SHARE:
        return "remixed" if same_length and _is_linear_combination(x, y) else None
    if same_length:
        return "same"
    # Different recordings often begin with the same calibration signal, which is alike in all channels. So for
    # recordings of different length, an agreement of such channels proves nothing.
    alike = len(x) < 2 or float(np.median(np.abs(_normalize_rows(x[1:]) @ _normalize_rows(x[:1]).T))) > ALIKE
    return None if alike or n_points < BANDS[-1][1] else "beginning"


def candidate_pairs(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the pairs of recordings whose signatures agree in part.

    Parameters
    ----------
    fingerprints : sequence of RecordingFingerprint
        Recordings, with signatures.

    Returns
    -------
    list of (int, int)
        Positions in `fingerprints`, the smaller one first; the list is sorted.
    """
    return sorted({*_pairs_by_hashes(fingerprints), *_pairs_by_mixing_code(fingerprints)})


def _pairs_by_hashes(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the pairs of recordings that share enough hashes of their signatures."""
    sketches = [[number for number in p.signature or () if number >= 0] for p in fingerprints]
    sizes = np.array([len(sketch) for sketch in sketches], np.int64)
    total = int(sizes.sum())
    if not total:
        return []
    numbers = np.fromiter((number for sketch in sketches for number in sketch), np.int64, total)
    who = np.repeat(np.arange(len(fingerprints)), sizes)
    seconds = np.array([p.seconds for p in fingerprints], float)
    # Sort all hashes. Equal hashes are then neighbours, and within equal hashes the recordings are sorted by length.
    order = np.lexsort((who, seconds[who], numbers))
    numbers, who = numbers[order], who[order]
    pairs = []
    # Only the next NEIGHBOURS entries are compared, so the time stays linear even if all recordings share a hash.
    for step in range(1, min(NEIGHBOURS, total - 1) + 1):
        meet = numbers[step:] == numbers[:-step]
        if not meet.any():
            break
        i, j = who[:-step][meet], who[step:][meet]
        pairs.append(np.minimum(i, j) * len(fingerprints) + np.maximum(i, j))
    if not pairs:
        return []
    codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
    i, j = codes // len(fingerprints), codes % len(fingerprints)
    # A single shared hash can be chance, unless the sketch is very short.
    kept = (i != j) & ((shared >= 2) | (np.minimum(sizes[i], sizes[j]) < 4))
    return [(int(a), int(b)) for a, b in zip(i[kept], j[kept], strict=True)]


def _pairs_by_mixing_code(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the pairs of recordings of the same length whose mixing codes differ in few bits."""
    coded = [
        (p.seconds, i, -1 - p.signature[0]) for i, p in enumerate(fingerprints) if p.signature and p.signature[0] < 0
    ]
    coded.sort()
    seconds = np.array([c[0] for c in coded])
    who = np.array([c[1] for c in coded], np.int64)
    codes = np.array([c[2] for c in coded], np.uint64)
    ends = np.searchsorted(seconds, seconds + LENGTH_S, side="right")
    found = []
    for i, end in enumerate(ends):
        near = np.flatnonzero(np.bitwise_count(codes[i + 1 : end] ^ codes[i]) <= NEAR_BITS)
        found += [(int(min(who[i], j)), int(max(who[i], j))) for j in who[i + 1 + near]]
    return found


def find_matches(
    ours: Sequence[RecordingFingerprint],
    theirs: Sequence[RecordingFingerprint],
    load_ours: Callable[[str], np.ndarray],
    load_theirs: Callable[[str], np.ndarray],
) -> list[tuple[int, int, Relation]]:
    """Find recordings of one collection that hold the same signal as a recording of another collection.

    Parameters
    ----------
    ours, theirs : sequence of RecordingFingerprint
        Recordings of the two collections, with signatures.
    load_ours, load_theirs : callable
        Return the full fingerprint [n, P] for the key of a recording. Called for candidate pairs only.

    Returns
    -------
    list of (int, int, str)
        Position in `ours`, position in `theirs`, and the result of `compare`.
    """
    found = []
    first, second = lru_cache(maxsize=512)(load_ours), lru_cache(maxsize=512)(load_theirs)
    for i, j in candidate_pairs([*ours, *theirs]):
        if i < len(ours) <= j:
            a, b = ours[i], theirs[j - len(ours)]
            if relation := compare(first(a.key), second(b.key), a.seconds, b.seconds):
                found.append((i, j - len(ours), relation))
    return found


def find_duplicates(
    fingerprints: Sequence[RecordingFingerprint], load_points: Callable[[str], np.ndarray] | None = None
) -> dict[str, Copy]:
    """Find recordings that can be left out because another recording holds the same signal.

    Parameters
    ----------
    fingerprints : sequence of RecordingFingerprint
        In order of preference (see `preference`): of several equal recordings the first one is kept.
    load_points : callable, optional
        Returns the full fingerprint [n, P] for the key of a recording. Called for candidate pairs only, and only if
        `RecordingFingerprint.points` is None.

    Returns
    -------
    dict of str to Copy
        Key of each recording to leave out, with the recording that is kept instead.
    """
    duplicates: dict[str, Copy] = {}
    kept_for: dict[str, RecordingFingerprint] = {}
    by_bytes: dict[str, RecordingFingerprint] = {}
    rest: list[RecordingFingerprint] = []
    for item in fingerprints:
        if item.sha256 and (first := by_bytes.setdefault(item.sha256, item)) is not item:
            duplicates[item.key] = Copy(kept=first.key)
            kept_for[item.key] = first
            continue
        if item.signature is None:
            item.signature = signature(item.points) if item.points is not None else []
        rest.append(item)
    at = {item.key: item for item in rest}

    @lru_cache(maxsize=512)
    def points_of(key: str) -> np.ndarray:
        points = at[key].points
        if points is None:
            if load_points is None:
                raise ValueError(f"the fingerprint of {key} is not in memory; pass load_points")
            points = load_points(key)
        return np.asarray(points, np.float32)

    earlier: defaultdict[int, list[int]] = defaultdict(list)
    for i, j in candidate_pairs(rest):
        earlier[j].append(i)
    for j in sorted(earlier):
        item = rest[j]
        for i in earlier[j]:
            relation = compare(points_of(rest[i].key), points_of(item.key), rest[i].seconds, item.seconds)
            if relation:
                kept = kept_for.get(rest[i].key, rest[i])
                kept_for[item.key] = kept
                difference = HOW[relation] if relation == "remixed" else ""
                if abs(kept.seconds - item.seconds) > LENGTH_S:
                    difference = f"{HOW['beginning']}, {item.seconds:.1f} of {kept.seconds:.1f} s"
                duplicates[item.key] = Copy(kept=kept.key, difference=difference)
                break
    # A file with equal bytes may point to a recording that turned out to be a duplicate of a third one.
    for key, duplicate in duplicates.items():
        if not duplicate.difference and duplicate.kept in kept_for:
            duplicates[key] = Copy(kept=kept_for[duplicate.kept].key)
    return duplicates


def preference(row: LedgerRow, *, trials: bool) -> tuple:
    """Make the sort key that decides which of several recordings of the same signal is kept: the smallest is kept.

    Parameters
    ----------
    row : LedgerRow
        Ledger row of the recording.
    trials : bool
        Whether the recording has trials.

    Returns
    -------
    tuple
        Recordings with trials come first, then those with a known subject, longer ones (in whole minutes, because
        formats pad), those with more channels; the recording's key decides the rest.
    """
    return (not trials, row.subject == row.key, -int(row.seconds // 60), -row.n_kept, row.key)
