"""Compare the positions of electrodes in a file with the standard positions of the electrodes of the same names.

Files use different coordinate systems: the x or the y axis can point to the nose, left and right can be exchanged, and
the origin can be the middle of a sphere instead of the point between the ears. The coordinate system of a file is found
with the help of the electrode names.
"""

from __future__ import annotations

import itertools

import numpy as np

FARTHEST_M = 0.03
"""If the position of an electrode in the file is more than 3 cm away from its standard position, the standard position
is used."""
MIN_ELECTRODES = 4
"""At least this many electrodes with standard names are needed to find the coordinate system of a file."""
SIZES = (0.75, 1.33)
"""Positions in the file are scaled if the ratio between the size of the standard head and the size of the head in the
file is outside this range."""
Places = list[list[float] | None]


def fit_positions(places: Places, standard: Places) -> tuple[Places, list[str]]:
    """Convert the positions of a file to head coordinates. Replace positions that are far from their standard position.

    Parameters
    ----------
    places : list of list of float or None
        Positions in the file, in metres; None for an unknown position.
    standard : list of list of float or None
        Standard position of each electrode in head coordinates, in metres; None for names without a standard position.

    Returns
    -------
    places : list of list of float or None
        The positions in head coordinates.
    notes : list of str
        Notes for the ledger about each change.
    """
    both = [i for i, (a, b) in enumerate(zip(places, standard, strict=True)) if a is not None and b is not None]
    if not both:
        return places, []
    own = np.array([places[i] for i in both], float)
    true = np.array([standard[i] for i in both], float)
    fits = [(np.eye(3), 1.0, np.zeros(3))]
    notes: list[str] = []
    if len(both) >= MIN_ELECTRODES:
        frame = _find_frame(own, true)
        distance = np.median(_distances(own, true, *frame))
        # Real heads differ from the standard head by centimetres, so the coordinates in the file are not changed if
        # they fit roughly.
        if np.median(_distances(own, true, *fits[0])) <= FARTHEST_M:
            fits.append(frame)
        elif distance > FARTHEST_M:
            text = f"positions in the file do not fit the names of the electrodes ({100 * distance:.0f} cm)"
            return list(standard), [f"{text}: standard positions used"]
        else:
            fits, notes = [frame], _describe(*frame)
    turn, size, shift = fits[0]
    out: Places = []
    far = []
    for i, (place, name) in enumerate(zip(places, standard, strict=True)):
        if place is None:
            out.append(None)
            continue
        moved = size * turn @ np.array(place, float) + shift
        if name is not None and min(_distances(np.array([place]), np.array([name]), *fit) for fit in fits) > FARTHEST_M:
            far.append(i)
            out.append(list(name))
        else:
            out.append([round(float(v), 5) for v in moved])
    if far:
        notes.append(f"{len(far)} positions in the file are more than 3 cm from the electrode: standard positions used")
    return out, notes


Frame = tuple[np.ndarray, float, np.ndarray]
"""Coordinate transform: exchange of the axes [3, 3], factor of the size, and shift [3] in metres."""


def _distances(own: np.ndarray, true: np.ndarray, turn: np.ndarray, size: float, shift: np.ndarray) -> np.ndarray:
    """Return the distance of each position, after the coordinate transform, from its standard position."""
    return np.linalg.norm(size * own @ turn.T + shift - true, axis=1)


def _find_frame(own: np.ndarray, true: np.ndarray) -> Frame:
    """Find the coordinate transform that moves positions [n, 3] closest to the standard positions [n, 3]."""
    # Use medians, because one wrong position has little effect on a median.
    pairs = np.triu_indices(len(own), 1)
    own_gaps, true_gaps = (np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1) for x in (own, true))
    if np.median(own_gaps) < 1e-3:
        return np.eye(3), 1.0, np.zeros(3)
    ratio = float(np.median(true_gaps / np.maximum(own_gaps, 1e-3)))
    size = 1.0 if SIZES[0] <= ratio <= SIZES[1] else ratio

    def shift(turn: np.ndarray, factor: float) -> np.ndarray:
        return np.median(true - factor * own @ turn.T, axis=0)

    def distance(turn: np.ndarray) -> float:
        return float(np.median(_distances(own, true, turn, ratio, shift(turn, ratio))))

    turns = [
        np.diag(signs)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1.0, -1.0), repeat=3)
    ]
    # If the electrodes are placed symmetrically, several exchanges of axes fit equally well. Therefore keep the axes of
    # the file unless other axes fit much better.
    best = min(turns, key=distance)
    if distance(np.eye(3)) < 1.5 * distance(best) or distance(np.eye(3)) < FARTHEST_M / 2:
        best = np.eye(3)
    return best, size, shift(best, size)


def _describe(turn: np.ndarray, size: float, shift: np.ndarray) -> list[str]:
    """Return notes for the ledger that describe a coordinate transform."""
    notes = []
    if not np.array_equal(turn, np.eye(3)):
        axes = ", ".join(f"{'-' if row.sum() < 0 else ''}{'xyz'[int(np.abs(row).argmax())]}" for row in turn)
        notes.append(f"positions in the file have wrong axes according to the names of the electrodes: ({axes}) used")
    if size != 1.0:
        notes.append(f"positions in the file are for another size of the head: multiplied by {size:.2f}")
    return [*notes, f"positions in the file have another origin: moved by {100 * np.linalg.norm(shift):.1f} cm"]
