"""Fine-tunes Stable Diffusion on EEG.

Started as ``dreamscale finetune CONFIG`` or ``accelerate launch -m finetune.stable_diffusion CONFIG``.

Shapes: B trials, T samples, M different images, h, w latent pixels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.dataset.batch import Batch
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.clip_images import clip_image_embeddings, weights_digest
from finetune.diffusion import DenoisingWatcher
from finetune.eeg import ImageAugmentConfig, choose_evenly, load_encoder, prepare_eeg, read_trials
from finetune.images import ImageTable, open_paired, to_model_range
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
from finetune.stable_diffusion.model import EEGDiffusion, load_base, open_time_path, save_model
from finetune.training.accelerate import make_accelerator, open_run, quiet_libraries, rank_loader
from finetune.training.config import TrainingConfig
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.runs.tracking import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class StableDiffusionConfig:
    """Stable Diffusion on EEG, after DreamDiffusion: encoder, projector and cross-attentions train."""

    dataset: str
    """EEG-image dataset with train and val splits."""
    encoder: str
    """Encoder package: an aligned run's `encoder/` (sequential), or a pretrained one (joint)."""
    base: str
    """Stable Diffusion in diffusers' layout: a directory, or a hub id."""
    output: str
    """Run directory; `model/` is written into it."""
    order: Literal["sequential", "joint"] = "sequential"
    """sequential: the encoder is aligned already, only the noise prediction counts; joint: plus the CLIP loss."""
    clip: str | None = None
    """CLIP model for the joint order."""
    clip_weight: float = 1.0
    """Weight of 1 - cosine in the joint order."""
    pretrained: bool = True
    """False: the encoder's shape with fresh weights, the ablation without pretraining."""
    tune: Literal["E+A", "E", "A"] = "E+A"
    """E: encoder with its projector; A: the U-Net's attn2 with its norm2."""
    time_path: bool = True
    """Also add a projection of the EEG to the time embedding, as the released code does; the paper has none."""
    hidden: int = 64
    """Tokens between the projector's two convolutions."""
    drop: float = 0.1
    """Share of trials whose condition is dropped in training, for classifier-free guidance."""
    encoder_lr: float = 1.0
    """Learning rate of the encoder over the peak."""
    attention_lr: float = 1.0
    """Learning rate of the U-Net's cross-attentions over the peak."""
    augment: ImageAugmentConfig = field(default_factory=ImageAugmentConfig)
    """Changes of the EEG in training."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(ema=0.99))
    """Steps, batch, rates."""
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
        if not 0 <= self.drop < 1 or self.hidden < 1 or self.val_trials < 1:
            raise ValueError("need 0 <= drop < 1, hidden >= 1 and val_trials >= 1")
        if self.order == "joint" and self.clip is None:
            raise ValueError("order joint needs 'clip': the CLIP model whose image embeddings the encoder follows")


def image_latents(
    table: ImageTable, pipeline: Any, size: int, *, device: Any, cache: Path | None, write: bool
) -> Tensor:
    """Encode every image once.

    Parameters
    ----------
    table : ImageTable
        The images.
    pipeline : StableDiffusionPipeline
        Whose autoencoder.
    size : int
        Pixels of a side.
    device : torch.device
        Where to compute.
    cache : Path or None
        Directory for the result.
    write : bool
        False on every rank but the first.

    Returns
    -------
    Tensor, [M, 2, 4, h, w]
        Mean and standard deviation of the latents, scaled as the U-Net sees them; on the CPU.
    """
    vae = pipeline.vae.to(device)

    def compute(pixels_BHW3: np.ndarray) -> Tensor:
        with torch.no_grad():
            posterior = vae.encode(to_model_range(pixels_BHW3).to(device)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor

    batch_size = max(1, min(64, 64 * 128 * 128 // size**2))
    key = {"what": "latents", "weights": weights_digest(vae)}
    latents = table.features(compute, size=size, key=key, cache=cache, batch_size=batch_size, write=write)
    vae.to("cpu")
    return latents


@torch.no_grad()
def build(config: StableDiffusionConfig, pipeline: Any, encoder: Any, projection: int | None) -> EEGDiffusion:
    """Put the model together, ready to train.

    Parameters
    ----------
    config : StableDiffusionConfig
        The request.
    pipeline : StableDiffusionPipeline
        The base.
    encoder : EEGEncoder
        The encoder.
    projection : int or None
        Width of CLIP's embeddings in the joint order.

    Returns
    -------
    EEGDiffusion
        Its trainable parameters are those that `tune` names.
    """
    from diffusers import DDPMScheduler

    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    length = int(tokenizer.model_max_length)
    empty = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    null_LW = pipeline.text_encoder(empty)[0][0].float()
    conditioner = Conditioner(
        ConditionerConfig(
            tokens=encoder.n_tokens,
            dim=encoder.dim,
            length=length,
            width=int(unet.config.cross_attention_dim),
            hidden=config.hidden,
            time_dim=open_time_path(unet) if config.time_path else 0,
        )
    )
    # No EEG starts as what the base model knows as no text.
    conditioner.null_LW.copy_(null_LW)
    head = None
    if projection is not None:
        head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=projection))
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    model = EEGDiffusion(encoder, conditioner, unet, noising, head, config.clip_weight)
    model.choose_trainables(config.tune)
    return model


def main(argv: list[str] | None = None) -> int:
    """Fine-tune Stable Diffusion on EEG.

    Parameters
    ----------
    argv : list of str, optional
        ``CONFIG.yaml`` and any key of `StableDiffusionConfig`.

    Returns
    -------
    int
        Exit code.
    """
    config = parse_config(StableDiffusionConfig, argv, prog="dreamscale finetune", positionals=("config",))
    quiet_libraries()
    data, val = open_paired(config.dataset, "train"), open_paired(config.dataset, "val")
    torch.manual_seed(config.seed)
    encoder = load_encoder(config.encoder, data, pretrained=config.pretrained)
    pipeline = load_base(config.base)
    size = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    table, val_table = ImageTable(data), ImageTable(val)
    accelerator = make_accelerator(
        num_processes=config.num_processes, device=config.device, precision=config.training.precision
    )
    run = open_run(config, accelerator)
    if run.finished and (run.path / "model" / "dreamscale.json").is_file():
        print(f"{config.output}: done already")
        return EXIT_DONE
    if run.finished:
        raise RequestError(f"{config.output}: finished, but its model is gone; choose another output, or delete it")
    once: dict[str, Any] = {
        "device": accelerator.device,
        "cache": Path(config.output) / "cache",
        "write": accelerator.is_main_process,
    }
    latents = image_latents(table, pipeline, size, **once)
    val_latents = image_latents(val_table, pipeline, size, **once)
    target_MP = clip_image_embeddings(table, config.clip, **once) if config.order == "joint" and config.clip else None
    model = build(config, pipeline, encoder, None if target_MP is None else target_MP.shape[1])
    times = int(model.noising.config.num_train_timesteps)
    watched = choose_evenly(len(val), config.val_trials)
    watcher = DenoisingWatcher(
        read_trials(val, watched, encoder, accelerator.device), val_latents[val_table.row_of[watched], 0], times
    )

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        b, row = len(batch.numbers), torch.as_tensor(table.row_of[batch.numbers])
        mean, std = latents[row].unbind(1)
        tensors = {
            "x": prepare_eeg(batch, data, table, config.augment, random, encoder),
            "latent": mean + std * random.normal(b, *mean.shape[1:]),
            "noise": random.normal(b, *mean.shape[1:]),
            "time": random.integers(times, b),
            "keep": random.uniform(b) >= config.drop,
        }
        return tensors if target_MP is None else {**tensors, "target": target_MP[row]}

    def lr_scale(name: str) -> float:
        return {"encoder": config.encoder_lr, "unet": config.attention_lr}.get(name.split(".")[0], 1.0)

    result = fit(
        model,
        config=config.training,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        loader=rank_loader(data, config.training, config.seed, accelerator),
        inputs=inputs,
        validate=watcher,
        lr_scale=lr_scale,
        description="Stable Diffusion on EEG",
    )
    if accelerator.is_main_process:
        found = {"best_step": result.best_step, "val": result.best, "dataset_id": data.manifest.dataset_id}
        origin = {"base": config.base, "encoder": config.encoder, "dataset": config.dataset, "labels": data.labels}
        save_model(run.path / "model", model, pipeline, {**found, **origin, "tune": config.tune, "order": config.order})
        plot_losses(run, run.path / "plots" / "loss.png", ["train/denoise", "val/loss", "val/shuffled"])
        run.status("done", **found)
        own, other = result.best["loss"], result.best["shuffled"]
        print(f"Stable Diffusion: val loss {own:.4f}, with other trials' EEG {other:.4f} -> {run.path / 'model'}")
    run.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
