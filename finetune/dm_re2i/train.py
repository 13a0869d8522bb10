"""Trains DM-RE2I: EVRNet as a classifier, then the DDPM guided by its frozen feature.

Started as ``dreamscale ddpm CONFIG`` or ``accelerate launch -m finetune.dm_re2i CONFIG``.

Legend of suffixes: B trials, b trials of this rank, C channels, T samples, D feature width, K classes, M images,
H rows, W columns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Batch
from finetune.dm_re2i.eg_ddpm import EGDDPM
from finetune.dm_re2i.evrnet import EVRNet
from finetune.dm_re2i.model import eeg_features, sample_images, save_model
from finetune.dm_re2i.train_evrnet import EVRNetStage, all_eeg, spread, train_evrnet
from finetune.images import ImageTable, open_paired, to_model_range, to_pixels
from finetune.training.fit import (
    StepRandom,
    TrainingConfig,
    fit,
    make_accelerator,
    open_run,
    plot_losses,
    quiet_libraries,
    rank_loader,
)
from pretrain.runs.directory import RunDirectory, TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


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

    def __call__(self, task: EGDDPMTask) -> dict[str, float]:
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
    task = EGDDPMTask(unet, noising, stage.loss)
    task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - missing from torch's overloads
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
        loader=rank_loader(data, stage.training, config.seed, accel),
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
