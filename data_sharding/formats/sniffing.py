"""Find recordings in a folder, and recognise the format of each recording by its content, before a reader opens it.

`mne.io.read_raw` chooses a reader by the file name, which is not safe: Neuroscan and ANT files both have the extension
``.cnt``, and the wrong reader can crash the process.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, is_remote
from data_sharding.common.untrusted import is_special
from data_sharding.formats import headers
from data_sharding.formats.claims import Near, eeglab_signal_name, files_beside, next_fif_part
from data_sharding.formats.readers import find_formats
from data_sharding.formats.unread.no_recordings import recognise_no_recording
from data_sharding.formats.unread.recorders import recognise_recorder
from data_sharding.formats.unread.tables import recognise_table

HEAD_BYTES = 1 << 15
"""Number of bytes that are read from the beginning of each file. Almost every header has fewer bytes than this, so one
request to an object store is enough."""
TEXT_BYTES = 1 << 20
"""At most this many bytes of a text header are read."""
NIHON_SIDECARS = (".pnt", ".21e", ".log", ".cmt", ".cn2", ".11d", ".reg", ".bft", ".edf.log")
CURRY8_SIDECARS = (".dpa", ".dpo", ".cef", ".ceo", ".rs3", ".hpi")
CURRY7_SIDECARS = (".dap", ".rs3", ".cef", ".ceo")
ORPHANS = {
    ".eeg": Reason("signal file without its header (.vhdr or .ahdr), and not a Nihon Kohden recording"),
    ".fdt": Reason("EEGLAB signal file without its .set"),
    ".avg": Reason("averaged, not a continuous recording"),
}
"""Reason for each extension of files that cannot be read alone: signal files without their header file, and
averages."""
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
    ".xdf": "XDF",
    ".xdfz": "XDF",
}
"""Formats by extension. A file with one of these extensions but without the header of this format is quarantined."""
HEADERS_OF_BRAINVISION = (".vhdr", ".ahdr")
MATLAB = Reason("no reader", "a MATLAB file has no sampling rate and no unit; describe it in a corpus of kind arrays")
HDF5 = b"\x89HDF\r\n\x1a\n"
TEXT_SIDECARS = (".json", ".tsv")
"""Extensions of BIDS sidecar files. These are text files, so the functions that recognise recordings are not called for
them; only text tables with a signal are recognised."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording that was found but is not open yet."""

    path: AnyPath
    """File or folder that the reader opens."""
    format: str
    """Name of the format; a key of `open_signal.READERS` if the format can be read."""
    files: tuple[AnyPath, ...]
    """Sorted paths of all files of the recording, including sidecars."""
    problem: Reason | None = None
    """Fault of the recording, for example in its header; None if there is no fault. A recording with a fault is not
    read."""
    continuous: bool = True
    """False if the file is undamaged but has no continuous signal. Such a file is excluded, and not quarantined."""


def _by_path(files: list[AnyPath]) -> tuple[AnyPath, ...]:
    return tuple(sorted(set(files), key=lambda file: file.as_posix()))


class File:
    """A file with an unknown format: its path, its first bytes, and the other files of its folder."""

    def __init__(self, path: AnyPath, near: Near | None) -> None:
        self.path, self._listing = path, near
        self.head = headers.read_range(path, 0, HEAD_BYTES)
        wide = self.head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        self.text = headers.decode_text(self.head)[0].encode() if wide else self.head.lstrip(codecs.BOM_UTF8)
        self.suffix = path.suffix.lower()
        self.stem = path.name[: -len(path.suffix)] if path.suffix else path.name

    @property
    def near(self) -> Near:
        """Files in the folder of this file, by lower-case name."""
        if self._listing is None:
            self._listing = files_beside(self.path)
        return self._listing

    def exists(self, name: str) -> bool:
        """Whether the folder of this file contains a file with this name, in upper or lower case."""
        return name.lower() in self.near

    def owner_of(self, name: str, headers_of: tuple[str, ...]) -> str | None:
        """Check the name of a data or marker file in this header.

        Return a reason if the file seems to belong to another recording, otherwise None.

        After a header was renamed, it can name a file that belongs to another recording. This is assumed if the base
        names of the header and of the named file differ, and if the folder contains one of two other files: a header
        with the base name of the named file, or a file like the named file with the base name of this header.
        """
        stem, _, ending = name.rpartition(".")
        if not stem or stem.lower() == self.stem.lower():
            return None
        if other := next((stem + suffix for suffix in headers_of if self.exists(stem + suffix)), None):
            return f"this file belongs to {self.near[other.lower()].name}; correct the name in the header"
        own = f"{self.stem}.{ending}"
        return f"{self.near[own.lower()].name} exists; correct the name in the header" if self.exists(own) else None

    def all_text(self, path: AnyPath | None = None) -> str:
        """Return the first megabyte of this file, or of the file `path`, as text. Every line ends with a newline."""
        data = headers.read_range(path or self.path, 0, TEXT_BYTES)
        return headers.decode_text(data)[0].replace("\r\n", "\n").replace("\r", "\n")

    def recording(
        self, format_: str, *sidecars: str, problem: Reason | None = None, continuous: bool = True, need: str = ""
    ) -> Recording:
        """Return the recording that consists of this file, and of the `sidecars` that exist.

        If no sidecar exists, the text `need` (if not empty) becomes the problem of the recording.
        """
        there = [self.near[name.lower()] for name in sidecars if name.lower() in self.near] if sidecars else []
        if need and not there:
            problem = Reason("sidecar missing", need)
        return Recording(
            path=self.path,
            format=format_,
            files=_by_path([self.path, *there]),
            problem=problem.shortened(300) if problem else None,
            continuous=continuous or bool(need and not there),
        )


# --- One function for each format, which returns a recording, or None if the file has another format. -----------------


def _edf(file: File) -> Recording | None:
    format_ = "edf" if file.head[:8] == b"0       " else "bdf" if file.head[:8] == b"\xffBIOSEMI" else None
    if format_ is None or len(file.head) < 256:
        return None
    found = headers.run_check(headers.check_edf, format_.upper(), file.path, file.head)
    problem, continuous = (found, True) if isinstance(found, Reason) else found
    return file.recording(format_, problem=problem, continuous=continuous)


def _gdf(file: File) -> Recording | None:
    if file.head[:4] != b"GDF ":
        return None
    return file.recording("gdf", problem=headers.run_check(headers.check_gdf, "GDF", file.path, file.head))


def _brainvision(file: File) -> Recording | None:
    if not re.match(rb"Brain ?Vision (Data Exchange Header|V-Amp Data Header|Core Data Format)", file.text):
        return None
    text, files, problem = file.all_text(), [], None
    for key, needed in (("DataFile", True), ("MarkerFile", False)):
        name = headers.ini_value(text, key)
        name = re.split(r"[\\/]", name)[-1].replace("$b", file.stem) if name else None
        # After the files were renamed, the header can contain the name of a data file that no longer exists. A data
        # file with the base name of the header may belong to another recording, so refuse the recording and do not use
        # that data file.
        if name and file.exists(name):
            files.append(name)
            if other := file.owner_of(name, HEADERS_OF_BRAINVISION):
                problem = problem or Reason("sidecar of another recording", f"the header names '{name}', but {other}")
            elif needed:
                data = file.near[name.lower()]
                problem = headers.run_check(headers.check_brainvision, "BrainVision", text, data)
        elif needed:
            problem = Reason("sidecar missing", f"the header names '{name}', which does not exist")
        elif name and f"{file.stem}.vmrk".lower() in file.near:
            # If the marker file with the name in the header does not exist, the reader uses this .vmrk file.
            files.append(f"{file.stem}.vmrk")
    return file.recording("brainvision", *files, problem=problem)


def _neuroscan(file: File) -> Recording | None:
    if file.head[:9] != b"Version 3":
        return None
    if file.suffix == ".cnt":
        return file.recording(
            "neuroscan", problem=headers.run_check(headers.check_neuroscan, "Neuroscan", file.path, file.head)
        )
    if file.suffix in (".eeg", ".avg"):
        what = (
            Reason(
                "epoched", "a Neuroscan .eeg holds trials, and there is no reader for it; export it as EEGLAB or EDF"
            )
            if file.suffix == ".eeg"
            else ORPHANS[".avg"]
        )
        return file.recording("neuroscan-epochs", problem=what, continuous=False)
    return None


def _ant(file: File) -> Recording | None:
    if file.head[:4] not in (b"RIFF", b"RF64"):
        return None
    if file.suffix != ".cnt" and not file.head[8:16].rstrip(b"\0 ").endswith(b"CNT"):
        return None
    # Next to an ANT file, an .evt or .trg file contains the events, and a .seg file contains the times of the segments.
    sidecars = [f"{file.stem}.{suffix}" for suffix in ("evt", "trg", "seg")]
    return file.recording("ant", *sidecars, problem=headers.run_check(headers.check_ant, "ANT", file.path, file.head))


def _fif(file: File) -> Recording | None:
    name = file.path.name.lower()
    zipped = name.endswith(".fif.gz") and file.head[:2] == b"\x1f\x8b"
    if not zipped and (file.head[:4] != b"\0\0\0\x64" or file.suffix != ".fif"):
        return None
    if zipped and not (file.exists(f"{name[:-7]}-1.fif.gz") or file.exists(f"{name[:-3]}-1.gz")):
        # The folder has no file that can be the next part. So do not search this file for the name of a next part,
        # because reading to the end of a gzip stream takes long.
        return file.recording("fif")
    # Read the name of the next part from the content of the file, because a file such as rest-1.fif may be another
    # recording.
    parts, here, head, problem = [file.path], file.path, file.head, None
    while following := headers.run_check(next_fif_part, "FIF", here, head):
        if isinstance(following, Reason):
            break
        here, head = file.near.get(following.lower()), b""
        if here is None:
            text = f"{parts[-1].name} names its next part '{following}', which does not exist"
            problem = Reason("sidecar missing", text)
            break
        if here in parts:
            break
        parts.append(here)
    return file.recording("fif", *(part.name for part in parts[1:]), problem=problem)


def _matlab(file: File) -> Recording | None:
    if not file.head.startswith((b"MATLAB", HDF5)):
        return None
    if file.suffix == ".set":
        # As in EEGLAB, prefer the .fdt file with the base name of the .set file to the .fdt file whose name is stored
        # in the .set file.
        own = f"{file.stem}.fdt"
        if not file.exists(own) and any(name.endswith(".fdt") for name in file.near):
            own = eeglab_signal_name(file.path, file.near.keys()) or own
        return file.recording("eeglab", own)
    if file.suffix == ".mat":
        return file.recording("mat", problem=MATLAB, continuous=False)
    return None


def _nihon(file: File) -> Recording | None:
    if file.suffix != ".eeg" or not re.match(rb"EEG-\d{4}[A-Z]|DAE-\d{4}[A-Z]|QI-\d{3}[A-Z]|NKC", file.head):
        return None
    sidecars = [file.stem + s for s in NIHON_SIDECARS]
    return file.recording("nihon", *sidecars, problem=headers.run_check(headers.check_nihon, "Nihon Kohden", file.path))


def _persyst(file: File) -> Recording | None:
    if file.suffix != ".lay" or file.text.lstrip()[:10].lower() != b"[fileinfo]":
        return None
    text, problem = file.all_text(), None
    # Use only the data file whose name is in the header, because MNE reads only this file.
    name = re.split(r"[\\/]", headers.ini_value(text, "File") or f"{file.stem}.dat")[-1]
    if other := file.exists(name) and file.owner_of(name, (".lay",)):
        problem = Reason("sidecar of another recording", f"the header names '{name}', but {other}")
    elif file.exists(name):
        problem = headers.run_check(headers.check_persyst, "Persyst", text, file.near[name.lower()])
    return file.recording("persyst", name, problem=problem, need=f"the header names '{name}', which does not exist")


def _nedf(file: File) -> Recording | None:
    # A NEDF file begins with XML: a root element with any name, which contains the element NEDFversion.
    if not re.match(rb"\s*(<\?xml[^<>]*>\s*)?<[A-Za-z_][^<>]*>[^\0]*<NEDFversion>", file.text):
        return None
    try:
        problem = headers.run_check(headers.check_nedf, "NEDF", file.path, file.head)
    except ImportError:
        problem = None  # The package defusedxml is missing; the reader reports later that it must be installed.
    return file.recording("nedf", problem=problem)


def _curry(file: File) -> Recording | None:
    if file.suffix == ".cdt":
        sidecars = [file.path.name + s for s in CURRY8_SIDECARS]
        needed = sidecars[:2]
    elif file.suffix == ".dat" and f"{file.stem}.dap".lower() in file.near:
        sidecars = [file.stem + s for s in CURRY7_SIDECARS]
        needed = sidecars[:1]
    else:
        return None
    header = next((file.near[name.lower()] for name in needed if name.lower() in file.near), None)
    problem = (
        Reason("sidecar missing", f"there is no file {' or '.join(needed)}")
        if header is None
        else headers.run_check(headers.check_curry, "Curry", file.path, header)
    )
    return file.recording("curry", *sidecars, problem=problem)


def _egi(file: File) -> Recording | None:
    if headers.egi_header(file.head) is None:
        return None
    found = headers.run_check(headers.check_egi, "EGI simple binary", file.path, file.head)
    problem, continuous = (found, True) if isinstance(found, Reason) else found
    return file.recording("egi", problem=problem, continuous=continuous)


def _xdf(file: File) -> Recording | None:
    gzipped = file.suffix == ".xdfz" or file.path.name.lower().endswith(".xdf.gz")
    return file.recording("xdf") if file.head[:4] == b"XDF:" or (gzipped and file.head[:2] == b"\x1f\x8b") else None


def _claims(file: File) -> Recording | None:
    """Return a `Recording` with a problem for a file that has a recording's extension, but unknown content."""
    if file.suffix in CLAIMED:
        name = CLAIMED[file.suffix]
        kind = name.split()[0]
        what = "an empty file" if not file.head else f"not {name}: it has no {kind} header"
        return file.recording(kind.lower(), problem=Reason("unreadable", what))
    if file.suffix in ORPHANS:
        return file.recording(file.suffix[1:], problem=ORPHANS[file.suffix])
    if file.suffix == ".mat":
        return file.recording("mat", problem=MATLAB, continuous=False)
    if found := recognise_recorder(file):
        return file.recording(found.format, *found.files, problem=found.reason, continuous=not found.excluded)
    return _table(file)


def _table(file: File) -> Recording | None:
    found = recognise_table(file)
    return found and file.recording(found.format, problem=found.reason)


def _no_recording(file: File) -> Recording | None:
    found = recognise_no_recording(file)
    return found and file.recording(found.format, problem=found.reason, continuous=False)


FORMATS: tuple[Callable[[File], Recording | None], ...] = (
    _no_recording,
    _edf,
    _gdf,
    _brainvision,
    _neuroscan,
    _ant,
    _xdf,
    _fif,
    _matlab,
    _nihon,
    _persyst,
    _nedf,
    _curry,
    _egi,
    *(format_.recognise for format_ in find_formats()),
    _claims,
)
"""Functions that recognise a format, in the order in which they are called."""


def _mff(path: AnyPath) -> Recording:
    files = [f for f in path.rglob("*") if f.is_file() and not f.name.startswith("._")]
    signals = [f for f in files if re.fullmatch(r"signal\d+\.bin", f.name)]
    problem = None if signals else Reason("sidecar missing", "the MFF folder has no signal*.bin")
    return Recording(path=path, format="mff", files=_by_path(files), problem=problem)


def sniff(path: str | AnyPath, near: Near | None = None) -> Recording | None:
    """Recognise the format of a file or folder, by its content if possible.

    Parameters
    ----------
    path : str, Path or UPath
        A file, or an ``.mff`` folder.
    near : mapping of str to path, optional
        Files of the same folder by lower-case name, if the caller has already listed the folder.

    Returns
    -------
    Recording or None
        The recording with all of its files. Its `problem` is set if the recording has a fault. The result is
        None if neither the content nor the extension belongs to a recording format.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    path = Path(path) if isinstance(path, str) else path
    if path.name.startswith("._"):
        return None
    if path.suffix.lower() in (".mff", ".mefd") and path.is_dir():
        if path.suffix.lower() == ".mff":
            return _mff(path)
        files = [f for f in path.rglob("*") if f.is_file() and not f.name.startswith("._")]
        return Recording(path=path, format="mefd", files=_by_path(files))
    # Skip other folders, and pipes, sockets and devices: reading from a pipe or device may never end.
    if not is_remote(path) and not stat.S_ISREG(path.stat().st_mode):
        return None
    file = File(path, near)
    looks = (_table,) if file.suffix in TEXT_SIDECARS else FORMATS
    return next((found for look in looks if (found := look(file))), None)


def _walk_local(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder below `root`, with the names of its files. A folder that cannot be listed raises an error."""

    def refuse(error: OSError) -> None:
        raise RequestError(
            f"{error.filename}: cannot be listed ({error.strerror}); make this folder readable, "
            "or exclude its parent folder"
        )

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            # A symbolic link points to a folder that was already searched, so do not search its subfolders again.
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        units = [name for name in folders if name.lower().endswith((".mff", ".mefd"))]
        folders[:] = [name for name in folders if name not in units and not name.startswith(".")]
        # Skip named pipes and devices: reading from them may never end.
        names = [name for name in names if not is_special(os.path.join(folder, name))]  # noqa: PTH118
        yield Path(folder), [*(name for name in units if not name.startswith(".")), *names]


def _walk_remote(root: Any) -> Iterator[tuple[Any, list[str]]]:
    try:
        entries = sorted(root.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise RequestError(
            f"{root}: cannot be listed ({error}); make this folder readable, or exclude its parent folder"
        ) from None
    names, folders = [], []
    for entry in entries:
        whole = entry.name.lower().endswith((".mff", ".mefd"))
        (folders if not whole and entry.is_dir() else names).append(entry.name)
    yield root, names
    for name in folders:
        if name and not name.startswith("."):
            yield from _walk_remote(root / name)


def find_recordings(root: str | AnyPath) -> list[Recording]:
    """Find all recordings under a folder, and all other files that have the extension of a recording.

    Parameters
    ----------
    root : str, Path or UPath
        Folder to search. Hidden files are skipped, including the ``._`` files of macOS.

    Returns
    -------
    list of Recording
        Recordings, sorted by path. A sidecar file is part of its recording and is not listed alone.

    Raises
    ------
    RequestError
        If a folder cannot be listed.
    """
    root = Path(root) if isinstance(root, str) else root
    found: list[Recording] = []
    for folder, names in _walk_remote(root) if is_remote(root) else _walk_local(Path(str(root))):
        near: dict[str, AnyPath] = {name.lower(): folder / name for name in names}
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = folder / name
            try:
                recording = sniff(path, near)
            except OSError as error:
                reason = Reason("unreadable", str(error.strerror or error))
                recording = Recording(path=path, format="unknown", files=(path,), problem=reason)
            if recording:
                found.append(recording)
    claimed = {file for recording in found for file in recording.files if file != recording.path}
    return sorted((r for r in found if r.path not in claimed), key=lambda r: r.path.as_posix())
