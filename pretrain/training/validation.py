"""Held-out loss: the same windows and the same masks every time, for any number of processes.

Letters in names: B windows, C channels, T time samples.
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

# Of the evaluation's masks; apart from the run's seed, so that runs of different seeds are comparable.
MASK_SEED = 20230629


def held_out_windows(dataset: EEGDataset | Mixture, most: int) -> list[int]:
    """Choose the windows that the model is judged on.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The val split.
    most : int
        Most windows; 0 for all.

    Returns
    -------
    list of int
        Their numbers, spread evenly over the split.
    """
    count = min(most or len(dataset), len(dataset))
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


@torch.no_grad()
def evaluate(
    engine: Any,
    dataset: EEGDataset | Mixture,
    config: PretrainConfig,
    world: World,
    *,
    alive: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss on the val split; every process must call it.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.
    dataset : EEGDataset or Mixture
        The val split.
    config : PretrainConfig
        The request.
    world : World
        This process among all.
    alive : callable
        Called before each batch, for whoever watches over hanging processes.
    stopping : callable
        Asked before each batch whether somebody wants the training to stop.

    Returns
    -------
    dict or None
        ``val_loss``, mean over the windows, and ``val_explained``, the share of the hidden tokens' squares that the
        reconstruction accounts for (0 for predicting zero, 1 for perfect); then the loss of each corpus and of each
        number of true channels among the windows, as ``val_loss_corpus/NAME`` and ``val_loss_channels/NUMBER``. None
        where somebody wants to stop, on any process: a whole evaluation may take longer than the grace that is left.
    """
    windows = held_out_windows(dataset, config.evaluation.windows)
    mine = windows[world.rank :: world.size]
    batch_size = config.evaluation.batch_size or config.micro
    # The model may be spread over the processes: all of them must run it equally often.
    rounds = math.ceil(math.ceil(len(windows) / world.size) / batch_size)
    model = engine.module
    model.eval()
    loss, power = 0.0, 0.0
    parts: dict[str, tuple[float, int]] = {}
    for start in range(0, rounds * batch_size, batch_size):
        alive()
        if world.any(stopping()):
            model.train()
            return None
        numbers = mine[start : start + batch_size]
        counted = bool(numbers)
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
    return result | _means(world.all_gather(parts))


def _means(of_processes: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Mean loss of each part of the windows, out of the processes' sums and counts."""
    names = sorted({name for parts in of_processes for name in parts})
    found = {name: [parts[name] for parts in of_processes if name in parts] for name in names}
    return {f"val_loss_{name}": sum(v for v, _ in pairs) / sum(n for _, n in pairs) for name, pairs in found.items()}
