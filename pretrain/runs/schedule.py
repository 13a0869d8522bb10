"""The learning-rate schedule of both training stages: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total: int) -> int:
    """Return the number of warm-up steps: `warmup` itself, or `warmup` times `total` if `warmup` is below 1."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def learning_rate(step: int, total: int, *, lr: float, min_lr: float, warmup: float) -> float:
    """Return the learning rate of one optimiser step.

    The learning rate rises linearly to `lr` over the warm-up. After the warm-up, the learning rate follows half a
    cosine to `min_lr`.

    Parameters
    ----------
    step : int
        Index of the optimiser step, counted from 0.
    total : int
        Number of optimiser steps in the whole run.
    lr : float
        Peak learning rate.
    min_lr : float
        Learning rate at the end of the run.
    warmup : float
        Length of the warm-up: a fraction of all steps if the value is below 1, else a number of steps.

    Returns
    -------
    float
        The learning rate.
    """
    rising = warmup_steps(warmup, total)
    if step < rising:
        return lr * (step + 1) / rising
    progress = (step - rising) / max(1, total - rising)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def check_schedule(prefix: str, *, lr: float, min_lr: float, warmup: float) -> None:
    """Check the settings of a learning-rate schedule.

    Parameters
    ----------
    prefix : str
        Prefix of the keys in error messages, e.g. ``optimizer.``.
    lr, min_lr, warmup : float
        See `learning_rate`.

    Raises
    ------
    ValueError
        If a value is not allowed.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"{prefix}lr is {lr}; it must be positive")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"{prefix}min_lr is {min_lr}; it must be from 0 to {prefix}lr, {lr}")
    if not warmup >= 0 or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(
            f"{prefix}warmup is {warmup}; it must be a whole number of steps, or a fraction of all steps below 1"
        )
