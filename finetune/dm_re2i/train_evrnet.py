"""The first stage of DM-RE2I: EVRNet learns to tell the category of the image from single trials.

Legend of suffixes: B trials, b trials of this rank, C channels, T samples, D feature width, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.dm_re2i.config import DMRE2IConfig
from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig, unit_variance, whitening_matrix
from finetune.dm_re2i.model import eeg_features
from finetune.eeg import augment_eeg, choose_evenly, eeg_for_model, read_trials
from finetune.images import ImageTable
from finetune.training.accelerate import open_run, rank_loader
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    numbers = choose_evenly(len(val), config.val_trials)
    calibration = choose_evenly(len(data), stage.calibration_trials)
    clean = read_trials(data, calibration, data.spec, device)[:, : stage.channels]
    whitening_CC = task.net.whitening_CC
    if isinstance(whitening_CC, Tensor):
        whitening_CC.copy_(whitening_matrix(clean.cpu(), stage.whiten))
    # Training changes whitened trials: noise and silenced channels would else be spread over all of them.
    normaliser = whitening_CC.clone() if isinstance(whitening_CC, Tensor) else None
    x_val = read_trials(val, numbers, val.spec, device)
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
        return {"x": augment_eeg(x, [int(meta["n"]) for meta in batch.metas], stage.augment, random), "target": target}

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
