"""Fine-tune Stable Diffusion on EEG, with the method of the DreamDiffusion paper.

The command is ``dreamscale finetune CONFIG`` or ``accelerate launch -m finetune.stable_diffusion CONFIG``.

Tensor shapes: B trials, T time points, M different images, h rows and w columns of a latent.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.dataset.batch import Batch
from finetune.base_models.conditions import embed_nothing, find_image_size
from finetune.base_models.load import load_base
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.eeg import (
    EEGConfig,
    ImageAugmentConfig,
    choose_evenly,
    group_repeats,
    load_encoder,
    prepare_eeg,
    read_encoder_input,
)
from finetune.electrodes import Electrodes
from finetune.images import ImageTable, open_train_val
from finetune.objective import DenoisingWatcher, ObjectiveConfig, Prediction, add_offset, check_objective, make_noising
from finetune.stable_diffusion.check import check_request
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
from finetune.stable_diffusion.lora import LoRAConfig
from finetune.stable_diffusion.model import EEGDiffusion, open_time_path, save_model
from finetune.targets.config import TargetConfig
from finetune.targets.latents import encode_images
from finetune.targets.load import Targets, load_targets
from finetune.targets.views import ViewConfig
from finetune.training.accelerate import (
    get_world,
    make_loader,
    quiet_libraries,
    report_finished,
    start_processes,
    use_run,
)
from finetune.training.compute import (
    UNetComputeConfig,
    apply_to_encoder,
    apply_to_unet,
    restore_frozen,
    store_frozen_in_bf16,
    use_tf32,
)
from finetune.training.config import TrainingConfig, free_keys
from finetune.training.fit import fit
from finetune.training.plots import plot_losses
from finetune.training.step_random import StepRandom
from pretrain.runs.config import check_at_least
from pretrain.runs.tracking import TrackerConfig

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


@dataclass(frozen=True, kw_only=True)
class StableDiffusionConfig(ObjectiveConfig):
    """Fine-tune Stable Diffusion on EEG, as in DreamDiffusion: train encoder, projector and cross-attentions."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "target.model"}

    dataset: str
    """Path of the EEG-image dataset, which must have train and val splits."""
    encoder: str
    """Encoder package. With `order: sequential`, give the folder `encoder/` of an alignment run; with `order: joint`,
    give a pretrained encoder."""
    base: str
    """Base model: Stable Diffusion 1 or 2, Stable Diffusion XL, or a Turbo model. Give a directory in the layout of
    diffusers, a hub id, or a single .safetensors file in the layout of the original code."""
    base_config: str | None = None
    """Only for a base model that is a single file: a directory or hub id of a pipeline of the same kind, whose configs
    and tokenizers are used."""
    output: str
    """Run directory, with the trained model in the subdirectory `model/`."""
    order: Literal["sequential", "joint"] = "sequential"
    """sequential: the encoder is already aligned with CLIP, and only the denoising loss is used. joint: the loss is the
    sum of the denoising loss and the CLIP loss."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What the encoder learns to match in order joint, which needs target.model."""
    clip_weight: float = 1.0
    """Weight of the CLIP loss (1 - cosine similarity to the targets) in order joint."""
    pretrained: bool = True
    """True: start from the pretrained weights of the encoder. False: start from random weights, to measure the effect
    of pretraining."""
    tune: Literal["E+A", "E", "A"] = "E+A"
    """Parts of the model that are trained. E: train the encoder and the projector, which computes the condition from
    the encoder's tokens. A: train the U-Net's cross-attentions and their norms (attn2, norm2). E+A: train all of these
    parts."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters of low rank, which are trained in place of the U-Net's cross-attentions. The trained model contains the
    adapters, and a U-Net to whose weights the adapters are added."""
    time_path: bool = True
    """Also add a vector from the EEG to the U-Net's time embedding, as in DreamDiffusion's code but not in its
    paper."""
    prediction: Prediction | None = None
    """Quantity that the U-Net learns to predict: the noise (epsilon), the velocity (v_prediction) or the latent of the
    image (sample). Empty: the quantity that the base model predicts. Another quantity than that of the base model needs
    much training, because the U-Net first has to unlearn the old one."""
    projector: Literal["conv", "resampler"] = "conv"
    """Network that computes the condition from the encoder's tokens. conv: two convolutions and a linear map, as in
    DreamDiffusion; resampler: a Perceiver resampler, whose learned queries read the tokens by attention."""
    hidden: int = 64
    """Only for the projector conv: number of tokens between its two convolutions."""
    resampler_depth: int = 4
    """Only for the projector resampler: number of layers."""
    resampler_heads: int = 8
    """Only for the projector resampler: number of attention heads; a divisor of the width of the U-Net's
    cross-attention, which is 768 for Stable Diffusion 1 and 1024 for Stable Diffusion 2."""
    drop: float = 0.1
    """Fraction of trials whose EEG condition is dropped in training. Classifier-free guidance needs a model that was
    trained with a drop above 0."""
    encoder_lr: float = 1.0
    """The encoder's learning rate is this factor times training.lr."""
    attention_lr: float = 1.0
    """The learning rate of the U-Net's cross-attentions is this factor times training.lr."""
    eeg: EEGConfig = field(default_factory=EEGConfig)
    """Which part of each trial the encoder reads, and how repeated presentations are averaged in the evaluation."""
    augment: ImageAugmentConfig = field(default_factory=ImageAugmentConfig)
    """Augmentation of the EEG in training."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Mirrored images and crops of the images in training. The CLIP loss always uses the whole image."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(ema=0.99))
    """Settings of the training: steps, batch size, learning rate and so on."""
    compute: UNetComputeConfig = field(default_factory=UNetComputeConfig)
    """How the networks are computed: settings for speed and memory."""
    license: str = "unknown"
    """Licence of the trained weights for the model card, as an identifier of the Hugging Face hub, e.g. cc-by-4.0. The
    licences of the base model and of the training data may restrict the licence of the weights."""
    val_trials: int = 256
    """Largest number of val trials that an evaluation uses. The used trials are spread evenly over the val split."""
    num_processes: int = 1
    """Total number of processes on all machines."""
    timeout_s: float = 1800.0
    """If the training makes no progress for this many seconds, the run fails with a message that names the hanging
    process. 0: the run may wait without limit."""
    restarts: int = 0
    """How many times 'dreamscale finetune' restarts its processes after one of them was killed. Each restart resumes
    from the newest checkpoint."""
    seed: int = 0
    """Seed for sample order, noise and initial weights."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracker to which metrics are sent, in addition to the file metrics.jsonl."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "timeout_s", "restarts")
        if not 0 <= self.drop < 1:
            raise ValueError(f"'drop' must be at least 0 and below 1, got {self.drop}")
        check_at_least(self, 1, "hidden", "resampler_depth", "resampler_heads", "val_trials", "num_processes")
        check_objective(self, self.prediction)
        if self.lora.rank and "A" not in self.tune:
            raise ValueError("lora.rank adapts the cross-attentions; set tune to A or E+A, or lora.rank to 0")
        if self.compute.frozen_bf16 and self.training.precision != "bf16":
            raise ValueError(
                "compute.frozen_bf16 needs training.precision bf16, because training in fp32 needs the weights in fp32"
            )
        self.training.micro_batches(self.num_processes)
        if not re.fullmatch(r"[A-Za-z0-9.-]+", self.license):
            raise ValueError(f"license is '{self.license}'; give an identifier such as cc-by-4.0, mit or unknown")
        if self.order == "joint" and not self.target.model:
            raise ValueError(
                "'order: joint' needs the key 'target.model': give the model whose embeddings the encoder learns, such "
                "as openai/clip-vit-large-patch14"
            )


def choose_noising(config: StableDiffusionConfig, pipeline: Any) -> DDPMScheduler:
    """Make the noise scheduler of the training, and give the pipeline a scheduler that samples accordingly.

    Parameters
    ----------
    config : StableDiffusionConfig
        Config of the command.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        Pipeline of the base model. Its scheduler is replaced if the training differs from that of the base model.

    Returns
    -------
    DDPMScheduler
        Scheduler that adds the noise in training.

    Raises
    ------
    RequestError
        If the options of the objective do not fit the base model.
    """
    from diffusers import DDIMScheduler

    before = pipeline.scheduler.config
    try:
        noising = make_noising(before, config, config.prediction)
    except ValueError as error:
        raise RequestError(f"{config.base}: {error}") from None
    if config.zero_snr or config.prediction not in (None, before.prediction_type):
        pipeline.scheduler = DDIMScheduler.from_config(noising.config, clip_sample=False)
    return noising


def check_projector(config: StableDiffusionConfig, width: int) -> None:
    """Raise a `RequestError` if the resampler's heads do not fit the width of the base model's cross-attention."""
    if config.projector == "resampler" and width % config.resampler_heads:
        raise RequestError(
            f"resampler_heads is {config.resampler_heads}, but the cross-attention of {config.base} has the width "
            f"{width}; give a divisor of {width}"
        )


@torch.no_grad()
def build(
    config: StableDiffusionConfig, pipeline: Any, encoder: Any, targets: Targets | None, noising: Any
) -> EEGDiffusion:
    """Build the model from its parts.

    Parameters
    ----------
    config : StableDiffusionConfig
        Config of the command.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        Pipeline of the base model.
    encoder : EEGEncoder
        EEG encoder.
    targets : Targets or None
        Targets of the images if ``config.order`` is joint; None if ``config.order`` is sequential.
    noising : DDPMScheduler
        Noise scheduler from `choose_noising`.

    Returns
    -------
    EEGDiffusion
        Model that is ready for training. Only the CLIP head and the parts that ``config.tune`` names are trainable.
    """
    unet, (null_1LW, null_1P) = pipeline.unet, embed_nothing(pipeline)
    conditioner = Conditioner(
        ConditionerConfig(
            tokens=encoder.n_tokens,
            dim=encoder.dim,
            length=null_1LW.shape[1],
            width=null_1LW.shape[2],
            projector=config.projector,
            hidden=config.hidden,
            resampler_depth=config.resampler_depth,
            resampler_heads=config.resampler_heads,
            time_dim=open_time_path(unet) if config.time_path else 0,
            pooled_dim=0 if null_1P is None else null_1P.shape[1],
            image_size=0 if null_1P is None else find_image_size(pipeline),
        )
    )
    # Start the null condition from the condition without a text, with which the base model was trained.
    conditioner.null_LW.copy_(null_1LW[0])
    if null_1P is not None:
        conditioner.null_P.copy_(null_1P[0])
    head = None
    if targets is not None:
        head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=targets.width))
    model = EEGDiffusion(
        encoder,
        conditioner,
        unet,
        noising,
        head,
        clip_weight=config.clip_weight,
        target_weights=() if targets is None else targets.weights,
        min_snr=config.min_snr,
    )
    model.choose_trainables(config.tune, config.lora)
    return model


def train(config: StableDiffusionConfig) -> int:
    """Fine-tune Stable Diffusion on EEG.

    Parameters
    ----------
    config : StableDiffusionConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    data, val = open_train_val(config.dataset, config.eeg.part, "finetune", [config.output])
    torch.manual_seed(config.seed)
    encoder = load_encoder(config.encoder, data, pretrained=config.pretrained, several_montages=True)
    electrodes = Electrodes(encoder, data)
    pipeline = load_base(config.base, config.base_config)
    check_projector(config, int(pipeline.unet.config.cross_attention_dim))
    noising = choose_noising(config, pipeline)
    # With LoRA, the weights of the cross-attentions are not trained, and the adapters are small.
    tune = config.tune.replace("A", "") if config.lora.rank else config.tune
    check_request(
        pipeline, encoder, output=config.output, time_path=config.time_path, tune=tune, training=config.training
    )
    size = find_image_size(pipeline)
    table, val_table = ImageTable(data), ImageTable(val)
    free = ("license", "compute", *free_keys("training", independent_samples=True))
    with (
        start_processes(config, config.training.precision, timeout_s=config.timeout_s) as accelerator,
        use_run(config, accelerator, free=free) as run,
        use_tf32(config.compute, accelerator.device),
    ):
        if report_finished(run):
            return EXIT_DONE
        world = get_world(accelerator)
        # Load the targets first, so that a wrong target is found before the images are encoded.
        targets = load_targets(config.target, table, world) if config.order == "joint" else None
        latents = encode_images(table, pipeline.vae, size, views=config.views, world=world)
        val_latents = encode_images(val_table, pipeline.vae, size, world=world)
        model = build(config, pipeline, encoder, targets, noising)
        apply_to_encoder(model.encoder, config.compute)
        apply_to_unet(model.unet, config.compute)
        kept = store_frozen_in_bf16(model.unet) if config.compute.frozen_bf16 else {}
        noise_steps = int(noising.config.num_train_timesteps)
        groups = group_repeats(val, config.eeg.average_repeats)
        watched = [groups[i] for i in choose_evenly(len(groups), config.val_trials)]
        watcher = DenoisingWatcher(
            read_encoder_input(val, watched, encoder, Electrodes(encoder, val), accelerator.device),
            val_latents[val_table.row_of[[group[0] for group in watched]], 0],
            noise_steps,
            world,
        )

        def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
            b, row = len(batch.numbers), torch.as_tensor(table.row_of[batch.numbers])
            places = electrodes.of(batch.numbers)
            views = config.views.count
            mean, std = (latents[row] if views == 1 else latents[row, random.integers(views, b)]).unbind(1)
            tensors = {
                "x": prepare_eeg(batch, data, table, config.augment, random, encoder, places),
                **places,
                "latent": mean + std * random.normal(b, *mean.shape[1:]),
                "noise": random.normal(b, *mean.shape[1:]),
                "time": random.integers(noise_steps, b),
                "keep": random.uniform(b) >= config.drop,
            }
            tensors["noise"] = add_offset(tensors["noise"], config.offset_noise, random)
            return tensors if targets is None else {**tensors, "target": targets.choose(row)[0]}

        def lr_scale(name: str) -> float:
            return {"encoder": config.encoder_lr, "unet": config.attention_lr}.get(name.split(".")[0], 1.0)

        result = fit(
            model,
            config=config.training,
            seed=config.seed,
            timeout_s=config.timeout_s,
            accelerator=accelerator,
            run=run,
            loader=make_loader(data, config.training, config.seed, accelerator),
            inputs=inputs,
            evaluate=watcher,
            lr_scale=lr_scale,
            description="Stable Diffusion on EEG",
        )
        if accelerator.is_main_process:
            found = {"best_step": result.best_step, "val": result.best, "dataset_id": data.manifest.dataset_id}
            found["dataset_version"] = data.manifest.version
            origin: dict[str, Any] = {
                "base": config.base,
                "encoder": config.encoder,
                "dataset": config.dataset,
                "labels": data.labels,
            }
            origin |= {"tune": config.tune, "order": config.order, "drop": config.drop, "eeg": config.eeg.part}
            card = {
                "license": config.license,
                "data": {
                    "dataset": Path(config.dataset).name,
                    "dataset_id": data.manifest.dataset_id,
                    "train trials": len(data),
                    "train images": len(table),
                    "categories": ", ".join(data.labels),
                    "samples of a trial": data.n_times,
                    "part of a trial (s from the onset; empty: default)": config.eeg.part,
                },
                "settings": {
                    "base": config.base,
                    **{
                        name: getattr(config, name)
                        for name in ("order", "tune", "projector", "time_path", "drop", "seed")
                    },
                    "lora": dataclasses.asdict(config.lora),
                    "prediction": noising.config.prediction_type,
                    **{name: getattr(config, name) for name in ("min_snr", "offset_noise", "zero_snr")},
                    "training": dataclasses.asdict(config.training),
                },
                "results": {"best step": result.best_step, **result.best},
            }
            restore_frozen(model.unet, kept)
            save_model(run.path / "model", model, pipeline, {**found, **origin}, card)
            plot_losses(run, run.path / "plots" / "loss.png", ["train/denoise", "val/loss", "val/shuffled"])
            run.status("done", **found)
            print(
                f"Stable Diffusion: val loss {result.best['loss']:.4f}, with other trials' EEG "
                f"{result.best['shuffled']:.4f} -> {run.path / 'model'}; next: dreamscale generate "
                f"{run.path / 'model'} {config.dataset} -o OUTPUT"
            )
    return EXIT_DONE


main = command(StableDiffusionConfig, train, prog="dreamscale finetune")

if __name__ == "__main__":
    sys.exit(main())
