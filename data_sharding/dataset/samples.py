"""Samples of a dataset, their encoding as bytes, and the writer of shards. A shard is a tar with an index.

Letters in shapes: `n` recorded channels (without padding), `T` time points of a window.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.untrusted import MAX_WINDOW

N_PADDED = 128
"""Number of channels of a padded window."""
ZSTD_LEVEL = -1
"""Compression level of zstd. Do not change the compression level, because another level gives different bytes for the
same sample.

The lower bits of float16 EEG are noise, so entropy coding saves little: level 3 would save 7 % of the bytes, but
writing would be 3 times slower and reading 4.5 times slower. Level -1 only compresses the copies of channels that
padding adds.
"""
_NPY_HEADER_BYTES = 128
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '<f2', 'fortran_order': False, 'shape': \("
    + str(N_PADDED).encode()
    + rb", (\d{1,9})\), \} *\n"
)
"""Header that NumPy writes for a padded window. NumPy's own reader of headers parses Python code, which fails now and
then in Python 3.11 if several threads parse at the same time ("AST constructor recursion depth mismatch")."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


def pad_channels(x: Any, n: int = N_PADDED) -> Any:
    """Pad windows by replicating channels: row `i` of the result is channel ``i % n_true`` of the window.

    Parameters
    ----------
    x : ndarray or Tensor, shape (..., n_true, T)
        Windows.
    n : int
        Number of channels of the padded windows.

    Returns
    -------
    ndarray or Tensor, shape (..., n, T)
        Padded windows.

    Raises
    ------
    ValueError
        If a window has no channel, or more than `n` channels.

    References
    ----------
    Bai et al., DreamDiffusion, arXiv 2306.16934, section 3.1.
    """
    true = x.shape[-2]
    if not 1 <= true <= n:
        raise ValueError(f"a window of {true} channels cannot be padded to {n} channels")
    return x if true == n else x[..., np.arange(n) % true, :]


def encode_eeg(eeg: np.ndarray) -> bytes:
    """Encode a window for a shard.

    Parameters
    ----------
    eeg : ndarray, shape (n, T)
        Window in microvolts, only the recorded channels.

    Returns
    -------
    bytes
        Zstandard-compressed .npy file with the float16 array, padded to [128, T].

    Raises
    ------
    ValueError
        If a value is not finite, or too large for float16 (65,504 microvolts).
    """
    import zstandard

    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(eeg).astype(np.float16)
    # A float16 is finite if at least one of its exponent bits is 0. This test takes a tenth of the time of np.isfinite.
    if not ((half.view(np.uint16) & 0x7C00) < 0x7C00).all():
        raise ValueError("the window has values that are not finite, or too large for float16 in microvolts")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(pad_channels(half)), version=(1, 0), allow_pickle=False)
    # zstd finds a copy of a channel only inside its match window, so this window must be as long as the whole
    # uncompressed .npy file.
    size = buffer.getbuffer().nbytes
    reach = min(max((size - 1).bit_length(), zstandard.WINDOWLOG_MIN), 27)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, source_size=size, window_log=reach, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(buffer.getvalue())


def decode_eeg(data: bytes, n: int | None = None, samples: int | None = None) -> np.ndarray:
    """Decode a window from a shard.

    Parameters
    ----------
    data : bytes
        Content of a member ``KEY.eeg.npy.zst``.
    n : int, optional
        Number of recorded channels, from the sample's JSON; if None, all 128 channels of the padded window are
        returned.
    samples : int, optional
        Expected number of time points of the window; if None, any number up to `MAX_WINDOW` is allowed.

    Returns
    -------
    ndarray of float16, shape (n or 128, T)
        Window in microvolts.

    Raises
    ------
    ValueError
        If the bytes are not a float16 window of 128 channels with the expected number of time points. The function
        never decompresses many more bytes than the expected window has.
    """
    import zstandard

    try:
        # Do not use the size that is stored in the compressed data, because a manipulated file can contain any size.
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as stream:
            header = _NPY_HEADER.fullmatch(stream.read(_NPY_HEADER_BYTES))
            shape = (N_PADDED, int(header[1])) if header else (0, 0)
            if not 0 < shape[1] <= (MAX_WINDOW if samples is None else samples):
                raise ValueError(f"not a .npy file of version 1.0 with float16 ({N_PADDED}, {samples or 'T'})")
            out = np.empty(shape, np.float16)
            got = stream.readinto(out.data.cast("B"))
            if got != out.nbytes or (samples or shape[1]) != shape[1] or stream.read(1):
                raise ValueError(f"the size is not that of a float16 window of shape {shape}")
    except zstandard.ZstdError as error:
        raise ValueError(f"not compressed by zstd, or damaged ({error})") from None
    return out[:n]


def wds_decoder(key: str, data: bytes) -> np.ndarray | None:
    """Decode EEG for the library webdataset: ``wds.WebDataset(urls, shardshuffle=False).decode(wds_decoder)``.

    Parameters
    ----------
    key : str
        Extension of the tar member.
    data : bytes
        Content of the member.

    Returns
    -------
    ndarray of float16, shape (128, T), or None
        The padded window in microvolts; None if the member is not EEG.
    """
    return decode_eeg(data) if key.lstrip(".") == "eeg.npy.zst" else None


def safe_key(text: str) -> str:
    """Convert any text to a valid key of a sample.

    Parameters
    ----------
    text : str
        Any text, such as a path.

    Returns
    -------
    str
        A text of characters from ``[A-Za-z0-9_-]`` only. A dot is not allowed, because webdataset readers end the key
        at a dot.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")


@dataclass(kw_only=True)
class Sample:
    """One sample of a dataset: a window of EEG, or a trial of an EEG-image corpus."""

    key: str
    """Key of the sample; unique in the dataset, with characters from ``[A-Za-z0-9_-]`` only."""
    eeg: np.ndarray
    """Signals of the recorded channels in microvolts, shape (`n`, `T`). A stored trial may have more time points than a
    window of the model."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Metadata of the sample, which is stored as JSON (see docs/data_format.md)."""
    image: bytes | None = None
    """Content of the image file, unchanged."""
    image_ext: str = "png"
    """Extension of the image file: jpg, png or webp."""

    def members(self) -> list[tuple[str, bytes]]:
        """Return the name and the bytes of each tar member of this sample, in the order in which they are written."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.key):
            raise ValueError(f"sample key '{self.key}': only letters, digits, '_' and '-' are allowed")
        if len(self.eeg) != self.meta.get("n"):
            raise ValueError(
                f"sample {self.key}: the metadata say n={self.meta.get('n')}, but there are {len(self.eeg)} channels"
            )
        text = json.dumps(self.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
        members = [(f"{self.key}.eeg.npy.zst", encode_eeg(self.eeg))]
        if self.image is not None:
            if self.image_ext not in IMAGE_EXTENSIONS:
                raise ValueError(
                    f"sample {self.key}: image type '{self.image_ext}' is not supported; use one of {IMAGE_EXTENSIONS}"
                )
            members.append((f"{self.key}.image.{self.image_ext}", self.image))
        members.append((f"{self.key}.json", text.encode()))
        return members


class ShardWriter:
    """Writer of a shard (a tar and its index). The same samples always give the same bytes.

    Parameters
    ----------
    path : str or Path
        Path of the tar. The index is written to the same folder, with the suffix ``.idx``.

    Notes
    -----
    The index is JSON: ``[{"key": KEY, "n": NUMBER OF CHANNELS, "members": {"eeg.npy.zst": [offset, size], ...}},
    ...]``, in the order of the tar. An offset is the position of a member's content in the tar, in bytes. The entry of
    a trial also has ``onset`` and ``samples``: the index of the time point at which the image appeared, and the number
    of time points.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self.path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by close()
        self._index: list[dict[str, Any]] = []

    def write(self, sample: Sample) -> None:
        """Append a sample to the shard.

        Parameters
        ----------
        sample : Sample
            Sample to append.

        Raises
        ------
        ValueError
            If the sample's key, channels, values or image cannot be stored.
        """
        about = {"n": len(sample.eeg)}
        if "onset" in sample.meta:
            about |= {"onset": int(sample.meta["onset"]), "samples": int(sample.eeg.shape[1])}
        self.write_members(sample.key, sample.members(), about)

    def write_members(self, key: str, members: list[tuple[str, bytes]], about: Mapping[str, Any]) -> None:
        """Append an encoded sample to the shard.

        Parameters
        ----------
        key : str
            Key of the sample.
        members : list of (str, bytes)
            Names and bytes of the members, as `Sample.members` returns them.
        about : mapping
            Values for the index: ``n`` (number of recorded channels), and for a trial ``onset`` and ``samples``. If the
            sample comes from another shard, `about` is the sample's entry in the index of that shard.
        """
        entry: dict[str, list[int]] = {}
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            start = self._tar.offset
            self._tar.addfile(info, io.BytesIO(data))
            entry[name[len(key) + 1 :]] = [start + 512, len(data)]
        known = {name: about[name] for name in ("n", "onset", "samples") if name in about}
        self._index.append({"key": key, **known, "members": entry})

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
