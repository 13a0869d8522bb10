"""Fingerprints of recordings, windows and images. A fingerprint does not depend on the file format or the dataset.

In array shapes, `n` is the number of channels, `T` the number of time samples of a window, and `P` the number of points
of a recording's fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.audit.duplicates import RecordingFingerprint, signature
from data_sharding.common.errors import RequestError, show
from data_sharding.common.storage import AnyPath, as_path, deliver, scratch_folder
from data_sharding.common.typed_values import check_fields
from data_sharding.common.untrusted import check_count, open_image
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.manifest import current_file
from data_sharding.dataset.rows import Rows

NAME = "fingerprints.parquet"
ROWS_A_GROUP = 256
"""Number of recordings in a row group of the Parquet file. To read the fingerprint of one recording, all fingerprints
of its row group are read."""

NEAR_BITS = 10
"""Two images count as similar only if at most this number of the 64 bits of their perceptual hashes differ."""
NEAR_LEVELS = 8.0
"""Two images count as similar only if the root mean square difference of their thumbnails is at most this number, on
the scale of pixel values from 0 to 255."""
NEAR_SHARE = 0.25
"""Two images count as similar only if the difference of their thumbnails is at most this fraction of the lower of the
two contrasts. Without this limit, all images of low contrast would count as similar."""
THUMB = 16
"""Width and height of a thumbnail in pixels."""


def write_fingerprints(
    path: str | AnyPath,
    rows: Iterable[LedgerRow],
    load_points: Callable[[str], np.ndarray],
) -> None:
    """Write the fingerprints of the recordings in a dataset. An interrupted write leaves no partial file.

    Parameters
    ----------
    path : str, Path or UPath
        File to write.
    rows : iterable of LedgerRow
        Ledger rows of the recordings whose fingerprints are written.
    load_points : callable
        Function that returns the fingerprint, shape (n, P), for the key of a recording.
    """
    with scratch_folder() as folder:
        local = folder / NAME
        _write(local, rows, load_points)
        deliver(local, as_path(path))


def _schema() -> Any:
    """Return the pyarrow schema of the fingerprints file."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    return pa.schema(
        [
            ("key", text),
            ("corpus", text),
            ("subject", text),
            ("sha256", text),
            ("seconds", pa.float64()),
            ("names", pa.list_(text)),
            ("n_points", number),
            ("points", pa.binary()),
            ("signature", pa.list_(number)),
        ]
    )


def _write(local: Path, rows: Iterable[LedgerRow], load_points: Callable[[str], np.ndarray]) -> None:
    """Write the Parquet file's row groups one by one, because the fingerprints may not all fit into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(local, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []

        def flush() -> None:
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group.clear()

        for row in rows:
            points = np.ascontiguousarray(load_points(row.key), np.float16)
            group.append(
                {name: getattr(row, name) for name in ("key", "corpus", "subject", "sha256", "seconds")}
                | {
                    "names": row.channels,
                    "n_points": points.shape[1] if points.ndim == 2 else 0,
                    "points": points.tobytes(),
                    "signature": signature(points),
                }
            )
            if len(group) == ROWS_A_GROUP:
                flush()
        flush()


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Columns of a fingerprints file that are read when the file is opened, with the types of the columns."""

    key: str
    sha256: str
    seconds: float
    names: list[str]
    signature: list[int]


_COLUMNS = [field.name for field in dataclasses.fields(_Stored)]


class Fingerprints:
    """Fingerprints of a dataset's recordings. The points (values) of a fingerprint are read only when `load` is called.

    Parameters
    ----------
    dataset : str, Path or UPath
        Directory of the dataset.

    Attributes
    ----------
    recordings : list of RecordingFingerprint
        One entry for each recording. In these entries, `points` is None; call `load` to read the points.

    Raises
    ------
    RequestError
        If the dataset has no fingerprints file, or if this file is damaged.
    """

    def __init__(self, dataset: str | AnyPath) -> None:
        import pyarrow as pa

        self.path = current_file(dataset, NAME)
        if not self.path.is_file():
            raise RequestError(f"{self.path}: no such file, so the dataset has no fingerprints; shard the corpus again")
        try:
            self._rows = Rows(self.path.open("rb"), self.path.stat().st_size, str(self.path), _schema())
            if missing := [name for name in _schema().names if name not in self._rows.names]:
                raise RequestError(f"{self.path}: the column '{missing[0]}' is missing; shard the corpus again")
            self.recordings = [
                RecordingFingerprint(**check_fields(_Stored, row, f"{self.path}, row {number}"))
                for number, row in enumerate(self._rows.iterate(_COLUMNS), start=1)
            ]
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise RequestError(f"{self.path}: damaged ({show(error)}); shard the corpus again") from None
        self._at = {recording.key: i for i, recording in enumerate(self.recordings)}
        if len(self._at) < len(self.recordings):
            raise RequestError(f"{self.path}: damaged (two rows have the same key); shard the corpus again")
        self._group = lru_cache(maxsize=16)(self._read_group)
        self._starts = np.cumsum([0, *self._rows.group_sizes()])

    def _read_group(self, number: int) -> list[dict[str, Any]]:
        import pyarrow as pa

        try:
            return list(self._rows.iterate(["n_points", "points"], [number]))
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise RequestError(f"{self.path}: damaged ({show(error)}); shard the corpus again") from None

    def load(self, key: str) -> np.ndarray:
        """Read the fingerprint of a recording.

        Parameters
        ----------
        key : str
            Key of the recording.

        Returns
        -------
        ndarray of float32, shape (n, P)
            Points of the fingerprint.

        Raises
        ------
        RequestError
            If the stored fingerprint is damaged.
        """
        at = self._at[key]
        group = int(np.searchsorted(self._starts, at, side="right")) - 1
        row = self._group(group)[at - int(self._starts[group])]
        where = f"{self.path}, row {at + 1}"
        points = row["points"] or b""
        n_points = check_count(row["n_points"], where, "n_points", most=len(points) // 2)
        if len(points) % (2 * max(n_points, 1)):
            fault = "the number of values does not fit the number of points of a channel"
            raise RequestError(f"{where}: damaged ({fault}); shard the corpus again")
        return np.frombuffer(points, np.float16).reshape(-1, max(n_points, 1)).astype(np.float32)


def window_digest(eeg: np.ndarray) -> int:
    """Compute a checksum of a window's values. The checksum does not depend on compression or padding.

    Parameters
    ----------
    eeg : ndarray of float16, shape (n, T)
        Recorded channels of the window (without padding).

    Returns
    -------
    int
        First 64 bits of the SHA-256 of the window's shape and values.
    """
    eeg = np.ascontiguousarray(eeg, "<f2")
    return int.from_bytes(hashlib.sha256(repr(eeg.shape).encode() + eeg.tobytes()).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class ImageFingerprint:
    """Data of an image that are needed to compare the image with others."""

    sha256: str
    """Checksum of the image file."""
    phash: int | None = None
    """Perceptual hash of 64 bits; None if Pillow cannot open the image file."""
    thumb: bytes = b""
    """Thumbnail of `THUMB` x `THUMB` RGB pixels."""


def fingerprint_image(data: bytes, sha256: str = "") -> ImageFingerprint:
    """Compute the fingerprint of an image.

    Parameters
    ----------
    data : bytes
        Content of the image file.
    sha256 : str, optional
        Checksum of the image file, if the caller has already computed the checksum.

    Returns
    -------
    ImageFingerprint
        Fingerprint of the image file and of its pixels.

    Notes
    -----
    The perceptual hash is the common hash based on the cosine transform (Zauner, Implementation and benchmarking of
    perceptual image hash functions, 2010): reduce the image to 32 x 32 grey pixels, keep the 8 x 8 lowest coefficients
    of the cosine transform, and set a bit for each coefficient above the median of all coefficients except the first.
    """
    from PIL import Image, ImageOps
    from scipy.fft import dctn

    sha256 = sha256 or hashlib.sha256(data).hexdigest()
    try:
        image = ImageOps.exif_transpose(open_image(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, struct.error):
        return ImageFingerprint(sha256=sha256)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].ravel()
    # In an image of a single colour, all coefficients are rounding errors, which must not change the hash. So set small
    # coefficients to 0.
    low = np.where(np.abs(low) < 1.0, 0.0, low)
    bits = low > np.median(low[1:])
    thumb = image.resize((THUMB, THUMB), Image.Resampling.BOX)
    return ImageFingerprint(
        sha256=sha256, phash=int.from_bytes(np.packbits(bits).tobytes(), "big"), thumb=np.asarray(thumb).tobytes()
    )


def find_similar_images(ours: Sequence[ImageFingerprint], theirs: Sequence[ImageFingerprint]) -> list[tuple[int, int]]:
    """Find pairs of similar images, for example an image and a copy that was resized or encoded again.

    Parameters
    ----------
    ours, theirs : sequence of ImageFingerprint
        Images of two collections.

    Returns
    -------
    list of (int, int)
        For each pair: index into `ours`, and index into `theirs`. Images of equal bytes are also returned as a pair, if
        Pillow can open them.

    Notes
    -----
    Two images are similar under two conditions. First, at most `NEAR_BITS` bits of their hashes differ. Second, the
    difference of their thumbnails is at most `NEAR_LEVELS`, and at most `NEAR_SHARE` times the lower of the two
    thumbnails' contrasts. Crops, mirror images, rotations and changes of colour are not found.
    """
    a = [i for i, p in enumerate(ours) if p.phash is not None]
    b = [j for j, p in enumerate(theirs) if p.phash is not None]
    if not a or not b:
        return []
    hashes = np.array([theirs[j].phash for j in b], np.uint64)
    found = []
    for i in a:
        near = np.flatnonzero(np.bitwise_count(hashes ^ np.uint64(ours[i].phash or 0)) <= NEAR_BITS)
        if not len(near):
            continue
        x = np.frombuffer(ours[i].thumb, np.uint8).astype(float)
        for j in near:
            y = np.frombuffer(theirs[b[j]].thumb, np.uint8).astype(float)
            apart = float(np.sqrt(((x - y) ** 2).mean()))
            contrast = min(_contrast(x), _contrast(y))
            if apart <= min(NEAR_LEVELS, max(NEAR_SHARE * contrast, 1.0)):
                found.append((i, b[j]))
    return found


def _contrast(thumb: np.ndarray) -> float:
    """Return the contrast of a thumbnail: the largest of the standard deviations of red, green and blue."""
    return float(thumb.reshape(-1, 3).std(axis=0).max())
