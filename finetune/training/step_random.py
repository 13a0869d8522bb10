"""Draw the random numbers of one training step, independent of the number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch


class StepRandom:
    """Draw the random numbers of one step for the global batch, and divide these numbers among the processes.

    The random numbers depend only on the seed and the step, not on the number of processes or on earlier steps.
    Therefore a resumed run draws the same numbers as an uninterrupted run.

    Parameters
    ----------
    seed, step : int
        Seed of the run, and number of the step.
    rank, world_size : int
        Number of this process, and total number of processes. Each process gets every `world_size`-th sample of the
        global batch.
    """

    def __init__(self, seed: int, step: int, *, rank: int = 0, world_size: int = 1) -> None:
        # Multiply the seed by a large number, because with `seed + step`, seed 1 at step 0 would draw the same numbers
        # as seed 0 at step 1.
        self._generator = torch.Generator().manual_seed(((seed + 1) * 0x9E3779B97F4A7C15 + step) % (1 << 63))
        self.rank, self.world_size = rank, world_size

    def _draw(self, draw: Callable[..., torch.Tensor], b: int, *shape: int) -> torch.Tensor:
        return draw((b * self.world_size, *shape), generator=self._generator)[self.rank :: self.world_size]

    def normal(self, b: int, *shape: int) -> torch.Tensor:
        """Draw standard normal random numbers with shape [b, *shape] on the CPU."""
        return self._draw(torch.randn, b, *shape)

    def uniform(self, b: int, *shape: int) -> torch.Tensor:
        """Draw uniform random numbers from 0 to 1 with shape [b, *shape] on the CPU."""
        return self._draw(torch.rand, b, *shape)

    def integers(self, high: int, b: int, *shape: int) -> torch.Tensor:
        """Draw random integers from 0 to high - 1 with shape [b, *shape] on the CPU."""
        return self._draw(lambda size, generator: torch.randint(high, size, generator=generator), b, *shape)
