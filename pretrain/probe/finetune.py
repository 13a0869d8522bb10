"""Fine-tune a whole encoder on the trials of a probe, to compare pretrained with random initial weights.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
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
# The rise of the learning rate takes at least two steps: a first step with the lowest rate, and a last step with the
# highest rate.
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
    """Train the whole encoder with a linear head on the mean of the tokens, and predict the labels of the test trials.

    Parameters
    ----------
    encoder : EEGEncoder
        Encoder with the initial weights. A copy of this encoder is trained; the encoder itself does not change.
    trials : Trials
        All trials of the dataset; the trials must have the same channels.
    fold : Fold
        The model is trained on the fold's `train` trials, and predicts the labels of the fold's `test` trials.
    choose_by : (ndarray, ndarray)
        Trials for the choice of the learning rate. The first array has the indices of the trials to train on, the
        second array has the indices of the trials to predict.
    classes : int
        Number of labels.
    epochs : int
        Number of passes over the training trials.
    rates : sequence of float
        Learning rates of AdamW to choose from. If only one learning rate is given, fine-tuning uses this rate without a
        search.
    seed : int
        Seed of the random numbers for the order of the trials.
    device : torch.device
        Device of the training.

    Returns
    -------
    ndarray, [number of test trials]
        Predicted labels.
    float
        Learning rate that was chosen.
    """
    fit, held = choose_by
    same = np.array_equal(fit, fold.train)

    def train(rows: np.ndarray, rate: float) -> nn.Module:
        return _train(encoder, trials, rows, classes=classes, epochs=epochs, rate=rate, seed=seed, device=device)

    best: tuple[float, float, nn.Module | None] = (-1.0, rates[0], None)
    if len(rates) > 1 or same:
        for rate in rates:
            model = train(fit, rate)
            right = float((_predict(model, trials, held, device) == trials.labels_n[held]).mean())
            if right > best[0]:
                best = (right, rate, model)
    # If the learning rate was chosen on a val split, the model with the best rate was already trained on all training
    # trials of the fold. Use this model.
    model = best[2] if same and best[2] is not None else train(fold.train, best[1])
    return _predict(model, trials, fold.test, device), best[1]


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return a schedule: the learning rate rises for a tenth of the steps, at least two, and then falls to almost 0.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        An optimiser with momentum, such as AdamW. The schedule lowers the momentum while the learning rate rises, and
        raises the momentum afterwards.
    rate : float
        Highest learning rate.
    steps : int
        Number of steps of the training, at least 1.

    Returns
    -------
    torch.optim.lr_scheduler.OneCycleLR
        The schedule. The caller must call ``step`` of the schedule after every training step.
    """
    # PyTorch divides by the number of steps in which the learning rate rises, and by the number in which it falls, so
    # neither may be 0. The schedule therefore has at least three steps. A training of one or two steps ends before the
    # learning rate falls.
    total = max(steps, _RISE + 1)
    share = max(_WARM_UP, _RISE / total)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=share)


def _inputs(encoder: EEGEncoder, trials: Trials, rows: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Return the encoder's arguments: scaled windows, and electrode positions if the encoder needs them."""
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
        # Set the head's weights to zero, so that every training begins with the same score for all labels.
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
