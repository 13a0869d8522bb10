"""EEG -> CLIP: trains an encoder and a small head so that a trial lands where CLIP puts the image that was seen.

Started as ``dreamscale align CONFIG`` or ``accelerate launch -m finetune.align CONFIG``.

Shapes: b trials of this rank, G of all ranks, C channels, T samples, N tokens of width D, P width of CLIP's projection,
M different images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, run_main
from data_sharding.common.files import write_json
from data_sharding.dataset.batch import Batch, sequential
from data_sharding.dataset.dataset import EEGDataset
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.clip_images import clip_image_embeddings
from finetune.eeg import ImageAugmentConfig, eeg_for_model, load_encoder, prepare_eeg
from finetune.images import ImageTable, open_paired
from finetune.training.accelerate import make_accelerator, open_run, quiet_libraries, rank_loader
from finetune.training.config import TrainingConfig
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.encoder.encoder import EEGEncoder
from pretrain.runs.tracking import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """EEG to CLIP alignment: encoder and head train, CLIP is frozen."""

    dataset: str
    """EEG-image dataset with train and val splits."""
    encoder: str
    """Encoder package of `dreamscale export`, or its hub id."""
    clip: str
    """CLIP model: a directory, or a hub id such as openai/clip-vit-large-patch14."""
    output: str
    """Run directory; `encoder/` and `align/` are written into it."""
    pretrained: bool = True
    """False: the encoder's shape with fresh weights, the ablation without pretraining."""
    loss: Literal["cosine", "infonce", "both"] = "both"
    """cosine: DreamDiffusion's 1 - cosine; infonce: contrast with the other images of the batch; both: their sum."""
    temperature: float = 0.1
    """Of the contrast."""
    encoder_lr: float = 1.0
    """Learning rate of the encoder over that of the head."""
    watch: Literal["cosine", "top1", "top5"] = "cosine"
    """What decides on the val split which weights are kept."""
    augment: ImageAugmentConfig = field(default_factory=ImageAugmentConfig)
    """Changes of the EEG in training."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, batch, rates."""
    num_processes: int = 1
    """Processes over all machines."""
    seed: int = 0
    """Of order, noise and fresh weights."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.encoder_lr < 0:
            raise ValueError("need temperature > 0 and encoder_lr >= 0")


def gathered(x_bP: Tensor) -> Tensor:
    """Rows of all ranks; only our own carry gradients.

    Parameters
    ----------
    x_bP : Tensor, [b, ...]
        Of this rank; the same number on every rank.

    Returns
    -------
    Tensor, [G, ...]
        In the order of the ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x_bP
    parts = [torch.empty_like(x_bP) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x_bP.detach().contiguous())
    parts[torch.distributed.get_rank()] = x_bP
    return torch.cat(parts)


def infonce(embeds_GP: Tensor, target_GP: Tensor, rows_G: Tensor, temperature: float) -> Tensor:
    """Contrast each trial with the other images of the batch, and each image with the other trials.

    Parameters
    ----------
    embeds_GP, target_GP : Tensor, [G, P]
        Of trials and of their images, unit length.
    rows_G : Tensor of int, [G]
        Which image each trial saw: two trials of one image are not each other's negatives.
    temperature : float
        Divisor of the cosines.

    Returns
    -------
    Tensor, scalar
        Mean cross-entropy of the two directions.
    """
    same_GG = rows_G[:, None] == rows_G[None]
    target_GG = same_GG.float() / same_GG.sum(1, keepdim=True)
    logits_GG = embeds_GP @ target_GP.T / temperature
    return (F.cross_entropy(logits_GG, target_GG) + F.cross_entropy(logits_GG.T, target_GG)) / 2


class Aligner(nn.Module):
    """Encoder and head with the alignment loss; all of it trains.

    Parameters
    ----------
    encoder : EEGEncoder
        The encoder.
    head : ClipHead
        The head.
    loss : str
        cosine, infonce or both.
    temperature : float
        Of the contrast.
    """

    def __init__(self, encoder: EEGEncoder, head: ClipHead, loss: str, temperature: float) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.loss, self.temperature = loss, temperature

    def embed(self, x_bCT: Tensor) -> Tensor:
        """Embed trials: [b, 128, T] in model units to [b, P] of unit length."""
        return F.normalize(self.head(self.encoder(x_bCT)).float(), dim=-1)

    def forward(self, x: Tensor, target: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Parameters
        ----------
        x : Tensor, [b, 128, T]
            EEG in model units.
        target : Tensor, [b, P]
            CLIP embeddings of the images, unit length.
        row : Tensor of int, [b]
            Which image.

        Returns
        -------
        dict
            loss, cosine (1 - cosine) and infonce; each the same mean over all ranks' trials.
        """
        embeds_bP = self.embed(x)
        out = {"cosine": 1 - (embeds_bP * target).sum(-1).mean()}
        loss = out["cosine"] if self.loss != "infonce" else torch.zeros_like(out["cosine"])
        if self.loss != "cosine":
            contrast = infonce(gathered(embeds_bP), gathered(target), gathered(row), self.temperature)
            out["infonce"] = contrast
            # Gradients are averaged over ranks, but each rank holds only its own rows' part of this one: undo the mean.
            world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            loss = loss + contrast * world - (contrast * (world - 1)).detach()
        return {"loss": loss, **{name: value.detach() for name, value in out.items()}}


@torch.no_grad()
def retrieval(
    embed: Any, dataset: EEGDataset, table: ImageTable, target_MP: Tensor, device: Any, batch_size: int = 64
) -> dict[str, float]:
    """Score how well images are found by EEG within a split.

    Parameters
    ----------
    embed : callable
        [b, 128, T] in microvolts to [b, P] of unit length.
    dataset : EEGDataset
        The split.
    table : ImageTable
        Its images.
    target_MP : Tensor, [M, P]
        Their CLIP embeddings.
    device : torch.device
        Where to compute.
    batch_size : int
        Trials at a time.

    Returns
    -------
    dict
        ``cosine`` (1 - cosine, mean), ``top1`` and ``top5`` (share of trials whose image comes first, among the first
        five of the split's images), ``label`` (share whose first image has the right label) and ``images``, M.
    """
    parts = []
    for batch in sequential(dataset, batch_size):
        parts.append(embed(batch.padded(device)).float().cpu())
    embeds_BP = torch.cat(parts)
    row_B = torch.as_tensor(table.row_of)
    similarity_BM = embeds_BP @ target_MP.T
    ranks_B = (similarity_BM > similarity_BM.gather(1, row_B[:, None])).sum(1)
    labels_M = torch.as_tensor(table.labels)
    return {
        "cosine": float(1 - (embeds_BP * target_MP[row_B]).sum(-1).mean()),
        "top1": float((ranks_B < 1).float().mean()),
        "top5": float((ranks_B < 5).float().mean()),
        "label": float((labels_M[similarity_BM.argmax(1)] == labels_M[row_B]).float().mean()),
        "images": len(table),
    }


def main(argv: list[str] | None = None) -> int:
    """Align an encoder with CLIP.

    Parameters
    ----------
    argv : list of str, optional
        ``CONFIG.yaml`` and any key of `AlignConfig`.

    Returns
    -------
    int
        Exit code.
    """
    config = parse_config(AlignConfig, argv, prog="dreamscale align", positionals=("config",))
    quiet_libraries()
    data, val = open_paired(config.dataset, "train"), open_paired(config.dataset, "val")
    torch.manual_seed(config.seed)
    encoder = load_encoder(config.encoder, data, pretrained=config.pretrained)
    table, val_table = ImageTable(data), ImageTable(val)
    accelerator = make_accelerator(
        num_processes=config.num_processes, device=config.device, precision=config.training.precision
    )
    run = open_run(config, accelerator)
    if run.finished:
        print(f"{config.output}: done already")
        return EXIT_DONE
    target_MP, val_target_MP = (
        clip_image_embeddings(
            t,
            config.clip,
            device=accelerator.device,
            cache=Path(config.output) / "cache",
            write=accelerator.is_main_process,
        )
        for t in (table, val_table)
    )
    head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=target_MP.shape[1]))
    aligner = Aligner(encoder, head, config.loss, config.temperature)

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        row = torch.as_tensor(table.row_of[batch.numbers])
        x, target = prepare_eeg(batch, data, table, config.augment, random, encoder), target_MP[row]
        return {"x": x, "target": target, "row": row}

    result = fit(
        aligner,
        config=config.training,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        loader=rank_loader(data, config.training, config.seed, accelerator),
        inputs=inputs,
        validate=lambda module: retrieval(
            lambda uv_bCT: module.embed(eeg_for_model(uv_bCT, module.encoder)),
            val,
            val_table,
            val_target_MP,
            accelerator.device,
        ),
        watch=config.watch,
        mode="min" if config.watch == "cosine" else "max",
        lr_scale=lambda name: config.encoder_lr if name.startswith("encoder.") else 1.0,
        description="alignment",
    )
    if accelerator.is_main_process:
        found = {"best_step": result.best_step, "val": result.best, "clip": config.clip, "dataset": config.dataset}
        found["dataset_id"] = data.manifest.dataset_id
        encoder.save_pretrained(run.path / "encoder", extra={"aligned": found})
        head.save_pretrained(run.path / "align")
        write_json(run.path / "align" / "result.json", found)
        plot_losses(run, run.path / "plots" / "loss.png", ["train/loss", "train/cosine", "val/cosine"])
        run.status("done", **found)
        label = result.best["label"]
        print(
            f"alignment: val {1 - result.best['cosine']:.3f} cosine, {label:.1%} right label -> {run.path / 'encoder'}"
        )
    run.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
