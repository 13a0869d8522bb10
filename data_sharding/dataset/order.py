"""Order of the samples in training, as a function of seed, epoch and place.

A place is a position in the order: 0 is the first sample of epoch 0, n the first sample of epoch 1, and so on. The
functions here compute the sample at any place directly. So a resumed run, another number of ranks and a worker all
find the same sample without any state.

`numpy.random.permutation` is not used: it takes 0.8 GB for a hundred million samples, in every worker of every rank,
and NumPy does not promise the same permutation in every release. The Feistel network below takes about a microsecond a
sample and no memory, and its result never changes. Only one number for each shard is kept in memory.

Shapes: b places, S shards.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Order = Literal["global", "shards"]
"""Order within an epoch: random over all samples (global), or over a few shards at a time (shards)."""

_ROUNDS = 8
_BLOCK = 4096
"""Number of consecutive places of a mixture in which each dataset gets its share."""
_UNIT = 1 << 40
"""Shares are stored as integers, in parts of this number, so that they add up exactly."""


def mix(value: np.ndarray) -> np.ndarray:
    """Hash counters to 64 random-looking bits each (one step of SplitMix64).

    Parameters
    ----------
    value : ndarray of uint64
        Counters.

    Returns
    -------
    ndarray of uint64
        Hashes, in the shape of `value`.

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
    """Compute elements of a random permutation of 0 .. n - 1 without computing the whole permutation.

    Parameters
    ----------
    places : ndarray of int, shape (b,)
        Indices into the permutation, from 0 to n - 1.
    n : int
        Length of the permutation.
    *key : int
        Seed of the permutation, as any number of integers.

    Returns
    -------
    ndarray of int64, shape (b,)
        Elements of the permutation at these indices.

    Notes
    -----
    A Feistel network splits a number of k bits into a left and a right half, and changes in turn one half by the XOR
    with a hash of the other half. Each of these rounds can be undone, so the network permutes the numbers below 2^k.
    Since n lies between 2^(k - 1) and 2^k, some results are n or larger. Such a result goes through the network again
    until it is below n (cycle walking). This is still a permutation: each number is on one cycle of the network, and
    the walk leads to the next number of the cycle that is below n.

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

    def apply_network(x: np.ndarray) -> np.ndarray:
        left, right = x >> low, x & low_mask
        for number, round_key in enumerate(round_keys):
            if number % 2:
                right = right ^ (mix(left ^ round_key) & low_mask)
            else:
                left = left ^ (mix(right ^ round_key) & high_mask)
        return (left << low) | right

    out = apply_network(np.asarray(places).astype(np.uint64))
    while (beyond := out >= n).any():
        out[beyond] = apply_network(out[beyond])
    return out.astype(np.int64)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Compute the whole global order of an epoch.

    Parameters
    ----------
    n : int
        Number of samples of the dataset.
    seed, epoch : int
        Seed of the order, and the epoch.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 .. n - 1.
    """
    return permute(np.arange(n), n, seed, 0, epoch)


class EpochOrder:
    """Order of the samples of one dataset, epoch after epoch.

    Parameters
    ----------
    shard_samples : ndarray of int, shape (S,)
        Number of samples of each shard.
    seed : int
        Seed of the order.
    order : {"global", "shards"}
        global: random over all samples. shards: the shards come in random order, and the samples are shuffled within
        each `window` of consecutive shards, so that a bounded cache can hold the shards that are read next.
    window : int
        Shards that are read at a time under order shards.
    stream : int
        Number of the dataset in a mixture; each dataset gets another order.
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
        """Compute the samples at some places.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places, from 0 without end: place `epoch * n + i` is the i-th sample of an epoch.

        Returns
        -------
        numbers : ndarray of int, shape (b,)
            Numbers of the samples in the dataset.
        epochs : ndarray of int, shape (b,)
            Epoch of each place.
        """
        epochs, places = np.divmod(np.asarray(line, np.int64), self.n)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            if self.order == "global":
                numbers[mine] = permute(places[mine], self.n, self.seed, self.stream, epoch)
            else:
                numbers[mine] = self._order_by_shards(places[mine], epoch)
        return numbers, epochs

    def windows(self, place: int) -> tuple[tuple[int, int], list[int]]:
        """List the shards that are read at a place and soon after it, under order shards.

        Parameters
        ----------
        place : int
            A place, from 0 without end.

        Returns
        -------
        window : (int, int)
            The epoch, and the number of the window in this epoch.
        shards : list of int
            Shards of this window and of the next window.
        """
        epoch, within_epoch = divmod(place, self.n)
        shards, _, window_ends = self._shard_order(epoch)
        number = int(np.searchsorted(window_ends, within_epoch, side="right"))
        found = shards[number * self.window : (number + 2) * self.window].tolist()
        if number + 1 == len(window_ends):
            found += self._shard_order(epoch + 1)[0][: self.window].tolist()
        return (epoch, number), found

    def _order_by_shards(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Compute the samples at places of one epoch.

        Lay the shards of the epoch side by side in their random order. A place lies in one window of shards; it is
        moved to a random other place of the same window. The shard at the new place, and the offset in that shard,
        give the sample.
        """
        shards, shard_ends, window_ends = self._shard_order(epoch)
        window = np.searchsorted(window_ends, places, side="right")
        edges = np.concatenate([[0], window_ends])
        moved = np.empty_like(places)
        for w in np.unique(window).tolist():
            mine = window == w
            size = int(edges[w + 1] - edges[w])
            # Key 1 belongs to the order of the shards, so the windows begin with key 2.
            moved[mine] = edges[w] + permute(places[mine] - edges[w], size, self.seed, self.stream, epoch, w + 2)
        which = np.searchsorted(shard_ends, moved, side="right")
        return self._first[shards[which]] + moved - (shard_ends[which] - self.samples[shards[which]])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards of an epoch in their random order, and the places at which each shard and each window ends."""
        if epoch not in self._shards:
            # Batches move forward from epoch to epoch: only the previous epoch may still be needed.
            self._shards = {k: v for k, v in self._shards.items() if k >= epoch - 1}
            count = len(self.samples)
            shards = permute(np.arange(count), count, self.seed, self.stream, epoch, 1)
            shard_ends = np.cumsum(self.samples[shards])
            window_ends = shard_ends[self.window - 1 :: self.window]
            if not len(window_ends) or window_ends[-1] != self.n:
                window_ends = np.append(window_ends, self.n)
            self._shards[epoch] = shards, shard_ends, window_ends
        return self._shards[epoch]


class DatasetInterleaver:
    """Decide which dataset of a mixture fills each place.

    Parameters
    ----------
    weights : sequence of float
        Share of each dataset; they need not sum to 1.
    seed : int
        Seed of the order in which the datasets alternate.

    Notes
    -----
    Places are dealt in blocks of 4096. In each block a dataset gets its share of the places, rounded, and a
    permutation shuffles which places these are. The rounding error of a block (below two places) is made up in the
    next blocks, so in the long run the shares are exact.

    Raises
    ------
    ValueError
        If a weight is not positive, or so small that its dataset would get less than two places of a block.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive and finite, got {weights}")
        edges = np.cumsum([0.0, *weights]) / sum(weights)
        if np.diff(edges).min() * _BLOCK < 2:
            raise ValueError(f"a weight below {2 / _BLOCK:.4f} of the sum is too small, got {weights}")
        self.seed = seed
        self._edges = [round(float(edge) * _UNIT) for edge in edges[:-1]] + [_UNIT]

    def _cumulative_places(self, block: int) -> np.ndarray:
        """Places before a block that the first j datasets got together, for j = 0, 1, 2 ...

        Python's integers are used because the product would overflow 64 bits.
        """
        return np.array([block * _BLOCK * edge // _UNIT for edge in self._edges], np.int64)

    def dealt_before(self, place: int) -> list[int]:
        """Count the places that each dataset got before the block of a place.

        Parameters
        ----------
        place : int
            A place of the mixture, from 0 without end.

        Returns
        -------
        list of int
            A number for each dataset.
        """
        return np.diff(self._cumulative_places(place // _BLOCK)).tolist()

    def at(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the dataset of some places, and the place in the own order of that dataset.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places of the mixture, from 0 without end.

        Returns
        -------
        which : ndarray of int, shape (b,)
            Dataset of each place.
        place : ndarray of int, shape (b,)
            Place in the order of that dataset. Over the whole line each of its places 0, 1, 2 ... comes once.
        """
        blocks, places = np.divmod(np.asarray(line, np.int64), _BLOCK)
        which, place = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            before, after = self._cumulative_places(block), self._cumulative_places(block + 1)
            # The slots of a block are sorted by dataset: dataset j has the slots ends[j] .. ends[j + 1]. A
            # permutation assigns a slot to each place.
            ends = after - before
            slot = permute(places[mine], _BLOCK, self.seed, block)
            which[mine] = np.searchsorted(ends, slot, side="right") - 1
            place[mine] = np.diff(before)[which[mine]] + slot - ends[which[mine]]
        return which, place
