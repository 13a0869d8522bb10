"""The first stage of DM-RE2I: EVRNet learns to tell the category of the image from single trials.

Legend of suffixes: B trials, b trials of this rank, C channels, T samples, D feature width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Batch, collate
from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig, unit_variance, whitening_matrix
from finetune.dm_re2i.model import eeg_features
from finetune.images import ImageTable, eeg_for_model
from finetune.training.fit import StepRandom, TrainingConfig, fit, open_run, plot_losses, rank_loader

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.dm_re2i.train import DMRE2IConfig


@dataclass(frozen=True, kw_only=True)
class EVRNetAugment:
    """Changes of the EEG that do not change what was seen; after the noise normalisation, training only."""

    shift: int = 0
    """Largest shift in time, in samples, to either side; the edge is repeated."""
    noise: float = 0.0
    """Standard deviation of white noise, in the trial's own."""
    drop_channels: float = 0.0
    """Largest share of channels that are silenced."""

    def __post_init__(self) -> None:
        if self.shift < 0 or self.noise < 0 or not 0 <= self.drop_channels < 1:
            raise ValueError("evrnet.augment: need shift >= 0, noise >= 0 and 0 <= drop_channels < 1")


@dataclass(frozen=True, kw_only=True)
class EVRNetStage:
    """The first stage: EEG to the category of the image."""

    channels: int = 128
    """Rows of the padded window that are used; fewer lose nothing where no trial has more true channels."""
    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Feature maps of the temporal, spatial and TS convolutions; the last is the feature's width."""
    dropout: float = 0.0
    """Share of the feature dropped before the linear layer; the paper shows none."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    whiten: float = 0.0
    """Multivariate noise normalisation before the network, with this shrinkage (0.05 is usual); for trials of one
    electrode layout. 0 for none, as in the paper."""
    average: int = 1
    """At the start of training, replace a trial by the mean of 1 to so many trials of its category in the batch.
    Single trials are mostly noise: what they share is found sooner. 1 for never."""
    average_end: int = 1
    """What `average` falls to, evenly, by the end of training."""
    mixup: float = 0.0
    """Largest share of another trial and of its category; 0 for none."""
    augment: EVRNetAugment = field(default_factory=EVRNetAugment)
    """Changes of the EEG in training."""
    watch: Literal["accuracy", "loss"] = "accuracy"
    """What decides on the val split which weights are kept."""
    calibration_trials: int = 512
    """Train trials from which the batch norms' statistics are taken before each validation and at the end."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(lr=1e-3))
    """Steps, batch, rates."""

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 128 or self.calibration_trials < 2:
            raise ValueError("evrnet: need 1 <= channels <= 128 and calibration_trials >= 2")
        if not 0 <= self.whiten <= 1:
            raise ValueError(f"evrnet.whiten must lie in [0, 1], got {self.whiten}")
        if not 1 <= self.average_end <= self.average or not 0 <= self.mixup <= 0.5 or not 0 <= self.label_smoothing < 1:
            raise ValueError("evrnet: need 1 <= average_end <= average, 0 <= mixup <= 0.5 and 0 <= label_smoothing < 1")
        EVRNetConfig(widths=self.widths, dropout=self.dropout, n_channels=self.channels)


def spread(n: int, count: int) -> list[int]:
    """Numbers of trials, evenly spread over a split.

    Parameters
    ----------
    n : int
        Trials of the split.
    count : int
        How many at most.

    Returns
    -------
    list of int
        Sorted, each once.
    """
    return np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)).tolist()


def all_eeg(dataset: EEGDataset, numbers: list[int], device: Any = None) -> Tensor:
    """Trials in model units.

    Parameters
    ----------
    dataset : EEGDataset
        Where from.
    numbers : list of int
        Which.
    device : torch.device, optional
        Where to.

    Returns
    -------
    Tensor, shape (B, 128, T)
        Scaled.
    """
    parts = [collate(dataset, numbers[start : start + 256]) for start in range(0, len(numbers), 256)]
    return torch.cat([eeg_for_model(part.padded(device), dataset.spec) for part in parts])


@torch.no_grad()
def calibrate_batch_norm(net: nn.Module, x_BCT: Tensor, batch: int = 64) -> None:
    """Take the batch norms' statistics from given trials, whatever training left there.

    They thereby depend on the weights alone: on averaged weights, after a resume, and although training saw averaged
    and noisy trials, they are those of the trials that will be asked about.

    Parameters
    ----------
    net : Module
        Left in evaluation mode.
    x_BCT : Tensor, shape (B, C, T)
        Clean trials in model units.
    batch : int
        Trials at a time.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    dropouts = [module for module in net.modules() if isinstance(module, nn.Dropout)]
    net.train()
    for dropout in dropouts:
        dropout.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    # Equal batches: each counts the same in the mean.
    for part in x_BCT[: max(batch, len(x_BCT) // batch * batch)].split(batch):
        net(part[:, None])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def same_category_average(x_bCT: Tensor, labels_b: Tensor, most: int, random: StepRandom) -> Tensor:
    """Replace trials by means over trials of their category.

    Parameters
    ----------
    x_bCT : Tensor, shape (b, C, T)
        Trials in model units.
    labels_b : Tensor of int, shape (b,)
        Their categories.
    most : int
        Each becomes the mean of 1 to `most` trials, itself among them; a trial may count twice.
    random : StepRandom
        Of this step.

    Returns
    -------
    Tensor, shape (b, C, T)
        Means, brought back to each trial's own standard deviation.
    """
    b = len(x_bCT)
    scores = random.uniform(b, most - 1, b)
    same = (labels_b[:, None] == labels_b[None, :])[:, None, :]
    partner = scores.masked_fill(~same, -1.0).argmax(dim=2)
    extra = random.integers(most, b, 1)
    used = (torch.arange(most - 1)[None, :] < extra).float()
    weights = torch.eye(b).scatter_add(1, partner, used)
    mean = torch.einsum("bc,cij->bij", weights / weights.sum(1, keepdim=True), x_bCT)
    std = mean.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    return mean * (x_bCT.std(dim=(1, 2), keepdim=True) / std)


def changed(x_bCT: Tensor, true_b: list[int], config: EVRNetAugment, random: StepRandom) -> Tensor:
    """Change trials in ways that do not change what was seen.

    Parameters
    ----------
    x_bCT : Tensor, shape (b, C, T)
        Trials, padded by replication.
    true_b : list of int
        True channels of each: copies of a channel share its fate.
    config : EVRNetAugment
        How much.
    random : StepRandom
        Of this step.

    Returns
    -------
    Tensor, shape (b, C, T)
        Changed trials.
    """
    b, channels, samples = x_bCT.shape
    true_bC = torch.arange(channels)[None, :] % torch.tensor(true_b)[:, None]
    if config.shift:
        moved = torch.arange(samples) + random.integers(2 * config.shift + 1, b, 1) - config.shift
        x_bCT = x_bCT.gather(2, moved.clamp(0, samples - 1)[:, None].expand(-1, channels, -1))
    if config.noise:
        noise = random.normal(b, channels, samples).gather(1, true_bC[..., None].expand(-1, -1, samples))
        x_bCT = x_bCT + config.noise * noise
    if config.drop_channels:
        share_b1 = random.uniform(b, 1) * config.drop_channels
        x_bCT = x_bCT * (random.uniform(b, channels) >= share_b1).gather(1, true_bC)[..., None]
    return x_bCT


class EVRNetTask(nn.Module):
    """EVRNet with its loss.

    Parameters
    ----------
    net : EVRNet
        The network.
    label_smoothing : float
        Of the cross-entropy.
    """

    def __init__(self, net: EVRNet, label_smoothing: float) -> None:
        super().__init__()
        self.net, self.label_smoothing = net, label_smoothing

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Parameters
        ----------
        x : Tensor, shape (B, C, T)
            EEG in model units, normalised.
        target : Tensor, shape (B, K)
            Share of each category.

        Returns
        -------
        dict
            loss and accuracy.
        """
        _, logits = self.net(x[:, None], normalised=True)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == target.argmax(1)).float().mean()}


def train_evrnet(
    config: DMRE2IConfig, data: EEGDataset, val: EEGDataset, tables: tuple[ImageTable, ImageTable], accel: Accelerator
) -> EVRNet:
    """Train the classifier, or load it where its run is finished.

    Parameters
    ----------
    config : DMRE2IConfig
        The request.
    data, val : EEGDataset
        The splits.
    tables : tuple of ImageTable
        Their images.
    accel : Accelerator
        The world.

    Returns
    -------
    EVRNet
        With the weights that were best on val, in evaluation mode, frozen.
    """
    stage, device = config.evrnet, accel.device
    run = open_run(config, accel, output=Path(config.output) / "evrnet")
    if run.finished and (run.path / "package" / "config.json").is_file():
        return EVRNet.from_pretrained(run.path / "package").requires_grad_(False).to(device)
    n_classes = len(data.labels)
    torch.manual_seed(config.seed)
    shape = EVRNetConfig(
        n_classes=n_classes,
        n_channels=stage.channels,
        widths=stage.widths,
        dropout=stage.dropout,
        noise_normalisation=stage.whiten > 0,
    )
    task = EVRNetTask(EVRNet(shape), stage.label_smoothing)
    task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - missing from torch's overloads
    labels = torch.as_tensor(tables[0].labels[tables[0].row_of])
    numbers = spread(len(val), config.val_trials)
    clean = all_eeg(data, spread(len(data), stage.calibration_trials), device)[:, : stage.channels]
    whitening_CC = task.net.whitening_CC
    if isinstance(whitening_CC, Tensor):
        whitening_CC.copy_(whitening_matrix(clean.cpu(), stage.whiten))
    # Training changes whitened trials: noise and silenced channels would else be spread over all of them.
    normaliser = whitening_CC.clone() if isinstance(whitening_CC, Tensor) else None
    x_val = all_eeg(val, numbers, device)
    y_val = torch.as_tensor(tables[1].labels[tables[1].row_of[numbers]], device=device)
    loader, steps = rank_loader(data, stage.training, config.seed, accel), stage.training.steps

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        y = labels[batch.numbers]
        x = eeg_for_model(batch.padded(), data.spec)[:, : stage.channels]
        if normaliser is not None:
            x = unit_variance(normaliser @ x)
        target = F.one_hot(y, n_classes).float()
        done = (loader.step - 1) / steps
        most = round(stage.average + (stage.average_end - stage.average) * done)
        if most > 1:
            x = same_category_average(x, y, most, random)
        if stage.mixup:
            share = stage.mixup * random.uniform(len(x), 1)
            other = random.uniform(len(x)).argsort()
            x = torch.lerp(x, x[other], share[..., None])
            target = torch.lerp(target, target[other], share)
        return {"x": changed(x, [int(meta["n"]) for meta in batch.metas], stage.augment, random), "target": target}

    def validate(module: EVRNetTask) -> dict[str, float]:
        net = module.net
        calibrate_batch_norm(net, clean)
        _, logits = eeg_features(net, x_val)
        accuracy = float((logits.argmax(1) == y_val).float().mean())
        loss = float(F.cross_entropy(logits, y_val))
        # On few val trials accuracies tie: the loss then decides.
        return {"accuracy": accuracy, "loss": loss, "score": accuracy - 1e-4 * min(loss, 100.0)}

    result = fit(
        task,
        config=stage.training,
        seed=config.seed,
        accelerator=accel,
        run=run,
        loader=loader,
        inputs=inputs,
        validate=validate,
        watch="score" if stage.watch == "accuracy" else "loss",
        mode="max" if stage.watch == "accuracy" else "min",
        description="EVRNet",
    )
    calibrate_batch_norm(task.net, clean)
    if accel.is_main_process:
        task.net.save_pretrained(run.path / "package")
        plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "val/loss", "train/accuracy", "val/accuracy"])
        run.status("done", best_step=result.best_step, val=result.best)
        print(f"EVRNet: val accuracy {result.best['accuracy']:.3f} (chance {1 / n_classes:.3f}) at {result.best_step}")
    run.close()
    accel.wait_for_everyone()
    return task.net.requires_grad_(False)
