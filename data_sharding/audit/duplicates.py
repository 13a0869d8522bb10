"""The same signal in two files, whatever their formats: found by fingerprints of single channels.

Two steps, so that a hundred thousand recordings are compared in seconds: a *signature* of a few numbers, kept with the
recording's row, says which pairs are worth a look; only of those the full fingerprints are loaded and compared.

Shapes: n channels, P points of a fingerprint (the 1 to 40 Hz signal, one point each 0.1 s: see
`data_sharding.processing.survey`).
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
"""Correlation from which two channels are the same."""
SHARE = 0.6
"""Share of the smaller recording's live channels that must be found again in the other."""
LENGTH_S = 1.5
"""Formats with records of whole seconds pad the last one."""
MIN_POINTS = 16
"""Fewer points agree by chance; such recordings are compared by checksum alone."""
ALIKE = 0.95
"""Median correlation between a recording's own channels from which it may be a calibration signal."""
BANDS = ((0, 32), (16, 48), (32, 64))
"""Stretches of points that are hashed one by one: one sample at the edge of a sign spoils one of them only."""
SKETCH = 16
"""Most numbers in a signature."""
NEIGHBOURS = 64
"""Most recordings of next lengths that one shared number leads to."""

MOST_RANK = 40
"""Independent channels beyond which 64 points are too few to tell whether one recording is a mixture of another."""
RANK = 2e-3
"""Singular value, as a share of the largest, from which a dimension counts; below is what formats round away."""
CODE_BITS = 62
NEAR_BITS = 12
"""Bits in which the mixing codes of one signal under two references may differ."""
MIXED = 0.1
"""Share of a channel that may lie outside of what the other recording's channels can be combined to."""

Relation = Literal["same", "beginning", "remixed"]
HOW: dict[Relation, str] = {
    "same": "same signal",
    "beginning": "same beginning",
    "remixed": "same signal under another reference",
}
"""Relations in words."""


@dataclass(kw_only=True)
class Print:
    """What is compared of a recording."""

    key: str
    """The recording's key."""
    sha256: str
    """Checksum over all its files; empty where it is not known."""
    seconds: float
    """Its length."""
    names: list[str] = field(default_factory=list)
    """Canonical names of the rows; for messages, not for the comparison: formats disagree about names."""
    signature: list[int] | None = None
    """See `signature`; computed from `points` where it is None."""
    points: np.ndarray | None = field(default=None, repr=False)
    """[n, P] fingerprint, where it is in memory already."""


def signature(points: np.ndarray) -> list[int]:
    """Few numbers that recordings of the same signal share, and others hardly ever.

    Parameters
    ----------
    points : ndarray, shape (n, P)
        Fingerprint.

    Returns
    -------
    list of int
        At most `SKETCH` positive numbers below 2**63, sorted; empty where there are too few points. Before them stands
        a negative one, the mixing code, where there are enough points for the number of channels.

    Notes
    -----
    The signs of 32 points of a channel are one number; of all channels' numbers the smallest after mixing are kept (a
    bottom-k sketch, Broder 1997). Two recordings share about as many of them as they share channels, in whatever order
    and under whatever names.

    The mixing code is of the points' leverages: the diagonal of the projection onto the space that the channels span
    over time. It is the same for every invertible combination of the channels, so that another reference, a bipolar
    montage or a few components taken out change few of its bits.
    """
    points = np.asarray(points, np.float32)
    if points.ndim != 2 or points.shape[1] < MIN_POINTS:
        return []
    rows = points[np.linalg.norm(points, axis=1) > 0]
    live = rows > 0
    bands = [band for band in BANDS if band[1] <= points.shape[1]] or [(0, MIN_POINTS)]
    numbers = []
    for place, (start, stop) in enumerate(bands):
        bits = live[:, start:stop]
        ups = bits.sum(axis=1)
        # A run of one sign is what a slow drift leaves in any recording.
        telling = (ups >= 4) & (ups <= bits.shape[1] - 4)
        word = (bits * (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))).sum(axis=1, dtype=np.uint64)
        numbers.append(word[telling] + np.uint64((place + 1) << 32))
    mixed = np.unique(_mix(np.concatenate(numbers)))[:SKETCH]
    return [*_mixing_code(rows), *(int(number) for number in mixed)]


def _space(rows: np.ndarray) -> np.ndarray:
    """Orthonormal basis [r, P] of what channels [n, P] span over time."""
    _, size, basis = np.linalg.svd(_unit(rows), full_matrices=False)
    return basis[size > RANK * size[0]]


def _mixing_code(rows: np.ndarray) -> list[int]:
    if len(rows) < 2 or rows.shape[1] < BANDS[-1][1]:
        return []
    basis = _space(rows)
    if len(basis) > MOST_RANK:
        return []
    leverage = (basis**2).sum(axis=0)
    bits = (leverage > np.median(leverage))[:CODE_BITS]
    return [-1 - int((bits * (1 << np.arange(CODE_BITS, dtype=np.int64))).sum())]


def _remixed(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the channels of one recording are combinations of the other's."""
    if min(len(x), len(y)) < 2 or x.shape[1] < BANDS[-1][1]:
        return False
    spaces = [(len(_space(rows)), rows) for rows in (x, y)]
    (_, part), (rank, whole) = sorted(spaces, key=lambda pair: pair[0])
    if rank > MOST_RANK:
        return False
    # Every point counts alike: the transient at the start, and artefacts, would outweigh the rest.
    weight = 1 / np.maximum(np.linalg.norm(_unit(whole), axis=0), 1e-6)
    basis = _space(whole * weight)
    part = _unit(part * weight)
    outside = np.linalg.norm(part - (part @ basis.T) @ basis, axis=1)
    return bool((outside < MIXED).mean() >= SHARE)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014), one bit shorter: numbers that JSON and int64 columns hold."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def compare(a: np.ndarray, b: np.ndarray, seconds_a: float, seconds_b: float) -> Relation | None:
    """Whether two recordings hold the same signal.

    Parameters
    ----------
    a : ndarray, shape (n, P)
        Fingerprint of one.
    b : ndarray, shape (n', P')
        Fingerprint of the other.
    seconds_a, seconds_b : float
        Their lengths.

    Returns
    -------
    str or None
        same: most channels of the smaller one are in the other, and the lengths agree. beginning: the channels agree,
        but one recording goes on for longer. remixed: the lengths agree, and the channels of one are combinations of
        the other's, as under another reference. None: neither.

    Notes
    -----
    Each half of the points must agree for itself: the transient with which amplifiers switch on looks alike in every
    recording, and would outweigh all that follows.
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
        agree &= _unit(x[:, start:stop]) @ _unit(y[:, start:stop]).T > SAME
    if agree.any(axis=1).mean() < SHARE:
        return "remixed" if abs(seconds_a - seconds_b) <= LENGTH_S and _remixed(x, y) else None
    if abs(seconds_a - seconds_b) <= LENGTH_S:
        return "same"
    # A calibration signal at the start is no evidence that two recordings of other lengths are one.
    alike = len(x) < 2 or float(np.median(np.abs(_unit(x[1:]) @ _unit(x[:1]).T))) > ALIKE
    return None if alike or n_points < BANDS[-1][1] else "beginning"


def candidates(prints: Sequence[Print]) -> list[tuple[int, int]]:
    """Pairs of recordings whose signatures meet.

    Parameters
    ----------
    prints : sequence of Print
        Recordings, with signatures.

    Returns
    -------
    list of (int, int)
        Places in `prints`, the smaller one first; sorted.
    """
    pairs = sorted({*_sketches_meet(prints), *_codes_meet(prints)})
    return pairs


def _sketches_meet(prints: Sequence[Print]) -> list[tuple[int, int]]:
    sketches = [[number for number in p.signature or () if number >= 0] for p in prints]
    sizes = np.array([len(sketch) for sketch in sketches], np.int64)
    total = int(sizes.sum())
    if not total:
        return []
    numbers = np.fromiter((number for sketch in sketches for number in sketch), np.int64, total)
    who = np.repeat(np.arange(len(prints)), sizes)
    seconds = np.array([p.seconds for p in prints], float)
    order = np.lexsort((who, seconds[who], numbers))
    numbers, who = numbers[order], who[order]
    pairs = []
    # Numbers that very many recordings share lead to the ones of next length only: the cost stays linear.
    for step in range(1, min(NEIGHBOURS, total - 1) + 1):
        meet = numbers[step:] == numbers[:-step]
        if not meet.any():
            break
        i, j = who[:-step][meet], who[step:][meet]
        pairs.append(np.minimum(i, j) * len(prints) + np.maximum(i, j))
    if not pairs:
        return []
    codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
    i, j = codes // len(prints), codes % len(prints)
    # One shared number of many is chance.
    kept = (i != j) & ((shared >= 2) | (np.minimum(sizes[i], sizes[j]) < 4))
    return [(int(a), int(b)) for a, b in zip(i[kept], j[kept], strict=True)]


def _codes_meet(prints: Sequence[Print]) -> list[tuple[int, int]]:
    """Pairs of recordings of one length whose mixing codes differ in few bits."""
    coded = [(p.seconds, i, -1 - p.signature[0]) for i, p in enumerate(prints) if p.signature and p.signature[0] < 0]
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


def matches(
    ours: Sequence[Print],
    theirs: Sequence[Print],
    load_ours: Callable[[str], np.ndarray],
    load_theirs: Callable[[str], np.ndarray],
) -> list[tuple[int, int, Relation]]:
    """Recordings of one collection that hold the same signal as one of another.

    Parameters
    ----------
    ours, theirs : sequence of Print
        Recordings with signatures.
    load_ours, load_theirs : callable
        Key of a recording to its full fingerprint [n, P]; called only where signatures meet.

    Returns
    -------
    list of (int, int, str)
        Places in `ours` and `theirs`, and the relation of `compare`.
    """
    found = []
    first, second = lru_cache(maxsize=512)(load_ours), lru_cache(maxsize=512)(load_theirs)
    for i, j in candidates([*ours, *theirs]):
        if i < len(ours) <= j:
            a, b = ours[i], theirs[j - len(ours)]
            if relation := compare(first(a.key), second(b.key), a.seconds, b.seconds):
                found.append((i, j - len(ours), relation))
    return found


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Which recording holds the same signal, and how the two differ."""

    kept: str
    """Key of the recording that is kept."""
    difference: str = ""
    """How the copy differs from it, in words; empty if it does not."""

    def __str__(self) -> str:
        return f"{self.kept} ({self.difference})" if self.difference else self.kept


def find_duplicates(prints: Sequence[Print], load_points: Callable[[str], np.ndarray] | None = None) -> dict[str, Copy]:
    """Recordings to leave out since another one holds the same.

    Parameters
    ----------
    prints : sequence of Print
        In order of preference (see `preference`): of equal recordings the first is kept.
    load_points : callable, optional
        Key of a recording to its full fingerprint [n, P]; called only where signatures meet, and not where
        `Print.points` is there.

    Returns
    -------
    dict of str to Copy
        Key of each duplicate to the recording that is kept in its place.
    """
    duplicate: dict[str, Copy] = {}
    root: dict[str, Print] = {}
    by_bytes: dict[str, Print] = {}
    rest: list[Print] = []
    for item in prints:
        if item.sha256 and (first := by_bytes.setdefault(item.sha256, item)) is not item:
            duplicate[item.key] = Copy(kept=first.key)
            root[item.key] = first
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
                raise ValueError(f"no fingerprint of {key}: give load_points")
            points = load_points(key)
        return np.asarray(points, np.float32)

    meets: defaultdict[int, list[int]] = defaultdict(list)
    for i, j in candidates(rest):
        meets[j].append(i)
    for j in sorted(meets):
        item = rest[j]
        for i in meets[j]:
            relation = compare(points_of(rest[i].key), points_of(item.key), rest[i].seconds, item.seconds)
            if relation:
                kept = root.get(rest[i].key, rest[i])
                root[item.key] = kept
                difference = HOW[relation] if relation == "remixed" else ""
                if abs(kept.seconds - item.seconds) > LENGTH_S:
                    difference = f"{HOW['beginning']}, {item.seconds:.1f} of {kept.seconds:.1f} s"
                duplicate[item.key] = Copy(kept=kept.key, difference=difference)
                break
    # Equal bytes may stand for a recording that turned out to be a duplicate itself.
    for key, copy in duplicate.items():
        if not copy.difference and copy.kept in root:
            duplicate[key] = Copy(kept=root[copy.kept].key)
    return duplicate


def preference(row: LedgerRow, *, trials: bool) -> tuple:
    """Which of several recordings of the same signal is kept: the smallest first.

    Parameters
    ----------
    row : LedgerRow
        The recording.
    trials : bool
        Whether the recording has trials.

    Returns
    -------
    tuple
        Sort key: with trials, subject known, longer (by minutes: formats pad), more channels, key.
    """
    return (not trials, row.subject == row.key, -int(row.seconds // 60), -row.n_kept, row.key)
