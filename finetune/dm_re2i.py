"""Trains DM-RE2I: EVRNet as a classifier, then the DDPM guided by its frozen feature.

Started as ``dreamscale ddpm CONFIG`` or ``accelerate launch -m finetune.dm_re2i CONFIG``.

Legend of suffixes: B trials, b trials of this rank, C channels, T samples, D feature width, K classes, M images,
H rows, W columns.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.config import parse_config
from data_sharding.dataset import EEGDataset
from data_sharding.errors import EXIT_DONE, RequestError, run_main
from data_sharding.loader import Batch, Loader, collate
from finetune.align import AugmentConfig, augmented
from finetune.data import ImageTable, eeg_for_model, open_paired, to_model_range, to_pixels
from finetune.dm_re2i_model import eeg_features, sample_images, save_model
from finetune.eg_ddpm import EGDDPM
from finetune.evrnet import EVRNet, EVRNetConfig, unit_variance, whitening_matrix
from finetune.training import StepRandom, TrainingConfig, fit, make_accelerator, open_run, plot_losses, quiet_libraries
from pretrain.run import RunDirectory, TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    augment: AugmentConfig = field(default_factory=AugmentConfig)
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


@dataclass(frozen=True, kw_only=True)
class EGDDPMStage:
    """The second stage: noise to the image, guided by the EEG's feature."""

    image_size: int = 64
    """Pixels of a side."""
    base_channels: int = 64
    """Feature maps at the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Feature maps of the levels over those of the first."""
    expansion: int = 2
    """Width multiple inside the ConvNeXt blocks."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 32
    """Width of a head."""
    scale_shift: bool = False
    """FiLM in place of adding the embedding; not in the paper."""
    patch: int = 1
    """Fold squares of so many pixels into channels; 2 is four times cheaper; not in the paper."""
    join_first: bool = False
    """Have the first level's copy join on the way up, too; narrow networks need it; not in the paper."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts. The paper's is the noise (epsilon); v_prediction draws forms after fewer steps."""
    loss: Literal["l1", "l2"] = "l2"
    """Norm of the error; the paper does not say."""
    noise_steps: int = 1000
    """Steps of the forward process, with the cosine schedule (squaredcos_cap_v2)."""
    drop: float = 0.1
    """Share of trials whose condition is dropped, for classifier-free guidance; the paper's is 0."""
    condition_noise: float = 0.0
    """Standard deviation of noise on the standardised feature in training."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(ema=0.995))
    """Steps, batch, rates."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or self.condition_noise < 0 or self.noise_steps < 2:
            raise ValueError("ddpm: need 0 <= drop < 1, condition_noise >= 0 and noise_steps >= 2")
        multiple = self.patch * 2 ** (len(self.multipliers) - 1)
        if len(self.multipliers) < 2 or self.patch < 1 or self.image_size < 1 or self.image_size % multiple:
            raise ValueError(
                f"ddpm.image_size {self.image_size} must be a multiple of {multiple}, which patch {self.patch} and "
                f"{len(self.multipliers)} levels (2 or more) ask for"
            )
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(f"ddpm.base_channels must be even and 4 or more, got {self.base_channels}")


@dataclass(frozen=True, kw_only=True)
class DMRE2IConfig:
    """DM-RE2I: EVRNet, then the EEG-guided DDPM in pixel space."""

    dataset: str
    """EEG-image dataset with train and val splits."""
    output: str
    """Run directory; `evrnet/` holds the first stage's run, `model/` the result."""
    evrnet: EVRNetStage = field(default_factory=EVRNetStage)
    """First stage."""
    evrnet_from: str | None = None
    """EVRNet of an earlier run (its `model/evrnet`) to take in place of training one."""
    ddpm: EGDDPMStage = field(default_factory=EGDDPMStage)
    """Second stage."""
    val_trials: int = 256
    """Trials of the val split that are watched, evenly spread."""
    num_processes: int = 1
    """Processes over all machines."""
    seed: int = 0
    """Of order, noise and fresh weights."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.val_trials < 2:
            raise ValueError(f"val_trials must be at least 2, got {self.val_trials}")


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
    parts = [collate(dataset, numbers[start : start + 256]).eeg for start in range(0, len(numbers), 256)]
    return torch.cat([eeg_for_model(part, dataset.spec, device) for part in parts])


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
    task = EVRNetTask(EVRNet(shape), stage.label_smoothing).to(memory_format=torch.channels_last)
    labels = torch.as_tensor(tables[0].labels[tables[0].row_of])
    numbers = spread(len(val), config.val_trials)
    clean = all_eeg(data, spread(len(data), stage.calibration_trials), device)[:, : stage.channels]
    if task.net.whitening_CC is not None:
        task.net.whitening_CC.copy_(whitening_matrix(clean.cpu(), stage.whiten))
    # Training changes whitened trials: noise and silenced channels would else be spread over all of them.
    normaliser = copy.deepcopy(task.net.whitening_CC)
    x_val = all_eeg(val, numbers, device)
    y_val = torch.as_tensor(tables[1].labels[tables[1].row_of[numbers]], device=device)
    loader, steps = _loader(data, stage.training, config.seed, accel), stage.training.steps

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        y = labels[batch.numbers]
        x = eeg_for_model(batch.eeg, data.spec)[:, : stage.channels]
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
        return {"x": augmented(x, batch.metas, stage.augment, random), "target": target}

    def validate(module: nn.Module) -> dict[str, float]:
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


def _loader(data: EEGDataset, training: TrainingConfig, seed: int, accel: Accelerator) -> Loader:
    world = {"rank": accel.process_index, "world_size": accel.num_processes}
    return Loader(data, training.batch, seed, **world, num_workers=training.workers)


class EGDDPMTask(nn.Module):
    """EG-DDPM with its loss.

    Parameters
    ----------
    unet : EGDDPM
        The network.
    noising : DDPMScheduler
        The forward process.
    norm : str
        l1 or l2.
    """

    def __init__(self, unet: EGDDPM, noising: Any, norm: str) -> None:
        super().__init__()
        self.unet, self.noising, self.norm = unet, noising, norm

    def errors(self, image: Tensor, noise: Tensor, time: Tensor, e: Tensor, drop: Tensor | None) -> Tensor:
        """Error of the prediction, one value a trial; arguments as of `forward`."""
        noisy = self.noising.add_noise(image, noise, time)
        velocity = self.noising.config.prediction_type == "v_prediction"
        target = self.noising.get_velocity(image, noise, time) if velocity else noise
        difference = self.unet(noisy, time, e, drop).float() - target
        return (difference.abs() if self.norm == "l1" else difference.square()).mean(dim=(1, 2, 3))

    def forward(
        self, image: Tensor, noise: Tensor, time: Tensor, e: Tensor, drop: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Parameters
        ----------
        image, noise : Tensor, shape (B, 3, H, W)
            Images from -1 to 1, and noise.
        time : Tensor of int, shape (B,)
            Step of the forward process.
        e : Tensor, shape (B, D)
            EEG features.
        drop : Tensor of bool, shape (B,), optional
            True where the condition is dropped.

        Returns
        -------
        dict
            loss.
        """
        return {"loss": self.errors(image, noise, time, e, drop).mean()}


class Watcher:
    """Denoising loss on val trials under fixed noise, with their own EEG and with one another's.

    Parameters
    ----------
    image_B3HW : Tensor, shape (B, 3, H, W)
        Images of the trials.
    e_BD : Tensor, shape (B, D)
        Their features.
    times : int
        Steps of the forward process.
    """

    REPEATS = 4

    def __init__(self, image_B3HW: Tensor, e_BD: Tensor, times: int) -> None:
        self.image, self.e = image_B3HW, e_BD
        generator = torch.Generator().manual_seed(0)
        n = len(image_B3HW)
        self.noise = torch.randn(self.REPEATS, *image_B3HW.shape, generator=generator)
        # Stratified: every repeat of a trial comes from another quarter of the steps.
        u = (torch.rand(self.REPEATS, n, generator=generator) + torch.arange(self.REPEATS)[:, None]) / self.REPEATS
        self.time = (u * times).long()

    def __call__(self, task: nn.Module) -> dict[str, float]:
        """Losses of a model.

        Parameters
        ----------
        task : EGDDPMTask
            In evaluation mode.

        Returns
        -------
        dict
            ``loss`` with the trials' own EEG, ``shuffled`` with another trial's: equal where EEG is ignored.
        """
        out = {}
        for name, e in (("loss", self.e), ("shuffled", self.e.roll(max(1, len(self.e) // 2), 0))):
            total = 0.0
            for noise, time in zip(self.noise, self.time, strict=True):
                for at in torch.arange(len(e)).split(64):
                    device = e.device
                    parts = (self.image[at].to(device), noise[at].to(device), time[at].to(device), e[at])
                    total += float(task.errors(*parts, None).sum())
            out[name] = total / (self.REPEATS * len(e))
        return out


def train_ddpm(
    config: DMRE2IConfig,
    evrnet: EVRNet,
    data: EEGDataset,
    val: EEGDataset,
    tables: tuple[ImageTable, ImageTable],
    run: RunDirectory,
    accel: Accelerator,
) -> None:
    """Train the guided DDPM and write the model.

    Parameters
    ----------
    config : DMRE2IConfig
        The request.
    evrnet : EVRNet
        In evaluation mode, frozen.
    data, val : EEGDataset
        The splits.
    tables : tuple of ImageTable
        Their images.
    run : RunDirectory
        Of this stage.
    accel : Accelerator
        The world.
    """
    from diffusers import DDPMScheduler

    stage, device = config.ddpm, accel.device
    pixels = torch.from_numpy(tables[0].pixels(size=stage.image_size))
    e_train, _ = eeg_features(evrnet, all_eeg(data, list(range(len(data))), device))
    numbers = spread(len(val), config.val_trials)
    e_val, logits_val = eeg_features(evrnet, all_eeg(val, numbers, device))
    val_pixels = tables[1].pixels(tables[1].row_of[numbers], stage.image_size)
    torch.manual_seed(config.seed)
    unet = EGDDPM(
        sample_size=stage.image_size,
        condition_dim=evrnet.dim,
        base_channels=stage.base_channels,
        multipliers=tuple(stage.multipliers),
        expansion=stage.expansion,
        heads=stage.heads,
        head_dim=stage.head_dim,
        scale_shift=stage.scale_shift,
        null_condition=stage.drop > 0,
        patch=stage.patch,
        join_first=stage.join_first,
    )
    std_D = e_train.std(dim=0)
    unet.set_condition_statistics(e_train.mean(dim=0), std_D)
    noising = DDPMScheduler(
        num_train_timesteps=stage.noise_steps, beta_schedule="squaredcos_cap_v2", prediction_type=stage.prediction
    )
    task = EGDDPMTask(unet, noising, stage.loss).to(memory_format=torch.channels_last)
    e_train, std_D = e_train.cpu(), std_D.cpu()

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        b = len(batch.numbers)
        image = to_model_range(pixels[torch.as_tensor(tables[0].row_of[batch.numbers])])
        e = e_train[batch.numbers]
        tensors = {
            "image": image,
            "noise": random.normal(b, *image.shape[1:]),
            "time": random.integers(stage.noise_steps, b),
            "e": e + stage.condition_noise * std_D * random.normal(b, e.shape[1]),
        }
        return {**tensors, "drop": random.uniform(b) < stage.drop} if stage.drop else tensors

    result = fit(
        task,
        config=stage.training,
        seed=config.seed,
        accelerator=accel,
        run=run,
        loader=_loader(data, stage.training, config.seed, accel),
        inputs=inputs,
        validate=Watcher(to_model_range(val_pixels), e_val, stage.noise_steps),
        description="EG-DDPM",
    )
    if accel.is_main_process:
        accuracy = float((logits_val.argmax(1).cpu().numpy() == tables[1].labels[tables[1].row_of[numbers]]).mean())
        found = {"best_step": result.best_step, "val": result.best, "dataset_id": data.manifest.dataset_id}
        origin = {"dataset": config.dataset, "labels": data.labels, "evrnet_val_accuracy": accuracy}
        save_model(run.path / "model", evrnet, unet, noising, data.spec, {**found, **origin})
        plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "val/loss", "val/shuffled"])
        _plot_samples(run.path / "plots" / "samples.png", unet, noising, e_val[:16], val_pixels[:16], stage.drop > 0)
        run.status("done", **found)
        own, other = result.best["loss"], result.best["shuffled"]
        print(f"EG-DDPM: val loss {own:.4f}, with other trials' EEG {other:.4f} -> {run.path / 'model'}")


def _plot_samples(path: Path, unet: EGDDPM, noising: Any, e_BD: Tensor, real: np.ndarray, guided: bool) -> None:
    """Val trials: what was seen above what is made of their EEG."""
    from PIL import Image

    scale = 2.0 if guided else 1.0
    seeds = list(range(len(e_BD)))
    made = to_pixels(sample_images(unet, noising.config, e_BD, steps=25, guidance_scale=scale, seeds=seeds))
    rows = [np.concatenate(list(images), axis=1) for images in (real, made)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def _check_data(config: DMRE2IConfig, splits: tuple[EEGDataset, EEGDataset], tables: tuple[ImageTable, ...]) -> None:
    """Refuse data that the request does not fit, before any long work."""
    for dataset, table in zip(splits, tables, strict=True):
        if len(dataset.labels) < 2:
            raise RequestError(f"{dataset.path}: EVRNet needs two categories or more, there are {len(dataset.labels)}")
        if table.labels.min() < 0 or table.labels.max() >= len(dataset.labels):
            raise RequestError(f"{dataset.path} ({dataset.split}): a trial's label is not in the manifest's labels")
        most = max(int(dataset.meta(number)["n"]) for number in range(len(dataset)))
        if most > config.evrnet.channels:
            raise RequestError(
                f"evrnet.channels is {config.evrnet.channels}, but a trial of {dataset.path} ({dataset.split}) has "
                f"{most} channels; set it to {most} or more"
            )


def _given_evrnet(path: str, labels: list[str]) -> EVRNet:
    evrnet = EVRNet.from_pretrained(path)
    if evrnet.config.n_classes != len(labels):
        raise RequestError(f"{path}: knows {evrnet.config.n_classes} categories, the dataset has {len(labels)}")
    return evrnet.requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    """Train EVRNet, then the EEG-guided DDPM.

    Parameters
    ----------
    argv : list of str, optional
        ``CONFIG.yaml`` and any key of `DMRE2IConfig`.

    Returns
    -------
    int
        Exit code.
    """
    quiet_libraries()
    config = parse_config(DMRE2IConfig, argv, prog="dreamscale ddpm", positionals=("config",))
    data, val = open_paired(config.dataset, "train"), open_paired(config.dataset, "val")
    tables = ImageTable(data), ImageTable(val)
    _check_data(config, (data, val), tables)
    given = _given_evrnet(config.evrnet_from, data.labels) if config.evrnet_from else None
    precision = config.ddpm.training.precision
    if precision != config.evrnet.training.precision:
        raise RequestError("evrnet.training.precision and ddpm.training.precision must be equal: one world serves both")
    accel = make_accelerator(num_processes=config.num_processes, device=config.device, precision=precision)
    # One after the other: a tracker knows one run at a time.
    evrnet = given.to(accel.device) if given is not None else train_evrnet(config, data, val, tables, accel)
    run = open_run(config, accel)
    if run.finished and (run.path / "model" / "dreamscale.json").is_file():
        print(f"{config.output}: done already")
        return EXIT_DONE
    if run.finished:
        raise RequestError(f"{config.output}: finished, but its model is gone; choose another output, or delete it")
    train_ddpm(config, evrnet, data, val, tables, run, accel)
    run.close()
    accel.wait_for_everyone()
    accel.end_training()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
