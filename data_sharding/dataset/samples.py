"""One sample of a dataset, its bytes, and the shard (tar + index) that holds many.

Shapes: n true channels, T samples a window.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

N_PADDED = 128
"""Channels of a padded window."""
ZSTD_LEVEL = -1
"""Fixed, since another level gives other bytes for the same sample.

Float16 EEG is noise in its lower bits: entropy coding (level 3) saves 7 % of the bytes, and makes writing 3 times and
reading 4.5 times slower. This level finds the copies that padding made, and nothing else.
"""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


def pad_channels(x: Any, n: int = N_PADDED) -> Any:
    """Fill missing channels by replication: row i is true channel i mod n_true.

    Parameters
    ----------
    x : ndarray or Tensor, shape (..., n_true, T)
        Windows.
    n : int
        Channels wanted.

    Returns
    -------
    ndarray or Tensor, shape (..., n, T)
        Padded windows.

    Raises
    ------
    ValueError
        If there is no channel, or more than `n`.

    References
    ----------
    Bai et al., DreamDiffusion, arXiv 2306.16934, section 3.1.
    """
    true = x.shape[-2]
    if not 1 <= true <= n:
        raise ValueError(f"cannot pad {true} channels to {n}")
    return x if true == n else x[..., np.arange(n) % true, :]


def encode_eeg(eeg: np.ndarray) -> bytes:
    """Bytes of a window as it stands in a shard.

    Parameters
    ----------
    eeg : ndarray, shape (n, T)
        Microvolts.

    Returns
    -------
    bytes
        Zstandard-compressed .npy of the float16 array padded to [128, T].

    Raises
    ------
    ValueError
        If a value is not finite, or beyond float16 (65,504 microvolts).
    """
    import zstandard

    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(eeg).astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("window holds values that are not finite in float16 microvolts")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(pad_channels(half)), version=(1, 0), allow_pickle=False)
    # A window over the whole sample, or the copies in long ones are not found.
    size = buffer.getbuffer().nbytes
    reach = min(max((size - 1).bit_length(), zstandard.WINDOWLOG_MIN), 27)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, source_size=size, window_log=reach, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(buffer.getvalue())


def decode_eeg(data: bytes, n: int | None = None) -> np.ndarray:
    """Window out of a shard's bytes.

    Parameters
    ----------
    data : bytes
        A member ``KEY.eeg.npy.zst``.
    n : int, optional
        True channels, from the sample's JSON; the padded array where None.

    Returns
    -------
    ndarray of float16, shape (n or 128, T)
        Microvolts.
    """
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress(data)
    return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)[:n]


def wds_decoder(key: str, data: bytes) -> np.ndarray | None:
    """Decoder for plain webdataset: ``wds.WebDataset(urls, shardshuffle=False).decode(wds_decoder)``.

    Parameters
    ----------
    key : str
        The member's extension.
    data : bytes
        The member.

    Returns
    -------
    ndarray of float16, shape (128, T), or None
        The padded window in microvolts; None for members that are not EEG.
    """
    return decode_eeg(data) if key.lstrip(".") == "eeg.npy.zst" else None


def safe_key(text: str) -> str:
    """Turn any text into characters that a sample's key may have.

    Parameters
    ----------
    text : str
        E.g. a path.

    Returns
    -------
    str
        ``[A-Za-z0-9_-]`` only: a dot would end the key for webdataset readers.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")


@dataclass(kw_only=True)
class Sample:
    """One window, or one trial of an EEG-image corpus."""

    key: str
    """Unique in the dataset; ``[A-Za-z0-9_-]`` only."""
    eeg: np.ndarray
    """[n, T] microvolts, true channels only."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The sample's JSON (see docs/data_format.md)."""
    image: bytes | None = None
    """The image's file, as it is."""
    image_ext: str = "png"
    """jpg, png or webp."""

    def members(self) -> list[tuple[str, bytes]]:
        """Names and bytes of the tar's members of this sample, in order."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.key):
            raise ValueError(f"sample key '{self.key}': only letters, digits, '_' and '-' are allowed")
        if len(self.eeg) != self.meta.get("n"):
            raise ValueError(f"sample {self.key}: meta n={self.meta.get('n')} but {len(self.eeg)} channels")
        text = json.dumps(self.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
        members = [(f"{self.key}.eeg.npy.zst", encode_eeg(self.eeg))]
        if self.image is not None:
            if self.image_ext not in IMAGE_EXTENSIONS:
                raise ValueError(f"sample {self.key}: image type '{self.image_ext}' is none of {IMAGE_EXTENSIONS}")
            members.append((f"{self.key}.image.{self.image_ext}", self.image))
        members.append((f"{self.key}.json", text.encode()))
        return members


class ShardWriter:
    """Writes one tar and its index, reproducible to the byte.

    Parameters
    ----------
    path : str or Path
        The tar; the index stands beside it with the suffix ``.idx``.

    Notes
    -----
    The index is JSON: ``[{"key": KEY, "n": true channels, "members": {"eeg.npy.zst": [offset, size], ...}}, ...]`` in
    the tar's order, offsets of the members' bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self.path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by close()
        self._index: list[dict[str, Any]] = []

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Parameters
        ----------
        sample : Sample
            The sample.

        Raises
        ------
        ValueError
            If its key, channels, values or image cannot be stored.
        """
        self.write_members(sample.key, sample.members(), len(sample.eeg))

    def write_members(self, key: str, members: list[tuple[str, bytes]], n: int | None = None) -> None:
        """Append a sample that is encoded already.

        Parameters
        ----------
        key : str
            The sample's key.
        members : list of (str, bytes)
            Names and bytes, as `Sample.members` gives them.
        n : int, optional
            True channels, as the index of the shard that the sample comes from says; looked up in its JSON where None.
        """
        if n is None:
            n = int(json.loads(dict(members)[f"{key}.json"])["n"])
        entry: dict[str, list[int]] = {}
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            start = self._tar.offset
            self._tar.addfile(info, io.BytesIO(data))
            entry[name[len(key) + 1 :]] = [start + 512, len(data)]
        self._index.append({"key": key, "n": n, "members": entry})

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Finish the tar and write the index."""
        self._tar.close()
        text = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in self._index)
        self.path.with_suffix(".idx").write_text(f"[\n{text}\n]\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close()
