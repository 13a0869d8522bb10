"""Config of DM-RE2I, which trains EVRNet first and then the EEG-guided DDPM (EG-DDPM)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from finetune.dm_re2i.evrnet import EVRNetConfig
from finetune.eeg import AugmentConfig, EEGConfig
from finetune.objective import ObjectiveConfig, Prediction, check_objective
from finetune.training.compute import ComputeConfig
from finetune.training.config import TrainingConfig, free_keys
from pretrain.runs.config import check_at_least
from pretrain.runs.tracking import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class EVRNetStage:
    """Config of the first stage: EVRNet learns to recognise the category of the image from the EEG."""

    network: Literal["evrnet", "eegnet", "tsconv", "encoder"] = "evrnet"
    """Network that is trained. evrnet: the network of the paper. Baselines are eegnet (EEGNet-8,2), tsconv (the EEG
    encoder of NICE) and encoder (the pretrained encoder `encoder` with a linear head). The feature of each network can
    guide EG-DDPM."""
    encoder: str | None = None
    """Encoder package for `network: encoder`: a directory that `dreamscale export` wrote, or a hub id."""
    train_encoder: bool = False
    """For `network: encoder`. True: train the encoder together with the linear head. False: freeze the encoder."""
    encoder_lr: float = 0.1
    """With `train_encoder: true`, the encoder's learning rate is this factor times training.lr."""
    channels: int = 128
    """Number of channels that the network reads, from 1 to 128. A dataset is refused if a trial has more channels. If a
    trial has fewer channels, its channels are repeated until this number is reached."""
    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Numbers of EVRNet's feature maps after the two temporal, the two spatial, and the temporal-spatial (TS)
    convolution. The last number of feature maps is also the width of the feature."""
    skip: Literal["input", "y0"] = "input"
    """Start of the second skip connection of EVRNet's multi-kernel residual blocks. input: the block's input, as in the
    paper; y0: the output of the block's first half, as an ablation."""
    mkrb: bool = True
    """False leaves out EVRNet's multi-kernel residual blocks, as an ablation."""
    dropout: float | None = None
    """Dropout rate. None: the dropout rate in the network's article (0 for evrnet, 0.25 for eegnet, 0.5 for tsconv),
    and 0 for encoder. In the networks evrnet and encoder, the dropout is before the linear layer."""
    label_smoothing: float = 0.0
    """Amount of label smoothing in the cross-entropy."""
    whiten: float = 0.0
    """Noise normalisation: the background activity of the trials is whitened before the network. The value is the
    shrinkage of the covariance matrix, usually 0.05; 0 switches noise normalisation off, as in the paper. Noise
    normalisation needs the same electrode layout in all trials."""
    average: int = 1
    """At the start of training, a trial is replaced by the mean of itself and up to `average` - 1 random trials of its
    category in the batch. Single trials are mostly noise, so the network learns faster from means. 1 switches averaging
    off."""
    average_end: int = 1
    """Value of `average` at the end of training. During training, `average` falls linearly to this value."""
    mixup: float = 0.0
    """Mixup: largest weight with which another trial and its category are mixed into a trial; 0 switches mixup off."""
    image_weight: float = 0.0
    """Weight of a second loss: the error with which a linear layer predicts the image from the feature. The layer
    predicts principal components of the image's pixels. With the second loss, the feature contains not only the
    category, but also the colours and the positions in the image. The second loss is 1 if the layer predicts the mean
    image, and 0 if the layer predicts the right image. The linear layer for the second loss is used only in training,
    and is not part of the model. With `image_weight` 0, as in the paper, there is no second loss."""
    image_components: int = 16
    """Number of principal components of the image that the linear layer of `image_weight` predicts."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the EEG in training, after the noise normalisation."""
    watch: Literal["accuracy", "loss"] = "accuracy"
    """Metric on the val split that decides which weights of the run are the best and are kept."""
    permute_labels: bool = False
    """Control: the categories of the train images are shuffled between the images. On new images, a network that was
    trained with shuffled categories should be right only as often as chance."""
    calibration_trials: int = 512
    """Number of train trials from which the statistics of the batch norms are computed, before each evaluation and at
    the end of training."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(lr=1e-3))
    """Settings of the training: steps, batch size, learning rate and so on."""

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 128 or self.calibration_trials < 2:
            raise ValueError(
                "evrnet.channels must be from 1 to 128 and evrnet.calibration_trials at least 2, got "
                f"{self.channels} and {self.calibration_trials}"
            )
        if not self.encoder_lr > 0:
            raise ValueError(f"evrnet.encoder_lr must be above 0, got {self.encoder_lr}")
        if not 0 <= self.whiten <= 1:
            raise ValueError(f"evrnet.whiten must be from 0 to 1, got {self.whiten}")
        if not 1 <= self.average_end <= self.average or not 0 <= self.mixup <= 0.5 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "evrnet.average_end must be from 1 to evrnet.average, evrnet.mixup from 0 to 0.5, and "
                f"evrnet.label_smoothing at least 0 and below 1; got average_end {self.average_end}, average "
                f"{self.average}, mixup {self.mixup} and label_smoothing {self.label_smoothing}"
            )
        if not 0 <= self.image_weight < math.inf or self.image_components < 1:
            raise ValueError(
                "evrnet.image_weight must be finite and at least 0, and evrnet.image_components at least 1, got "
                f"{self.image_weight} and {self.image_components}"
            )
        if self.image_weight and self.network == "encoder" and not self.train_encoder:
            raise ValueError(
                "evrnet.image_weight adds a loss that trains the EEG feature, but the feature of a frozen encoder does "
                "not change; set evrnet.image_weight: 0 or evrnet.train_encoder: true"
            )
        if self.image_weight and self.average > 1:
            raise ValueError(
                f"evrnet.image_weight {self.image_weight} and evrnet.average {self.average} cannot be used together, "
                "because a mean over trials of different images has no single image to predict; set one of the two "
                "keys to its default"
            )
        if (self.encoder is None) == (self.network == "encoder"):
            raise ValueError(
                f"evrnet.network is {self.network} and evrnet.encoder is {self.encoder}; give evrnet.encoder for the "
                "network 'encoder', and for no other network"
            )
        if self.network == "encoder" and self.whiten:
            raise ValueError(
                "evrnet.whiten must be 0 for the network 'encoder', which was pretrained without whitening"
            )
        EVRNetConfig(widths=self.widths, dropout=self.dropout or 0.0, n_channels=self.channels)


@dataclass(frozen=True, kw_only=True)
class EGDDPMStage(ObjectiveConfig):
    """Config of the second stage: a diffusion model of pixels, guided by a vector from EEG."""

    guide: Literal["feature", "logits", "encoder"] = "feature"
    """Vector that guides the diffusion. feature: the semantic feature of EVRNet, as in the paper. logits: the class
    scores of EVRNet. encoder: the mean token of a pretrained encoder; EVRNet is not used."""
    encoder: str | None = None
    """Encoder package for `guide: encoder`: a directory that `dreamscale export` wrote, or a hub id."""
    train_guide: bool = False
    """True: the network that computes the guiding vector is trained together with the diffusion model, from the
    denoising loss. False: the network that computes the guiding vector is frozen, and all vectors are computed once."""
    guide_lr: float = 1.0
    """With `train_guide: true`, the learning rate of the guiding network is this factor times training.lr."""
    backbone: Literal["paper", "unet2d"] = "paper"
    """U-Net that predicts the noise. paper: the U-Net of the paper, with ConvNeXt blocks and linear attention. unet2d:
    UNet2DModel of diffusers, the U-Net of Ho et al. (2020), guided in the same way."""
    image_size: int = 64
    """Width and height of the images in pixels."""
    base_channels: int = 64
    """Number of feature maps at the first level of the U-Net."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Number of feature maps at each level of the U-Net, as a multiple of `base_channels`."""
    expansion: int = 2
    """For backbone paper: number of feature maps inside a ConvNeXt block, as a multiple of the number at the block's
    output."""
    heads: int = 4
    """For backbone paper: number of attention heads. Backbone unet2d has (feature maps / `head_dim`) heads."""
    head_dim: int = 32
    """Width of an attention head."""
    scale_shift: bool = False
    """How the embedding of the diffusion step and of the EEG changes feature maps. True: it scales and shifts them
    (FiLM). False: it is added to them, as in the paper."""
    patch: int = 1
    """Side length in pixels of the squares that are folded into channels. With `patch` 1, as in the paper, no pixels
    are folded. With `patch` 2, the network needs a quarter of the computation of `patch` 1."""
    join_first: bool = False
    """For backbone paper: add a skip connection from the U-Net's first level to its last block. Narrow networks need
    this skip connection. The paper does not have this connection, and backbone unet2d always has it."""
    prediction: Prediction = "epsilon"
    """Quantity that the network predicts. epsilon: the noise, as in the paper. v_prediction: the velocity, with which
    images show shapes after fewer training steps. sample: the image."""
    loss: Literal["l1", "l2"] = "l2"
    """Norm of the prediction error. The paper does not say which norm it uses."""
    noise_steps: int = 1000
    """Number of steps of the forward process (the process that adds noise). The noise schedule is the cosine schedule
    (squaredcos_cap_v2)."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler that `dreamscale generate` uses for this model by default. ddpm: all steps of the forward process, as in
    the paper. ddim: 25 steps."""
    drop: float = 0.1
    """Fraction of trials whose EEG condition is dropped in training; 0 in the paper. Classifier-free guidance needs a
    model that was trained with a drop above 0."""
    standardise: bool = True
    """Standardise the EEG feature with its mean and standard deviation over the train trials. False: use the feature as
    it is, as in the paper."""
    condition_noise: float = 0.0
    """Standard deviation of the noise that is added to the EEG feature in training, relative to the standard deviation
    of the feature over the train trials. The paper adds no noise to the EEG feature."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How the networks are computed: settings for speed. `compile` compiles the U-Net; `tf32` holds for both stages."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(ema=0.995))
    """Settings of the training: steps, batch size, learning rate and so on."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or self.condition_noise < 0 or self.noise_steps < 2:
            raise ValueError(
                "ddpm.drop must be at least 0 and below 1, ddpm.condition_noise at least 0, and ddpm.noise_steps at "
                f"least 2, got {self.drop}, {self.condition_noise} and {self.noise_steps}"
            )
        check_objective(self, self.prediction, "ddpm.")
        if self.min_snr and self.loss != "l2":
            raise ValueError("ddpm.min_snr weights squared errors; set ddpm.loss: l2, or ddpm.min_snr: 0")
        multiple = self.patch * 2 ** (len(self.multipliers) - 1)
        if len(self.multipliers) < 2 or self.patch < 1 or self.image_size < 1 or self.image_size % multiple:
            raise ValueError(
                f"ddpm.image_size must be a multiple of {multiple} for ddpm.patch {self.patch} and "
                f"{len(self.multipliers)} entries in ddpm.multipliers (at least 2 are needed), got {self.image_size}"
            )
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(f"ddpm.base_channels must be even and at least 4, got {self.base_channels}")
        if (self.encoder is None) == (self.guide == "encoder"):
            raise ValueError(
                f"ddpm.guide is {self.guide} and ddpm.encoder is {self.encoder}; give ddpm.encoder for the guide "
                "'encoder', and for no other guide"
            )
        if not self.guide_lr > 0:
            raise ValueError(f"ddpm.guide_lr must be above 0, got {self.guide_lr}")
        if self.backbone == "unet2d":
            self._check_unet2d()

    def _check_unet2d(self) -> None:
        defaults = {f.name: f.default for f in fields(self) if f.name in ("expansion", "heads", "join_first")}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if changed:
            raise ValueError(
                f"ddpm.{changed[0]} is a key for ddpm.backbone 'paper'; leave it out for ddpm.backbone 'unet2d'"
            )
        maps = [self.base_channels * multiple for multiple in self.multipliers[1:]]
        if self.base_channels % 4 or any(width % self.head_dim for width in maps):
            raise ValueError(
                f"ddpm.backbone 'unet2d': ddpm.base_channels ({self.base_channels}) must be a multiple of 4, and "
                f"ddpm.base_channels times each later entry of ddpm.multipliers ({maps}) must be a multiple of "
                f"ddpm.head_dim ({self.head_dim})"
            )


@dataclass(frozen=True, kw_only=True)
class DMRE2IConfig:
    """Train DM-RE2I: first EVRNet, then the EEG-guided DDPM, which generates pixels."""

    dataset: str
    """Path of the EEG-image dataset, which must have train and val splits."""
    output: str
    """Run directory, with the run of the first stage in `evrnet/` and the trained model in `model/`."""
    eeg: EEGConfig = field(default_factory=EEGConfig)
    """Which part of each trial EVRNet (or a pretrained encoder) reads, and how repeated presentations are averaged in
    the evaluation."""
    evrnet: EVRNetStage = field(default_factory=EVRNetStage)
    """Settings of the first stage, which trains EVRNet."""
    stages: Literal["both", "evrnet"] = "both"
    """Stages to train. evrnet: train only the classifier. After a run with `stages: evrnet`, the same command with
    `stages: both` continues with EG-DDPM."""
    evrnet_from: str | None = None
    """Directory `model/evrnet` of an earlier run. If `evrnet_from` is given, the first stage is skipped."""
    ddpm: EGDDPMStage = field(default_factory=EGDDPMStage)
    """Settings of the second stage, which trains EG-DDPM."""
    license: str = "unknown"
    """Licence of the trained weights for the model card, as an identifier of the Hugging Face hub, e.g. cc-by-4.0. The
    licence of the training data may restrict the licence of the weights."""
    val_trials: int = 256
    """Largest number of val trials that an evaluation uses. The used trials are spread evenly over the val split."""
    num_processes: int = 1
    """Total number of processes on all machines."""
    timeout_s: float = 1800.0
    """If the training makes no progress for this many seconds, the run fails with a message that names the hanging
    process. 0: the run may wait without limit."""
    restarts: int = 0
    """How many times 'dreamscale ddpm' restarts its processes after one of them was killed. Each restart resumes from
    the newest checkpoint."""
    seed: int = 0
    """Seed for sample order, noise and initial weights."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracker to which metrics are sent, in addition to the file metrics.jsonl."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "timeout_s", "restarts")
        if self.val_trials < 2:
            raise ValueError(f"val_trials must be at least 2, got {self.val_trials}")
        if not re.fullmatch(r"[A-Za-z0-9.-]+", self.license):
            raise ValueError(f"license is '{self.license}'; give an identifier such as cc-by-4.0, mit or unknown")
        if self.ddpm.guide == "encoder" and self.evrnet_from is not None:
            raise ValueError(
                "'evrnet_from' cannot be set with 'ddpm.guide: encoder', which uses no EVRNet; remove one of the keys"
            )
        if self.stages == "evrnet" and (self.evrnet_from is not None or self.ddpm.guide == "encoder"):
            other = "evrnet_from" if self.evrnet_from is not None else "ddpm.guide: encoder"
            raise ValueError(
                f"'stages: evrnet' only trains EVRNet, but with '{other}' no EVRNet is trained; remove one of the two "
                "keys"
            )

    @staticmethod
    def free_keys() -> tuple[str, ...]:
        """Return the config keys that may change when a run is resumed."""
        # The output of EVRNet for a sample depends on the other samples of the forward pass, because EVRNet has batch
        # norms. EG-DDPM has no such layer.
        evrnet = free_keys("evrnet.training", independent_samples=False)
        return ("license", "stages", "ddpm.compute", *evrnet, *free_keys("ddpm.training", independent_samples=True))
