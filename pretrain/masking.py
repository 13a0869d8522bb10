"""Which tokens are hidden: a function of seed, epoch and sample, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.model import visible_tokens


def keep_indices(seed: int, epochs: Sequence[int], numbers: Sequence[int], tokens: int, mask_ratio: float) -> Tensor:
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

    Returns
    -------
    Tensor, [B, K], int64
        Visible tokens of each sample, in rising order; every subset of this size is equally likely. The same sample
        has the same mask in the same epoch for any number of processes, workers or resumptions.
    """
    with np.errstate(over="ignore"):
        state_B = _mix(_mix(np.full(len(epochs), seed % 2**64, np.uint64)) ^ np.asarray(epochs, np.uint64))
        state_B = _mix(state_B ^ np.asarray(numbers, np.uint64))
        noise_BN = _mix(state_B[:, None] + np.arange(tokens, dtype=np.uint64))
    order_BN = np.argsort(noise_BN, axis=1, kind="stable")[:, : visible_tokens(tokens, mask_ratio)]
    return torch.from_numpy(np.sort(order_BN, axis=1).astype(np.int64))


def _mix(value: np.ndarray) -> np.ndarray:
    """Step of SplitMix64: turns a counter into 64 independent-looking bits."""
    value = (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
