"""Inception-V3 in the variant with which the FID, the KID and the Inception Score are defined.

The structure differs from Inception-V3 of torchvision: average pooling ignores padding, the last block has a maximum
pooling, and images are resized as in TensorFlow 1. The names of the layers are those of the file
``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid, which holds the weights of the original TensorFlow graph.

Tensor shapes: B images, H rows, W columns, C channels, D = 2048 width of the embedding, K = 1008 classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from data_sharding.common.files import sha256_file
from finetune.evaluation.networks.network import FrozenNetwork, to_unit_range
from finetune.evaluation.networks.weights import fill_network, read_arrays
from finetune.evaluation.pixel_metrics import Images

NAME = "inception-v3"
SIDE = 299
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""Name of the published file of weights."""
SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
"""Address of the published file of weights."""

Kernel = int | tuple[int, int]
Step = tuple[tuple[str, int, Kernel], ...]
"""Convolutions (name, output channels, kernel) that read the same input; their outputs are concatenated."""


class BasicConv2d(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Compute the layer."""
        return torch.relu(self.bn(self.conv(x_BCHW)))


class Mixed(nn.Module):
    """Block of Inception: concatenated outputs of several chains of convolutions and of one pooling of the same input.

    Parameters
    ----------
    inputs : int
        Number of input channels.
    chains : list of list of Step
        Chains of convolutions.
    pool : str
        ``average`` or ``maximum`` (followed by a convolution), or ``reduce``: a maximum pooling with stride 2 and no
        convolution. With ``reduce``, the last convolution of each chain has stride 2 and no padding.
    pool_features : int
        Number of output channels of the convolution that follows the pooling.
    """

    def __init__(self, inputs: int, chains: list[list[Step]], pool: str, pool_features: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.names: list[list[list[str]]] = []
        self.outputs = inputs if pool == "reduce" else pool_features
        for chain in chains:
            channels = inputs
            for number, step in enumerate(chain):
                reduces = pool == "reduce" and number == len(chain) - 1
                for name, outputs, kernel in step:
                    self.add_module(name, BasicConv2d(channels, outputs, kernel, 2 if reduces else 1, not reduces))
                channels = sum(outputs for _, outputs, _ in step)
            self.names.append([[name for name, _, _ in step] for step in chain])
            self.outputs += channels
        if pool != "reduce":
            self.branch_pool = BasicConv2d(inputs, pool_features, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Compute the block."""
        parts = []
        for chain in self.names:
            x = x_BCHW
            for names in chain:
                x = torch.cat([self.get_submodule(name)(x) for name in names], dim=1)
            parts.append(x)
        if self.pool == "reduce":
            parts.append(nn.functional.max_pool2d(x_BCHW, 3, stride=2))
        elif self.pool == "maximum":
            parts.append(self.branch_pool(nn.functional.max_pool2d(x_BCHW, 3, stride=1, padding=1)))
        else:
            pooled = nn.functional.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)
            parts.append(self.branch_pool(pooled))
        return torch.cat(parts, dim=1)


def _chain(prefix: str, *layers: tuple[int, Kernel]) -> list[Step]:
    """Return a chain of convolutions, whose names consist of the prefix and the numbers 1, 2 and so on."""
    return [((f"{prefix}_{number}", outputs, kernel),) for number, (outputs, kernel) in enumerate(layers, 1)]


def _mixed_a(inputs: int, pool_features: int) -> Mixed:
    chains = [
        [(("branch1x1", 64, 1),)],
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
    ]
    return Mixed(inputs, chains, "average", pool_features)


def _mixed_b(inputs: int) -> Mixed:
    return Mixed(inputs, [[(("branch3x3", 384, 3),)], _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))], "reduce")


def _mixed_c(inputs: int, width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    chains = [
        [(("branch1x1", 192, 1),)],
        _chain("branch7x7", (width, 1), (width, row), (192, column)),
        _chain("branch7x7dbl", (width, 1), (width, column), (width, row), (width, column), (192, row)),
    ]
    return Mixed(inputs, chains, "average", 192)


def _mixed_d(inputs: int) -> Mixed:
    chains = [
        _chain("branch3x3", (192, 1), (320, 3)),
        _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
    ]
    return Mixed(inputs, chains, "reduce")


def _mixed_e(inputs: int, pool: str) -> Mixed:
    def split(prefix: str) -> Step:
        return (f"{prefix}a", 384, (1, 3)), (f"{prefix}b", 384, (3, 1))

    chains = [
        [(("branch1x1", 320, 1),)],
        [*_chain("branch3x3", (384, 1)), split("branch3x3_2")],
        [*_chain("branch3x3dbl", (448, 1), (384, 3)), split("branch3x3dbl_3")],
    ]
    return Mixed(inputs, chains, pool, 192)


class InceptionV3(nn.Module):
    """Inception-V3 in the variant with which the FID is defined.

    References
    ----------
    Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016. The structure is that of
    torch-fidelity and pytorch-fid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        self.Mixed_6a = _mixed_b(288)
        self.Mixed_6b, self.Mixed_6c = _mixed_c(768, 128), _mixed_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _mixed_c(768, 160), _mixed_c(768, 192)
        self.Mixed_7a = _mixed_d(768)
        self.Mixed_7b, self.Mixed_7c = _mixed_e(1280, "average"), _mixed_e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the embeddings [B, 2048] and the class scores [B, 1008] of prepared images.

        The class scores leave out the bias of the last layer, as in the definition of the Inception Score.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_B3HW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(nn.functional.max_pool2d(x, 3, stride=2)))
        x = nn.functional.max_pool2d(x, 3, stride=2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        embedding_BD = x.mean(dim=(2, 3))
        return embedding_BD, embedding_BD @ self.fc.weight.T


def resize_as_tensorflow(x_BCHW: Tensor, side: int) -> Tensor:
    """Resize images to a square by the bilinear interpolation of TensorFlow 1, without antialiasing.

    Row i of the output is read at row i x (input rows) / (output rows) of the input, and columns in the same way.
    `torch.nn.functional.interpolate` has no mode that reads the input at the same positions as TensorFlow 1.
    """
    for dimension in (2, 3):
        length = x_BCHW.shape[dimension]
        place = torch.arange(side, dtype=torch.float32) * (length / side)
        low = place.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).view([-1 if d == dimension else 1 for d in range(4)])
        below, above = x_BCHW.index_select(dimension, low), x_BCHW.index_select(dimension, high)
        x_BCHW = below + (above - below) * share
    return x_BCHW


def prepare_images(images_BHW3: Images) -> Tensor:
    """Resize original images to 299 x 299 pixels as TensorFlow 1 does, and scale the values to -1 to 1."""
    return (resize_as_tensorflow(to_unit_range(images_BHW3) * 255, SIDE) - 128) / 128


def load_inception(path: str | Path) -> FrozenNetwork:
    """Load Inception-V3 in the variant with which the FID is defined.

    Parameters
    ----------
    path : str or Path
        File `WEIGHTS` of pytorch-fid, or a safetensors file with the same names.

    Returns
    -------
    FrozenNetwork
        The network with its weights.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or holds the weights of another network.
    """
    network = fill_network(InceptionV3(), read_arrays(path), path)
    return FrozenNetwork(
        name=NAME, file=str(path), sha256=sha256_file(path), prepare=prepare_images, compute=network, batch=16
    )
