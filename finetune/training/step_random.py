"""Random numbers of one training step, the same for every number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch


class StepRandom:
    """Random numbers of one step: drawn for the global batch, then divided among the processes.

    The numbers depend on the seed and the step alone: not on the number of processes, and not on earlier draws. So a
    resumed run draws the same numbers as an uninterrupted one.

    Parameters
    ----------
    seed, step : int
        Seed of the run, and number of the step.
    rank, world_size : int
        Number of this process, and of all processes. The process takes every world_size-th sample of the global batch.
    """

    def __init__(self, seed: int, step: int, *, rank: int = 0, world_size: int = 1) -> None:
        # The multiplication separates the streams: with seed + step, seed 1 would repeat seed 0 one step later.
        self._generator = torch.Generator().manual_seed(((seed + 1) * 0x9E3779B97F4A7C15 + step) % (1 << 63))
        self.rank, self.world_size = rank, world_size

    def _draw(self, draw: Callable[..., torch.Tensor], b: int, *shape: int) -> torch.Tensor:
        return draw((b * self.world_size, *shape), generator=self._generator)[self.rank :: self.world_size]

    def normal(self, b: int, *shape: int) -> torch.Tensor:
        """Draw standard normal numbers [b, *shape] on the CPU."""
        return self._draw(torch.randn, b, *shape)

    def uniform(self, b: int, *shape: int) -> torch.Tensor:
        """Draw numbers in [0, 1), [b, *shape], on the CPU."""
        return self._draw(torch.rand, b, *shape)

    def integers(self, high: int, b: int, *shape: int) -> torch.Tensor:
        """Draw integers in [0, high), [b, *shape], on the CPU."""
        return self._draw(lambda size, generator: torch.randint(high, size, generator=generator), b, *shape)
