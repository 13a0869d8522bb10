"""Settings that pretraining and fine-tuning share, and checks of them."""

from __future__ import annotations

import dataclasses
from typing import Any


def check_at_least(config: Any, least: int, *names: str, prefix: str = "") -> None:
    """Check that fields of a config are not below a limit; a field that is None is not checked.

    Parameters
    ----------
    config : dataclass instance
        The config.
    least : int
        Smallest value allowed.
    *names : str
        Fields to check.
    prefix : str
        The keys' common beginning in error messages, e.g. ``training.``.

    Raises
    ------
    ValueError
        If a field is below the limit; the message names its key.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{prefix}{name} is {value}; it must be at least {least}")


def samples_per_process(batch_size: int, num_processes: int, micro_batch_size: int | None, *, prefix: str = "") -> int:
    """Check that a batch divides evenly, and return each process's share of it.

    Parameters
    ----------
    batch_size : int
        Samples of one optimiser step over all processes.
    num_processes : int
        Number of processes.
    micro_batch_size : int or None
        Samples of one process in one forward pass; None for its whole share of the batch.
    prefix : str
        The keys' common beginning in error messages, e.g. ``training.``.

    Returns
    -------
    int
        Samples of one process in one optimiser step.

    Raises
    ------
    ValueError
        If the batch cannot be divided as asked.
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
    """When to write a checkpoint, from which the run can be resumed."""

    every: int = 500
    """Steps between two checkpoints. The last step and a requested stop write a checkpoint too."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    milestones: int | None = None
    """Checkpoints whose step is a multiple of this number are never deleted; it must be a multiple of `every`. None
    deletes all but the newest."""
    asynchronous: bool = False
    """Copy the state to the CPU's memory, and write this copy to disk in the background. Training waits only while the
    state is copied. The copy needs CPU memory: in pretraining twelve bytes for each parameter, divided among the
    processes."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "keep", "milestones", prefix="checkpoint.")
        if self.milestones is not None and self.milestones % self.every:
            raise ValueError(
                f"checkpoint.milestones is {self.milestones}; it must be a multiple of checkpoint.every, {self.every}"
            )
