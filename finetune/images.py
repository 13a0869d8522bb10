"""Read the images of EEG-image datasets: decode, resize and scale images, and list the different images of a split.

Array shapes: B trials, M different images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath
from data_sharding.common.untrusted import open_image
from data_sharding.dataset.dataset import EEGDataset
from pretrain.runs.versions import find_run_versions

if TYPE_CHECKING:
    import torch


def open_paired(
    path: str | AnyPath, split: str, *, tmin: float | None = None, tmax: float | None = None, version: str = ""
) -> EEGDataset:
    """Open a split in which every trial has an image.

    Trials whose stored EEG does not cover `tmin` to `tmax` are left out, and a message says how many.

    Parameters
    ----------
    path : str, Path or UPath
        Path of the dataset.
    split : str
        Name of the split: train, val or test.
    tmin, tmax : float, optional
        Part of each trial to read, in seconds from the onset of its image (see `EEGDataset`).
    version : str
        Dataset id of the version to read; if empty, the newest version is read.

    Returns
    -------
    EEGDataset
        Trials of the split.

    Raises
    ------
    RequestError
        If the dataset is incomplete, the split does not exist, or a trial has no image.
    """
    dataset = EEGDataset(path, split, tmin=tmin, tmax=tmax, version=version).require_images()
    if dataset.left_out:
        print(
            f"{path} ({split}): {dataset.left_out} trials are left out, because their EEG is not stored from tmin to "
            "tmax"
        )
    return dataset


def open_train_val(
    path: str, part: Mapping[str, float | None], command: str, runs: Sequence[str | Path]
) -> tuple[EEGDataset, EEGDataset]:
    """Open the splits train and val for a training run.

    A resumed run reads the dataset version with which the run began.

    Parameters
    ----------
    path : str
        Path of the dataset.
    part : mapping
        Arguments `tmin` and `tmax` of `open_paired`.
    command : str
        Name of the command, for messages.
    runs : sequence of str or Path
        Run directories of all training stages of the command, with the last stage first.

    Returns
    -------
    train, val : EEGDataset
        Trials of the two splits.

    Raises
    ------
    RequestError
        If `open_paired` refuses a split, or if the dataset version with which the run began can no longer be read.
    """
    version = find_run_versions(runs, [path], command).get(path, "")
    train = open_paired(path, "train", version=version, **part)
    # The dataset may get a new version after the train split is opened, so open the val split in the version of the
    # train split.
    return train, open_paired(path, "val", version=train.manifest.dataset_id, **part)


def decode_image(data: bytes, size: int | None = None, *, name: str = "image") -> np.ndarray:
    """Decode an image file. If `size` is given, cut out the central square and resize the square.

    Parameters
    ----------
    data : bytes
        Content of a PNG, JPEG or WebP file.
    size : int, optional
        Width and height of the result in pixels. None keeps the size of the image.
    name : str
        Name of the image in error messages.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Image in RGB.

    Raises
    ------
    RequestError
        If the image cannot be decoded.
    """
    from PIL import Image

    try:
        image = open_image(data).convert("RGB")
    except OSError as error:
        raise RequestError(
            f"{name}: the image cannot be decoded ({error}); repair the file and make the dataset again"
        ) from None
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image, np.uint8)


def read_caption(meta: Mapping[str, Any]) -> str:
    """Return the caption of a trial's image, or the name of its label if there is no caption."""
    return str(meta.get("caption") or read_label_name(meta))


def read_label_name(meta: Mapping[str, Any]) -> str:
    """Return the name of the label of a trial's image, or a name made from its number."""
    return str(meta.get("label_name") or f"label {meta['label']}")


def to_model_range(pixels_BHW3: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert images from values 0 to 255 to the value range of image models, -1 to 1.

    Parameters
    ----------
    pixels_BHW3 : ndarray or Tensor of uint8, shape (B, H, W, 3)
        Images in RGB.

    Returns
    -------
    Tensor of float32, shape (B, 3, H, W)
        Images with values from -1 to 1.
    """
    import torch

    return torch.as_tensor(pixels_BHW3).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def check_finite(x_B3HW: torch.Tensor, model: object) -> torch.Tensor:
    """Return the images that a model has generated. Raise a `RequestError` if a value is NaN or infinite.

    NaN would become black pixels, so that the images of a damaged model would look like a result.
    """
    if not bool(x_B3HW.isfinite().all()):
        raise RequestError(
            f"{model}: the generated images have NaN or infinite values, so the weights are damaged; get the model "
            "again from its source, or train it again"
        )
    return x_B3HW


def to_pixels(x_B3HW: torch.Tensor) -> np.ndarray:
    """Convert a model's images to 8-bit images with values from 0 to 255.

    Parameters
    ----------
    x_B3HW : Tensor, shape (B, 3, H, W)
        Images with values from -1 to 1; values outside this range are clipped.

    Returns
    -------
    ndarray of uint8, shape (B, H, W, 3)
        Images in RGB.
    """
    return x_B3HW.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class ImageTable:
    """Table of the different images of a split. An image that several trials show has only one row.

    Parameters
    ----------
    dataset : EEGDataset
        A split with images.

    Attributes
    ----------
    ids : list of str
        Image id of each row of the table; the rows are sorted by this id.
    labels : ndarray of int, shape (M,)
        Label of the image in each row.
    captions : list of str
        Caption of the image in each row. If an image has no caption, the name of its label is used.
    label_names : list of str
        Name of the label of the image in each row.
    row_of : ndarray of int, shape (trials,)
        For each trial of the dataset, the row of its image.

    Raises
    ------
    RequestError
        If a trial has no image, no image id or no label.
    """

    def __init__(self, dataset: EEGDataset) -> None:
        self.dataset = dataset.require_images()
        trials = dataset.trials
        ids, codes, labels = trials.values("image_id"), trials.codes("image_id"), trials.numbers("label")
        missing = np.array([image_id is None for image_id in ids])[codes] | (labels < 0)
        if missing.any():
            raise RequestError(
                f"{dataset.path}: sample {dataset.key(int(missing.argmax()))} has no image_id or label; make the "
                "dataset again"
            )
        row_of_code = np.zeros(len(ids), np.int64)
        used = sorted(np.unique(codes).tolist(), key=lambda code: str(ids[code]))
        row_of_code[used] = np.arange(len(used))
        self.ids = [str(ids[code]) for code in used]
        self.row_of = row_of_code[codes]
        self._first = np.unique(self.row_of, return_index=True)[1].tolist()
        self._grouped: dict[bool, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.labels = labels[self._first]
        metas = [
            {"caption": trials.text("caption", n), "label_name": trials.text("label_name", n), "label": labels[n]}
            for n in self._first
        ]
        self.captions = [read_caption(meta) for meta in metas]
        self.label_names = [read_label_name(meta) for meta in metas]

    def __len__(self) -> int:
        return len(self.ids)

    def _same_image(self, within_person: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group trials with the same image and channels, and perhaps of the same person.

        Three arrays: the group of each trial, the trials sorted by group, and the position of each group's first trial
        among the sorted trials.
        """
        if within_person not in self._grouped:
            person = ("corpus", "subject") if within_person else ()
            group = self.dataset.trials.group("image_id", "ch_names", *person)
            order = np.argsort(group, kind="stable")
            first = np.searchsorted(group[order], np.arange(group.max() + 2))
            self._grouped[within_person] = group, order, first
        return self._grouped[within_person]

    def companions(self, number: int, *, within_person: bool = False) -> list[int]:
        """List the other trials with the same image and the same channels as a trial.

        Parameters
        ----------
        number : int
            Number of the trial.
        within_person : bool
            True: list only trials of the same person.

        Returns
        -------
        list of int
            Numbers of the other trials, in order.
        """
        group, order, first = self._same_image(within_person)
        found = order[first[group[number]] : first[group[number] + 1]]
        return found[found != number].tolist()

    def pixels(self, rows: Any = None, size: int | None = None) -> np.ndarray:
        """Decode images of the table.

        Parameters
        ----------
        rows : sequence of int, optional
            Rows whose images are decoded; by default, all rows.
        size : int, optional
            Width and height of the decoded images in pixels. If no size is given, all images must have the same size.

        Returns
        -------
        ndarray of uint8, shape (B, H, W, 3)
            Images in RGB.

        Raises
        ------
        RequestError
            If an image cannot be decoded, or the images differ in size and no size was given.
        """
        out = self.decode(range(len(self)) if rows is None else rows, size)
        if len({image.shape for image in out}) > 1:
            raise RequestError(
                f"{self.dataset.path}: the images have different sizes; give the size to which the images are resized"
            )
        return np.stack(out)

    def read_files(self, rows: Iterable[int]) -> Iterator[bytes]:
        """Read the stored image files of some rows of the table."""
        return (self.dataset.image(self._first[row]) for row in rows)

    def decode(self, rows: Any, size: int | None = None) -> list[np.ndarray]:
        """Decode images of the table as `pixels` does; without `size`, the images may have different sizes."""
        numbers = [self._first[row] for row in rows]
        return [
            decode_image(self.dataset.image(n), size, name=f"{self.dataset.path}: sample {self.dataset.key(n)}")
            for n in numbers
        ]


def find_components(train_MHW3: np.ndarray, val_MHW3: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the principal components of the images' pixels.

    Parameters
    ----------
    train_MHW3, val_MHW3 : ndarray of uint8, shape (M, H, W, 3)
        Images of the train split, from which the principal components are computed, and images of the val split.
    components : int
        Largest number P of components.

    Returns
    -------
    train_MP, val_MP : ndarray of float32, shape (M, P)
        Principal components of the images, whose pixels are scaled to values from -1 to 1. Each component has mean 0
        over the train images.
    """
    train_MX, val_MX = (x.reshape(len(x), -1).astype(np.float32) / 127.5 - 1 for x in (train_MHW3, val_MHW3))
    mean_X = train_MX.mean(axis=0)
    _, _, basis = np.linalg.svd(train_MX - mean_X, full_matrices=False)
    basis_PX = basis[:components]
    # The sign of a principal component is arbitrary, and can depend on the CPU. Make the sign of each component the
    # same on all processes.
    largest = np.take_along_axis(basis_PX, np.abs(basis_PX).argmax(axis=1)[:, None], axis=1)
    basis_PX = basis_PX * np.sign(largest)
    return (train_MX - mean_X) @ basis_PX.T, (val_MX - mean_X) @ basis_PX.T


class TableImages:
    """Images of chosen rows of a table; an image is decoded each time it is read.

    Parameters
    ----------
    table : ImageTable
        The table.
    rows : ndarray of int, shape (B,)
        Row of each image; a row may be chosen several times.
    size : int
        Width and height of the decoded images in pixels.
    """

    def __init__(self, table: ImageTable, rows: np.ndarray, size: int) -> None:
        self.table, self.rows, self.size = table, np.asarray(rows), size

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers B, H, W and 3."""
        return len(self.rows), self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Return one image for a number, and several images for a slice."""
        chosen = self.rows[rows]
        return (
            self.table.pixels([int(chosen)], self.size)[0] if chosen.ndim == 0 else self.table.pixels(chosen, self.size)
        )
