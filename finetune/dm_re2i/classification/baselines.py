"""Networks with which EVRNet is compared: EEGNet, TSConv, and a pretrained encoder with a linear head.

The networks in this module have the same interface as EVRNet, so each of them can guide EG-DDPM.

Tensor shapes: B trials, C channels, T time points, D feature width, K classes, N encoder tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.training.module_files import load_module, save_module
from pretrain.encoder.encoder import EEGEncoder
from pretrain.probe.eegnet import EEGNet


@dataclass(frozen=True, kw_only=True)
class ConvolutionConfig:
    """Sizes of an EEGNet or a TSConv."""

    n_classes: int
    """Number of classes, K."""
    n_channels: int
    """Number of EEG channels, C."""
    n_times: int
    """Number of time points of a trial, T."""
    sfreq: float
    """Sampling rate in Hz, from which the lengths of the filters follow."""
    dropout: float
    """Dropout rate."""
    noise_normalisation: bool = False
    """Multiply the channels by a fixed matrix first, to whiten the background activity."""

    def __post_init__(self) -> None:
        if self.n_classes < 2 or min(self.n_channels, self.n_times) < 1 or not self.sfreq > 0:
            raise ValueError("need n_classes >= 2, n_channels >= 1, n_times >= 1 and sfreq > 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class EEGNetClassifier(EEGClassifier):
    """EEGNet-8,2 (Lawhern et al. 2018), also used in `pretrain.probe`; the feature is the input of its linear layer.

    Parameters
    ----------
    config : ConvolutionConfig
        Sizes of the network.
    """

    KIND = "eegnet"
    CONFIG = ConvolutionConfig

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.net = EEGNet(config.n_channels, config.n_times, config.sfreq, config.n_classes, config.dropout)

    @property
    def dim(self) -> int:
        """Width D of the feature."""
        return self.net.head.in_features

    def embed(self, x_B1CT: Tensor) -> Tensor:
        """Compute the feature of each trial, [B, D]."""
        return self.net.features(x_B1CT)

    def classify(self, e_BD: Tensor) -> Tensor:
        """Compute the class scores [B, K] from features."""
        return self.net.head(e_BD)

    def limit_norms(self) -> None:
        """Limit the norms of the spatial filters and of the linear layer, as in the article on EEGNet."""
        self.net.limit_norms()


class TSConv(EEGClassifier):
    """TSConv, the temporal-spatial convolution with which NICE encodes EEG, with a linear layer.

    In NICE, a projector maps the feature to CLIP's space; in this class, a linear layer maps the feature to class
    scores. At 250 Hz, the filters have the published numbers of time points. At any other sampling rate, the filters
    have the same durations in seconds.

    Parameters
    ----------
    config : ConvolutionConfig
        Sizes of the network.

    Raises
    ------
    ValueError
        If a trial is shorter than the filters.

    References
    ----------
    Song et al., "Decoding Natural Images from EEG for Object Recognition", ICLR 2024, and its released code.
    """

    KIND = "tsconv"
    CONFIG = ConvolutionConfig
    WIDTH = 40

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        # At 250 Hz, each filter has 25 time points, and the pooling computes means over 51 time points in steps of 5.
        kernel, pool, stride = (max(1, round(samples / 250 * config.sfreq)) for samples in (25, 51, 5))
        if (shortest := kernel + pool - 1) > config.n_times:
            raise ValueError(
                f"TSConv needs trials of {shortest} or more time points at {config.sfreq:g} Hz, not {config.n_times}"
            )
        self.positions = (config.n_times - shortest) // stride + 1
        self.net = nn.Sequential(
            nn.Conv2d(1, self.WIDTH, (1, kernel)),
            nn.AvgPool2d((1, pool), (1, stride)),
            nn.BatchNorm2d(self.WIDTH),
            nn.ELU(),
            nn.Conv2d(self.WIDTH, self.WIDTH, (config.n_channels, 1)),
            nn.BatchNorm2d(self.WIDTH),
            nn.ELU(),
            nn.Dropout(config.dropout),
            nn.Conv2d(self.WIDTH, self.WIDTH, 1),
        )
        self.fc = nn.Linear(self.dim, config.n_classes)

    @property
    def dim(self) -> int:
        """Width D of the feature."""
        return self.WIDTH * self.positions

    def embed(self, x_B1CT: Tensor) -> Tensor:
        """Compute the feature of each trial, [B, D]: the outputs of the 40 filters, one time point after another."""
        return self.net(x_B1CT)[:, :, 0].transpose(1, 2).flatten(1)

    def classify(self, e_BD: Tensor) -> Tensor:
        """Compute the class scores [B, K] from features."""
        return self.fc(e_BD)


@dataclass(frozen=True, kw_only=True)
class EncoderClassifierConfig:
    """Sizes of an encoder with a linear head."""

    n_classes: int
    """Number of classes, K."""
    n_channels: int
    """Number of rows of a padded trial."""
    n_times: int
    """Number of time points of a trial, T."""
    dim: int
    """Width of the encoder's tokens, D."""
    dropout: float = 0.0
    """Dropout rate of the feature before the linear head."""
    train_encoder: bool = False
    """True: the encoder is trained together with the head. False: the encoder is frozen."""
    noise_normalisation: bool = False
    """Noise normalisation is always off, because the encoder was pretrained on EEG that was not whitened."""


class EncoderClassifier(EEGClassifier):
    """A pretrained encoder with a linear head. The feature is the mean of the encoder's tokens.

    Parameters
    ----------
    config : EncoderClassifierConfig
        Sizes of the network.
    encoder : EEGEncoder
        Encoder without a head.
    """

    KIND = "encoder_classifier"
    CONFIG = EncoderClassifierConfig

    def __init__(self, config: EncoderClassifierConfig, encoder: EEGEncoder) -> None:
        super().__init__(config)
        self.encoder = encoder.requires_grad_(config.train_encoder)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.dim, config.n_classes)

    @property
    def dim(self) -> int:
        """Width D of the feature."""
        return self.config.dim

    def scaling(self, spec: PreprocessSpec) -> EEGEncoder:
        """Return the encoder, because the encoder scales trials as in its pretraining."""
        return self.encoder

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.config.train_encoder:
            self.encoder.eval()
        return self

    def embed(self, x_B1CT: Tensor) -> Tensor:
        """Compute the mean token of each trial, [B, D]."""
        return self.encoder.tokens(x_B1CT[:, 0]).mean(dim=1)

    def classify(self, e_BD: Tensor) -> Tensor:
        """Compute the class scores [B, K] from features."""
        return self.fc(self.dropout(e_BD))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head to config.json and model.safetensors, and the encoder package to the folder ``encoder``."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder / "encoder")
        save_module(self.fc, self.config, folder, self.KIND)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a network that `save_pretrained` wrote, in evaluation mode.

        Raises
        ------
        RequestError
            If a file is missing or damaged, or the encoder does not fit the head.
        """
        folder = Path(folder)
        head: Any = load_module(_Head, EncoderClassifierConfig, folder, cls.KIND)
        encoder, config = EEGEncoder.from_pretrained(folder / "encoder"), head.config
        found = (encoder.dim, encoder.config.channels, encoder.n_times)
        if encoder.head is not None or found != (config.dim, config.n_channels, config.n_times):
            raise RequestError(f"{folder}: the sizes of the encoder do not fit its linear head; train the model again")
        model = cls(config, encoder)
        model.fc.load_state_dict(head.state_dict())
        return model.eval()


class _Head(nn.Linear):
    """The linear head alone, without the encoder, as `EncoderClassifier.save_pretrained` stores the head."""

    def __init__(self, config: EncoderClassifierConfig) -> None:
        super().__init__(config.dim, config.n_classes)
        self.config = config
