"""Choose at random which tokens are hidden and which channels are dropped.

The choice depends only on the seed, the epoch and the number that identifies the sample. In one epoch, a sample
therefore gets the same mask for any number of processes and workers, also in a run that was interrupted and resumed.
The random numbers come from a hash of (seed, epoch, sample, counter), because a separate random generator for each
sample would be slower.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Channel dropout mixes this number into the hash, so that its random numbers differ from the masks' random numbers.
_DROPOUT = np.uint64(0xD20C4A11E15)


def visible_tokens(tokens: int, mask_ratio: float) -> int:
    """Compute the number of tokens that the encoder sees.

    Parameters
    ----------
    tokens : int
        Number of tokens along a window (N).
    mask_ratio : float
        Share of hidden tokens, between 0 and 1.

    Returns
    -------
    int
        Number of visible tokens. It is the same for all samples, so that the samples of a batch can be stacked into one
        tensor.
    """
    # Round before int(): in floating point, 1 - 0.9 is slightly below 0.1, so int() alone would give one token too few.
    return int(round(tokens * (1.0 - mask_ratio), 6))


def keep_indices(
    seed: int,
    epochs: Sequence[int],
    numbers: Sequence[int],
    tokens: int,
    mask_ratio: float,
    *,
    block: int = 1,
    channels: Sequence[int] | None = None,
) -> Tensor:
    """Draw at random, for each sample, which tokens are visible.

    Parameters
    ----------
    seed : int
        Seed of the run.
    epochs : sequence of int, [B]
        Epoch of each sample.
    numbers : sequence of int, [B]
        Number that identifies each sample in the dataset.
    tokens : int
        Number of tokens along a window (N).
    mask_ratio : float
        Share of the tokens to hide, between 0 and 1.
    block : int
        Number of neighbouring tokens in a span; the tokens of a span are hidden together. If the number of hidden
        tokens is not a multiple of `block`, one span is shorter.
    channels : sequence of int, [B], optional
        If every channel has a separate mask: for each mask, the index of the channel that it belongs to.

    Returns
    -------
    Tensor, [B, K], int64
        Indices of the visible tokens of each sample, in rising order. With `block` 1, every subset of K tokens is
        equally likely. With a larger `block`, every order of hidden spans and visible tokens is equally likely.
    """
    state_B = _state(seed, epochs, numbers)
    if channels is not None:
        state_B = _mix(state_B ^ _mix(np.asarray(channels, np.uint64)))
    visible = visible_tokens(tokens, mask_ratio)
    if block == 1:
        order_BN = np.argsort(_noise(state_B, tokens), axis=1, kind="stable")[:, :visible]
        return torch.from_numpy(np.sort(order_BN, axis=1).astype(np.int64))
    # A window consists of J pieces. Each piece is a span of hidden tokens or one visible token. Shuffle the pieces and
    # put them one after another. The place where a visible token then begins is its index in the window.
    spans, rest = divmod(tokens - visible, block)
    lengths = np.array([block] * spans + [rest] * (rest > 0) + [1] * visible)
    order_BJ = np.argsort(_noise(state_B, len(lengths)), axis=1, kind="stable")
    start_BJ = np.cumsum(lengths[order_BJ], axis=1) - lengths[order_BJ]
    seen_BJ = order_BJ >= len(lengths) - visible
    return torch.from_numpy(start_BJ[seen_BJ].reshape(len(order_BJ), visible).astype(np.int64))


def dropped_channels(
    seed: int, epochs: Sequence[int], numbers: Sequence[int], counts: Sequence[int], share: float, width: int
) -> Tensor:
    """Draw at random, for each sample, which channels are hidden from the encoder.

    Parameters
    ----------
    seed : int
        Seed of the run.
    epochs, numbers : sequence of int, [B]
        See `keep_indices`.
    counts : sequence of int, [B]
        Number of recorded channels of each sample.
    share : float
        Probability with which a recorded channel is dropped. At least one channel of each sample stays.
    width : int
        Number of rows of the padded window.

    Returns
    -------
    Tensor, [B, width], bool
        True for rows to hide. All copies of a dropped channel are hidden too. In a padded window with ``n`` recorded
        channels, row ``i`` is a copy of channel ``i mod n``.
    """
    counts_B = np.asarray(counts, np.int64)
    noise_BC = _noise(_mix(_state(seed, epochs, numbers) ^ _DROPOUT), width) / 2.0**64
    real_BC = np.arange(width) < counts_B[:, None]
    # The recorded channel with the largest random number is never dropped, so at least one channel stays.
    stays_B = np.where(real_BC, noise_BC, -1.0).argmax(axis=1)
    dropped_BC = noise_BC < share
    dropped_BC[np.arange(len(counts_B)), stays_B] = False
    source_BC = np.arange(width) % counts_B[:, None]
    return torch.from_numpy(np.take_along_axis(dropped_BC, source_BC, axis=1))


def _state(seed: int, epochs: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    """For each sample of a batch, return a 64-bit hash of seed, epoch and number of the sample in the dataset."""
    state_B = _mix(_mix(np.full(len(epochs), seed % 2**64, np.uint64)) ^ np.asarray(epochs, np.uint64))
    return _mix(state_B ^ np.asarray(numbers, np.uint64))


def _noise(state_B: np.ndarray, draws: int) -> np.ndarray:
    """Return `draws` random 64-bit numbers for each sample, [B, draws]."""
    with np.errstate(over="ignore"):
        return _mix(state_B[:, None] + np.arange(draws, dtype=np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply one step of the hash SplitMix64; the results look independent even for neighbouring inputs."""
    with np.errstate(over="ignore"):
        value = (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
