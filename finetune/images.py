"""Trials with their images: decoding, sizes and ranges, one row an image however often it was seen.

Shapes: B trials, M different images, H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.dataset.dataset import EEGDataset

if TYPE_CHECKING:
    import torch


def open_paired(path: str | Path, split: str) -> EEGDataset:
    """Open a split in which every trial has an image.

    Parameters
    ----------
    path : str or Path
        The dataset.
    split : str
        train, val or test.

    Returns
    -------
    EEGDataset
        The split.

    Raises
    ------
    RequestError
        If there is no complete dataset, no such split, or a trial has no image.
    """
    return EEGDataset(path, split).require_images()


def decode_image(data: bytes, size: int | None = None, *, name: str = "image") -> np.ndarray:
    """Decode an image file, cut its central square and bring it to a size.

    Parameters
    ----------
    data : bytes
        PNG, JPEG or WebP.
    size : int, optional
        Pixels of a side; as it is where None.
    name : str
        What it is called in a message.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        RGB.

    Raises
    ------
    RequestError
        If it cannot be decoded.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:
        raise RequestError(f"{name}: the image cannot be decoded ({error}); mend it and shard again") from None
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image, np.uint8)


def to_model_range(pixels_BHW3: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Bring bytes to what image models see.

    Parameters
    ----------
    pixels_BHW3 : ndarray or Tensor of uint8, shape (B, H, W, 3)
        RGB.

    Returns
    -------
    Tensor of float32, shape (B, 3, H, W)
        From -1 to 1.
    """
    import torch

    return torch.as_tensor(pixels_BHW3).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pixels(x_B3HW: torch.Tensor) -> np.ndarray:
    """Bring a model's images to bytes.

    Parameters
    ----------
    x_B3HW : Tensor, shape (B, 3, H, W)
        From -1 to 1; what lies beyond is limited, as a screen would.

    Returns
    -------
    ndarray of uint8, shape (B, H, W, 3)
        RGB.
    """
    return x_B3HW.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class ImageTable:
    """The different images of a split: several subjects saw the same one, and it is worth decoding once.

    Parameters
    ----------
    dataset : EEGDataset
        A split with images.

    Attributes
    ----------
    ids : list of str
        Image ids, one a row, sorted.
    labels : ndarray of int, shape (M,)
        Label of each image.
    captions : list of str
        Caption of each; its label's name where it has none.
    row_of : ndarray of int, shape (trials,)
        Row of each trial's image, by the trial's number in the dataset.
    companions : list of list of int
        For each trial, the other trials of the same image under the same channels.

    Raises
    ------
    RequestError
        If a trial has no image or no image id.
    """

    def __init__(self, dataset: EEGDataset) -> None:
        self.dataset = dataset.require_images()
        metas = [dataset.meta(number) for number in range(len(dataset))]
        missing = next((n for n, m in enumerate(metas) if not {"image_id", "label"} <= m.keys()), None)
        if missing is not None:
            raise RequestError(
                f"{dataset.path}: sample {dataset.key(missing)} has no image_id or label; shard it again"
            )
        first: dict[str, int] = {}
        for number, meta in enumerate(metas):
            first.setdefault(meta["image_id"], number)
        self.ids = sorted(first)
        self._first = [first[i] for i in self.ids]
        rows = {image_id: row for row, image_id in enumerate(self.ids)}
        self.row_of = np.array([rows[meta["image_id"]] for meta in metas])
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        alike = [(int(row), tuple(meta["ch_names"])) for row, meta in zip(self.row_of, metas, strict=True)]
        for number, what in enumerate(alike):
            groups.setdefault(what, []).append(number)
        self.companions = [[n for n in groups[what] if n != number] for number, what in enumerate(alike)]
        self.labels = np.array([int(metas[n]["label"]) for n in self._first])
        self.captions = [
            str(metas[n].get("caption") or metas[n].get("label_name") or f"label {metas[n]['label']}")
            for n in self._first
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, rows: Any = None, size: int | None = None) -> np.ndarray:
        """Decode images.

        Parameters
        ----------
        rows : sequence of int, optional
            Which; all of them by default.
        size : int, optional
            Pixels of a side; without it all images must have one size.

        Returns
        -------
        ndarray of uint8, shape (B, H, W, 3)
            RGB.

        Raises
        ------
        RequestError
            If an image cannot be decoded, or sizes differ and none was asked for.
        """
        out = []
        for row in range(len(self)) if rows is None else rows:
            number = self._first[row]
            name = f"{self.dataset.path}: sample {self.dataset.key(number)}"
            out.append(decode_image(self.dataset.image(number), size, name=name))
        if len({image.shape for image in out}) > 1:
            raise RequestError(f"{self.dataset.path}: images of different sizes; name the size to bring them to")
        return np.stack(out)

    def features(
        self,
        compute: Callable[[np.ndarray], torch.Tensor],
        *,
        size: int | None,
        key: dict[str, Any],
        cache: str | Path | None = None,
        batch_size: int = 64,
        write: bool = True,
    ) -> torch.Tensor:
        """Compute something of every image once, and keep it on disk.

        Parameters
        ----------
        compute : callable
            Takes uint8 [B, H, W, 3], gives a tensor [B, ...].
        size : int or None
            Size to which images are brought.
        key : dict
            What the result depends on besides the images, e.g. the model's path and checksum.
        cache : str or Path, optional
            Directory for the result; nothing is kept without it.
        batch_size : int
            Images at a time.
        write : bool
            False on every rank but the first.

        Returns
        -------
        Tensor, shape (M, ...)
            On the CPU, one row an image.
        """
        import torch
        from safetensors.torch import load_file, save_file

        manifest = self.dataset.manifest
        digest = digest_of({**key, "dataset": manifest.dataset_id, "split": self.dataset.split, "size": size})
        path = Path(cache) / f"{digest[:16]}.safetensors" if cache is not None else None
        if path is not None and path.is_file():
            return load_file(path)["features"]
        parts = []
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            parts.append(compute(self.pixels(rows, size)).detach().cpu())
        features = torch.cat(parts).contiguous()
        if path is not None and write:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({"features": features}, temporary)
            temporary.replace(path)
        return features
