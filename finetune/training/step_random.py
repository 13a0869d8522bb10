"""Random numbers of one step, the same for every number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch


class StepRandom:
    """Randomness of one step: drawn for the global batch, cut for the rank.

    So a step's noise depends on the seed and the step alone, not on the number of processes nor on what was drawn
    before, and a resumed run draws what it would have drawn.

    Parameters
    ----------
    seed, step : int
        What it depends on.
    rank, world_size : int
        Which samples of the global batch are ours: every world_size-th.
    """

    def __init__(self, seed: int, step: int, *, rank: int = 0, world_size: int = 1) -> None:
        # A hash of both: consecutive seeds and steps must not share their streams.
        self._generator = torch.Generator().manual_seed(((seed + 1) * 0x9E3779B97F4A7C15 + step) % (1 << 63))
        self.rank, self.world_size = rank, world_size

    def _draw(self, draw: Callable[..., torch.Tensor], b: int, *shape: int) -> torch.Tensor:
        return draw((b * self.world_size, *shape), generator=self._generator)[self.rank :: self.world_size]

    def normal(self, b: int, *shape: int) -> torch.Tensor:
        """Standard normal numbers [b, *shape] on the CPU."""
        return self._draw(torch.randn, b, *shape)

    def uniform(self, b: int, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), [b, *shape], on the CPU."""
        return self._draw(torch.rand, b, *shape)

    def integers(self, high: int, b: int, *shape: int) -> torch.Tensor:
        """Integers in [0, high), [b, *shape], on the CPU."""
        return self._draw(lambda size, generator: torch.randint(high, size, generator=generator), b, *shape)
