"""EVRNet: a network that computes a semantic feature and class scores for each EEG trial.

Tensor shapes: B batch, C channels (electrodes), T time points, D feature width, K classes, F feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.dm_re2i.classifier import EEGClassifier


@dataclass(frozen=True, kw_only=True)
class EVRNetConfig:
    """Sizes of an EVRNet. The default sizes are those of the published network."""

    n_classes: int = 40
    """Number of classes, K."""
    n_channels: int = 128
    """Number of EEG channels, C."""
    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Numbers of feature maps after the two temporal, the two spatial, and the temporal-spatial (TS) convolution. The
    last number of feature maps is also the width of the semantic feature."""
    multi_kernels: tuple[int, int] = (3, 5)
    """Kernel sizes of the two convolutions in each multi-kernel residual block."""
    skip: Literal["input", "y0"] = "input"
    """Start of the second skip connection of a multi-kernel residual block. input: the block's input, as in the paper.
    y0: the output of the block's first half, as in two ordinary residual blocks in sequence."""
    mkrb: bool = True
    """False leaves out both multi-kernel residual blocks, unlike the paper."""
    dropout: float = 0.0
    """Dropout rate of the semantic feature before the linear layer. The paper uses no dropout."""
    noise_normalisation: bool = False
    """Multiply the channels by a fixed matrix first, to whiten the background activity, unlike the paper."""

    def __post_init__(self) -> None:
        if len(self.widths) != 5 or min(self.widths) < 1:
            raise ValueError(f"widths must be five positive numbers, not {self.widths}")
        if len(self.multi_kernels) != 2 or any(k < 1 or k % 2 == 0 for k in self.multi_kernels):
            raise ValueError(f"multi_kernels must be two odd numbers, not {self.multi_kernels}")
        if self.skip not in ("input", "y0"):
            raise ValueError(f"skip must be input or y0, not {self.skip}")
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be 2 or more, not {self.n_classes}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


def _conv_block(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU. Along an axis with stride 2, the output has half the length."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    # The convolution has no bias, because batch norm would remove it. The published number of parameters does not count
    # biases of convolutions.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class MKRB(nn.Module):
    """Multi-kernel residual block: two convolutions, each with a skip connection.

    ``y0 = ReLU(ReLU(BN(Conv3x3(v))) + v)``, ``y = ReLU(ReLU(BN(Conv5x5(y0))) + v)``. In the paper, both skip
    connections start at the block's input `v`. With ``skip="y0"``, the second connection starts at `y0`, as in two
    ordinary residual blocks.

    Parameters
    ----------
    width : int
        Number of feature maps at input and output.
    kernels : tuple of int
        Sizes of the two kernels.
    skip : str
        Start of the second skip connection of a block: input or y0.
    """

    def __init__(self, width: int, kernels: tuple[int, int] = (3, 5), skip: str = "input") -> None:
        super().__init__()
        small, large = kernels
        self.small = _conv_block(width, width, (small, small), (1, 1))
        self.large = _conv_block(width, width, (large, large), (1, 1))
        self.skip = skip

    def forward(self, v_BFCT: Tensor) -> Tensor:
        """Apply the residual block.

        Parameters
        ----------
        v_BFCT : Tensor, shape (B, F, C, T)
            Input feature maps.

        Returns
        -------
        Tensor, shape (B, F, C, T)
            Output feature maps.
        """
        y0_BFCT = torch.relu(self.small(v_BFCT) + v_BFCT)
        return torch.relu(self.large(y0_BFCT) + (v_BFCT if self.skip == "input" else y0_BFCT))


class EVRNet(EEGClassifier):
    """Compute a semantic feature from EEG, with temporal, spatial and joint convolutions and two multi-kernel blocks.

    Parameters
    ----------
    config : EVRNetConfig, optional
        Sizes of the network. The default is the published network, which has 3,700,040 parameters.

    References
    ----------
    Zeng et al., "DM-RE2I: A framework based on diffusion model for the reconstruction from EEG to image",
    Biomedical Signal Processing and Control 86 (2023) 105125.
    """

    KIND = "evrnet"
    CONFIG = EVRNetConfig

    def __init__(self, config: EVRNetConfig | None = None) -> None:
        config = config or EVRNetConfig()
        super().__init__(config)
        w1, w2, w3, w4, w5 = config.widths
        self.temporal = nn.Sequential(_conv_block(1, w1, (1, 3), (1, 2)), _conv_block(w1, w2, (1, 3), (1, 2)))
        self.temporal_mkrb = self._make_mkrb(w2)
        self.spatial = nn.Sequential(_conv_block(w2, w3, (3, 1), (2, 1)), _conv_block(w3, w4, (3, 1), (2, 1)))
        self.spatial_mkrb = self._make_mkrb(w4)
        self.ts = _conv_block(w4, w5, (3, 3), (2, 2))
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(w5, config.n_classes)

    def _make_mkrb(self, width: int) -> nn.Module:
        config = self.config
        return MKRB(width, config.multi_kernels, config.skip) if config.mkrb else nn.Identity()

    @property
    def dim(self) -> int:
        """Width D of the semantic feature."""
        return self.config.widths[-1]

    def embed(self, x_B1CT: Tensor) -> Tensor:
        """Compute the semantic feature of each trial, [B, D]."""
        h = self.temporal_mkrb(self.temporal(x_B1CT))
        h = self.spatial_mkrb(self.spatial(h))
        return self.ts(h).mean(dim=(2, 3))

    def classify(self, e_BD: Tensor) -> Tensor:
        """Compute the class scores [B, K] from semantic features."""
        return self.fc(self.dropout(e_BD))
