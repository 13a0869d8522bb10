"""Config of DM-RE2I: EVRNet, then the EEG-guided DDPM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finetune.dm_re2i.evrnet import EVRNetConfig
from finetune.eeg import AugmentConfig
from finetune.training.config import TrainingConfig
from pretrain.runs.tracking import TrackerConfig


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
