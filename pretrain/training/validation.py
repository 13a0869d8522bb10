"""The loss on the val split, computed on the same windows and with the same masks in every evaluation.

In tensor names, B is the number of windows, C of channels, and T of time samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture
from pretrain.runs.distributed import World
from pretrain.training.config import PretrainConfig

MASK_SEED = 20230629
"""Seed for the masks of the evaluation. The mask seed does not depend on the run's seed, so runs with different seeds
can be compared."""


def choose_windows(dataset: EEGDataset | Mixture, most: int) -> list[int]:
    """Return the indices of at most `most` windows, spread evenly over the split; if `most` is 0, of all windows."""
    count = min(most or len(dataset), len(dataset))
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


@torch.no_grad()
def evaluate(
    engine: Any,
    dataset: EEGDataset | Mixture,
    config: PretrainConfig,
    world: World,
    *,
    before_batch: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Compute the loss on the val split; every process must call this function.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The DeepSpeed engine.
    dataset : EEGDataset or Mixture
        The val split.
    config : PretrainConfig
        The run's config.
    world : World
        The processes of the run.
    before_batch : callable
        Function that is called before each batch, to report progress to the watchdog.
    stopping : callable
        Function that is called before each batch; it returns whether a stop was requested in this process.

    Returns
    -------
    dict or None
        ``val_loss``: mean loss of the windows. ``val_explained``: 1 - loss / power, where power is the loss of a model
        that predicts zero everywhere. It is 1 for a perfect reconstruction, and 0 for a model that predicts zero
        everywhere. ``val_loss_corpus/NAME``: mean loss of the windows of one corpus. ``val_loss_channels/NUMBER``: mean
        loss of the windows with NUMBER recorded channels. If a stop was requested in any process, the evaluation ends
        early, and the result is None: a batch system may kill the run before the evaluation ends.
    """
    windows = choose_windows(dataset, config.evaluation.windows)
    mine = windows[world.rank :: world.size]
    batch_size = config.evaluation.batch_size or config.micro
    # At ZeRO stage 3 a forward pass is a collective operation, so all processes must run the same number of forward
    # passes.
    rounds = math.ceil(math.ceil(len(windows) / world.size) / batch_size)
    model = engine.module
    model.eval()
    loss, power = 0.0, 0.0
    # For each corpus, and separately for each number of channels: sum of the losses, and number of windows.
    parts: dict[str, tuple[float, int]] = {}
    for start in range(0, rounds * batch_size, batch_size):
        before_batch()
        if world.any(stopping()):
            model.train()
            return None
        numbers = mine[start : start + batch_size]
        counted = bool(numbers)
        # A process that has no windows left runs the model on a window of another process, but ignores the result.
        numbers = numbers or windows[:1]
        batch = collate(dataset, numbers)
        x_BCT = model.windows(batch, dataset.spec, world.device)
        prepared = model.prepare(batch, MASK_SEED, training=False)
        inputs = {name: value.to(world.device) for name, value in prepared.items()}
        loss_B = engine(x_BCT, **inputs)
        power_B = model.power(x_BCT, **inputs)
        if counted:
            loss += float(loss_B.double().sum())
            power += float(power_B.double().sum())
            for meta, value in zip(batch.metas, loss_B.tolist(), strict=True):
                for part in (f"corpus/{meta.get('corpus') or 'unknown'}", f"channels/{meta['n']:03d}"):
                    total, number = parts.get(part, (0.0, 0))
                    parts[part] = total + value, number + 1
    model.train()
    loss, power, count = world.all_reduce_sum(loss, power, len(mine))
    result = {"val_loss": loss / count, "val_explained": 1.0 - loss / power if power else 0.0}
    return result | _average_parts(world.all_gather(parts))


def _average_parts(of_processes: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Return the mean loss of the windows of each corpus, and of the windows with each number of channels."""
    sums: dict[str, tuple[float, int]] = {}
    for parts in of_processes:
        for name, (total, number) in parts.items():
            before, counted = sums.get(name, (0.0, 0))
            sums[name] = before + total, counted + number
    return {f"val_loss_{name}": total / number for name, (total, number) in sorted(sums.items())}
