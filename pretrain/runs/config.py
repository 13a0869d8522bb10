"""Settings that pretraining and fine-tuning have in common, and functions that check settings."""

from __future__ import annotations

import dataclasses
from typing import Any


def check_at_least(config: Any, least: int, *names: str, prefix: str = "") -> None:
    """Check that the values of config fields are not below a limit. Config fields whose value is None are not checked.

    Parameters
    ----------
    config : dataclass instance
        The config.
    least : int
        Smallest value allowed.
    *names : str
        Names of the fields to check.
    prefix : str
        Prefix of the keys in error messages, e.g. ``training.``.

    Raises
    ------
    ValueError
        If the value of a field is below `least`; the message names the key of the field.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{prefix}{name} is {value}; it must be at least {least}")


def samples_per_process(batch_size: int, num_processes: int, micro_batch_size: int | None, *, prefix: str = "") -> int:
    """Check that a batch can be divided evenly among the processes, and return the size of each process's share.

    Parameters
    ----------
    batch_size : int
        Number of samples in one optimiser step, summed over all processes.
    num_processes : int
        Number of processes.
    micro_batch_size : int or None
        Number of samples that one process computes in one forward pass; None if it computes its whole share of the
        batch at once.
    prefix : str
        Prefix of the keys in error messages, e.g. ``training.``.

    Returns
    -------
    int
        Number of samples that one process computes in one optimiser step.

    Raises
    ------
    ValueError
        If the batch cannot be divided evenly among the processes, or a process's share into micro batches.
    """
    if batch_size % num_processes:
        raise ValueError(
            f"{prefix}batch_size is {batch_size}; it must be a multiple of num_processes, which is {num_processes}"
        )
    share = batch_size // num_processes
    if micro_batch_size is not None and (micro_batch_size < 1 or share % micro_batch_size):
        raise ValueError(
            f"{prefix}micro_batch_size is {micro_batch_size}; it must divide {share}, each process's share of "
            f"{prefix}batch_size"
        )
    return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints and how many to keep. A run can be resumed from a checkpoint."""

    every: int = 500
    """Number of steps between two checkpoints. A checkpoint is also written after the last step, and when a stop is
    requested."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    milestones: int | None = None
    """Checkpoints whose step is a multiple of `milestones` are never deleted; `milestones` must be a multiple of
    `every`. If milestones is not set, only the newest checkpoints are kept."""
    asynchronous: bool = False
    """If true, the training state is copied to the CPU's memory, and a background thread writes this copy to disk.
    Training waits only until the state is copied. In pretraining, the copy needs twelve bytes of CPU memory for each
    parameter of the model; every process holds its share of the copy."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "keep", "milestones", prefix="checkpoint.")
        if self.milestones is not None and self.milestones % self.every:
            raise ValueError(
                f"checkpoint.milestones is {self.milestones}; it must be a multiple of checkpoint.every, {self.every}"
            )
