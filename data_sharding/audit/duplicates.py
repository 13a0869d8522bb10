"""Find copies of a recording, even in files of another format, by comparing fingerprints of the signals.

A fingerprint contains the signal of each channel between 1 and 40 Hz, with one value (a *point*) every 0.1 s: 64 points
from the beginning of the recording, and 32 points from each of some later excerpts (see
`data_sharding.processing.survey`). Comparing the fingerprints of all pairs of a hundred thousand recordings would take
too long, so there are two steps. In the first step, a *signature* of a few numbers is computed from the beginning of
each recording. Pairs of recordings with similar signatures are *candidate pairs*. In the second step, only the
fingerprints of the candidate pairs are loaded and compared.

In array shapes, `n` and `m` are numbers of channels, and `P` is the number of points of a fingerprint.
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
"""Two channels have the same signal if their correlation is above this value."""
SHARE = 0.6
"""Two recordings have the same signal if, in the recording with fewer channels, at least this fraction of the channels
have the same signal as a channel of the other recording."""
LENGTH_S = 1.5
"""The lengths of two recordings count as equal if they differ by at most this number of seconds, because some formats
add padding at the end."""
MIN_POINTS = 16
"""Fingerprints with fewer points than this are not compared, because so few points can be equal by chance. Such
recordings are compared only by the checksums of their files."""
ALIKE = 0.95
"""If the median correlation of a recording's channels with its first channel is above this value, the recording may be
a calibration signal."""
BANDS = ((0, 32), (16, 48), (32, 64))
"""Ranges of points of a channel. Each range is hashed separately. A point is in at most two ranges, so if the sign of
one point changes, at most two hashes change."""
FIRST = BANDS[-1][1]
"""Number of points that a fingerprint contains from the beginning of the recording. Fingerprints that older versions of
Dreamscale wrote contain only these points."""
LATER = 32
"""Number of points that a fingerprint contains from each later excerpt."""
DEAD = 1e-4
"""A channel is flat in an excerpt if the norm of its points in this excerpt is below this fraction of the norm of all
its points."""
SKETCH = 16
"""Largest number of hashes in a signature."""
NEIGHBOURS = 64
"""Recordings with the same hash are sorted by their lengths. Each of them forms pairs only with this number of
recordings before it, and this number of recordings after it, so only with recordings of similar length."""

MOST_RANK = 40
"""Linear combinations are searched only if the rank of the recording (its number of linearly independent channels) is
at most 40. With a higher rank, 64 points are too few to show that the channels of one recording are linear combinations
of the channels of another recording."""
RANK = 2e-3
"""When the rank is computed, singular values below this fraction of the largest singular value are treated as rounding
errors."""
CODE_BITS = 62
"""Number of bits of a mixing code. The bits must fit into a positive int64."""
NEAR_BITS = 12
"""Two recordings of equal length are a candidate pair if at most this many bits of their mixing codes differ."""
MIXED = 0.1
"""A channel is a linear combination of the channels of the other recording if the residual of the linear fit is below
this fraction of the channel's norm."""

SHORT_PIECE_S = 10.0
"""If the mean length of the segments in a file is below this number of seconds, the segments are epochs of a longer
recording."""

Relation = Literal["same", "beginning", "remixed"]
HOW: dict[Relation, str] = {
    "same": "same signal",
    "beginning": "same beginning",
    "remixed": "same signal under another reference",
}
"""Texts for messages: how two recordings are related."""


@dataclass(kw_only=True)
class RecordingFingerprint:
    """Data of a recording that are needed to compare the recording with others."""

    key: str
    """Key of the recording."""
    sha256: str
    """Checksum over all files of the recording; empty if the checksum is unknown."""
    seconds: float
    """Length of the recording in seconds."""
    names: list[str] = field(default_factory=list)
    """Canonical channel names, for messages. The names are not compared, because formats name channels differently."""
    signature: list[int] | None = None
    """Result of the function `signature`; None if the signature must still be computed from `points`."""
    points: np.ndarray | None = field(default=None, repr=False)
    """Fingerprint, shape (n, P); None if the fingerprint is not in memory."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A recording that is left out because another recording has the same signal."""

    kept: str
    """Key of the other recording, which is kept."""
    difference: str = ""
    """Description of the difference, if the lengths or references of the two recordings differ."""

    def __str__(self) -> str:
        return f"{self.kept} ({self.difference})" if self.difference else self.kept


def signature(points: np.ndarray) -> list[int]:
    """Compute the signature of a recording: a few numbers by which recordings with the same signal are found.

    If two recordings have the same signal, several numbers of their signatures are equal.

    Parameters
    ----------
    points : ndarray, shape (n, P)
        Fingerprint of a recording.

    Returns
    -------
    list of int
        At most `SKETCH` hashes (positive, below 2**63), sorted. If a mixing code (see below) can be computed, it is
        written before the hashes as a negative number. The list is empty if the fingerprint has too few points.

    Notes
    -----
    *Hashes.* The signs of 32 points of a channel form one number of 32 bits, and this number is hashed. Only the
    smallest hashes of all channels are kept (a bottom-k sketch, Broder 1997). So the more channels two recordings have
    in common, the more hashes they have in common. The hashes do not depend on the order or the names of the channels.

    *Mixing code.* The mixing code finds recordings with channels that are linear combinations of the channels of
    another recording. Each channel is a vector over time, and the vectors of all channels span a space. The projection
    matrix onto this space has one diagonal element for each point, the *leverage* of the point. The leverage does not
    change if the channels are replaced by invertible linear combinations of the channels. The mixing code has one bit
    for each of the first `CODE_BITS` points. A bit is set if the leverage of its point is above the median leverage. So
    another reference, a bipolar montage, or the removal of a few independent components (ICA) changes only a few bits
    of the mixing code.
    """
    points = np.asarray(points, np.float32)
    if points.ndim != 2 or points.shape[1] < MIN_POINTS:
        return []
    points = points[:, :FIRST]
    rows = points[np.linalg.norm(points, axis=1) > 0]
    positive = rows > 0
    bands = [band for band in BANDS if band[1] <= points.shape[1]] or [(0, MIN_POINTS)]
    numbers = []
    for place, (start, stop) in enumerate(bands):
        bits = positive[:, start:stop]
        ups = bits.sum(axis=1)
        # Skip a range of points in which almost all signs are equal. A slow drift can cause equal signs in any
        # recording, so equal signs do not identify a recording.
        telling = (ups >= 4) & (ups <= bits.shape[1] - 4)
        word = (bits * (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))).sum(axis=1, dtype=np.uint64)
        numbers.append(word[telling] + np.uint64((place + 1) << 32))
    sketch = np.unique(_hash(np.concatenate(numbers)))[:SKETCH]
    return [*_mixing_code(rows), *(int(number) for number in sketch)]


def _span(rows: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis, shape (rank, P), of the space spanned by the channels, shape (n, P)."""
    _, size, basis = np.linalg.svd(_normalize_rows(rows), full_matrices=False)
    return basis[size > RANK * size[0]]


def _mixing_code(rows: np.ndarray) -> list[int]:
    """Return a list with the mixing code (see `signature`) as a negative number; empty if it cannot be computed."""
    if len(rows) < 2 or rows.shape[1] < BANDS[-1][1]:
        return []
    basis = _span(rows)
    if len(basis) > MOST_RANK:
        return []
    leverage = (basis**2).sum(axis=0)
    bits = (leverage > np.median(leverage))[:CODE_BITS]
    return [-1 - int((bits * (1 << np.arange(CODE_BITS, dtype=np.int64))).sum())]


def _is_linear_combination(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether most channels of one recording are linear combinations of the channels of the other recording."""
    if min(len(x), len(y)) < 2 or x.shape[1] < BANDS[-1][1]:
        return False
    spaces = [(len(_span(rows)), rows) for rows in (x, y)]
    (_, part), (rank, whole) = sorted(spaces, key=lambda pair: pair[0])
    if rank > MOST_RANK:
        return False
    # Scale the values of all channels at each point to the same norm, because otherwise the points with the largest
    # values (artefacts, and the transient at the start) would dominate the fit.
    weight = 1 / np.maximum(np.linalg.norm(_normalize_rows(whole), axis=0), 1e-6)
    basis = _span(whole * weight)
    part = _normalize_rows(part * weight)
    outside = np.linalg.norm(part - (part @ basis.T) @ basis, axis=1)
    return bool((outside < MIXED).mean() >= SHARE)


def _hash(x: np.ndarray) -> np.ndarray:
    """Hash numbers with the finaliser of SplitMix64 (Steele et al. 2014); a hash has 63 bits and so fits into int64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _normalize_rows(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def compare(a: np.ndarray, b: np.ndarray, seconds_a: float, seconds_b: float) -> Relation | None:
    """Decide whether two recordings have the same signal.

    Parameters
    ----------
    a : ndarray, shape (n, points of the first recording)
        Fingerprint of the first recording.
    b : ndarray, shape (m, points of the second recording)
        Fingerprint of the second recording.
    seconds_a, seconds_b : float
        Lengths of the two recordings in seconds.

    Returns
    -------
    str or None
        "same": most channels of the recording with fewer channels are also in the other recording, and the lengths are
        equal. "beginning": most channels are also in the other recording, but one recording is longer. "remixed": the
        lengths are equal, and most channels of one recording are linear combinations of the channels of the other
        recording, as after a change of the reference. None: the signals are different.

    Notes
    -----
    For the 64 points from the beginning, the correlation of two channels must be high in the first half, and also in
    the second half. The reason: when an amplifier is switched on, its signal has a large transient, which looks the
    same in every recording. In a correlation over all 64 points, this transient would hide the differences between the
    later points.

    Recordings of different people can begin with the same calibration signal. So if there are later excerpts,
    recordings of equal length must also agree in more than half of the excerpts, and recordings of different length in
    at least one excerpt.
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
    first = min(n_points, FIRST)
    cuts = [0, first // 2, first] if first >= 2 * MIN_POINTS else [0, first]
    agree = np.ones((len(x), len(y)), bool)
    for start, stop in pairwise(cuts):
        agree &= _normalize_rows(x[:, start:stop]) @ _normalize_rows(y[:, start:stop]).T > SAME
    same_length = abs(seconds_a - seconds_b) <= LENGTH_S
    later = _later_stretches(x, y, agree)
    # If the lengths differ, parts of one recording may have been cut out. Then some later excerpts of the two
    # recordings come from different parts of the signal, so one equal excerpt is enough.
    enough = 2 * sum(later) > len(later) if same_length else any(later)
    if agree.any(axis=1).mean() < SHARE or (later and not enough):
        return "remixed" if same_length and _is_linear_combination(x, y) else None
    if same_length:
        return "same"
    # Different recordings often begin with the same calibration signal, which is nearly equal in all channels. So if
    # the lengths differ and the channels are nearly equal to each other, treat the recordings as different.
    alike = len(x) < 2 or float(np.median(np.abs(_normalize_rows(x[1:]) @ _normalize_rows(x[:1]).T))) > ALIKE
    return None if alike or n_points < FIRST else "beginning"


def _later_stretches(x: np.ndarray, y: np.ndarray, agree: np.ndarray) -> list[bool]:
    """Compare the later excerpts of two fingerprints.

    Parameters
    ----------
    x, y : ndarray, shapes (n, P) and (m, P)
        Fingerprints of the two recordings; `n` is not larger than `m`.
    agree : ndarray of bool, shape (n, m)
        True where a channel of `x` and a channel of `y` agree at the beginning of the recordings.

    Returns
    -------
    list of bool
        One value for each later excerpt: True if enough channels of `x` agree with a channel of `y` in this excerpt
        too. An excerpt is left out if most channels of `x` or of `y` are flat in this excerpt.
    """
    found = []
    for start in range(FIRST, x.shape[1] - LATER + 1, LATER):
        u, v = x[:, start : start + LATER], y[:, start : start + LATER]
        if min((np.linalg.norm(part, axis=1) > DEAD).mean() for part in (u, v)) < 0.5:
            continue
        both = agree & (_normalize_rows(u) @ _normalize_rows(v).T > SAME)
        found.append(bool(both.any(axis=1).mean() >= SHARE))
    return found


def candidate_pairs(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the candidate pairs: pairs of recordings with similar signatures (see `signature`).

    Parameters
    ----------
    fingerprints : sequence of RecordingFingerprint
        Recordings with their signatures.

    Returns
    -------
    list of (int, int)
        Sorted list of pairs. Each pair has two indices into `fingerprints`, with the smaller index first.
    """
    return sorted({*_pairs_by_hashes(fingerprints), *_pairs_by_mixing_code(fingerprints)})


def _pairs_by_hashes(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the pairs of recordings whose signatures have enough hashes in common."""
    sketches = [[number for number in p.signature or () if number >= 0] for p in fingerprints]
    sizes = np.array([len(sketch) for sketch in sketches], np.int64)
    total = int(sizes.sum())
    if not total:
        return []
    numbers = np.fromiter((number for sketch in sketches for number in sketch), np.int64, total)
    who = np.repeat(np.arange(len(fingerprints)), sizes)
    seconds = np.array([p.seconds for p in fingerprints], float)
    # Sort all hashes, so that equal hashes follow each other. Equal hashes are sorted by the length of their
    # recordings.
    order = np.lexsort((who, seconds[who], numbers))
    numbers, who = numbers[order], who[order]
    pairs = []
    # Compare each hash of the sorted list only with the next NEIGHBOURS hashes. Thus the computing time grows only
    # linearly with the number of hashes, even if all recordings have the same hash.
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
    # A pair needs two common hashes, because one common hash can be a coincidence. A single common hash is enough if a
    # recording of the pair has fewer than 4 hashes.
    kept = (i != j) & ((shared >= 2) | (np.minimum(sizes[i], sizes[j]) < 4))
    return [(int(a), int(b)) for a, b in zip(i[kept], j[kept], strict=True)]


def _pairs_by_mixing_code(fingerprints: Sequence[RecordingFingerprint]) -> list[tuple[int, int]]:
    """List the pairs of recordings of equal length whose mixing codes (see `signature`) differ in only a few bits."""
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
    """Find the recordings of one collection that have the same signal as a recording of another collection.

    Parameters
    ----------
    ours, theirs : sequence of RecordingFingerprint
        Recordings of the two collections, with their signatures.
    load_ours, load_theirs : callable
        Functions that take the key of a recording, and return its full fingerprint, shape (n, P). These functions are
        called only for recordings in candidate pairs.

    Returns
    -------
    list of (int, int, str)
        For each pair of recordings with the same signal: index into `ours`, index into `theirs`, and the result of
        `compare`.
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
    """Find recordings that can be left out because another recording has the same signal.

    Parameters
    ----------
    fingerprints : sequence of RecordingFingerprint
        Recordings, sorted by `preference`. Of several recordings of the same signal, the first recording is kept.
    load_points : callable, optional
        Function that takes the key of a recording, and returns its full fingerprint, shape (n, P). This function is
        needed if `RecordingFingerprint.points` is None for a recording in a candidate pair.

    Returns
    -------
    dict of str to Copy
        Maps the key of each recording that can be left out to a `Copy`, which names the recording that is kept.
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
                raise ValueError(f"the fingerprint of {key} is not in memory; pass the argument 'load_points'")
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
    # If recording A has the same bytes as recording B, `duplicates[A]` says until now that B is kept. If B is itself a
    # duplicate of recording C, `duplicates[A]` must name C, because B is not kept.
    for key, duplicate in duplicates.items():
        if not duplicate.difference and duplicate.kept in kept_for:
            duplicates[key] = Copy(kept=kept_for[duplicate.kept].key)
    return duplicates


def preference(row: LedgerRow, *, trials: bool) -> tuple:
    """Make a sort key for a recording.

    Of several recordings with the same signal, the recording with the smallest sort key is kept.

    Parameters
    ----------
    row : LedgerRow
        Ledger row of the recording.
    trials : bool
        True if the recording has trials of an EEG-image corpus.

    Returns
    -------
    tuple
        Sort key. The sort key prefers, in this order: a recording with trials; a known subject; a greater length (in
        whole minutes, because some formats pad the end); a file that marks more interruptions of the recording; more
        channels; a key that is earlier in alphabetical order.
    """
    # Windows must not cross an interruption, so prefer the file that marks more interruptions. Short segments are
    # epochs, so the borders between them are not counted as interruptions.
    segments = row.segments if row.seconds >= SHORT_PIECE_S * row.segments else 0
    return (not trials, row.subject == row.key, -int(row.seconds // 60), -segments, -row.n_kept, row.key)
