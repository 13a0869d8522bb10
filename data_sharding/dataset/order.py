"""Random order of the training samples, which is computed from a seed and is not stored.

A place is a position in the endless order of the samples of all epochs. With `n` samples, place 0 is the first sample
of epoch 0, place `n` is the first sample of epoch 1, and so on. The functions in this module compute the sample at any
place directly. So every rank, every worker and a resumed run find the same sample at the same place without any saved
state.

`numpy.random.permutation` is not used: a permutation of a hundred million samples would be an array of 0.8 GB in every
worker of every rank, and NumPy does not promise the same permutation in every release. The Feistel network of `permute`
needs about a microsecond for each sample and no memory, and its result never changes. `EpochOrder` keeps only a few
numbers for each shard in memory.

Letters in shapes: `b` places, `S` shards.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Order = Literal["global", "shards"]
"""Order within an epoch. With "global", the samples are shuffled over the whole dataset; with "shards", only within
windows (groups of a few consecutive shards)."""

_ROUNDS = 8
_BLOCK = 4096
"""A mixture assigns places to its datasets in blocks of this many consecutive places. In each block, each dataset gets
a share of the places that equals its weight, up to rounding."""
_UNIT = 1 << 40
"""Weights of datasets are stored as integers that add up to this number, so that their sum has no rounding error."""


def mix(value: np.ndarray) -> np.ndarray:
    """Hash each counter to 64 random-looking bits (one step of SplitMix64).

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
        Seed of the permutation: one or more integers.

    Returns
    -------
    ndarray of int64, shape (b,)
        Elements of the permutation at the indices `places`.

    Notes
    -----
    A Feistel network splits a number of `k` bits into a left and a right half. In each round, the network replaces one
    half by the XOR of this half with a hash of the other half. Each round can be inverted, so the network permutes the
    numbers below ``2**k``. If the result of the network is not below `n`, the network is applied to the result again
    until it is below `n` (cycle walking). The results of cycle walking are still a permutation of ``0 .. n - 1``: each
    number is on one cycle of the network, and cycle walking leads to the next number of the cycle that is below `n`.

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
    """Compute the whole order of the samples in an epoch, for the order "global".

    Parameters
    ----------
    n : int
        Number of samples of the dataset.
    seed, epoch : int
        Seed of the order, and number of the epoch.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 .. n - 1.
    """
    return permute(np.arange(n), n, seed, 0, epoch)


class EpochOrder:
    """Random order of the samples of one dataset, with a new permutation in each epoch.

    Parameters
    ----------
    shard_samples : ndarray of int, shape (S,)
        Number of samples of each shard.
    seed : int
        Seed of the random order.
    order : {"global", "shards"}
        global: the samples are shuffled over the whole dataset. shards: the shards are in random order, and the samples
        are shuffled within each window, that is, within each group of `window` consecutive shards. With the order
        "shards", a cache that holds two windows of shards is large enough.
    window : int
        Number of shards in one window. The order "global" does not use the number of shards in a window.
    stream : int
        Number of the dataset in a mixture; each dataset gets a different order.
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
        """Compute which samples are at the given places in the endless order of samples.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places in the endless order, counted from 0: place ``epoch * n + i`` is the sample at position `i` of an
            epoch with `n` samples.

        Returns
        -------
        numbers : ndarray of int, shape (b,)
            For each place, the number of the sample in the dataset.
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
        """List the shards that the order "shards" reads at a place, and the shards that it reads next.

        Parameters
        ----------
        place : int
            A place in the endless order of samples, counted from 0.

        Returns
        -------
        window : (int, int)
            Number of the epoch, and number of the window in this epoch.
        shards : list of int
            Shards of the window that contains `place`, and of the next window.
        """
        epoch, within_epoch = divmod(place, self.n)
        shards, _, window_ends = self._shard_order(epoch)
        number = int(np.searchsorted(window_ends, within_epoch, side="right"))
        found = shards[number * self.window : (number + 2) * self.window].tolist()
        if number + 1 == len(window_ends):
            found += self._shard_order(epoch + 1)[0][: self.window].tolist()
        return (epoch, number), found

    def _order_by_shards(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Compute which samples the order "shards" has at the given places of one epoch.

        The shards of the epoch are concatenated in their random order. Each place lies in one window of the
        concatenated shards. A permutation of this window maps the place to a position in the window, and the sample
        that is stored at this position is returned.
        """
        shards, shard_ends, window_ends = self._shard_order(epoch)
        window = np.searchsorted(window_ends, places, side="right")
        edges = np.concatenate([[0], window_ends])
        moved = np.empty_like(places)
        for w in np.unique(window).tolist():
            mine = window == w
            size = int(edges[w + 1] - edges[w])
            # The last integer of the seed is 1 for the order of the shards (see `_shard_order`) and `w + 2` for window
            # `w`, so all these permutations have different seeds.
            moved[mine] = edges[w] + permute(places[mine] - edges[w], size, self.seed, self.stream, epoch, w + 2)
        which = np.searchsorted(shard_ends, moved, side="right")
        return self._first[shards[which]] + moved - (shard_ends[which] - self.samples[shards[which]])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the random order of the shards in an epoch, and the places where each shard and each window ends."""
        if epoch not in self._shards:
            # A later batch never needs an epoch before `epoch - 1`, so delete the shard orders of such epochs.
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
    """Decide which dataset of a mixture gives the sample at each place in the endless order of samples.

    Parameters
    ----------
    weights : sequence of float
        Weight of each dataset; the weights need not sum to 1.
    seed : int
        Seed of the order in which the datasets alternate.

    Notes
    -----
    Places are assigned to datasets in blocks of 4096 places. In each block, the number of places of a dataset is its
    normalised weight times 4096, rounded, and a permutation chooses the places of each dataset. The next blocks correct
    the rounding error of a block (below two places), so over many blocks each dataset gets the share of places that its
    weight states.

    Raises
    ------
    ValueError
        If a weight is not positive, or if a weight is so small that its dataset would get fewer than two of the 4096
        places of a block.
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
        """For j = 0, 1, 2 ..., return how many of the places before a block belong to the first `j` datasets.

        The function multiplies Python's integers and not NumPy's, because a product can need more than 64 bits.
        """
        return np.array([block * _BLOCK * edge // _UNIT for edge in self._edges], np.int64)

    def dealt_before(self, place: int) -> list[int]:
        """Count the places that were assigned to each dataset before the block that contains the given place.

        Parameters
        ----------
        place : int
            A place in the endless order of the mixture, counted from 0.

        Returns
        -------
        list of int
            Number of places that each dataset got before the block.
        """
        return np.diff(self._cumulative_places(place // _BLOCK)).tolist()

    def at(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute which dataset gives the sample at each place of a mixture, and the place in the dataset's own order.

        Parameters
        ----------
        line : ndarray of int, shape (b,)
            Places in the endless order of the mixture, counted from 0.

        Returns
        -------
        which : ndarray of int, shape (b,)
            Dataset of each place.
        place : ndarray of int, shape (b,)
            For each given place, the place in the order of the chosen dataset. Over all places of the mixture, each
            place of a dataset occurs exactly once.
        """
        blocks, places = np.divmod(np.asarray(line, np.int64), _BLOCK)
        which, place = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            before, after = self._cumulative_places(block), self._cumulative_places(block + 1)
            # Each block has a list of slots that is sorted by dataset: dataset `j` has the slots from `ends[j]` to
            # `ends[j + 1] - 1`. A permutation assigns one slot to each place of the block.
            ends = after - before
            slot = permute(places[mine], _BLOCK, self.seed, block)
            which[mine] = np.searchsorted(ends, slot, side="right") - 1
            place[mine] = np.diff(before)[which[mine]] + slot - ends[which[mine]]
        return which, place
