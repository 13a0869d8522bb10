"""Judge real images that nobody saw in the trials, as if a generator had made these images.

By default, these other images are images of the training split. If there are other images of every category of the
trials, each image that a person saw is paired with another image of its category, and all metrics are computed as for
generated images. If a category of the trials has no other images, only the metrics that compare whole sets of images,
such as the FID, are computed.

Array shapes: B trials, M different seen images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.common.untrusted import MAX_IMAGE, read_limited
from finetune.evaluation.generated import ImageFiles
from finetune.evaluation.measure import MeasureOptions, measure
from finetune.evaluation.networks.judges import Judges, RealImages, measure_other_set
from finetune.evaluation.pixel_metrics import ImageRows, Images, ImageSource
from finetune.images import ImageTable, TableImages, decode_image
from pretrain.evidence.rules import NotApplicable

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the names of image files that are read from a folder."""


class ResizedFiles(ImageFiles):
    """Images in files; an image is decoded and resized each time it is read, so that all images have the same size."""

    def _read(self, file: Path) -> Images:
        return decode_image(_read(file), self.size[0], name=str(file))


def _read(file: Path) -> bytes:
    try:
        return read_limited(file, MAX_IMAGE)
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}; check the folder of the key 'real_images'") from None


@dataclass(frozen=True, kw_only=True)
class OtherImages:
    """Real images that nobody saw in the evaluated trials."""

    source: str
    """Where the images come from, as a phrase for reports."""
    images_MHW3: ImageSource
    """The images; each different image once."""
    labels_M: NDArray[np.int64]
    """Category of each image; -1 for an unknown category."""


def take_training_images(
    table: ImageTable, seen_ids: Iterable[str], copies: Iterable[tuple[str, str]], size: int
) -> OtherImages | NotApplicable:
    """Take the training images that nobody saw in the trials and that have no copy with another name.

    Parameters
    ----------
    table : ImageTable
        Images of the training split.
    seen_ids : iterable of str
        Ids of the images that people saw in the evaluated trials.
    copies : iterable of (str, str)
        Pairs of ids of the same image, from `pretrain.evidence.copies.find_copies`.
    size : int
        Width and height of the images in pixels.

    Returns
    -------
    OtherImages or NotApplicable
        The images, or a text that says why there are no images.
    """
    left_out = set(seen_ids).union(*copies)
    rows_M = np.array([row for row, name in enumerate(table.ids) if name not in left_out], np.int64)
    if len(rows_M) < 2:
        return NotApplicable(reason="the training split has fewer than two images that were not seen and have no copy")
    return OtherImages(
        source="images of the training split",
        images_MHW3=TableImages(table, rows_M, size),
        labels_M=table.labels[rows_M],
    )


def hash_images(table: ImageTable, ids: Iterable[str]) -> set[str]:
    """Return the SHA-256 of the files of the images in `table` that have one of the given ids."""
    wanted = set(ids)
    rows = [row for row, name in enumerate(table.ids) if name in wanted]
    return {hashlib.sha256(data).hexdigest() for data in table.read_files(rows)}


def read_folder(folder: str | Path, labels: Sequence[str], seen: set[str], size: int) -> OtherImages:
    """Read real images from a folder of the user.

    Parameters
    ----------
    folder : str or Path
        Folder of images. If a subfolder's name is a label of the dataset, the images in the subfolder have this
        category. The category of all remaining images is unknown.
    labels : sequence of str
        Labels of the dataset.
    seen : set of str
        SHA-256 of the files of the images that people saw in the trials. Files in the folder with one of these
        checksums are left out.
    size : int
        Width and height of the images in pixels.

    Returns
    -------
    OtherImages
        The images. Of several equal files, only the first is kept.

    Raises
    ------
    RequestError
        If there is no such folder, or if it has fewer than two different images.
    """
    if not Path(folder).is_dir():
        raise RequestError(f"{folder}: no such folder; set the key 'real_images' to a folder of images")
    number_of = {name: number for number, name in enumerate(labels)}
    files, found, known = [], [], set(seen)
    for file in sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()):
        digest = hashlib.sha256(_read(file)).hexdigest()
        if digest not in known:
            known.add(digest)
            files.append(file)
            found.append(number_of.get(file.parent.name, -1))
    if len(files) < 2:
        raise RequestError(
            f"{folder}: needs at least 2 images ({', '.join(ENDINGS)}) that were not seen in the trials and are not "
            f"equal to another file; found {len(files)}"
        )
    return OtherImages(
        source=f"images of the folder {Path(folder).name}",
        images_MHW3=ResizedFiles(files, (size, size, 3)),
        labels_M=np.array(found, np.int64),
    )


def choose_of_category(other: OtherImages, real: RealImages, seed: int) -> NDArray[np.int64] | None:
    """Choose, for each trial, an image in `other` that has the same category as the image that the person saw.

    Trials in which people saw the same image have the same choice. Two seen images have the same choice only if `other`
    has fewer images of their category than people saw.

    Parameters
    ----------
    other : OtherImages
        The other images.
    real : RealImages
        The seen images.
    seed : int
        Seed of the choice.

    Returns
    -------
    ndarray of int, shape (B,), or None
        For each trial, the row of the chosen image in `other`; None if `other` lacks a category of the trials.
    """
    label_M = real.labels_B[real.first_M]
    if not set(label_M.tolist()) <= set(other.labels_M.tolist()):
        return None
    rng, chosen_M = np.random.default_rng(seed), np.zeros(len(label_M), np.int64)
    for label in np.unique(label_M):
        order = rng.permutation(np.flatnonzero(other.labels_M == label))
        rows = np.flatnonzero(label_M == label)
        chosen_M[rows] = np.resize(order, len(rows))
    return chosen_M[real.row_B]


def measure_other_images(
    other: OtherImages | NotApplicable, real: RealImages, judges: Judges, options: MeasureOptions
) -> dict[str, Any] | str:
    """Compute the metrics of other real images as if a model had generated them.

    Parameters
    ----------
    other : OtherImages or NotApplicable
        The other images, or a text that says why there are no other images.
    real, judges, options
        The arguments of `finetune.evaluation.measure.measure`.

    Returns
    -------
    dict or str
        ``source``: where the images come from. ``images``: number of different other images that were used. ``paired``:
        whether there are other images of every category of the trials. ``metrics``: values of the metrics. If there is
        no result, a text says why. If ``paired`` is false, ``metrics`` has only the metrics that compare two sets of
        images. These metrics are computed for a random set with as many other images as people saw different images, or
        for all other images if there are fewer.

    Raises
    ------
    RequestError
        If an image cannot be decoded, or if a network computes NaN or infinity.
    """
    if isinstance(other, NotApplicable):
        return f"not applicable: {other.reason}"
    rows_B = choose_of_category(other, real, options.seed)
    if rows_B is not None:
        found = measure(ImageRows(other.images_MHW3, rows_B), real, judges, options).metrics
        return {"source": other.source, "images": len(np.unique(rows_B)), "paired": True, "metrics": found}
    count = min(len(other.images_MHW3), len(real.first_M))
    rows = np.sort(np.random.default_rng(options.seed).permutation(len(other.images_MHW3))[:count])
    chosen, found = ImageRows(other.images_MHW3, rows), {}
    for network in judges.networks:
        found |= measure_other_set(network, chosen, real)
    return {"source": other.source, "images": count, "paired": False, "metrics": found}
