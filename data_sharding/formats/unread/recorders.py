"""Recognise recordings in formats for which this package has no reader, and compressed recordings."""

from __future__ import annotations

import re
import tarfile
import zipfile
from dataclasses import dataclass
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.unread import Finding

HDF5 = b"\x89HDF\r\n\x1a\n"
RECORDINGS = (
    *(".edf", ".bdf", ".gdf", ".rec", ".vhdr", ".ahdr", ".eeg", ".cnt", ".set", ".fdt", ".fif", ".lay", ".nedf"),
    *(".xdf", ".trc", ".nxe", ".cdt", ".mff", ".raw", ".erd", ".acq", ".easy", ".ncs", ".nwb", ".rhd", ".rhs", ".mefd"),
    *(".smr", ".smrx", ".ns5", ".ns2", ".ns3", ".ns6", ".e", ".mat", ".avg"),
)
"""Extensions of recordings. By these extensions, recordings inside an archive and compressed recordings are
recognised."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".z")
ARCHIVES = (
    ".zip",
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".7z",
    ".rar",
    ".tar.gz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
)
SMALLEST_ARRAY_BYTES = 1 << 16
"""Arrays and HDF5 files below this size are not reported, because they usually contain labels or settings."""
SMALLEST_BINARY_BYTES = 1 << 20
"""Binary files of unknown content below this size are not reported."""
NO_RECORDINGS = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg", ".psd", ".ico", ".heic"),
        *(".avi", ".mp4", ".mov", ".mkv", ".wmv", ".mpg", ".mpeg", ".m4v", ".webm", ".asf"),
        *(".wav", ".mp3", ".ogg", ".flac", ".m4a", ".aac", ".wma", ".aif", ".aiff"),
        *(".pdf", ".doc", ".docx", ".ppt", ".pptx", ".xls", ".xlsx", ".odt", ".ods", ".odp", ".rtf", ".ps", ".eps"),
        *(".nii", ".mgz", ".mgh", ".gii", ".img", ".stl", ".obj", ".ply", ".blend", ".fig", ".spm"),
        *(".exe", ".dll", ".so", ".dylib", ".o", ".a", ".pyc", ".jar", ".class", ".msi", ".dmg", ".iso", ".whl"),
        *(".pt", ".pth", ".ckpt", ".onnx", ".safetensors", ".pb", ".tflite", ".ttf", ".otf", ".woff", ".woff2"),
        *(".db", ".sqlite", ".sqlite3", ".accdb", ".mdb", ".log", ".tmp", ".bak", ".lock", ".pack", ".idx"),
        *COMPRESSED,
        *ARCHIVES,
    )
)
"""Extensions of common files that are not recordings."""
MOST_MEMBERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """A format without a reader."""

    format: str
    """Name in the ledger."""
    title: str
    """Name of the amplifier or the program."""
    suffixes: tuple[str, ...] = ()
    """Extensions of the file with the signal. If empty, the format is recognised only by the first bytes."""
    magic: tuple[tuple[int, bytes], ...] = ()
    """Offset and bytes by which the format is recognised. If empty, the format is recognised only by the extension."""
    do: str = "export the recording as EDF with the manufacturer's program"
    """What the user can do to get a readable file."""
    sidecars: str = ""
    """Pattern of the names of other files of the recording; ``{stem}`` is the name without the extension."""
    excluded: bool = False
    """True if files of this format contain no EEG."""
    one_a_folder: bool = False
    """True if all files with this extension in a folder are one recording."""


RECORDERS = (
    Recorder(
        format="natus",
        title="Natus (XLTEK)",
        suffixes=(".erd",),
        sidecars=r"{stem}(_\d+)?\.(erd|eeg|ent|etc|snc|stc|vtc|vt2|epo|toc|xlvtc)",
    ),
    Recorder(format="biopac", title="Biopac AcqKnowledge", suffixes=(".acq",)),
    Recorder(
        format="neuroelectrics-easy",
        title="Neuroelectrics (.easy, a table without sampling rate and channel names)",
        suffixes=(".easy",),
        do="use the .nedf or .edf file of the same recording",
        sidecars=r"{stem}\.info",
    ),
    Recorder(format="intan", title="Intan RHD", magic=((0, b"\x02\x27\x91\xc6"),)),
    Recorder(format="intan", title="Intan RHS", magic=((0, b"\xac\x27\x91\xd6"),)),
    Recorder(format="intan", title="Intan", suffixes=(".rhd", ".rhs")),
    Recorder(format="spike2", title="CED Spike2", suffixes=(".smr", ".smrx")),
    Recorder(format="windaq", title="DATAQ WinDaq", suffixes=(".wdq", ".wdh", ".wdc")),
    Recorder(format="labview", title="National Instruments LabVIEW", suffixes=(".lvm",)),
    Recorder(format="tdms", title="National Instruments TDMS", magic=((0, b"TDSm"),)),
    Recorder(format="plexon", title="Plexon", suffixes=(".pl2", ".plx"), sidecars=""),
    Recorder(format="tdt", title="Tucker-Davis (tank)", suffixes=(".tev",), sidecars=r"{stem}\.(tbk|tdx|tnt|tsq|tin)"),
    Recorder(format="axon", title="Axon", magic=((0, b"ABF "),)),
    Recorder(format="axon", title="Axon", magic=((0, b"ABF2"),)),
    Recorder(
        format="bci2000",
        title="BCI2000",
        magic=((0, b"HeaderLen="),),
        do="convert it to EDF or BrainVision with the BCI2000 tools",
    ),
    Recorder(
        format="bci2000",
        title="BCI2000",
        magic=((0, b"BCI2000V="),),
        do="convert it to EDF or BrainVision with the BCI2000 tools",
    ),
    Recorder(format="nicolet-e", title="Nicolet (.e)", suffixes=(".e",)),
    Recorder(format="cadwell", title="Cadwell", suffixes=(".vpd", ".ez3", ".ezd", ".arc")),
    Recorder(format="stellate", title="Stellate Harmonie", suffixes=(".sig",), sidecars=r"{stem}\.sts"),
    Recorder(format="open-ephys", title="Open Ephys", magic=((0, b"header.format = 'Open Ephys"),), one_a_folder=True),
    Recorder(format="open-ephys", title="Open Ephys", suffixes=(".oebin",)),
    Recorder(
        format="wfdb",
        title="WFDB (PhysioNet)",
        suffixes=(".hea",),
        do="convert the recording to EDF with the WFDB software (mit2edf)",
        sidecars=r"{stem}\.(dat|mat)",
    ),
    Recorder(format="meg", title="MEG (CTF, KIT)", suffixes=(".meg4", ".sqd"), excluded=True),
    Recorder(format="deltamed", title="Deltamed (Coherence)", suffixes=(".coh",)),
    Recorder(format="ebneuro", title="EB Neuro (Galileo)", suffixes=(".ebm",)),
    Recorder(format="manscan", title="MANSCAN", suffixes=(".mbi",), sidecars=r"{stem}\.mb2"),
    Recorder(format="elan", title="ELAN", suffixes=(".eeg.ent",)),
    Recorder(format="tmsi", title="TMSi (Poly5)", suffixes=(".poly5", ".s00")),
    Recorder(format="tmsi", title="TMSi (Poly5)", magic=((0, b"POLY SAMPLE FILE"),)),
    Recorder(format="neuroexplorer", title="NeuroExplorer", suffixes=(".nex", ".nex5")),
    Recorder(format="openvibe", title="OpenViBE", suffixes=(".ov",)),
    Recorder(format="besa", title="BESA", suffixes=(".mul", ".fsg", ".foc")),
    Recorder(format="ebs", title="EBS", magic=((0, b"EBS\x94"),)),
    Recorder(format="nihon-text", title="Nihon Kohden text export (.m00)", suffixes=(".m00",)),
    Recorder(format="mef", title="MEF 2", suffixes=(".mef",)),
    Recorder(format="neuralynx-raw", title="Neuralynx raw data (.nrd)", suffixes=(".nrd",)),
    Recorder(format="compumedics", title="Compumedics Profusion", suffixes=(".sdy", ".slp")),
    Recorder(format="dewesoft", title="Dewesoft", suffixes=(".dxd", ".d7d")),
    Recorder(format="snirf", title="near-infrared spectroscopy (SNIRF)", suffixes=(".snirf",), excluded=True),
    Recorder(format="dicom", title="DICOM", magic=((128, b"DICM"),), excluded=True),
)
"""Formats without a reader. For each file, the first entry that matches is used."""


def recognise_recorder(file: Any) -> Finding | None:
    """Recognise a recording in a format without a reader.

    Parameters
    ----------
    file : sniffing.File
        The file.

    Returns
    -------
    Finding or None
        The format of the recording, and what the user can do with the file; None if the file has none of these formats.
    """
    name = file.path.name.lower()
    for recorder in RECORDERS:
        by_name = name.endswith(recorder.suffixes) if recorder.suffixes else True
        by_bytes = all(file.head[at : at + len(what)] == what for at, what in recorder.magic)
        if by_name and by_bytes:
            return _describe(file, recorder)
    return _recognise_compressed(file, name) or _recognise_arrays(file) or _recognise_unknown(file)


def _describe(file: Any, recorder: Recorder) -> Finding | None:
    if recorder.format == "neuroelectrics-easy" and f"{file.stem}.nedf".lower() in file.near:
        return None  # The .nedf file is used: it has the same signal, with sampling rate and channel names.
    if recorder.one_a_folder:
        same = sorted(entry.name for entry in file.near.values() if entry.suffix.lower() == file.suffix)
        if same[0] != file.path.name:
            return None
        return Finding(format=recorder.format, reason=_reason(recorder), files=tuple(same[1:]))
    if recorder.format == "wfdb" and not re.match(rb"\s*(#[^\n]*\n\s*)*\S+ \d+ [\d.]+", file.head[:2000]):
        return None
    stem = re.sub(r"_\d{3}$", "", file.stem) if recorder.format == "natus" else file.stem
    pattern = re.compile(recorder.sidecars.replace("{stem}", re.escape(stem)), re.IGNORECASE)
    files = tuple(entry.name for entry in file.near.values() if pattern.fullmatch(entry.name) and recorder.sidecars)
    if recorder.format == "natus" and stem != file.stem and f"{stem}.erd".lower() in file.near:
        return None  # This file is a later part of a recording. The `Finding` of the first part lists this file.
    if not file.head:
        return Finding(format=recorder.format, reason=Reason("unreadable", "an empty file"), files=files)
    return Finding(format=recorder.format, reason=_reason(recorder), excluded=recorder.excluded, files=files)


def _reason(recorder: Recorder) -> Reason:
    return Reason(f"no reader for {recorder.title}", "" if recorder.excluded else recorder.do)


def _recognise_compressed(file: Any, name: str) -> Finding | None:
    if name.endswith(ARCHIVES):
        return _describe_archive(file, name)
    inner = name.rsplit(".", 1)[0]
    if name.endswith(COMPRESSED) and inner.endswith(RECORDINGS):
        what = f"a compressed .{inner.rsplit('.', 1)[1]} file; unpack it, and exclude the compressed file"
        return Finding(format="compressed", reason=Reason("compressed", what))
    return None


def _describe_archive(file: Any, name: str) -> Finding | None:
    """Describe an archive; return None if no file in the archive has the extension of a recording."""
    names: list[str] | None = None
    try:
        if name.endswith(".zip"):
            with file.path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
        elif name.endswith(".tar"):
            with file.path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                names = [member.name for member, _ in zip(archive, range(MOST_MEMBERS), strict=False)]
    except (zipfile.BadZipFile, tarfile.TarError, ValueError, OSError, NotImplementedError):
        return Finding(format="archive", reason=Reason("unreadable", "a damaged archive"))
    if names is None:
        text = "an archive with unknown content; unpack it if it contains recordings, or exclude it"
        return Finding(format="archive", reason=Reason("archive", text))
    inside = [entry for entry in names if entry.lower().endswith((*RECORDINGS, *(f"{s}.gz" for s in RECORDINGS)))]
    if not inside:
        return None
    text = f"an archive with {len(inside)} recordings such as {inside[0].rsplit('/', 1)[-1]}; unpack it"
    return Finding(format="archive", reason=Reason("archive", text))


def _recognise_arrays(file: Any) -> Finding | None:
    """Recognise arrays, HDF5 files and unknown binary files.

    Such files are only reported and not read, because they have no standard field for the sampling rate.
    """
    if file.suffix not in (".npy", ".npz", ".h5", ".hdf5", ".hdf", ".dat", ".bin", ".raw"):
        return None
    size = int(file.path.stat().st_size)
    if file.suffix in (".npy", ".npz"):
        if size < SMALLEST_ARRAY_BYTES or (file.suffix == ".npy" and not _is_table(file.head)):
            return None
        text = "an array has no sampling rate and no unit; describe it in a corpus of kind arrays"
        return Finding(format="array", reason=Reason("no reader", text), excluded=True)
    if file.suffix in (".h5", ".hdf5", ".hdf"):
        if size < SMALLEST_ARRAY_BYTES or not file.head.startswith(HDF5):
            return None
        text = "HDF5 files of EEG have no standard layout; convert it to EDF, or to an array (corpus of kind arrays)"
        return Finding(format="hdf5", reason=Reason("no reader for this HDF5 file", text))
    if size < SMALLEST_BINARY_BYTES or b"\0" not in file.head:
        return None
    text = "the file has no known header; convert it to EDF, or exclude it if it is not a recording"
    return Finding(format="binary", reason=Reason("binary file without a known header", text))


def _recognise_unknown(file: Any) -> Finding | None:
    """Report a large binary file of an unknown kind, because it may be the recording of an unknown amplifier."""
    if b"\0" not in file.head or file.suffix in NO_RECORDINGS or int(file.path.stat().st_size) < SMALLEST_BINARY_BYTES:
        return None
    kind = f"a {file.suffix} file" if file.suffix else "a file without an extension"
    text = f"{kind} whose content is not known; if it is a recording, convert it to EDF"
    return Finding(format="unknown", reason=Reason("unknown kind of file", text), excluded=True)


def _is_table(head: bytes) -> bool:
    """Return whether a .npy file has numbers in 2 or 3 dimensions, and one of the last two is at least 200 long."""
    match = re.search(rb"'descr': '[<>|=]([fiu])\d+'.*'shape': \(([\d, ]+)\)", head[:512])
    if head[:6] != b"\x93NUMPY" or not match:
        return False
    shape = [int(part) for part in match[2].split(b",") if part.strip()]
    return len(shape) in (2, 3) and max(shape[-2:]) >= 200
