"""Find recordings by content, and read them with the reader that their header calls for.

`mne.io.read_raw` chooses by file name; two makers share ``.cnt``, and one's reader takes the process down on the
other's file. Here the header decides, before any reader is touched.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.errors import RequestError

if TYPE_CHECKING:
    from mne.io import BaseRaw

HEAD_BYTES = 4096
"""Enough for every header that is looked at here."""
NIHON_SIDECARS = (".pnt", ".21e", ".log", ".cmt", ".cn2", ".11d", ".reg", ".bft", ".edf.log")
CURRY8_SIDECARS = (".dpa", ".dpo", ".cef", ".ceo", ".rs3")
CURRY7_SIDECARS = (".dap", ".rs3", ".cef", ".ceo")
UNSUPPORTED = {
    ".xdf": "XDF (LabStreamingLayer)",
    ".trc": "Micromed TRC",
    ".nwb": "Neurodata Without Borders",
    ".mefd": "MEF3",
    ".e": "Nicolet",
}
ORPHANS = {
    ".eeg": "signal file without its header (.vhdr or .ahdr), and not a Nihon Kohden recording",
    ".fdt": "EEGLAB signal file without its .set",
    ".avg": "averaged, not a continuous recording",
}
"""Files that hold signal but are no recording by themselves: reported where no header claims them."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording found on disk, not read yet."""

    path: Path
    """What a reader is given."""
    format: str
    """Name of the format, a key of `READERS` where it can be read."""
    files: tuple[Path, ...]
    """All files that make it up, sidecars included, sorted."""
    problem: str | None = None
    """What the header already shows to be wrong; such a file is not read."""
    continuous: bool = True
    """False for valid files that hold no continuous signal: excluded rather than quarantined."""


class ReadError(ValueError):
    """A recording cannot be read; the message is the reason for the ledger."""


class NotContinuous(ReadError):
    """The file is valid, but holds no continuous signal."""


# --- finding ---------------------------------------------------------------------------------------------------------


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def _siblings(path: Path) -> dict[str, Path]:
    """Files of the folder by lower-case name: makers' software is careless about case."""
    return {entry.name.lower(): entry for entry in path.parent.iterdir()}


def _ini_value(text: str, key: str) -> str | None:
    match = re.search(rf"^\s*{key}\s*=\s*(.+?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    return match.group(1) if match else None


def _edf_header(path: Path, head: bytes, format_: str) -> tuple[str | None, bool]:
    """What an EDF or BDF header shows to be wrong, and whether there is a continuous signal."""
    try:
        n_signals = int(head[252:256])
        header_bytes, n_records = int(head[184:192]), int(head[236:244])
        with path.open("rb") as stream:
            header = stream.read(256 + 256 * n_signals)
        labels = [header[256 + 16 * i : 272 + 16 * i].decode("latin-1").strip() for i in range(n_signals)]
        offset = 256 + 216 * n_signals
        per_record = [int(header[offset + 8 * i : offset + 8 * i + 8]) for i in range(n_signals)]
    except ValueError:
        return f"damaged {format_.upper()} header", True
    if not any(label not in ("EDF Annotations", "BDF Annotations") for label in labels):
        return "no signal: the file holds annotations only", False
    record = sum(per_record) * (3 if format_ == "bdf" else 2)
    have = (path.stat().st_size - header_bytes) / record if record else 0
    if n_records > 0 and have < n_records:
        return f"truncated: the header promises {n_records} records, the file holds {have:.1f}", True
    if head[192:197] in (b"EDF+D", b"BDF+D"):
        width = 3 if format_ == "bdf" else 2
        notes = next((i for i, label in enumerate(labels) if label.endswith("Annotations")), None)
        if notes is None or _has_gaps(
            path, header_bytes, record, sum(per_record[:notes]) * width, float(head[244:252])
        ):
            return "discontinuous: the file (EDF+D) has gaps, and windows would reach over them", True
    return None, True


def _has_gaps(path: Path, header_bytes: int, record: int, annotations_at: int, duration_s: float) -> bool:
    """Whether the records of an EDF+D file do not follow one another: each one's first annotation is its onset."""
    onsets = []
    with path.open("rb") as stream:
        for start in range(header_bytes, path.stat().st_size - record + 1, record):
            stream.seek(start + annotations_at)
            match = re.match(rb"[+-][\d.]+", stream.read(32))
            if match is None:
                return True
            onsets.append(float(match.group()))
    return any(abs(b - a - duration_s) > 1e-3 for a, b in itertools.pairwise(onsets))


def _brainvision(path: Path, head: bytes) -> Recording:
    text = path.read_bytes().decode("utf-8", errors="replace")
    near, files, problem = _siblings(path), [path], None
    for key, needed in (("DataFile", True), ("MarkerFile", False)):
        name = _ini_value(text, key)
        name = name and name.replace("$b", path.stem)
        # The header's name can be stale after a renaming: the same stem is the usual meaning, but a guess; refuse it.
        if name and Path(name).name.lower() in near:
            files.append(near[Path(name).name.lower()])
        elif needed:
            problem = f"sidecar missing: the header names '{name}', which is not there"
    return Recording(path=path, format="brainvision", files=tuple(sorted(files)), problem=problem)


def _with_sidecars(path: Path, format_: str, names: list[str], *, need_any: list[str] | None = None) -> Recording:
    near = _siblings(path)
    files = [path, *(near[name.lower()] for name in names if name.lower() in near)]
    problem = None
    if need_any and not any(name.lower() in near for name in need_any):
        problem = f"sidecar missing: none of {', '.join(need_any)} is there"
    return Recording(path=path, format=format_, files=tuple(sorted(set(files))), problem=problem)


def _mff(path: Path) -> Recording:
    files = tuple(sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("._")))
    signals = [f for f in files if re.fullmatch(r"signal\d+\.bin", f.name)]
    problem = None if signals else "sidecar missing: the MFF folder has no signal*.bin"
    return Recording(path=path, format="mff", files=files, problem=problem)


def sniff(path: str | Path) -> Recording | None:
    """Say what a file (or folder) is, by its content.

    Parameters
    ----------
    path : str or Path
        A file, or an ``.mff`` folder.

    Returns
    -------
    Recording or None
        The recording with every file that belongs to it; `problem` is set where the header is enough to see that it
        cannot be used. None for a file that is not a recording, nor claims to be one by its extension.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _mff(path) if suffix == ".mff" else None
    if path.name.startswith("._"):
        return None
    head = _head(path)
    stem = path.name[: -len(path.suffix)] if path.suffix else path.name

    def one(format_: str, problem: str | None = None, continuous: bool = True) -> Recording:
        return Recording(path=path, format=format_, files=(path,), problem=problem, continuous=continuous)

    text = head.lstrip(b"\xef\xbb\xbf")
    if head[:8] == b"0       " and len(head) >= 256:
        return one("edf", *_edf_header(path, head, "edf"))
    if head[:8] == b"\xffBIOSEMI" and len(head) >= 256:
        return one("bdf", *_edf_header(path, head, "bdf"))
    if head[:4] == b"GDF ":
        return one("gdf")
    if re.match(rb"Brain ?Vision (Data Exchange Header|V-Amp Data Header|Core Data Format)", text):
        return _brainvision(path, head)
    if head[:9] == b"Version 3" and suffix == ".cnt":
        return one("neuroscan")
    if head[:9] == b"Version 3" and suffix == ".eeg":
        return one("neuroscan-epochs", "epoched: a Neuroscan .eeg holds trials, not a continuous recording", False)
    if head[:4] in (b"RIFF", b"RF64") and head[8:16].rstrip(b"\0 ").endswith(b"CNT"):
        return one("ant")
    if head[:4] in (b"RIFF", b"RF64") and suffix == ".cnt":
        return one("ant")
    if (head[:4] == b"\0\0\0\x64" and suffix == ".fif") or path.name.lower().endswith(".fif.gz"):
        near = _siblings(path)
        parts = [p for n, p in near.items() if re.fullmatch(re.escape(stem.lower()) + r"-\d+\.fif", n)]
        if split := re.match(r"(.*)_split-01(.*)", stem.lower()):
            pattern = re.escape(split.group(1)) + r"_split-\d+" + re.escape(split.group(2)) + r"\.fif"
            parts = [p for n, p in near.items() if re.fullmatch(pattern, n)]
        return Recording(path=path, format="fif", files=tuple(sorted({path, *parts})))
    if suffix == ".set" and (head[:6] == b"MATLAB" or head[:8] == b"\x89HDF\r\n\x1a\n"):
        return _with_sidecars(path, "eeglab", [f"{stem}.fdt"])
    if re.match(rb"EEG-\d{4}[A-Z]|DAE-\d{4}[A-Z]|NKC", head) and suffix == ".eeg":
        return _with_sidecars(path, "nihon", [stem + s for s in NIHON_SIDECARS])
    if text.lstrip()[:10].lower() == b"[fileinfo]" and suffix == ".lay":
        data = _ini_value(text.decode("utf-8", errors="replace"), "File") or f"{stem}.dat"
        names = [re.split(r"[\\/]", data)[-1], f"{stem}.dat"]
        return _with_sidecars(path, "persyst", names, need_any=names)
    if b"<NEDFversion>" in head:
        return one("nedf")
    if suffix == ".cdt":
        need = [path.name + s for s in (".dpa", ".dpo")]
        return _with_sidecars(path, "curry", [path.name + s for s in CURRY8_SIDECARS], need_any=need)
    if suffix == ".dat" and f"{stem}.dap".lower() in _siblings(path):
        return _with_sidecars(path, "curry", [stem + s for s in CURRY7_SIDECARS])
    if suffix == ".nxe":
        # 64 channels of 16 bits, and no header at all: the size is the only thing that can be checked.
        size = path.stat().st_size
        fault = (
            None if size and size % 128 == 0 else f"truncated: {size} bytes are no whole number of 64-channel frames"
        )
        return one("eximia", fault)
    if suffix in CLAIMED:
        what = "an empty file" if not head else f"not {CLAIMED[suffix]}: the header is not one"
        return one(CLAIMED[suffix].split()[0].lower(), f"unreadable: {what}")
    if suffix in UNSUPPORTED:
        return one(suffix[1:], f"no reader for {UNSUPPORTED[suffix]}")
    if suffix in ORPHANS:
        return one(suffix[1:], ORPHANS[suffix])
    return None


CLAIMED = {
    ".edf": "EDF",
    ".bdf": "BDF",
    ".gdf": "GDF",
    ".vhdr": "BrainVision",
    ".ahdr": "BrainVision",
    ".cnt": "CNT (neither Neuroscan nor ANT)",
    ".set": "EEGLAB",
    ".fif": "FIF",
    ".lay": "Persyst",
    ".nedf": "NEDF",
}
"""Extensions that promise a recording: without its header the file is named and set aside."""


def _walk(root: Path) -> Iterator[Path]:
    """All files and `.mff` folders; a folder that cannot be read stops the walk, since what it holds would be lost."""

    def refuse(error: OSError) -> None:
        raise RequestError(f"{error.filename}: cannot be listed ({error.strerror}); mend it or exclude its parent")

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # A link back to a folder above.
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)
            elif name.lower().endswith((".mff", ".mefd")):
                folders.remove(name)
                yield Path(folder) / name
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder) / name


def find_recordings(root: str | Path) -> list[Recording]:
    """All recordings under a folder, and whatever claims to be one.

    Parameters
    ----------
    root : str or Path
        The folder; hidden files and macOS's ``._`` twins are passed over.

    Returns
    -------
    list of Recording
        Sorted by path. Files that belong to another recording of the list are not in it.
    """
    found: list[Recording] = []
    for path in _walk(Path(root)):
        try:
            recording = sniff(path)
        except OSError as error:
            recording = Recording(path=path, format="unknown", files=(path,), problem=f"unreadable: {error.strerror}")
        if recording:
            found.append(recording)
    claimed = {file for recording in found for file in recording.files if file != recording.path}
    return sorted((r for r in found if r.path not in claimed), key=lambda r: r.path.as_posix())


# --- reading ---------------------------------------------------------------------------------------------------------


def neuroscan_data_format(path: str | Path) -> str:
    """Bits of a Neuroscan CNT file, which its header does not say reliably.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        ``"int16"`` or ``"int32"``.

    Notes
    -----
    The size of the data block over channels and samples decides where the header's counts agree with it. Otherwise
    both readings are compared: one sample of 32 bits taken for two of 16 alternates between a smooth and a noisy
    half, and two of 16 taken for one of 32 are ruled by the noise of every other channel; the smoother one is right.
    """
    import numpy as np

    with Path(path).open("rb") as stream:
        head = stream.read(900)
        n_channels = int.from_bytes(head[370:372], "little")
        n_samples = int.from_bytes(head[864:868], "little")
        events = int.from_bytes(head[886:890], "little")
        start = 900 + 75 * n_channels
        size = (events if start < events <= Path(path).stat().st_size else Path(path).stat().st_size) - start
        if not n_channels or size <= 0:
            raise ReadError("unreadable: damaged Neuroscan header")
        for bits in (16, 32):
            if n_samples and n_channels * n_samples * bits // 8 == size:
                return f"int{bits}"
        stream.seek(start)
        block = stream.read(min(size, n_channels * 4 * 2000))
    rough = {}
    for name, dtype in (("int16", "<i2"), ("int32", "<i4")):
        frame = n_channels * np.dtype(dtype).itemsize
        x = np.frombuffer(block[: len(block) // frame * frame], dtype).reshape(-1, n_channels).astype(float)
        rough[name] = np.median(np.diff(x, axis=0).std(0) / np.maximum(x.std(0), 1e-12))
    return min(rough, key=lambda name: rough[name])


def _neuroscan(path: Path) -> BaseRaw:
    import mne

    return mne.io.read_raw_cnt(path, data_format=neuroscan_data_format(path))  # type: ignore[arg-type]


def _fif(path: Path) -> BaseRaw:
    import mne

    try:
        return mne.io.read_raw_fif(path, allow_maxshield=False)
    except ValueError as error:
        if "No raw data" in str(error):
            raise NotContinuous("no continuous recording in the FIF file: epochs, averages or something else") from None
        raise


def _eeglab(path: Path) -> BaseRaw:
    import mne

    try:
        return mne.io.read_raw_eeglab(path)
    except TypeError as error:
        if match := re.search(r"number of trials is (\d+)", str(error)):
            raise NotContinuous(f"epoched: {match.group(1)} trials, not a continuous recording") from None
        raise


def _mne(name: str, **options: Any) -> Callable[[Path], BaseRaw]:
    def read(path: Path) -> BaseRaw:
        import mne

        return getattr(mne.io, f"read_raw_{name}")(path, **options)

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "edf": _mne("edf"),
    "bdf": _mne("bdf"),
    "gdf": _mne("gdf"),
    "brainvision": _mne("brainvision"),
    "neuroscan": _neuroscan,
    "ant": _mne("ant"),
    "fif": _fif,
    "eeglab": _eeglab,
    "nihon": _mne("nihon"),
    "persyst": _mne("persyst"),
    "nedf": _mne("nedf"),
    "curry": _mne("curry"),
    "eximia": _mne("eximia"),
    "mff": _mne("egi", events_as_annotations=False),
}
"""Format to its reader."""
UNIT_FACTORS = {"eximia": 1e-6}
"""Formats whose reader returns another unit than volts, with the factor to volts.

eXimia: a converter of 10 V and 16 bits behind a gain of 2000 has 0.0763 microvolts a bit, and MNE's reader returns
that number as if it were volts.
"""


def read(recording: Recording) -> BaseRaw:
    """Open a recording with the reader of its format; the signal is not loaded yet.

    Parameters
    ----------
    recording : Recording
        What `sniff` found.

    Returns
    -------
    mne.io.BaseRaw
        The recording.

    Raises
    ------
    ReadError
        With the reason for the ledger.

    Notes
    -----
    Some readers can take the process down on a damaged file. Call this where that is survivable.
    """
    import warnings

    import mne

    if recording.problem:
        raise (ReadError if recording.continuous else NotContinuous)(recording.problem)
    reader = READERS[recording.format]
    try:
        with warnings.catch_warnings(), mne.utils.use_log_level("ERROR"):
            warnings.simplefilter("ignore")
            return reader(recording.path)
    except ReadError:
        raise
    except ImportError as error:
        raise ReadError(f"reader not installed: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:
        raise ReadError(f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
