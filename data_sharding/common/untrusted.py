"""Checks of values that were read from files. A value from a file must pass a check of this module before it is used.

Datasets, checkpoints and models are copied between laboratories, and somebody may have changed them. So all code that
reads such files calls the functions of this module. Most functions of this module return a valid value, and raise a
`RequestError` with a message of one line for an invalid value.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from upath import UPath

from data_sharding.common.errors import RequestError, show

MAX_JSON = 64 * 2**20
"""Largest size of a JSON file in bytes. In memory, JSON takes up to 20 times the size of the file."""
MAX_PIXELS = 64_000_000
"""Largest number of pixels of an image."""
MAX_IMAGE = 2**28
"""Largest size of an image file in bytes."""
IMAGE_KINDS = ("JPEG", "PNG", "WEBP")
"""Image formats that are decoded, by Pillow's names. The format is recognised by the content, not by the file name."""
MAX_UNPACKED = 200
"""Largest allowed ratio of an archive's unpacked size to its packed size."""
FREE_UNPACKED = 64 * 2**20
"""An archive whose unpacked size in bytes is at most this value is always allowed."""
MAX_WINDOW = 2**20
"""Largest number of time points of a window or trial. A padded window of this length takes 0.27 GB as float16."""
MAX_SFREQ = 100_000.0
"""Largest sampling rate of windows in Hz. Recordings are resampled to the rate of the windows, so a higher rate needs
more memory."""
MAX_SETTING = 1e12
"""Largest absolute value of a number in the preprocessing settings. The squares of these numbers must be finite as
float32."""
MAX_POSITION = 1000.0
"""Largest coordinate of an electrode in metres. The limit is so large that positions in millimetres are accepted,
too."""
MAX_NAME = 4096
"""Largest number of characters of a name in a file, such as a subject, a label or the path of a recording."""
MAX_TEXT = 2**17
"""Largest number of characters of a longer text in a file, such as a caption or a note about a recording."""
MAX_LABELS = 20_000
"""Largest number of labels of a dataset. Classifiers need a matrix whose size grows with the square of this number."""
MAX_FILE = 2**50
"""Largest size of a file in bytes that a manifest may state."""
LEAST_SAMPLE = 2048
"""Smallest size in bytes of a sample in a tar file: two members, each with a header."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,88}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
_PATH = re.compile(rf"{_PART}(?:/{_PART}){{0,15}}")
# Pattern of numbers with so many digits, or such a large exponent, that parsing can give infinity.
_LARGE_NUMBER = re.compile(r"[eE]\+?\d{3}|\d{300}")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


_TEXT, _NUMBER = (str, None), ((int, float), None)
# Type and smallest allowed value (None: no limit) of each entry of a sample's metadata.
_META: dict[str, tuple[Any, float | None]] = {
    **dict.fromkeys(("reference", "recording", "subject", "session", "corpus", "split"), _TEXT),
    **dict.fromkeys(("image_id", "label_name", "caption", "concept"), _TEXT),
    "n": (int, 1),
    "onset": (int, None),
    "label": (int, 0),
    "sfreq": ((int, float), 1e-6),
    "start": _NUMBER,
    "ch_names": (list, None),
    "positions": (list, None),
    "bads": (list, None),
}


def refusal(where: str, fault: str) -> RequestError:
    """Make the error for a file with an invalid value; the caller raises the error."""
    return RequestError(f"{where}: damaged or changed ({fault}); get the file again from its source")


def check_key(value: Any, where: str) -> str:
    """Check the key of a sample or the name of a split: at most 88 letters, digits, ``_`` and ``-``.

    Parameters
    ----------
    value : Any
        The key in the file.
    where : str
        Path of the file, for the error message.

    Returns
    -------
    str
        The key. A valid key can safely be used as a file name.

    Raises
    ------
    RequestError
        If the value is not a valid key.
    """
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise refusal(where, f"'{show(value)}' is not a valid name; only letters, digits, '_' and '-' are allowed")
    return value


def check_sha256(value: Any, where: str) -> str:
    """Check that a value is a SHA-256 checksum: 64 digits from 0 to 9 and from a to f; return the checksum."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise refusal(where, f"'{show(value)}' is not a SHA-256 checksum, which has 64 hexadecimal digits")
    return value


def check_path(value: Any, where: str) -> str:
    """Check the path of a file inside a folder.

    Parameters
    ----------
    value : Any
        The path in the file.
    where : str
        Path of the file that contains the value, for the error message.

    Returns
    -------
    str
        The path: relative, with forward slashes, and always inside the folder.

    Raises
    ------
    RequestError
        If the path is absolute, if a part is ``..`` or hidden, or if it has a character that Dreamscale never uses.
    """
    if not isinstance(value, str) or not _PATH.fullmatch(value):
        raise refusal(where, f"'{show(value)}' is not a path of a file inside the folder")
    return value


def check_count(value: Any, where: str, what: str, *, least: int = 0, most: float) -> int:
    """Check a whole number.

    Parameters
    ----------
    value : Any
        The number in the file.
    where, what : str
        Path of the file, and name of the number, for the error message.
    least, most : int
        Smallest and largest possible number.

    Returns
    -------
    int
        The number.

    Raises
    ------
    RequestError
        If the value is not a whole number from `least` to `most`.
    """
    if type(value) is not int or not least <= value <= most:
        limit = f"from {least}" if most == math.inf else f"from {least} to {most}"
        raise refusal(where, f"{what} is '{show(value)}', not a whole number {limit}")
    return value


def check_number(value: Any, where: str, what: str) -> float:
    """Check that a value is a finite number; return the number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise refusal(where, f"{what} is '{show(value)}', not a finite number")
    return value


def check_text(value: Any, where: str, what: str, *, most: int = MAX_NAME) -> str:
    """Check that a value is a text of at most `most` characters; return the text."""
    if not isinstance(value, str):
        raise refusal(where, f"{what} is '{show(value)}', not a text")
    if len(value) > most:
        raise refusal(where, f"{what} has {len(value)} characters; at most {most} characters are allowed")
    return value


def check_group(value: Any, where: str, what: str = "the content") -> dict[str, Any]:
    """Check that a JSON value is an object (keys with values); return the object."""
    if not isinstance(value, dict):
        raise refusal(where, f"{what} is not an object with keys and values")
    return value


def check_list(value: Any, where: str, what: str = "the content") -> list[Any]:
    """Check that a JSON value is a list; return the list."""
    if not isinstance(value, list):
        raise refusal(where, f"{what} is not a list")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("two keys are equal")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is too large")
    return value


def parse_json(data: str | bytes | bytearray | memoryview) -> Any:
    """Parse JSON strictly.

    Parameters
    ----------
    data : str or bytes
        The JSON text, in UTF-8.

    Returns
    -------
    Any
        The value.

    Raises
    ------
    ValueError
        If the text is not JSON or is longer than `MAX_JSON`, if an object has a key twice, if a number is NaN or
        infinite, if a text has an unpaired surrogate (half of a character), or if lists and objects are nested too
        deeply.
    """
    if len(data) > MAX_JSON:
        raise ValueError(f"longer than {MAX_JSON // 2**20} MiB")
    text = data if isinstance(data, str) else bytes(data).decode("utf-8")
    number = _finite if _LARGE_NUMBER.search(text) else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=number)
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None
    if _HALF_CHARACTER.search(text):
        # A text with an unpaired surrogate is not valid Unicode, so it cannot be printed or stored. A pair of
        # surrogates is one character and is allowed.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a local file for reading. Refuse folders, devices, sockets and named pipes.

    Parameters
    ----------
    path : str or Path
        The file. A symbolic link to a file is followed.

    Returns
    -------
    int
        File descriptor; the caller must close it.

    Raises
    ------
    OSError
        If the file cannot be opened.
    RequestError
        If the path is not a file. (Reading from a device, a socket or a named pipe may never end.)
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError(
            f"{path}: not a file, but a folder, a device or a named pipe; remove it or choose another file"
        )
    return descriptor


def is_special(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a device, a socket or a named pipe, from which reading may never end."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - called for every file of a corpus
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_limited(path: Any, most: int = MAX_JSON) -> bytes:
    """Read a small file.

    Parameters
    ----------
    path : Path or UPath
        The file, on this machine or on an object store.
    most : int
        Largest size in bytes.

    Returns
    -------
    bytes
        Content of the file.

    Raises
    ------
    OSError
        If the file cannot be read.
    RequestError
        If the file is larger than `most`, or if `path` is not a file.
    """
    stream: IO[bytes] = os.fdopen(open_regular(path), "rb") if not isinstance(path, UPath) else path.open("rb")
    with stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise refusal(str(path), f"larger than {most} bytes")
    return data


def check_entries(
    entries: Any, where: str, members: Mapping[str, int], *, tar_bytes: int, longest: int
) -> list[dict[str, Any]]:
    """Check the entries of the index of a shard.

    An entry contains the key of a sample. For each file (member) of the sample in the tar file, the entry contains an
    offset and a size.

    Parameters
    ----------
    entries : Any
        Parsed content of the index.
    where : str
        Path of the index, for the error message.
    members : mapping of str to int
        Maps the name of each member that a sample may have to the largest size of this member in bytes.
    tar_bytes : int
        Size of the tar file in bytes. Every member must be inside the tar file.
    longest : int
        Largest number of time points that a sample may have.

    Returns
    -------
    list of dict
        The entries.

    Raises
    ------
    RequestError
        If an entry has an invalid key, an unknown member, or an offset or size that is not inside the tar file.
    """
    for number, entry in enumerate(check_list(entries, where)):
        check_entry(entry, f"{where}, entry {number}", members, tar_bytes=tar_bytes, longest=longest)
    return entries


def check_entry(entry: Any, where: str, members: Mapping[str, int], *, tar_bytes: int, longest: int) -> None:
    """Check one entry of a shard's index; the arguments are those of `check_entries`."""
    check_key(check_group(entry, where).get("key"), where)
    check_count(entry.get("n", 0), where, "n", most=255)
    check_count(entry.get("onset", 0), where, "onset", least=-longest, most=longest)
    check_count(entry.get("samples", 0), where, "samples", most=longest)
    for name, place in check_group(entry.get("members"), where, "members").items():
        if name not in members:
            raise refusal(where, f"a sample has the unknown member '{show(name)}'")
        if not isinstance(place, list) or len(place) != 2:
            raise refusal(where, f"the value of {name} is not a pair of offset and size")
        size = check_count(place[1], where, f"the size of {name}", most=min(tar_bytes, members[name]))
        check_count(place[0], where, f"the offset of {name}", most=tar_bytes - size)


def check_preprocess(values: Any, where: str) -> dict[str, Any]:
    """Check the numbers of a stored `PreprocessSpec`, before memory is allocated for its windows.

    Parameters
    ----------
    values : Any
        The preprocessing settings, as they are stored in a file.
    where : str
        Path of the file, for the error message.

    Returns
    -------
    dict
        The stored spec.

    Raises
    ------
    RequestError
        If the window or the stride is not a positive whole number, if another number is not finite or is too large, or
        if the sampling rate is too high.
    """
    quality = check_group(values, where, "preprocess").get("quality")
    nested = {f"quality.{key}": value for key, value in quality.items()} if isinstance(quality, dict) else {}
    for key, value in {**values, **nested}.items():
        if key in ("window", "stride"):
            check_count(value, where, f"preprocess.{show(key)}", least=1, most=MAX_WINDOW)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(value, where, f"preprocess.{show(key)}")
            if abs(value) > MAX_SETTING:
                raise refusal(where, f"preprocess.{show(key)} is {show(value)}, beyond {MAX_SETTING:g}")
    if check_number(values.get("sfreq", 1.0), where, "preprocess.sfreq") > MAX_SFREQ:
        raise refusal(where, f"preprocess.sfreq is {show(values['sfreq'])}; the largest sampling rate is {MAX_SFREQ:g}")
    return values


def check_meta(values: Any) -> dict[str, Any]:
    """Check the types of a sample's metadata. Entries may be missing, and an unknown entry may have any value.

    Parameters
    ----------
    values : Any
        Parsed JSON of the sample.

    Returns
    -------
    dict
        The metadata.

    Raises
    ------
    ValueError
        If an entry does not have the type that Dreamscale writes.
    """
    if not isinstance(values, dict):
        raise ValueError("not an object with keys and values")
    for name, value in values.items():
        types, least = _META.get(name, (None, None))
        if types is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise ValueError(f"{name} is '{show(value)}'")
        if least is not None and not value >= least:
            raise ValueError(f"{name} is {show(value)}")
        if types is str and len(value) > (MAX_TEXT if name == "caption" else MAX_NAME):
            raise ValueError(f"{name} has {len(value)} characters")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in values.get("ch_names", ())):
        raise ValueError("a channel has no name, or a name that is too long")
    check_positions(values.get("positions") or [], "the metadata")
    return values


def check_positions(values: Any, where: str) -> list[Any]:
    """Check electrode positions, each of which is None or three numbers in metres; return the positions."""
    for place in check_list(values, where, "positions"):
        is_point = isinstance(place, list) and len(place) == 3 and {*map(type, place)} <= {float, int}
        if place is not None and not (is_point and max(map(abs, place)) < MAX_POSITION):
            raise refusal(where, "the position of an electrode is not three numbers, or is far outside a room")
    return values


def unpack_zstd(data: bytes, where: str) -> bytes:
    """Decompress zstd data.

    Parameters
    ----------
    data : bytes
        The compressed data.
    where : str
        Path of the file, for the error message.

    Returns
    -------
    bytes
        The data.

    Raises
    ------
    RequestError
        If the data are damaged, or if the decompressed size is far larger than the compressed size.
    """
    import zstandard

    most = max(FREE_UNPACKED, MAX_UNPACKED * len(data))
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as stream:
            out = stream.read(most + 1)
    except zstandard.ZstdError as error:
        raise refusal(where, f"not compressed by zstd, or damaged: {show(error)}") from None
    check_unpacked([len(out)], len(data), where)
    return out


def private_folder(path: Path) -> Path:
    """Make sure that a folder exists, and that only this user can write to it.

    Parameters
    ----------
    path : Path
        The folder.

    Returns
    -------
    Path
        The given folder. Only its owner can use the folder, because this function sets its mode to 0700.

    Raises
    ------
    RequestError
        If another user could replace the folder or its files.
    OSError
        If the folder cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (path.absolute(), path.absolute().parent):
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise RequestError(f"{folder}: belongs to another user; choose a folder that belongs to you")
        if folder.name != path.name and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise RequestError(f"{folder}: every user can replace its content; choose a folder that belongs to you")
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o700)
    return path


def check_unpacked(sizes: Iterable[int], packed: int, where: str) -> None:
    """Refuse a compressed archive whose unpacked size is far larger than its packed size.

    Parameters
    ----------
    sizes : iterable of int
        Size in bytes that each file of the archive has after unpacking, as stated in the archive.
    packed : int
        Size of the archive in bytes.
    where : str
        Path of the archive, for the error message.

    Raises
    ------
    RequestError
        If the sum of the sizes is more than `MAX_UNPACKED` times the size of the archive, and more than
        `FREE_UNPACKED`.
    """
    total = sum(sizes)
    if total > max(FREE_UNPACKED, MAX_UNPACKED * packed):
        raise refusal(where, f"the {packed} bytes of the file unpack to {total} bytes")


def open_npz(path: str | os.PathLike[str]) -> Any:
    """Open a ``.npz`` file of plain arrays. Refuse a file whose unpacked size is far larger than its packed size.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    numpy.lib.npyio.NpzFile
        The opened file, for a ``with`` block.

    Raises
    ------
    RequestError
        If the file is not a zip archive, or if its unpacked size is too large.
    OSError
        If the file cannot be read.
    """
    import numpy as np

    os.close(open_regular(path))
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise refusal(str(path), f"not a .npz file: {show(error)}") from None
    check_unpacked(sizes, Path(path).stat().st_size, str(path))
    return np.load(path, allow_pickle=False)


def _size_of_hdf5(path: str | os.PathLike[str]) -> int | None:
    """Return the size of an HDF5 file in bytes; None if the file is not HDF5."""
    with os.fdopen(open_regular(path), "rb") as stream:
        size, at = os.fstat(stream.fileno()).st_size, 0
        # A file may have other data before the HDF5 signature. The signature is then at byte 512, 1024, 2048 and so on.
        while at < size:
            stream.seek(at)
            if stream.read(8) == b"\x89HDF\r\n\x1a\n":
                return size
            at = max(512, 2 * at)
    return None


def check_hdf5(path: str | os.PathLike[str]) -> None:
    """Refuse an HDF5 file (for example MATLAB or EEGLAB) with data in other files, or data far larger than the file.

    Parameters
    ----------
    path : str or Path
        The file. A file that is not HDF5 is not checked.

    Raises
    ------
    RequestError
        If the file has links to other files, or data sets whose values are in other files or are far larger than the
        file.
    """
    size = _size_of_hdf5(path)
    if size is None:
        return
    import h5py

    sizes: list[int] = []

    def look(group: Any, seen: set[int]) -> None:
        for name in group:
            if not isinstance(link := group.get(name, getlink=True), h5py.HardLink | h5py.SoftLink):
                raise refusal(str(path), f"'{show(name)}' is a link to data elsewhere ({type(link).__name__})")
            try:
                entry = group[name]
            except (KeyError, OSError, RuntimeError):
                continue  # A soft link to a name that is not in the file.
            address = h5py.h5o.get_info(entry.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(entry, h5py.Dataset):
                if entry.external or entry.is_virtual:
                    raise refusal(str(path), f"the values of '{show(name)}' are in another file")
                sizes.append(entry.size * entry.dtype.itemsize if entry.size is not None else 0)
            elif isinstance(entry, h5py.Group):
                look(entry, seen)

    try:
        with h5py.File(path, "r") as file:
            look(file, set())
    except RequestError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise refusal(str(path), show(error)) from None
    check_unpacked(sizes, size, str(path))


def open_image(data: bytes | str | os.PathLike[str]) -> Any:
    """Decode a JPEG, PNG or WebP image.

    Parameters
    ----------
    data : bytes, str or Path
        Content of the image file, or its path.

    Returns
    -------
    PIL.Image.Image
        The image, decoded.

    Raises
    ------
    OSError
        If the file is damaged, is an image of another kind, or has more than `MAX_PIXELS` pixels.
    """
    from PIL import Image

    source = io.BytesIO(data) if isinstance(data, bytes) else os.fdopen(open_regular(data), "rb")
    try:
        with source, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=IMAGE_KINDS)
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            return image
    except Image.UnidentifiedImageError:
        raise OSError(f"damaged, or not one of {', '.join(IMAGE_KINDS)}") from None
    except OSError:
        raise
    except (Image.DecompressionBombError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise OSError(show(error)) from None
    except Exception as error:  # Damaged parts of an image raise other errors too, such as struct.error and zlib.error.
        raise OSError(f"{type(error).__name__}: {show(error)}") from None
