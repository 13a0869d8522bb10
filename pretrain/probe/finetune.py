"""Fine-tuning an encoder on a probe's trials: whether its weights are a better start than random ones.

Letters in names: n trials, B trials of a batch, C channels, T time samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.progress import progress
from data_sharding.dataset.samples import pad_channels

if TYPE_CHECKING:
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.probe.features import Trials
    from pretrain.probe.folds import Fold

_WARM_UP, _WEIGHT_DECAY, _BATCH = 0.1, 0.05, 32
# Fewest steps in which a rate can rise: one low, one at the top.
_RISE = 2


def finetune_and_predict(
    encoder: EEGEncoder,
    trials: Trials,
    fold: Fold,
    choose_by: tuple[np.ndarray, np.ndarray],
    *,
    classes: int,
    epochs: int,
    rates: Sequence[float],
    seed: int,
    device: torch.device,
) -> tuple[np.ndarray, float]:
    """Train a linear head on the mean token together with the whole encoder, and label the test trials.

    Parameters
    ----------
    encoder : EEGEncoder
        The start; a copy is trained.
    trials : Trials
        All trials, all with the same channels.
    fold : Fold
        Fitted on `train`, predicted for `test`.
    choose_by : (ndarray, ndarray)
        Trials fitted on and trials scored to choose among the learning rates.
    classes : int
        Number of labels.
    epochs : int
        Passes over the training trials.
    rates : sequence of float
        Learning rates of AdamW; one of them is taken as it is.
    seed : int
        Of the order of the trials.
    device : torch.device
        Where.

    Returns
    -------
    ndarray, [n of test]
        Predicted labels.
    float
        Learning rate chosen.
    """
    fit, held = choose_by
    same = np.array_equal(fit, fold.train)

    def trained(rows: np.ndarray, rate: float) -> nn.Module:
        return _train(encoder, trials, rows, classes=classes, epochs=epochs, rate=rate, seed=seed, device=device)

    best: tuple[float, float, nn.Module | None] = (-1.0, rates[0], None)
    if len(rates) > 1 or same:
        for rate in rates:
            model = trained(fit, rate)
            right = float((_predict(model, trials, held, device) == trials.labels_n[held]).mean())
            if right > best[0]:
                best = (right, rate, model)
    # With a val split, what was tried out is what is wanted.
    model = best[2] if same and best[2] is not None else trained(fold.train, best[1])
    return _predict(model, trials, fold.test, device), best[1]


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Warm up over a tenth of the steps, then fall to nothing.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Of AdamW's kind: its momentum goes the other way.
    rate : float
        Highest learning rate.
    steps : int
        Steps of the training, at least 1.

    Returns
    -------
    torch.optim.lr_scheduler.OneCycleLR
        To be moved on after every step.
    """
    # PyTorch divides by the lengths of the rise and the fall, so both must be there: one or two steps only rise.
    total = max(steps, _RISE + 1)
    share = max(_WARM_UP, _RISE / total)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=share)


def _inputs(encoder: EEGEncoder, trials: Trials, rows: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Windows as the encoder takes them, and where their electrodes sit."""
    x_BCT = torch.from_numpy(pad_channels(trials.eeg_nCT[rows].astype(np.float32), encoder.config.channels)).to(device)
    electrodes = [trials.electrodes[row] for row in rows]
    return encoder.scale_for_model(x_BCT, len(trials.channels)), *encoder.inputs_of(electrodes, device).values()


def _train(
    encoder: EEGEncoder,
    trials: Trials,
    rows: np.ndarray,
    *,
    classes: int,
    epochs: int,
    rate: float,
    seed: int,
    device: torch.device,
) -> nn.Module:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = copy.deepcopy(encoder).train()
        # From zero: all starts say nothing about any label.
        model.head, model.n_outputs = nn.Linear(model.dim, classes, device=device), classes
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
        steps = epochs * -(-len(rows) // _BATCH)
        scheduler = one_cycle(optimizer, rate, steps)
        with progress("fine-tuning", steps) as advance:
            for _ in range(epochs):
                for batch in torch.randperm(len(rows)).split(_BATCH):
                    numbers = rows[batch.numpy()]
                    target = torch.from_numpy(trials.labels_n[numbers]).long().to(device)
                    loss = nn.functional.cross_entropy(model(*_inputs(model, trials, numbers, device)), target)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    advance(1)
    return model.eval()


@torch.no_grad()
def _predict(model: nn.Module, trials: Trials, rows: np.ndarray, device: torch.device) -> np.ndarray:
    parts = np.split(rows, range(256, len(rows), 256))
    return np.concatenate([model(*_inputs(model, trials, part, device)).argmax(dim=1).cpu().numpy() for part in parts])  # type: ignore[arg-type]
