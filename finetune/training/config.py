"""Length, learning rate and cadence of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and how often."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 64
    """Samples of a step over all processes; a multiple of num_processes * accumulate."""
    accumulate: int = 1
    """Parts into which a process cuts its share of the batch, one after another, to save memory."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end over the peak; cosine in between."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only: vectors (biases, norms) have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    clip_norm: float = 1.0
    """Limit of the gradient's norm; 0 for none."""
    ema: float = 0.0
    """Decay of the moving average of the fp32 weights, warmed up; 0 for none."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: autocast; the weights stay fp32."""
    workers: int = 0
    """Reading processes of each rank."""
    log_every: int = 10
    """Steps between lines of metrics."""
    validate_every: int = 100
    """Steps between validations; the last step has one, too."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or self.warmup < 0 or not 0 <= self.ema < 1:
            raise ValueError("training: need lr > 0, warmup >= 0 and 0 <= ema < 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step.

        Parameters
        ----------
        step : int
            Optimiser steps done before it.

        Returns
        -------
        float
            Linear warm-up, then cosine.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.min_lr_ratio
        return self.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
