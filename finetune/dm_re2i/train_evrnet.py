"""First stage of DM-RE2I: train EVRNet to recognise the category of the seen image from the EEG of a trial.

Tensor shapes: B trials, b trials of this process, C channels, T time points, D feature width, K classes, P principal
components of an image, M images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.dm_re2i.classification.measure import evaluate_classifier, save_results, score
from finetune.dm_re2i.classifier import EEGClassifier, scale_to_unit_variance, whitening_matrix
from finetune.dm_re2i.config import DMRE2IConfig, EVRNetStage
from finetune.dm_re2i.model import compute_features
from finetune.dm_re2i.networks import NAMES, build_classifier, load_classifier
from finetune.eeg import augment_eeg, choose_evenly, group_repeats, read_trials, scale_eeg
from finetune.images import ImageTable, find_components
from finetune.training.accelerate import get_world, make_loader, use_run
from finetune.training.batch_norm import synchronise_batch_norms
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pretrain.runs.directory import RunDirectory

IMAGE_SIZE = 32
"""Width and height in pixels of the images whose principal components are computed."""


@torch.no_grad()
def calibrate_batch_norm(net: nn.Module, x_BCT: Tensor, batch: int = 64) -> None:
    """Compute the running statistics of the batch norms again, from given trials.

    The new statistics depend only on the weights and on the given trials. The statistics from training cannot be used,
    for two reasons. They come from augmented trials. They also belong to the weights of the last step, but the
    evaluation may use the moving average of the weights.

    Parameters
    ----------
    net : Module
        Network with the batch norms. The function leaves the network in evaluation mode.
    x_BCT : Tensor, shape (B, C, T)
        Scaled trials without augmentation.
    batch : int
        Number of trials in one forward pass.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        net.eval()
        return
    momenta = [norm.momentum for norm in norms]
    dropouts = [module for module in net.modules() if isinstance(module, nn.Dropout)]
    net.train()
    for dropout in dropouts:
        dropout.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # With momentum None, PyTorch computes the plain mean over all batches.
    # Every batch has the same weight in the mean, so all batches must be equally large. Trials that would fill only a
    # part of a batch are left out.
    for part in x_BCT[: max(batch, len(x_BCT) // batch * batch)].split(batch):
        net(part[:, None])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def average_within_category(x_bCT: Tensor, labels_b: Tensor, most: int, random: StepRandom) -> Tensor:
    """Replace each trial by a mean over trials of the same category.

    Parameters
    ----------
    x_bCT : Tensor, shape (b, C, T)
        Scaled trials.
    labels_b : Tensor of int, shape (b,)
        Categories of the trials.
    most : int
        Largest number of trials in a mean: the trial itself, and up to `most` - 1 trials that are drawn at random, with
        replacement, from the trials of its category in the batch.
    random : StepRandom
        Random numbers of this training step.

    Returns
    -------
    Tensor, shape (b, C, T)
        Averaged trials. Each mean is scaled to the standard deviation of the trial that it replaces.
    """
    b = len(x_bCT)
    # Choose `most` - 1 partners for each trial. To choose a partner, give every trial of the batch a random score, and
    # take the trial of the same category with the highest score.
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
    """A classifier, such as EVRNet, together with its loss.

    Parameters
    ----------
    net : EEGClassifier
        The classification network.
    label_smoothing : float
        Amount of label smoothing in the cross-entropy.
    image_components : int
        Number P of principal components of the image that a linear layer predicts from the EEG feature; with 0, there
        is no such layer.
    image_weight : float
        Weight with which the error of the predicted principal components is added to the loss.
    """

    def __init__(
        self, net: EEGClassifier, label_smoothing: float, image_components: int = 0, image_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.net, self.label_smoothing, self.image_weight = net, label_smoothing, image_weight
        self.image_layer = nn.Linear(net.dim, image_components) if image_components else None

    def forward(self, x: Tensor, target: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the classification loss of a batch, and the error of the image components if they are given.

        Parameters
        ----------
        x : Tensor, shape (B, C, T)
            Scaled EEG, after the noise normalisation.
        target : Tensor, shape (B, K)
            Target probability of each category.
        image : Tensor, shape (B, P), optional
            Principal components of the image of each trial.

        Returns
        -------
        dict
            ``loss`` and ``accuracy``; with image components also ``image_error``.
        """
        # Limit the norms of the weights before each step and before each evaluation, because the training loop has no
        # hook after the optimiser's step.
        self.net.limit_norms()
        e_BD, logits = self.net(x[:, None], normalised=True)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        found = {"accuracy": (logits.argmax(1) == target.argmax(1)).float().mean()}
        if self.image_layer is not None and image is not None:
            found["image_error"] = compute_image_error(self.image_layer(e_BD).float(), image)
            loss = loss + self.image_weight * found["image_error"]
        return {"loss": loss, **found}


def compute_image_error(predicted_BP: Tensor, image_BP: Tensor) -> Tensor:
    """Return the squared error of predicted image components, summed over components and averaged over images.

    For components from `scale_components`, the error over all train images is 1 if zeros (the mean image) are
    predicted, and 0 if the right components are predicted.
    """
    return (predicted_BP - image_BP).square().sum(dim=1).mean()


def scale_components(train_MP: np.ndarray, val_MP: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scale principal components of images so that their variances over the train images add up to 1."""
    size = max(float(np.sqrt(np.square(train_MP).sum(axis=1).mean())), 1e-6)
    return torch.from_numpy(train_MP / size), torch.from_numpy(val_MP / size)


def check_labels(data: EEGDataset, table: ImageTable) -> None:
    """Refuse a dataset if a category of val or test does not occur in train, because no network can learn it.

    Parameters
    ----------
    data : EEGDataset
        Trials of the train split.
    table : ImageTable
        Images of the train split.

    Raises
    ------
    RequestError
        If a category of val or test does not occur in train; the message names the categories.
    """
    known = set(table.labels.tolist())
    for split in ("val", "test"):
        if not data.manifest.samples(split):
            continue
        other = EEGDataset(data.path, split, version=data.manifest.dataset_id)
        unknown = set(other.trials.numbers("label").tolist()) - known
        if unknown:
            names = [data.labels[label] if 0 <= label < len(data.labels) else str(label) for label in sorted(unknown)]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise RequestError(
                f"{data.path}: the categories {shown} of {split} do not occur in train, so a classifier cannot learn "
                f"them; make the dataset with 'split.by: image', so that each split has images of every category, or "
                f"train a model without categories ('dreamscale finetune')"
            )


def choose_targets(table: ImageTable, stage: EVRNetStage, seed: int) -> np.ndarray:
    """Return, for each trial, the image whose category is the trial's target in training.

    Parameters
    ----------
    table : ImageTable
        Images of the train split.
    stage : EVRNetStage
        Config of the stage.
    seed : int
        Seed for shuffling the images, which is done only if `stage.permute_labels` is true.

    Returns
    -------
    array of int, shape (trials,)
        For each trial, the row of this image in the `ImageTable`. If the images are shuffled, all trials of an image
        still have the same target, and each category has as many images as before.
    """
    order_M = np.arange(len(table))
    if stage.permute_labels:
        order_M = np.random.default_rng([seed, 1]).permutation(order_M)
    return order_M[table.row_of]


def train_evrnet(
    config: DMRE2IConfig,
    data: EEGDataset,
    val: EEGDataset,
    tables: tuple[ImageTable, ImageTable],
    accelerator: Accelerator,
) -> EEGClassifier:
    """Train EVRNet or a baseline, or load the trained network if its run is already finished.

    Parameters
    ----------
    config : DMRE2IConfig
        Config of the command.
    data, val : EEGDataset
        Trials of the train split and of the val split.
    tables : tuple of ImageTable
        Images of the train split and of the val split.
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.

    Returns
    -------
    EEGClassifier
        The network in evaluation mode, with the weights that were best on the val split. The weights are frozen.

    Raises
    ------
    RequestError
        If the run is finished, but its folder `package` was deleted.
    """
    output = Path(config.output) / "evrnet"
    with use_run(config, accelerator, free=config.free_keys(), output=output) as run:
        if run.finished and (run.path / "package" / "config.json").is_file():
            if accelerator.is_main_process and config.stages == "evrnet":
                print(f"{run.path}: this run is complete; nothing to do")
            return load_classifier(run.path / "package").requires_grad_(False).to(accelerator.device)
        if run.finished:
            raise RequestError(
                f"{run.path}: this run is complete, but its 'package' folder is missing; delete {run.path} to train "
                "again"
            )
        network = _train(config, data, val, tables, run, accelerator)
    accelerator.wait_for_everyone()
    return network


def _train(
    config: DMRE2IConfig,
    data: EEGDataset,
    val: EEGDataset,
    tables: tuple[ImageTable, ImageTable],
    run: RunDirectory,
    accelerator: Accelerator,
) -> EEGClassifier:
    """Train EVRNet or a baseline in an open run directory; the other arguments are those of `train_evrnet`."""
    stage, device, n_classes = config.evrnet, accelerator.device, len(data.labels)
    torch.manual_seed(config.seed)
    parts = stage.image_components if stage.image_weight else 0
    train_MP = val_MP = None
    if parts:
        # Different CPUs round differently, which can change the principal components. Therefore, all processes use the
        # principal components that the first process computed.
        world = get_world(accelerator)
        own = None
        if world.first:
            images, held = (table.pixels(size=IMAGE_SIZE) for table in tables)
            own = scale_components(*find_components(images, held, parts))
        train_MP, val_MP = world.broadcast(own)
    parts = train_MP.shape[1] if train_MP is not None else 0
    task = EVRNetTask(build_classifier(stage, data), stage.label_smoothing, parts, stage.image_weight)
    channels, scaling = task.net.config.n_channels, task.net.scaling(data.spec)
    synchronise_batch_norms(task)
    task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's type hints lack this overload
    targets = choose_targets(tables[0], stage, config.seed)
    labels = torch.as_tensor(tables[0].labels[targets])
    calibration = [[number] for number in choose_evenly(len(data), stage.calibration_trials)]
    clean = read_trials(data, calibration, scaling, device)[:, :channels]
    whitening_CC = task.net.whitening_CC
    if isinstance(whitening_CC, Tensor):
        whitening_CC.copy_(whitening_matrix(clean.cpu(), stage.whiten))
    # Whiten before the augmentation. Whitening after the augmentation would spread the added noise, and the zeros of
    # silenced channels, over all channels.
    normaliser = whitening_CC.clone() if isinstance(whitening_CC, Tensor) else None
    groups = group_repeats(val, config.eeg.average_repeats)
    watched = [groups[i] for i in choose_evenly(len(groups), config.val_trials)]
    x_val = read_trials(val, watched, scaling, device)
    val_rows = tables[1].row_of[[group[0] for group in watched]]
    y_val = torch.as_tensor(tables[1].labels[val_rows], device=device)
    loader, steps = make_loader(data, stage.training, config.seed, accelerator), stage.training.steps

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        y = labels[batch.numbers]
        x = scale_eeg(batch.padded(), scaling)[:, :channels]
        if normaliser is not None:
            x = scale_to_unit_variance(normaliser @ x)
        target = F.one_hot(y, n_classes).float()
        image = train_MP[targets[batch.numbers]] if train_MP is not None else None
        done = (loader.step - 1) / steps
        most = round(stage.average + (stage.average_end - stage.average) * done)
        if most > 1:
            x = average_within_category(x, y, most, random)
        if stage.mixup:
            share = stage.mixup * random.uniform(len(x), 1)
            other = random.uniform(len(x)).argsort()
            x = torch.lerp(x, x[other], share[..., None])
            target = torch.lerp(target, target[other], share)
            image = torch.lerp(image, image[other], share) if image is not None else None
        x = augment_eeg(x, [int(meta["n"]) for meta in batch.metas], stage.augment, random)
        return {"x": x, "target": target, **({"image": image} if image is not None else {})}

    def evaluate(module: EVRNetTask, pulse: Callable[[], None]) -> dict[str, float]:
        net = module.net
        pulse()
        net.limit_norms()
        calibrate_batch_norm(net, clean)
        pulse()
        e_BD, logits = compute_features(net, x_val, pulse=pulse)
        found = score(logits, y_val)
        if val_MP is not None and module.image_layer is not None:
            predicted_BP = module.image_layer(e_BD.to(device))
            found["image_error"] = float(compute_image_error(predicted_BP, val_MP[val_rows].to(device)))
        # With few val trials, several evaluations often have the same accuracy. In that case, the evaluation with the
        # lowest loss is the best of these evaluations.
        return {**found, "score": found["accuracy"] - 1e-4 * min(found["loss"], 100.0)}

    result = fit(
        task,
        config=stage.training,
        seed=config.seed,
        timeout_s=config.timeout_s,
        accelerator=accelerator,
        run=run,
        loader=loader,
        inputs=inputs,
        evaluate=evaluate,
        watch="score" if stage.watch == "accuracy" else "loss",
        mode="max" if stage.watch == "accuracy" else "min",
        lr_scale=lambda name: stage.encoder_lr if name.startswith("net.encoder.") else 1.0,
        # The forward pass limits the norms of weights in place, which would not change the divided weights.
        divide=False,
        description=NAMES[stage.network],
    )
    calibrate_batch_norm(task.net, clean)
    if accelerator.is_main_process:
        task.net.save_pretrained(run.path / "package")
        plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "val/loss", "train/accuracy", "val/accuracy"])
        found = evaluate_classifier(task.net, val, tables[1], device, config.eeg.average_repeats).summary
        # The weights that were best on the val trials were chosen, so results on the val trials are a little too good.
        save_results({"chose_weights": True, "best_step": result.best_step, **found}, run.path)
        run.status("done", best_step=result.best_step, val=result.best)
        low, high = found["interval_images"]
        print(
            f"{NAMES[stage.network]}: val accuracy {found['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, "
            f"chance {1 / n_classes:.3f}) at step {result.best_step} -> {run.path / 'package'}"
        )
    return task.net.requires_grad_(False)
