"""Orders of samples as pure functions of seed, epoch and place: nothing is kept in memory but a row a shard.

A permutation of a hundred million samples takes 0.8 GB in every reading process of every rank, and numpy does not
promise the same one from release to release. A Feistel network over the places costs a microsecond a sample, needs no
memory, and is the same everywhere and for good.

Shapes: b places, S shards.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Order = Literal["global", "shards"]
"""How an epoch goes: at random over all samples, or over a few shards at a time."""

_ROUNDS = 8
_BLOCK = 4096
"""Places of a mixture within which its shares are dealt out."""
_UNIT = 1 << 40
"""Shares are kept as whole parts of this, so that they add up exactly."""


def mix(value: np.ndarray) -> np.ndarray:
    """Step of SplitMix64: turn counters into 64 bits each that look independent.

    Parameters
    ----------
    value : ndarray of uint64
        Counters.

    Returns
    -------
    ndarray of uint64
        Bits.

    References
    ----------
    Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        value = (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def permute(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Look up places in a random permutation without writing it out.

    Parameters
    ----------
    places : ndarray of int, shape (b,)
        From 0 to n - 1.
    n : int
        Length of the permutation.
    *key : int
        What it depends on.

    Returns
    -------
    ndarray of int64, shape (b,)
        The numbers at these places; over all n places every number comes once.

    References
    ----------
    Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (cycle walking on a Feistel network).
    """
    if n == 1:
        return np.zeros(len(places), np.int64)
    bits = (n - 1).bit_length()
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state ^ np.uint64(part % 2**64))
    with np.errstate(over="ignore"):
        round_keys = mix(state + np.arange(_ROUNDS, dtype=np.uint64))

    def shuffled(x: np.ndarray) -> np.ndarray:
        left, right = x >> low, x & low_mask
        for number, round_key in enumerate(round_keys):
            if number % 2:
                right = right ^ (mix(left ^ round_key) & low_mask)
            else:
                left = left ^ (mix(right ^ round_key) & high_mask)
        return (left << low) | right

    # Numbers beyond n lead on to others until one below it comes: a permutation of the n stays one.
    out = shuffled(np.asarray(places).astype(np.uint64))
    while (beyond := out >= n).any():
        out[beyond] = shuffled(out[beyond])
    return out.astype(np.int64)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch over all samples.

    Parameters
    ----------
    n : int
        Samples of the dataset.
    seed, epoch : int
        What the order depends on.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 .. n - 1.
    """
    return permute(np.arange(n), n, seed, 0, epoch)


class EpochOrder:
    """Order of one dataset, epoch after epoch.

    Parameters
    ----------
    shard_samples : ndarray of int, shape (S,)
        Samples of each shard.
    seed : int
        Of the order.
    order : {"global", "shards"}
        global: at random over all samples. shards: shards at random, and samples at random within each `window` of
        them, so that a bounded cache holds what is read next.
    window : int
        Shards that are read at a time.
    stream : int
        The dataset's number in a mixture.
    """

    def __init__(
        self, shard_samples: np.ndarray, seed: int, order: Order = "global", window: int = 16, stream: int = 0
    ) -> None:
        self.samples = np.asarray(shard_samples, np.int64)
        self.n = int(self.samples.sum())
        self.seed, self.order, self.window, self.stream = seed, order, window, stream
        self._first = np.cumsum(self.samples) - self.samples
        self._shards: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def at(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up places in the epochs' orders, one after another.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places, from 0 without end.

        Returns
        -------
        numbers : ndarray of int, shape (b,)
            Samples of the dataset.
        epochs : ndarray of int, shape (b,)
            The epoch that each place is in.
        """
        epochs, places = np.divmod(np.asarray(line, np.int64), self.n)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            if self.order == "global":
                numbers[mine] = permute(places[mine], self.n, self.seed, self.stream, epoch)
            else:
                numbers[mine] = self._by_shards(places[mine], epoch)
        return numbers, epochs

    def windows(self, place: int) -> tuple[tuple[int, int], list[int]]:
        """Shards that are read around a place under order shards.

        Parameters
        ----------
        place : int
            Place, from 0 without end.

        Returns
        -------
        window : (int, int)
            Epoch, and number of the window in it.
        shards : list of int
            Shards of this window and of the next one.
        """
        epoch, spot = divmod(place, self.n)
        shards, _, bounds = self._shard_order(epoch)
        number = int(np.searchsorted(bounds, spot, side="right"))
        found = shards[number * self.window : (number + 2) * self.window].tolist()
        if number + 1 == len(bounds):
            found += self._shard_order(epoch + 1)[0][: self.window].tolist()
        return (epoch, number), found

    def _by_shards(self, places: np.ndarray, epoch: int) -> np.ndarray:
        shards, ends, bounds = self._shard_order(epoch)
        group = np.searchsorted(bounds, places, side="right")
        base = np.concatenate([[0], bounds])
        spot = np.empty_like(places)
        for g in np.unique(group).tolist():
            mine = group == g
            size = int(base[g + 1] - base[g])
            spot[mine] = base[g] + permute(places[mine] - base[g], size, self.seed, self.stream, epoch, g + 2)
        where = np.searchsorted(ends, spot, side="right")
        return self._first[shards[where]] + spot - (ends[where] - self.samples[shards[where]])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards of an epoch in order, the places at which each ends, and those at which each window ends."""
        if epoch not in self._shards:
            # Two epochs at the most meet in a batch larger than what is left of one; keep few.
            self._shards = {k: v for k, v in self._shards.items() if k >= epoch - 1}
            count = len(self.samples)
            shards = permute(np.arange(count), count, self.seed, self.stream, epoch, 1)
            ends = np.cumsum(self.samples[shards])
            bounds = ends[self.window - 1 :: self.window]
            if not len(bounds) or bounds[-1] != self.n:
                bounds = np.append(bounds, self.n)
            self._shards[epoch] = shards, ends, bounds
        return self._shards[epoch]


class Interleaved:
    """Which dataset of a mixture each place takes, and the how-manieth of that dataset it is.

    Parameters
    ----------
    weights : sequence of float
        Shares of the places; they need not sum to 1.
    seed : int
        Of the order in which datasets take turns.

    Notes
    -----
    Every 4096 places hold each dataset's share but for less than two samples, and what is missing comes in the next:
    shares are met exactly in the long run.

    Raises
    ------
    ValueError
        If a weight is not positive, or so small beside the others that a block would not hold two of it.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite, got {weights}")
        edges = np.cumsum([0.0, *weights]) / sum(weights)
        if np.diff(edges).min() * _BLOCK < 2:
            raise ValueError(f"a weight below {2 / _BLOCK:.4f} of the sum is too small, got {weights}")
        self.seed = seed
        self._edges = [round(float(edge) * _UNIT) for edge in edges[:-1]] + [_UNIT]

    def _dealt(self, block: int) -> np.ndarray:
        """Places that datasets 0 .. j have taken before a block, for each j; python's integers do not overflow."""
        return np.array([block * _BLOCK * edge // _UNIT for edge in self._edges], np.int64)

    def begun(self, place: int) -> list[int]:
        """Places that each dataset has been dealt before the block of a place.

        Parameters
        ----------
        place : int
            Place, from 0 without end.

        Returns
        -------
        list of int
            One a dataset.
        """
        return np.diff(self._dealt(place // _BLOCK)).tolist()

    def at(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up places.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places, from 0 without end.

        Returns
        -------
        which : ndarray of int, shape (b,)
            Dataset of each place.
        place : ndarray of int, shape (b,)
            Place in that dataset's own order; all of 0, 1, 2 ... come once.
        """
        blocks, places = np.divmod(np.asarray(line, np.int64), _BLOCK)
        which, place = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            before, after = self._dealt(block), self._dealt(block + 1)
            # Slots of the block stand sorted by dataset; a permutation deals them out.
            ends = after - before
            slot = permute(places[mine], _BLOCK, self.seed, block)
            which[mine] = np.searchsorted(ends, slot, side="right") - 1
            place[mine] = np.diff(before)[which[mine]] + slot - ends[which[mine]]
        return which, place
