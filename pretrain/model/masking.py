"""Which tokens are hidden and which channels dropped: a function of seed, epoch and sample, and of nothing else.

Letters in names: B samples, C channels, N tokens, K visible tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Keeps the draws of channel dropout apart from those of the masks.
_DROPOUT = np.uint64(0xD20C4A11E15)


def visible_tokens(tokens: int, mask_ratio: float) -> int:
    """Count the tokens that the encoder sees.

    Parameters
    ----------
    tokens : int
        Tokens of a window.
    mask_ratio : float
        Share hidden, between 0 and 1.

    Returns
    -------
    int
        The same for every sample, so that a batch stays rectangular.
    """
    # Rounded first: 1 - 0.9 is a hair below 0.1, and truncation would lose a token.
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
    """Draw the visible tokens of some samples.

    Parameters
    ----------
    seed : int
        The run's seed.
    epochs : sequence of int, [B]
        The epoch of each sample.
    numbers : sequence of int, [B]
        Each sample's number in the dataset.
    tokens : int
        Tokens of a window.
    mask_ratio : float
        Share of the tokens to hide.
    block : int
        Hidden tokens come in contiguous spans of this length; a last, shorter span fills the share up.
    channels : sequence of int, [B], optional
        Where every channel has a mask of its own: which channel each row is for.

    Returns
    -------
    Tensor, [B, K], int64
        Visible tokens of each sample, in rising order. Every subset of this size is equally likely, or for blocks
        every arrangement of the spans among the visible tokens. The same sample has the same mask in the same epoch
        for any number of processes, workers or resumptions.
    """
    state_B = _state(seed, epochs, numbers)
    if channels is not None:
        state_B = _mix(state_B ^ _mix(np.asarray(channels, np.uint64)))
    visible = visible_tokens(tokens, mask_ratio)
    if block == 1:
        order_BN = np.argsort(_noise(state_B, tokens), axis=1, kind="stable")[:, :visible]
        return torch.from_numpy(np.sort(order_BN, axis=1).astype(np.int64))
    # Spans and visible tokens as beads on a string: shuffle the beads, then see where the visible ones lie.
    spans, rest = divmod(tokens - visible, block)
    lengths = np.array([block] * spans + [rest] * (rest > 0) + [1] * visible)
    beads_BM = np.argsort(_noise(state_B, len(lengths)), axis=1, kind="stable")
    start_BM = np.cumsum(lengths[beads_BM], axis=1) - lengths[beads_BM]
    seen_BM = beads_BM >= len(lengths) - visible
    return torch.from_numpy(start_BM[seen_BM].reshape(len(beads_BM), visible).astype(np.int64))


def dropped_channels(
    seed: int, epochs: Sequence[int], numbers: Sequence[int], counts: Sequence[int], share: float, width: int
) -> Tensor:
    """Draw the channels whose signal is withheld from the encoder.

    Parameters
    ----------
    seed : int
        The run's seed.
    epochs, numbers : sequence of int, [B]
        As for `keep_indices`.
    counts : sequence of int, [B]
        True channels of each sample.
    share : float
        Probability of each true channel to be dropped; one at least always stays.
    width : int
        Rows of the padded window.

    Returns
    -------
    Tensor, [B, width], bool
        True for the rows to withhold. All copies of a channel go with it: row i is channel ``i mod n``.
    """
    counts_B = np.asarray(counts, np.int64)
    noise_BC = _noise(_mix(_state(seed, epochs, numbers) ^ _DROPOUT), width) / 2.0**64
    real_BC = np.arange(width) < counts_B[:, None]
    # The channel with the largest draw stays, whatever the share.
    stays_B = np.where(real_BC, noise_BC, -1.0).argmax(axis=1)
    dropped_BC = noise_BC < share
    dropped_BC[np.arange(len(counts_B)), stays_B] = False
    source_BC = np.arange(width) % counts_B[:, None]
    return torch.from_numpy(np.take_along_axis(dropped_BC, source_BC, axis=1))


def _state(seed: int, epochs: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    state_B = _mix(_mix(np.full(len(epochs), seed % 2**64, np.uint64)) ^ np.asarray(epochs, np.uint64))
    return _mix(state_B ^ np.asarray(numbers, np.uint64))


def _noise(state_B: np.ndarray, draws: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _mix(state_B[:, None] + np.arange(draws, dtype=np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    """Step of SplitMix64: turns a counter into 64 independent-looking bits."""
    with np.errstate(over="ignore"):
        value = (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
