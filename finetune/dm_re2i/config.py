"""Config of DM-RE2I: EVRNet, then the EEG-guided DDPM (EG-DDPM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finetune.dm_re2i.evrnet import EVRNetConfig
from finetune.eeg import AugmentConfig
from finetune.training.config import TrainingConfig, free_keys
from pretrain.runs.tracking import TrackerConfig


@dataclass(frozen=True, kw_only=True)
class EVRNetStage:
    """The first stage: EVRNet learns the category of the image from the EEG."""

    channels: int = 128
    """Number of channels that the network takes, from 1 to 128. It must not be below the trials' true channels; the
    channels above those are copies."""
    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Feature maps of the two temporal, the two spatial and the TS convolutions. The last is the feature's width."""
    dropout: float = 0.0
    """Dropout of the feature before the linear layer. The paper has none."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    whiten: float = 0.0
    """Shrinkage of a multivariate noise normalisation before the network; 0.05 is usual. It needs trials of one
    electrode layout. 0 switches it off, as in the paper."""
    average: int = 1
    """At the start of training, a trial is replaced by the mean of 1 to `average` trials of its category in the batch.
    Single trials are mostly noise, and their common signal is learned faster from means. 1 switches it off."""
    average_end: int = 1
    """Value of `average` at the end of training; in between, it falls linearly."""
    mixup: float = 0.0
    """Largest share of another trial and of that trial's category in a training trial; 0 switches mixing off."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the EEG in training, after the noise normalisation."""
    watch: Literal["accuracy", "loss"] = "accuracy"
    """Metric on the val split that decides which weights are kept."""
    calibration_trials: int = 512
    """Number of train trials from which the statistics of the batch norms are computed, before each evaluation and at
    the end."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(lr=1e-3))
    """Steps, batch size, learning rate and so on."""

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 128 or self.calibration_trials < 2:
            raise ValueError("evrnet: need 1 <= channels <= 128 and calibration_trials >= 2")
        if not 0 <= self.whiten <= 1:
            raise ValueError(f"evrnet.whiten must be from 0 to 1, got {self.whiten}")
        if not 1 <= self.average_end <= self.average or not 0 <= self.mixup <= 0.5 or not 0 <= self.label_smoothing < 1:
            raise ValueError("evrnet: need 1 <= average_end <= average, 0 <= mixup <= 0.5 and 0 <= label_smoothing < 1")
        EVRNetConfig(widths=self.widths, dropout=self.dropout, n_channels=self.channels)


@dataclass(frozen=True, kw_only=True)
class EGDDPMStage:
    """The second stage: a diffusion model in pixel space, guided by EVRNet's feature."""

    image_size: int = 64
    """Width and height of the images in pixels."""
    base_channels: int = 64
    """Feature maps at the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Feature maps of each level, as multiples of `base_channels`."""
    expansion: int = 2
    """Width multiple inside the ConvNeXt blocks."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 32
    """Width of a head."""
    scale_shift: bool = False
    """Let the embedding scale and shift the feature maps (FiLM) instead of adding it; not in the paper."""
    patch: int = 1
    """Fold squares of this many pixels a side into channels; 2 makes the network four times cheaper. Not in the
    paper."""
    join_first: bool = False
    """Add a skip connection from the first level; narrow networks need it. Not in the paper."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts: the noise (epsilon), as in the paper, or the velocity (v_prediction), which shows
    forms after fewer steps."""
    loss: Literal["l1", "l2"] = "l2"
    """Norm of the error. The paper does not name it."""
    noise_steps: int = 1000
    """Steps of the forward process. Its noise schedule is the cosine (squaredcos_cap_v2)."""
    drop: float = 0.1
    """Share of trials whose condition is dropped in training; classifier-free guidance needs some. 0 in the paper."""
    condition_noise: float = 0.0
    """Standard deviation of noise that is added to the standardised feature in training."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(ema=0.995))
    """Steps, batch size, learning rate and so on."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or self.condition_noise < 0 or self.noise_steps < 2:
            raise ValueError("ddpm: need 0 <= drop < 1, condition_noise >= 0 and noise_steps >= 2")
        multiple = self.patch * 2 ** (len(self.multipliers) - 1)
        if len(self.multipliers) < 2 or self.patch < 1 or self.image_size < 1 or self.image_size % multiple:
            raise ValueError(
                f"ddpm.image_size {self.image_size} must be a multiple of {multiple}, because of patch {self.patch} "
                f"and {len(self.multipliers)} levels (at least 2)"
            )
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(f"ddpm.base_channels must be even and at least 4, got {self.base_channels}")


@dataclass(frozen=True, kw_only=True)
class DMRE2IConfig:
    """DM-RE2I: EVRNet, then the EEG-guided DDPM in pixel space."""

    dataset: str
    """EEG-image dataset with train and val splits."""
    output: str
    """Run directory. `evrnet/` in it is the first stage's run, `model/` the result."""
    evrnet: EVRNetStage = field(default_factory=EVRNetStage)
    """First stage."""
    evrnet_from: str | None = None
    """EVRNet of an earlier run (`model/evrnet` in it), to use instead of training one."""
    ddpm: EGDDPMStage = field(default_factory=EGDDPMStage)
    """Second stage."""
    val_trials: int = 256
    """Largest number of trials of the val split for the evaluation, evenly spread over the split."""
    num_processes: int = 1
    """Number of processes on all machines together."""
    seed: int = 0
    """Seed for sample order, noise and initial weights."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.val_trials < 2:
            raise ValueError(f"val_trials must be at least 2, got {self.val_trials}")

    @staticmethod
    def free_keys() -> tuple[str, ...]:
        """Return the keys that may change when a run is resumed."""
        # EVRNet's batch norms couple the samples of one forward pass; EG-DDPM has no such layer.
        evrnet = free_keys("evrnet.training", independent_samples=False)
        return (*evrnet, *free_keys("ddpm.training", independent_samples=True))
