"""A small image classifier that recognises the category of generated images.

Papers judge generated images with a network that was trained on ImageNet. The classifier in this module needs no
download, because the classifier is trained on the dataset's training images. The training of the classifier uses no
EEG, no generated images, and no images of the val and test splits.

Array shapes: B images, H rows, W columns, D feature width, K classes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_sharding.common.errors import RequestError, show
from data_sharding.common.progress import progress
from finetune.foreign_models import MAX_SIDE
from pretrain.model.weights import check_network, measure_weights

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Size and training settings of the image classifier."""

    RENAMED: ClassVar[dict[str, str]] = {"batch": "batch_size"}

    steps: int = 250
    """Number of optimiser steps."""
    batch_size: int = 64
    """Number of images in one optimiser step."""
    lr: float = 3e-3
    """Highest learning rate during the training."""
    width: int = 24
    """Number of feature maps of the first convolution. The classifier computes 4 x `width` features for each image."""
    size: int = 32
    """Width and height in pixels to which images are resized; a multiple of 8."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.width < 4 or not self.lr > 0:
            raise ValueError(
                "training.steps must be at least 1, training.batch_size at least 2, training.width at least 4 and "
                f"training.lr above 0, got {self.steps}, {self.batch_size}, {self.width} and {self.lr}"
            )
        if self.size < 16 or self.size % 8:
            raise ValueError(f"training.size must be a multiple of 8 and at least 16, got {self.size}")


class ImageClassifier(nn.Module):
    """Image classifier: four convolutions, the mean and the maximum over all pixels, and two linear layers.

    Parameters
    ----------
    n_classes : int
        Number of classes K.
    width : int
        Number of feature maps of the first convolution.
    size : int
        Width and height of the images in pixels.
    """

    def __init__(self, n_classes: int, width: int = 24, size: int = 32) -> None:
        super().__init__()
        self.n_classes, self.width, self.size = n_classes, width, size
        widths = (3, width, 2 * width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if level < 3:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Linear(8 * width, 4 * width)
        self.head = nn.Linear(4 * width, n_classes)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and class scores.

        Parameters
        ----------
        x_B3HW : Tensor, shape (B, 3, H, W)
            Images with values from -1 to 1; H and W are equal to the classifier's `size`.

        Returns
        -------
        features_BD, logits_BK : Tensor
            Features and class scores.
        """
        h = self.body(x_B3HW)
        features = torch.relu(self.squeeze(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)))
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, images_BHW3: Images, batch: int = 256) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute features and class probabilities of images.

        Parameters
        ----------
        images_BHW3 : ndarray of uint8, shape (B, H, W, 3)
            Square images of any size.
        batch : int
            Number of images in one forward pass.

        Returns
        -------
        features_BD : ndarray, shape (B, D)
            Input of the last layer, used as the features of the images.
        probabilities_BK : ndarray, shape (B, K)
            Class probabilities.
        """
        self.eval()
        features, probabilities = [], []
        for start in range(0, len(images_BHW3), batch):
            f, logits = self(to_input(images_BHW3[start : start + batch], self.size))
            features.append(f.double().numpy())
            probabilities.append(logits.double().softmax(dim=1).numpy())
        return np.concatenate(features), np.concatenate(probabilities)

    def save(self, path: str | Path, metadata: dict[str, str]) -> None:
        """Write the classifier to one safetensors file. Equal weights and equal metadata give a file with equal bytes.

        Parameters
        ----------
        path : str or Path
            File to write.
        metadata : dict of str to str
            Texts to store with the weights, e.g. the dataset's id.
        """
        from safetensors.torch import save

        from data_sharding.common.files import atomic_write_bytes

        shape = {"n_classes": str(self.n_classes), "width": str(self.width), "size": str(self.size)}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        texts = {**metadata, **shape, "kind": "dreamscale-classifier"}
        atomic_write_bytes(path, _sort_header(save(tensors, metadata=texts)))

    @classmethod
    def load(cls, path: str | Path) -> tuple[ImageClassifier, dict[str, str]]:
        """Load a classifier that `save` wrote.

        Parameters
        ----------
        path : str or Path
            File to read.

        Returns
        -------
        classifier : ImageClassifier
            The classifier in evaluation mode.
        metadata : dict of str to str
            Texts that were stored in the file of the weights, such as the id of the dataset.

        Raises
        ------
        RequestError
            If the file is missing or damaged, or is not a classifier.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise RequestError(f"{path}: no such classifier file; leave --classifier out to train a classifier")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != "dreamscale-classifier":
                    raise RequestError(
                        f"{path}: not a classifier written by 'dreamscale evaluate'; leave --classifier out"
                    )
                shape = [int(metadata[name]) for name in ("n_classes", "width", "size")]
                if not 16 <= shape[2] <= MAX_SIDE:
                    raise RequestError(
                        f"{path}: the classifier reads images of {show(shape[2])} pixels, but only 16 to "
                        f"{MAX_SIDE} pixels are allowed; leave --classifier out to train a classifier"
                    )
                check_network(lambda: cls(*shape), measure_weights([path]), path)
                model = cls(*shape)
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=True)  # noqa: SIM118
        except (SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{path}: the classifier is damaged ({error}); delete this file and evaluate again"
            ) from None
        return model.eval(), metadata


def _sort_header(content: bytes) -> bytes:
    """Sort the header of a safetensors file, because the library writes the metadata in a random order."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # Sorting the keys does not change the length of the header's text. The safetensors library pads the header with
    # spaces, so the sorted header is padded with spaces to the same length.
    return content[:8] + header.encode().ljust(length) + content[8 + length :]


def to_input(images_BHW3: Images, size: int) -> Tensor:
    """Convert images of uint8 [B, H, W, 3] to the classifier's input [B, 3, H, W] with values from -1 to 1."""
    x = torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    if x.shape[-1] != size:
        x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return x


def _augment(x_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Augment images: mirror, zoom, shift and blur the images, change colours and contrast, and add noise.

    The classifier must recognise the category of a generated image even if, for example, the colours are wrong.
    """
    b, _, height, width = x_B3HW.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    mirror = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    zoom = uniform(0.85, 1.18)
    matrix = torch.zeros(b, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = mirror * zoom, zoom
    matrix[:, :, 2] = uniform(-0.2, 0.2, 2)
    grid = nn.functional.affine_grid(matrix, [b, 3, height, width], align_corners=False)
    x = nn.functional.grid_sample(x_B3HW, grid, padding_mode="reflection", align_corners=False)
    # Generated objects may have any colour, so the colour channels are mixed to make the classifier learn shapes.
    mixing = torch.softmax(uniform(-3, 3, 3, 3), dim=2)
    x = torch.where((uniform(0, 1) < 0.5)[:, None, None, None], torch.einsum("bij,bjhw->bihw", mixing, x), x)
    x = x * uniform(0.6, 1.3, 1, 1, 1) + uniform(-0.25, 0.25, 1, 1, 1)
    soft = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(0, 1, 1, 1, 1))
    return x + uniform(0, 0.2, 1, 1, 1) * torch.randn(x.shape, generator=generator)


@contextmanager
def _use_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_classifier(
    images_BHW3: Images, labels_B: NDArray[np.integer], n_classes: int, *, config: ClassifierConfig, seed: int
) -> ImageClassifier:
    """Train the image classifier. On one machine, equal arguments give equal weights.

    The training uses one thread, because the rounding of a training step depends on the number of threads.

    Parameters
    ----------
    images_BHW3 : ndarray of uint8, shape (B, H, W, 3)
        Real images, without duplicates.
    labels_B : ndarray of int, shape (B,)
        Classes of the images.
    n_classes : int
        Number of classes K.
    config : ClassifierConfig
        Size and training settings.
    seed : int
        Seed for initial weights, order of images and augmentation of images.

    Returns
    -------
    ImageClassifier
        The trained classifier in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(n_classes, config.width, config.size).train()
    generator = torch.Generator().manual_seed(seed)
    x, y = to_input(images_BHW3, config.size), torch.as_tensor(labels_B).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.long)
    with _use_one_thread(), progress("training the classifier", config.steps) as advance:
        for _ in range(config.steps):
            while len(order) < config.batch_size:
                order = torch.cat([order, torch.randperm(len(x), generator=generator)])
            rows, order = order[: config.batch_size], order[config.batch_size :]
            _, logits = model(_augment(x[rows], generator))
            loss = nn.functional.cross_entropy(logits, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()
    return model.eval()
