"""Train DM-RE2I in two stages: EVRNet as a classifier, then a DDPM guided by EVRNet or by a pretrained encoder.

The command is ``dreamscale ddpm CONFIG`` or ``accelerate launch -m finetune.dm_re2i CONFIG``.

Tensor shapes: B trials, b trials of this process, C channels, T time points, D feature width, K classes, M images, H
rows, W columns.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.diffusion import choose_sampling
from finetune.dm_re2i.backbones import build_unet
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.config import DMRE2IConfig
from finetune.dm_re2i.guide import EEGGuide
from finetune.dm_re2i.guided import GuidedUNet
from finetune.dm_re2i.model import ClassMeans, compute_features, save_model
from finetune.dm_re2i.networks import load_classifier
from finetune.dm_re2i.portable.pipeline import sample_images
from finetune.dm_re2i.train_evrnet import check_labels, train_evrnet
from finetune.eeg import choose_evenly, compute_for_trials, group_repeats, load_encoder, read_trials, scale_eeg
from finetune.images import ImageTable, open_train_val, to_model_range, to_pixels
from finetune.objective import DenoisingWatcher, add_offset, denoising_errors, make_noising, weigh_steps
from finetune.training.accelerate import (
    get_world,
    make_loader,
    quiet_libraries,
    report_finished,
    start_processes,
    use_run,
)
from finetune.training.compute import compile_blocks, use_tf32
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import Accelerator


class EGDDPMTask(nn.Module):
    """The network EG-DDPM together with its loss.

    Parameters
    ----------
    unet : GuidedUNet
        Network that predicts the noise.
    noising : DDPMScheduler
        Scheduler of the forward process (the process that adds noise).
    norm : str
        Norm of the prediction error: l1 or l2.
    guide : EEGGuide, optional
        Network that computes the guiding vectors from EEG, if this network is trained together with the U-Net. Without
        `guide`, the method `forward` gets guiding vectors in place of EEG.
    min_snr : float
        Gamma of the weights of the noise steps (see `finetune.objective.weigh_steps`); 0 gives equal weights.
    """

    def __init__(
        self, unet: GuidedUNet, noising: Any, norm: str, guide: EEGGuide | None = None, min_snr: float = 0.0
    ) -> None:
        super().__init__()
        self.unet, self.noising, self.norm, self.guide, self.min_snr = unet, noising, norm, guide, min_snr

    def features(self, eeg: Tensor) -> Tensor:
        """Return the guiding vectors [B, D]: computed from EEG [B, C, T], or the input itself without a `guide`."""
        return eeg if self.guide is None else self.guide(eeg)

    def errors(
        self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Compute each trial's prediction error from its guiding vector; for the other arguments, see `forward`."""
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
        self, image: Tensor, noise: Tensor, time: Tensor, eeg: Tensor, jitter: Tensor, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the denoising loss of a batch.

        Parameters
        ----------
        image, noise : Tensor, shape (B, 3, H, W)
            Images with values from -1 to 1, and the noise that is added to them.
        time : Tensor of int, shape (B,)
            Step of the forward process (the process that adds noise) for each trial.
        eeg : Tensor, shape (B, D) or (B, C, T)
            Guiding vectors of the trials, or scaled EEG if the task has a `guide`.
        jitter : Tensor, shape (B, D)
            Noise that is added to the guiding vectors.
        keep : Tensor of bool, shape (B,), optional
            False for trials whose EEG condition is dropped; by default all conditions are kept.

        Returns
        -------
        dict
            The loss, under the key ``loss``.
        """
        error_B = self.errors(self.features(eeg) + jitter, image, noise, time, keep)
        return {"loss": (error_B * weigh_steps(self.noising, time, self.min_snr)).mean()}


def train_ddpm(
    config: DMRE2IConfig,
    guide: EEGGuide,
    data: EEGDataset,
    val: EEGDataset,
    tables: tuple[ImageTable, ImageTable],
    run: RunDirectory,
    accelerator: Accelerator,
) -> None:
    """Train the EEG-guided DDPM and write the model.

    Parameters
    ----------
    config : DMRE2IConfig
        Config of the command.
    guide : EEGGuide
        Network that computes the vectors that guide the DDPM.
    data, val : EEGDataset
        Trials of the train split and of the val split.
    tables : tuple of ImageTable
        Images of the train split and of the val split.
    run : RunDirectory
        Run directory of this stage.
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.
    """
    stage, device, scaling = config.ddpm, accelerator.device, guide.scaling(data.spec)
    pixels = torch.from_numpy(tables[0].pixels(size=stage.image_size))
    vectors = compute_for_trials(data, scaling, guide.compute, accelerator)
    groups = group_repeats(val, config.eeg.average_repeats)
    watched = [groups[i] for i in choose_evenly(len(groups), config.val_trials)]
    rows = tables[1].row_of[[group[0] for group in watched]]
    x_val = read_trials(val, watched, scaling, device)
    val_pixels = tables[1].pixels(rows, stage.image_size)
    torch.manual_seed(config.seed)
    unet = build_unet(stage, guide.dim)
    std_D = vectors.std(dim=0)
    if stage.standardise:
        unet.set_condition_statistics(vectors.mean(dim=0), std_D)
    schedule = {"num_train_timesteps": stage.noise_steps, "beta_schedule": "squaredcos_cap_v2"}
    noising = make_noising(schedule, stage, stage.prediction)
    if stage.compute.compile:
        compile_blocks(unet)
    if stage.train_guide:
        guide.choose_trainables(x_val[:2])
    task = EGDDPMTask(unet, noising, stage.loss, guide if stage.train_guide else None, stage.min_snr)
    task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's type hints lack this overload

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        b = len(batch.numbers)
        image = to_model_range(pixels[torch.as_tensor(tables[0].row_of[batch.numbers])])
        tensors = {
            "image": image,
            "noise": random.normal(b, *image.shape[1:]),
            "time": random.integers(stage.noise_steps, b),
            "eeg": scale_eeg(batch.padded(), scaling) if stage.train_guide else vectors[batch.numbers],
            "jitter": stage.condition_noise * std_D * random.normal(b, guide.dim),
        }
        if stage.drop:
            tensors["keep"] = random.uniform(b) >= stage.drop
        tensors["noise"] = add_offset(tensors["noise"], stage.offset_noise, random)
        return tensors

    def lr_scale(name: str) -> float:
        return stage.guide_lr if name.startswith("guide.") else 1.0

    result = fit(
        task,
        config=stage.training,
        seed=config.seed,
        timeout_s=config.timeout_s,
        accelerator=accelerator,
        run=run,
        loader=make_loader(data, stage.training, config.seed, accelerator),
        inputs=inputs,
        evaluate=DenoisingWatcher(
            x_val if stage.train_guide else guide.compute(x_val),
            to_model_range(val_pixels),
            stage.noise_steps,
            get_world(accelerator),
        ),
        lr_scale=lr_scale,
        description="EG-DDPM",
    )
    if stage.train_guide:
        vectors = compute_for_trials(data, scaling, guide.compute, accelerator)
    if accelerator.is_main_process:
        found = {"best_step": result.best_step, "val": result.best, "dataset_id": data.manifest.dataset_id}
        found["dataset_version"] = data.manifest.version
        origin: dict[str, Any] = {"dataset": config.dataset, "labels": data.labels, "eeg": config.eeg.part}
        origin |= {"sampler": stage.sampler, "train_guide": stage.train_guide}
        if isinstance(guide.network, EEGClassifier):
            _, logits_BK = compute_features(guide.network, x_val)
            right = logits_BK.argmax(1).cpu().numpy() == tables[1].labels[rows]
            origin["evrnet_val_accuracy"] = float(right.mean())
        labels = torch.as_tensor(tables[0].labels[tables[0].row_of])
        means = ClassMeans.compute(vectors, labels, len(data.labels))
        card = {
            "license": config.license,
            "data": {
                "dataset": Path(config.dataset).name,
                "dataset_id": data.manifest.dataset_id,
                "train trials": len(data),
                "train images": len(tables[0]),
                "categories": ", ".join(data.labels),
                "samples of a trial": data.n_times,
                "part of a trial (s from the onset; empty: default)": config.eeg.part,
            },
            "settings": {"ddpm": dataclasses.asdict(stage), "seed": config.seed},
            "results": {"best step": result.best_step, **result.best},
        }
        save_model(run.path / "model", guide, unet, noising, means, data.spec, {**found, **origin}, card)
        plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "val/loss", "val/shuffled"])
        shown = guide.compute(x_val[:16])
        _plot_samples(run.path / "plots" / "samples.png", unet, noising.config, shown, val_pixels[:16])
        run.status("done", **found)
        print(
            f"EG-DDPM: val loss {result.best['loss']:.4f}, with other trials' EEG {result.best['shuffled']:.4f} -> "
            f"{run.path / 'model'}; next: dreamscale generate {run.path / 'model'} {config.dataset} -o OUTPUT"
        )


def _plot_samples(path: Path, unet: GuidedUNet, noising_config: Any, e_BD: Tensor, real_BHW3: np.ndarray) -> None:
    """Draw a figure with two rows: images that a person saw, and images generated from the EEG of the same trials."""
    from PIL import Image

    guided = unet.null is not None
    # The plot always uses the fast sampler ddim, even if the config gives another sampler for the model.
    sampling = choose_sampling(
        noising_config, sampler="ddim", steps=None, guidance_scale=None, dropped=guided, has_null=guided
    )
    made = to_pixels(sample_images(unet, noising_config, e_BD, sampling, list(range(len(e_BD)))))
    rows = [np.concatenate(list(images), axis=1) for images in (real_BHW3, made)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def _check_data(config: DMRE2IConfig, splits: tuple[EEGDataset, EEGDataset], tables: tuple[ImageTable, ...]) -> None:
    """Raise an error, before any long computation, if the datasets do not fit the config."""
    for dataset, table in zip(splits, tables, strict=True):
        if len(dataset.labels) < 2:
            raise RequestError(
                f"{dataset.path}: EVRNet needs at least two categories, but the dataset has {len(dataset.labels)}; "
                "give another dataset, or train a model without categories ('dreamscale finetune')"
            )
        if table.labels.min() < 0 or table.labels.max() >= len(dataset.labels):
            raise RequestError(
                f"{dataset.path} ({dataset.split}): a trial has a label that is not in the dataset's list of "
                "labels; make the dataset again"
            )
        most = int(dataset.trials.numbers("n").max())
        if config.ddpm.guide != "encoder" and most > config.evrnet.channels:
            raise RequestError(
                f"evrnet.channels is {config.evrnet.channels}, but a trial of {dataset.path} ({dataset.split}) has "
                f"{most} channels; set evrnet.channels to {most} or more"
            )


def _load_evrnet(path: str, data: EEGDataset) -> EEGClassifier:
    evrnet = load_classifier(path)
    if evrnet.config.n_classes != len(data.labels):
        raise RequestError(
            f"{path}: this classifier has {evrnet.config.n_classes} categories, but the dataset has "
            f"{len(data.labels)}; give a classifier of this dataset as evrnet_from, or leave evrnet_from out"
        )
    if evrnet.n_times not in (None, data.n_times):
        raise RequestError(
            f"{path}: this classifier takes trials of {evrnet.n_times} time points, but eeg.tmin to eeg.tmax has "
            f"{data.n_times}; set eeg.tmin and eeg.tmax as in its training, or leave evrnet_from out"
        )
    return evrnet.requires_grad_(False)


def train(config: DMRE2IConfig) -> int:
    """Train EVRNet or a baseline and, if the config asks for both stages, also the EEG-guided DDPM.

    Parameters
    ----------
    config : DMRE2IConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    evrnet = Path(config.output) / "evrnet"
    runs = [evrnet] if config.stages == "evrnet" else [config.output, evrnet]
    data, val = open_train_val(config.dataset, config.eeg.part, "ddpm", runs)
    tables = ImageTable(data), ImageTable(val)
    _check_data(config, (data, val), tables)
    stage, given = config.ddpm, None
    if stage.encoder is not None:
        given = EEGGuide(load_encoder(stage.encoder, data), "encoder")
    elif config.evrnet_from:
        given = EEGGuide(_load_evrnet(config.evrnet_from, data), stage.guide)
    if given is None:
        check_labels(data, tables[0])
    precision = stage.training.precision
    if given is None and precision != config.evrnet.training.precision:
        raise RequestError(
            "evrnet.training.precision and ddpm.training.precision must be equal, because both stages share one "
            "Accelerator"
        )
    with (
        start_processes(config, precision, timeout_s=config.timeout_s) as accelerator,
        use_tf32(stage.compute, accelerator.device),
    ):
        # Open the run directory of the second stage only after the run directory of the first stage is closed, because
        # an experiment tracker can log only one run at a time.
        guide = given or EEGGuide(train_evrnet(config, data, val, tables, accelerator), stage.guide)
        if config.stages == "evrnet":
            return EXIT_DONE
        with use_run(config, accelerator, free=config.free_keys()) as run:
            if not report_finished(run):
                train_ddpm(config, guide.to(accelerator.device), data, val, tables, run, accelerator)
    return EXIT_DONE


main = command(DMRE2IConfig, train, prog="dreamscale ddpm")

if __name__ == "__main__":
    sys.exit(main())
