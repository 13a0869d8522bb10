"""Align EEG with CLIP or another frozen model: train an encoder so that a trial is close to its target.

The target of a trial is the embedding of the image that the person saw, of a text of this image, or both. A small head
maps the encoder's tokens to the space of the targets.

The command is ``dreamscale align CONFIG`` or ``accelerate launch -m finetune.align CONFIG``.

Tensor shapes: b trials of this process, G trials of all processes, C channels, T time points, N tokens of width D, K
targets of a trial (image, text, or both), P width of the targets, M different images.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, show
from data_sharding.common.files import write_json
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.eeg import (
    EEGConfig,
    ImageAugmentConfig,
    group_repeats,
    load_encoder,
    prepare_eeg,
    read_encoder_input,
)
from finetune.electrodes import Electrodes, EncoderInput, Places
from finetune.images import ImageTable, open_train_val
from finetune.people import PersonLayers, PersonLayersConfig, list_people
from finetune.retrieval.maps import AlignmentRun
from finetune.targets.config import TargetConfig
from finetune.targets.load import load_targets
from finetune.targets.losses import infonce, soft_contrast
from finetune.training.accelerate import (
    get_world,
    make_loader,
    quiet_libraries,
    report_finished,
    start_processes,
    use_run,
)
from finetune.training.batch_norm import gather_rows
from finetune.training.compute import EncoderComputeConfig, apply_to_encoder, use_tf32
from finetune.training.config import TrainingConfig, free_keys
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.encoder.encoder import EEGEncoder
from pretrain.runs.config import check_at_least
from pretrain.runs.distributed import World
from pretrain.runs.tracking import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Align EEG with CLIP or another frozen model: train the encoder and a small head."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "target.model"}

    dataset: str
    """Path of the EEG-image dataset, which must have train and val splits."""
    encoder: str = ""
    """Encoder package: a directory that `dreamscale export` wrote, or a hub id."""
    output: str
    """Run directory, with the results in the subdirectories `encoder/` and `align/`."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What the embedding of a trial learns to match; target.model must be set."""
    pretrained: bool = True
    """True: start from the pretrained weights of the encoder. False: start from random weights, to measure the effect
    of pretraining."""
    people: Literal["none", "linear"] = "none"
    """linear: give each person of the train split an input layer, a linear map of the channels, which is trained
    together with the encoder. Other people get no layer, until the key `calibrate` adds one. none: no such layers."""
    calibrate: str = ""
    """Output of an earlier `dreamscale align`. If it is set, the encoder, the head and the target of that run are used
    without a change, and only the input layers of people who have none in that run are trained, from their trials in
    the train split. A few trials of a person are enough to begin with. The result is an alignment run with these people
    added. The keys encoder, target, pretrained and people are not used."""
    loss: Literal["cosine", "infonce", "both", "soft"] = "both"
    """Loss. cosine: 1 - cosine similarity, as in DreamDiffusion; infonce: contrastive loss within the batch; both: the
    sum of these two losses; soft: contrastive loss in which similar targets share the probability."""
    temperature: float = 0.1
    """Temperature of the contrastive loss, by which the cosine similarities are divided."""
    soft_temperature: float = 0.05
    """Only for the loss soft: temperature by which the cosine similarities of the targets are divided. The smaller it
    is, the less probability is shared."""
    encoder_lr: float = 1.0
    """The encoder's learning rate is this factor times training.lr. The head's learning rate is training.lr."""
    watch: Literal["cosine", "top1", "top5"] = "cosine"
    """Metric on the val split that decides which weights of the run are the best and are kept."""
    eeg: EEGConfig = field(default_factory=EEGConfig)
    """Which part of each trial the encoder reads, and how repeated presentations are averaged in the evaluation."""
    augment: ImageAugmentConfig = field(default_factory=ImageAugmentConfig)
    """Augmentation of the EEG in training."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Settings of the training: steps, batch size, learning rate and so on."""
    compute: EncoderComputeConfig = field(default_factory=EncoderComputeConfig)
    """How the encoder is computed: settings for speed and memory."""
    num_processes: int = 1
    """Total number of processes on all machines."""
    timeout_s: float = 1800.0
    """If the training makes no progress for this many seconds, the run fails with a message that names the hanging
    process. 0: the run may wait without limit."""
    restarts: int = 0
    """How many times 'dreamscale align' restarts its processes after one of them was killed. Each restart resumes from
    the newest checkpoint."""
    seed: int = 0
    """Seed for sample order, noise and initial weights."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracker to which metrics are sent, in addition to the file metrics.jsonl."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "timeout_s", "restarts")
        if not self.temperature > 0 or not self.soft_temperature > 0 or self.encoder_lr < 0:
            raise ValueError(
                "'temperature' and 'soft_temperature' must be above 0 and 'encoder_lr' at least 0, got "
                f"{self.temperature}, {self.soft_temperature} and {self.encoder_lr}"
            )
        if not self.encoder and not self.calibrate:
            raise ValueError("'encoder' is missing: give an encoder package, or an alignment run as 'calibrate'")
        if not self.target.model and not self.calibrate:
            raise ValueError("'target.model' is missing: give a frozen model, such as openai/clip-vit-large-patch14")


@dataclass(frozen=True, kw_only=True)
class AlignmentLoss:
    """The loss of the alignment, and its settings."""

    kind: Literal["cosine", "infonce", "both", "soft"] = "both"
    """Kind of loss (see `AlignConfig.loss`)."""
    temperature: float = 0.1
    """Temperature of the contrastive losses."""
    soft_temperature: float = 0.05
    """Temperature of the similarities of targets, for the kind soft."""
    weights: tuple[float, ...] = (1.0,)
    """Weight of each of the K targets."""


class Aligner(nn.Module):
    """Encoder and head with the alignment loss; both networks are trained.

    Parameters
    ----------
    encoder : EEGEncoder
        EEG encoder, which computes tokens.
    head : ClipHead
        Network that maps tokens to the space of the targets.
    loss : AlignmentLoss
        The loss.
    people : PersonLayers, optional
        Input layers of people.
    """

    def __init__(
        self, encoder: EEGEncoder, head: ClipHead, loss: AlignmentLoss, people: PersonLayers | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.loss, self.people = encoder, head, loss, people

    def embed(self, x_bCT: Tensor, places: Places, person_b: Tensor | None = None) -> Tensor:
        """Compute embeddings [b, P] of unit length from scaled EEG trials [b, 128, T]."""
        if self.people is not None and person_b is not None:
            x_bCT = self.people(x_bCT, person_b)
        return F.normalize(self.head(self.encoder(x_bCT, **places)).float(), dim=-1)

    def forward(
        self, x: Tensor, target: Tensor, group: Tensor, person: Tensor | None = None, **places: Tensor
    ) -> dict[str, Tensor]:
        """Compute the alignment loss of a batch.

        Parameters
        ----------
        x : Tensor, [b, 128, T]
            EEG, scaled for the encoder.
        target : Tensor, [b, K, P]
            Targets of each trial, of unit length.
        group : Tensor of int, [b, K]
            Number of each target. Targets with the same number are equal.
        person : Tensor of int, [b], optional
            Number of the input layer of each trial's person.
        **places : Tensor
            Electrode positions of the trials (see `finetune.electrodes`).

        Returns
        -------
        dict
            ``loss``, ``cosine`` (1 - cosine similarity) and ``infonce`` or ``soft`` (contrastive loss), which are
            weighted sums over the targets. ``cosine`` is the mean over the trials of this process; the contrastive
            loss is the mean over the trials of all processes.
        """
        settings, embeds_bP = self.loss, self.embed(x, places, person)
        weight_K = embeds_bP.new_tensor(settings.weights)
        out = {"cosine": ((1 - (embeds_bP[:, None] * target).sum(-1)) * weight_K).sum(-1).mean()}
        loss = out["cosine"] if settings.kind in ("cosine", "both") else torch.zeros_like(out["cosine"])
        if settings.kind != "cosine":
            # Each of R processes computes the same contrastive loss of the whole batch. The backward pass of
            # `gather_rows` adds up their equal gradients, so the sum is R times too large. Accelerate then averages
            # over the processes, which divides the sum by R.
            embeds_GP, target_GKP, group_GK = gather_rows(embeds_bP), gather_rows(target), gather_rows(group)
            contrast = torch.zeros_like(loss)
            for k, weight in enumerate(settings.weights):
                contrast = contrast + weight * self._contrast(embeds_GP, target_GKP[:, k], group_GK[:, k])
            out["soft" if settings.kind == "soft" else "infonce"] = contrast
            loss = loss + contrast
        return {"loss": loss, **{name: value.detach() for name, value in out.items()}}

    def _contrast(self, embeds_GP: Tensor, target_GP: Tensor, group_G: Tensor) -> Tensor:
        settings = self.loss
        if settings.kind == "soft":
            return soft_contrast(embeds_GP, target_GP, settings.temperature, settings.soft_temperature)
        return infonce(embeds_GP, target_GP, group_G, settings.temperature)


@torch.no_grad()
def measure_retrieval(
    embed: Callable[[EncoderInput, Sequence[Sequence[int]]], Tensor],
    encoder: EEGEncoder,
    dataset: EEGDataset,
    table: ImageTable,
    target_MP: Tensor,
    device: Any,
    pulse: Callable[[], None] = lambda: None,
    batch_size: int = 64,
    average_repeats: int = 1,
    world: World | None = None,
) -> dict[str, float]:
    """Measure how well the image of a trial can be found among all images of a split, from the trial's EEG.

    Parameters
    ----------
    embed : callable
        Function that takes scaled EEG of trials and the presentations of each trial, and returns embeddings of unit
        length, [b, P].
    encoder : EEGEncoder
        Encoder that defines the scaling of the EEG.
    dataset : EEGDataset
        Trials of the split.
    table : ImageTable
        Images of the split.
    target_MP : Tensor, [M, P]
        Targets of the images.
    device : torch.device
        Device of the computation.
    pulse : callable
        Function that is called before each batch. If the run was asked to stop (e.g. by SIGTERM), this function raises
        an error, which ends the evaluation.
    batch_size : int
        Number of trials in one forward pass.
    average_repeats : int
        Largest number of presentations of the same image to the same subject that are averaged to one trial; 0 averages
        all presentations.
    world : World, optional
        Processes that share the work; all processes must call this function. By default, this process does all the
        work.

    Returns
    -------
    dict
        ``cosine``: mean of 1 - cosine similarity of a trial and its own image. ``top1``: fraction of trials whose own
        image is more similar to the trial than all other images, or as similar as the best of them. ``top5``: fraction
        of trials whose own image is among the five most similar images. ``label``: fraction of trials whose most
        similar image has the same label as the own image. ``images``: number of images, M. ``trials``: number of trials
        after averaging. ``repeats``: mean number of presentations that are averaged to a trial.
    """
    world, groups = world or World(), group_repeats(dataset, average_repeats)
    electrodes = Electrodes(encoder, dataset)
    embeds_BP = torch.zeros(len(groups), target_MP.shape[1], device=device)
    for start in range(0, len(groups), batch_size * world.size):
        # Every process must call `pulse` equally often, also if it has one batch less to compute.
        pulse()
        own = slice(start + world.rank * batch_size, start + (world.rank + 1) * batch_size)
        if groups[own]:
            trials = read_encoder_input(dataset, groups[own], encoder, electrodes, device)
            embeds_BP[own] = embed(trials, groups[own]).float()
    if world.size > 1:
        # Each row is computed by one process, and is zero on the other processes.
        dist.all_reduce(embeds_BP)
    embeds_BP = embeds_BP.cpu()
    row_B = torch.as_tensor(table.row_of[[group[0] for group in groups]])
    similarity_BM = embeds_BP @ target_MP.T
    better_B = (similarity_BM > similarity_BM.gather(1, row_B[:, None])).sum(1)
    labels_M = torch.as_tensor(table.labels)
    return {
        "cosine": float(1 - (embeds_BP * target_MP[row_B]).sum(-1).mean()),
        "top1": float((better_B < 1).float().mean()),
        "top5": float((better_B < 5).float().mean()),
        "label": float((labels_M[similarity_BM.argmax(1)] == labels_M[row_B]).float().mean()),
        "images": len(table),
        "trials": len(groups),
        "repeats": len(dataset) / len(groups),
    }


def align(config: AlignConfig) -> int:
    """Align an EEG encoder with a frozen model.

    Parameters
    ----------
    config : AlignConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    data, val = open_train_val(config.dataset, config.eeg.part, "align", [config.output])
    torch.manual_seed(config.seed)
    before = AlignmentRun.load(config.calibrate) if config.calibrate else None
    if before is None:
        encoder = load_encoder(config.encoder, data, pretrained=config.pretrained, several_montages=True)
    else:
        encoder = _check_calibration(before, data, config)
    target = config.target if before is None else TargetConfig(model=before.target, layer=before.layer)
    electrodes, people = Electrodes(encoder, data), _make_people(config, before, data)
    person_n, val_person_n = (None if people is None else people.find(list_people(split)) for split in (data, val))
    table, val_table = ImageTable(data), ImageTable(val)
    free = ("compute", *free_keys("training", independent_samples=config.loss == "cosine"))
    with (
        start_processes(config, config.training.precision, timeout_s=config.timeout_s) as accelerator,
        use_run(config, accelerator, free=free) as run,
        use_tf32(config.compute, accelerator.device),
    ):
        if report_finished(run, "encoder/config.json"):
            return EXIT_DONE
        targets, val_targets = (load_targets(target, t, get_world(accelerator)) for t in (table, val_table))
        head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=targets.width))
        if before is not None:
            head = before.head
            encoder.requires_grad_(False)
            head.requires_grad_(False)
        loss = AlignmentLoss(
            kind=config.loss,
            temperature=config.temperature,
            soft_temperature=config.soft_temperature,
            weights=tuple(targets.weights),
        )
        apply_to_encoder(encoder, config.compute)
        aligner = Aligner(encoder, head, loss, people)

        def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
            target, group = targets.choose(table.row_of[batch.numbers])
            places = electrodes.of(batch.numbers)
            x = prepare_eeg(batch, data, table, config.augment, random, encoder, places)
            tensors = {"x": x, "target": target, "group": group, **places}
            return tensors if person_n is None else {**tensors, "person": person_n[batch.numbers]}

        def evaluate(module: Aligner, pulse: Callable[[], None]) -> dict[str, float]:
            def embed(trials: EncoderInput, groups: Sequence[Sequence[int]]) -> Tensor:
                person = None
                if val_person_n is not None:
                    person = val_person_n[[group[0] for group in groups]].to(trials.device)
                return module.embed(trials.x, trials.places, person)

            return measure_retrieval(
                embed,
                module.encoder,
                val,
                val_table,
                val_targets.first,
                accelerator.device,
                pulse,
                average_repeats=config.eeg.average_repeats,
                world=get_world(accelerator),
            )

        result = fit(
            aligner,
            config=config.training,
            seed=config.seed,
            timeout_s=config.timeout_s,
            accelerator=accelerator,
            run=run,
            loader=make_loader(data, config.training, config.seed, accelerator),
            inputs=inputs,
            evaluate=evaluate,
            watch=config.watch,
            mode="min" if config.watch == "cosine" else "max",
            lr_scale=lambda name: config.encoder_lr if name.startswith("encoder.") else 1.0,
            description="alignment",
        )
        if accelerator.is_main_process:
            found = {"best_step": result.best_step, "val": result.best, "dataset": config.dataset}
            found["target"] = dataclasses.asdict(target)
            found |= {"dataset_id": data.manifest.dataset_id, "dataset_version": data.manifest.version}
            found["eeg"] = config.eeg.part
            if people is not None:
                found["people"] = list(people.config.people)
                people.save_pretrained(run.path / "people")
            encoder.save_pretrained(run.path / "encoder", extra={"aligned": found})
            head.save_pretrained(run.path / "align")
            write_json(run.path / "align" / "result.json", found)
            plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "train/cosine", "val/cosine"])
            run.status("done", **found)
            print(
                f"alignment: on the val split, mean cosine similarity {1 - result.best['cosine']:.3f}; the most "
                f"similar image has the right label in {result.best['label']:.1%} of the trials"
                f"{_say_repeats(result.best)} -> {run.path / 'encoder'}; next: {_say_next(config, people)}"
            )
    return EXIT_DONE


def _check_calibration(before: AlignmentRun, data: EEGDataset, config: AlignConfig) -> EEGEncoder:
    """Check that an alignment run can be calibrated with a dataset, and return the encoder of the run."""
    data.require_preprocess(before.encoder.spec, f"encoder of {config.calibrate}")
    if before.part != config.eeg.part:
        raise RequestError(
            f"{config.calibrate} was aligned with eeg.tmin {before.part['tmin']} and eeg.tmax {before.part['tmax']}; "
            "set the same values"
        )
    return before.encoder


def _make_people(config: AlignConfig, before: AlignmentRun | None, data: EEGDataset) -> PersonLayers | None:
    """Return the input layers of people; None if the encoder reads all people without such layers."""
    names = sorted(set(list_people(data)))
    if before is None:
        return PersonLayers(PersonLayersConfig(people=tuple(names))) if config.people == "linear" else None
    known = before.people or PersonLayers(PersonLayersConfig())
    new = [name for name in names if name not in known.config.people]
    if not new:
        raise RequestError(
            f"{config.calibrate}: all people of the train split of {config.dataset} have an input layer already, so "
            "nobody can be added; give a dataset with new people"
        )
    shown = ", ".join(map(show, new[:5])) + (" and others" if len(new) > 5 else "")
    print(f"calibration of {config.calibrate} for {shown}: encoder, head and target are those of this run")
    return known.add(new)


def _say_next(config: AlignConfig, people: PersonLayers | None) -> str:
    """Return the command that the user should run next."""
    if people is not None:
        return f"dreamscale retrieve {config.output} {config.dataset} -o OUT"
    return (
        f"dreamscale finetune configs/finetune/stable_diffusion.yaml --dataset {config.dataset} "
        f"--encoder {Path(config.output) / 'encoder'}"
    )


def _say_repeats(found: dict[str, float]) -> str:
    """Return a note for the user that each trial is a mean over presentations; empty if nothing was averaged."""
    if found["repeats"] <= 1:
        return ""
    return f" (each trial is the mean of {found['repeats']:.3g} presentations, eeg.average_repeats)"


main = command(AlignConfig, align, prog="dreamscale align")

if __name__ == "__main__":
    sys.exit(main())
