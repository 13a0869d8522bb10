"""What tells recordings, windows and pictures apart, whatever file, format or dataset they stand in.

Shapes: n channels, T samples a window, P points of a recording's fingerprint.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.audit.duplicates import Print, signature
from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, as_path, deliver, scratch_folder
from data_sharding.dataset.ledger import LedgerRow

NAME = "fingerprints.parquet"
ROWS_A_GROUP = 256
"""Recordings of one row group: what is read to look at one of them."""

NEAR_BITS = 10
"""Bits of 64 in which the perceptual hashes of one picture may differ after it was encoded or resized again."""
NEAR_LEVELS = 8.0
"""Root mean square difference, of 255 levels, between the thumbnails of one picture."""
NEAR_SHARE = 0.25
"""The same as a share of the picture's own contrast: two pictures of little contrast are not the same for that."""
THUMB = 16
"""Side of a thumbnail in pixels."""


def write_fingerprints(
    path: str | AnyPath, rows: Iterable[LedgerRow], load_points: Callable[[str], np.ndarray]
) -> None:
    """Write the fingerprints of the recordings that a dataset holds, whole or not at all.

    Parameters
    ----------
    path : str, Path or UPath
        The file.
    rows : iterable of LedgerRow
        The ledger; rows that are not ``sharded`` are left out.
    load_points : callable
        Key of a recording to its fingerprint [n, P].
    """
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    schema = pa.schema(
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
    with scratch_folder() as folder:
        local = folder / NAME
        _write(local, schema, rows, load_points)
        deliver(local, as_path(path))


def _write(local: Path, schema: Any, rows: Iterable[LedgerRow], load_points: Callable[[str], np.ndarray]) -> None:
    """A group of rows at a time: those of a hundred thousand recordings do not fit into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(local, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []

        def flush() -> None:
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group.clear()

        for row in rows:
            if row.status != "sharded":
                continue
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


class Fingerprints:
    """Fingerprints of a dataset's recordings; the points are read when they are asked for.

    Parameters
    ----------
    dataset : str, Path or UPath
        The dataset's directory.

    Raises
    ------
    RequestError
        If the dataset has none, or the file is damaged.
    """

    def __init__(self, dataset: str | AnyPath) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = as_path(dataset) / NAME
        if not self.path.is_file():
            raise RequestError(f"{self.path}: no such file; only 'dreamscale shard' writes fingerprints")
        try:
            self._file = pq.ParquetFile(self.path.open("rb"), pre_buffer=False)
            columns = ["key", "sha256", "seconds", "names", "signature"]
            rows = self._file.read(columns=columns, use_threads=False).to_pylist()
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise RequestError(f"{self.path}: damaged ({error}); shard the corpus again") from None
        self.prints = [Print(**row) for row in rows]
        self._at = {row["key"]: i for i, row in enumerate(rows)}
        self._group = lru_cache(maxsize=16)(self._read_group)
        bounds = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *bounds])

    def _read_group(self, number: int) -> list[dict[str, Any]]:
        table = self._file.read_row_group(number, columns=["n_points", "points"], use_threads=False)
        return table.to_pylist()

    def load(self, key: str) -> np.ndarray:
        """Fingerprint of a recording.

        Parameters
        ----------
        key : str
            The recording.

        Returns
        -------
        ndarray of float32, shape (n, P)
            Its points.
        """
        at = self._at[key]
        group = int(np.searchsorted(self._starts, at, side="right")) - 1
        row = self._group(group)[at - int(self._starts[group])]
        return np.frombuffer(row["points"], np.float16).reshape(-1, max(row["n_points"], 1)).astype(np.float32)


def window_digest(eeg: np.ndarray) -> int:
    """Checksum of a window's content, the same however it was compressed or padded.

    Parameters
    ----------
    eeg : ndarray of float16, shape (n, T)
        The true channels, as decoded.

    Returns
    -------
    int
        64 bits of the SHA-256 over shape and values.
    """
    eeg = np.ascontiguousarray(eeg, "<f2")
    return int.from_bytes(hashlib.sha256(repr(eeg.shape).encode() + eeg.tobytes()).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class ImagePrint:
    """What is compared of a picture."""

    sha256: str
    """Of the file."""
    phash: int | None = None
    """Perceptual hash, 64 bits; None where the file is no picture that Pillow opens."""
    thumb: bytes = b""
    """Thumbnail of `THUMB` x `THUMB` RGB pixels."""


def image_print(data: bytes, sha256: str = "") -> ImagePrint:
    """Fingerprint of a picture.

    Parameters
    ----------
    data : bytes
        The file.
    sha256 : str, optional
        Its checksum, where it is known.

    Returns
    -------
    ImagePrint
        Of the file, and of the decoded pixels.

    Notes
    -----
    The perceptual hash is the usual one: 32 x 32 grey pixels, the 8 x 8 lowest coefficients of their cosine transform
    against their median (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010).
    """
    from PIL import Image, ImageOps
    from scipy.fft import dctn

    sha256 = sha256 or hashlib.sha256(data).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ImagePrint(sha256=sha256)
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].ravel()
    # Coefficients of a flat picture are rounding errors: they must not decide bits.
    low = np.where(np.abs(low) < 1.0, 0.0, low)
    bits = low > np.median(low[1:])
    thumb = picture.resize((THUMB, THUMB), Image.Resampling.BOX)
    return ImagePrint(
        sha256=sha256, phash=int.from_bytes(np.packbits(bits).tobytes(), "big"), thumb=np.asarray(thumb).tobytes()
    )


def similar_images(ours: Sequence[ImagePrint], theirs: Sequence[ImagePrint]) -> list[tuple[int, int]]:
    """Pictures that look the same: encoded again, resized, converted.

    Parameters
    ----------
    ours, theirs : sequence of ImagePrint
        Pictures of two collections.

    Returns
    -------
    list of (int, int)
        Places in `ours` and `theirs`; pictures of equal bytes are among them.

    Notes
    -----
    Two tests: at most `NEAR_BITS` bits of the hashes differ, and the thumbnails differ by at most `NEAR_LEVELS` and by
    at most `NEAR_SHARE` of their contrast. Crops, mirror images, rotations and changes of colour are not found.
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
    """Standard deviation over places, not over the three colours."""
    return float(thumb.reshape(-1, 3).std(axis=0).max())
