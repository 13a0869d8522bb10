"""Find the channels that all trials have, so that features of trials are compared channel by channel.

If two recordings use different caps, or the same cap with the channels in another order, row 0 of their EEG can belong
to two different electrodes, and so can every other row. The rows of common channels are therefore found by name.

In array shapes, C is the number of common channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.untrusted import parse_json
from data_sharding.dataset.dataset import EEGDataset

SAME_PLACE_M = 0.06
"""Largest distance in metres between the positions of one electrode in two recordings. Positions that were measured on
two heads, or come from two templates, differ by a few centimetres. The channel A1 at the vertex of a BioSemi cap and
the electrode A1 on the left ear are more than 10 cm apart."""

Part = tuple[EEGDataset, Sequence[int]]
"""A split, and the indices of the trials that are read from the split."""
Place = Sequence[float] | None
"""Position of an electrode in metres in head coordinates; None if the position is unknown."""


def iterate_layouts(parts: Sequence[Part]) -> Iterator[tuple[list[str], list[Place]]]:
    """Yield each combination of channel names and electrode positions in the trials, once for each split."""
    for dataset, numbers in parts:
        trials, wanted = dataset.trials, np.asarray(numbers, np.int64)
        codes = np.stack([trials.codes(name)[wanted] for name in ("ch_names", "positions")])
        pairs, first = np.unique(codes, axis=1, return_index=True)
        for names, places in pairs.T[np.argsort(first)].tolist():
            named = parse_json(trials.values("ch_names")[names] or "[]")
            placed = parse_json(trials.values("positions")[places] or "null")
            yield named, placed or [None] * len(named)


def find_common_channels(parts: Sequence[Part]) -> list[str]:
    """Find the channels that all trials have in common.

    Parameters
    ----------
    parts : sequence of (EEGDataset, sequence of int)
        Splits, each with the indices of the trials that are used.

    Returns
    -------
    list of str
        Names of the channels, in the order of the first trial. If a name stands for electrodes at different places in
        two trials, the channel of this name is not common. The list is empty if the trials have no channel in common.
    """
    common: dict[str, Place] | None = None
    for names, places in iterate_layouts(parts):
        found = dict(zip(names, places, strict=True))
        if common is None:
            common = found
        common = {
            name: found[name] if place is None else place
            for name, place in common.items()
            if name in found and _is_same_place(place, found[name])
        }
    return list(common or {})


def _is_same_place(one: Place, other: Place) -> bool:
    return one is None or other is None or math.dist(one, other) <= SAME_PLACE_M


def make_row_finder(dataset: EEGDataset, channels: Sequence[str]) -> Callable[[int], NDArray[np.int64]]:
    """Make a function that finds the rows of given channels in the EEG of a trial.

    Parameters
    ----------
    dataset : EEGDataset
        Split of the trials.
    channels : sequence of str
        Names of channels that all trials have.

    Returns
    -------
    callable
        Function that takes the number of a trial and returns, for each channel, its row in the trial's EEG, [C].
    """
    codes, texts = dataset.trials.codes("ch_names"), dataset.trials.values("ch_names")
    rows: dict[int, NDArray[np.int64]] = {}

    def find(number: int) -> NDArray[np.int64]:
        code = int(codes[number])
        if code not in rows:
            names = parse_json(texts[code] or "[]")
            rows[code] = np.array([names.index(name) for name in channels], np.int64)
        return rows[code]

    return find
