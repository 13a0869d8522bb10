"""Trains DM-RE2I: EVRNet as a classifier, then the DDPM guided by its frozen feature.

Started as ``dreamscale ddpm CONFIG`` or ``accelerate launch -m finetune.dm_re2i CONFIG``.

Legend of suffixes: B trials, b trials of this rank, C channels, T samples, D feature width, K classes, M images,
H rows, W columns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.diffusion import DenoisingWatcher, denoising_errors
from finetune.dm_re2i.config import DMRE2IConfig
from finetune.dm_re2i.eg_ddpm import EGDDPM
from finetune.dm_re2i.evrnet import EVRNet
from finetune.dm_re2i.model import eeg_features, sample_images, save_model
from finetune.dm_re2i.train_evrnet import train_evrnet
from finetune.eeg import choose_evenly, read_trials
from finetune.images import ImageTable, open_paired, to_model_range, to_pixels
from finetune.training.accelerate import make_accelerator, open_run, quiet_libraries, rank_loader
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import Accelerator


class EGDDPMTask(nn.Module):
    """EG-DDPM with its loss.

    Parameters
    ----------
    unet : EGDDPM
        The network.
    noising : DDPMScheduler
        The forward process.
    norm : str
        Norm of the error: l1 or l2.
    """

    def __init__(self, unet: EGDDPM, noising: Any, norm: str) -> None:
        super().__init__()
        self.unet, self.noising, self.norm = unet, noising, norm

    def features(self, eeg: Tensor) -> Tensor:
        """Return the EEG's features, [B, D]; EVRNet is frozen, so they were computed before the training."""
        return eeg

    def errors(
        self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Measure the error of each trial's prediction; arguments as of `forward`."""
        return denoising_errors(
            lambda x, t, condition: self.unet(x, t, *condition),
            self.noising,
            clean,
            noise,
            time,
            (features, keep),
            norm=self.norm,
        )

    def forward(
        self, image: Tensor, noise: Tensor, time: Tensor, e: Tensor, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Parameters
        ----------
        image, noise : Tensor, shape (B, 3, H, W)
            Images from -1 to 1, and noise.
        time : Tensor of int, shape (B,)
            Step of the forward process.
        e : Tensor, shape (B, D)
            EEG features.
        keep : Tensor of bool, shape (B,), optional
            False where the condition is dropped; by default every condition is kept.

        Returns
        -------
        dict
            loss.
        """
        return {"loss": self.errors(e, image, noise, time, keep).mean()}


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
    e_train, _ = eeg_features(evrnet, read_trials(data, list(range(len(data))), data.spec, device))
    numbers = choose_evenly(len(val), config.val_trials)
    e_val, logits_val = eeg_features(evrnet, read_trials(val, numbers, val.spec, device))
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
        return {**tensors, "keep": random.uniform(b) >= stage.drop} if stage.drop else tensors

    result = fit(
        task,
        config=stage.training,
        seed=config.seed,
        accelerator=accel,
        run=run,
        loader=rank_loader(data, stage.training, config.seed, accel),
        inputs=inputs,
        validate=DenoisingWatcher(e_val, to_model_range(val_pixels), stage.noise_steps),
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
