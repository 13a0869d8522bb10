"""Open a recording of any format as a `Signal`, with its gaps and metadata. The signal is read only on demand.

In array shapes, n is the number of channels, S the number of samples at the recorded rate, and E the number of epochs.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib
import itertools
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.matlab_files import check_matlab
from data_sharding.common.reason import Reason
from data_sharding.common.untrusted import check_hdf5
from data_sharding.formats import headers
from data_sharding.formats.about import describe, hide, private_words
from data_sharding.formats.claims import files_beside, link_files
from data_sharding.formats.edf import open_records
from data_sharding.formats.marks.files import (
    find_mff_pauses,
    find_neuroscan_marks,
    read_ant_segments,
)
from data_sharding.formats.marks.interruptions import Found, find_marks, time_of_sample
from data_sharding.formats.mne_signal import (
    EpochsSignal,
    NotContinuous,
    RawSignal,
    ReadError,
    annotations_of,
    annotations_of_epochs,
    quiet,
    read_raw_units,
)
from data_sharding.formats.readers import find_formats
from data_sharding.formats.repair.brainvision import (
    CODEPAGE,
    Repaired,
    check_text,
    find_unread_layout,
    read_markers,
    read_text,
    repair_header,
    repair_markers,
)
from data_sharding.formats.repair.eeglab import with_repairs
from data_sharding.formats.repair.persyst import repair_header as repair_persyst
from data_sharding.formats.repair.records import copy_with_patches
from data_sharding.formats.repair.sidecars import read_without_broken
from data_sharding.formats.signal import Segment, Signal
from data_sharding.formats.sniffing import Recording
from data_sharding.formats.units import names_no_unit

if TYPE_CHECKING:
    from mne.io import BaseRaw

PACKAGES = {
    "ant": "antio",
    "curry": "curryreader",
    "eeglab": "pymatreader",
    "mff": "mffpy",
    "nedf": "defusedxml",
    "xdf": "pyxdf",
}
"""Optional package that the reader of a format needs."""
SUFFIXES: dict[str, tuple[str, ...]] = {
    "edf": (".edf",),
    "bdf": (".bdf",),
    "gdf": (".gdf",),
    "nedf": (".nedf",),
    "xdf": (".xdf", ".xdfz", ".xdf.gz"),
}
"""File extensions that the reader of a format accepts. Other extensions exist: PhysioNet has EDF files named .rec."""


def neuroscan_data_format(path: str | Path) -> str:
    """Determine whether a Neuroscan CNT file has 16-bit or 32-bit samples. The header does not say this reliably.

    Parameters
    ----------
    path : str or Path
        File to read.

    Returns
    -------
    str
        ``"int16"`` or ``"int32"``.

    Raises
    ------
    ReadError
        If the header is damaged.

    Notes
    -----
    The numbers of channels and samples in the header give the size of the data block for 16 bits and for 32 bits. If
    one of the two sizes is exactly right, its number of bits is used. Otherwise, the data are decoded once as 16-bit
    and once as 32-bit samples, and the smoother of the two signals is used, because decoding with the wrong number of
    bits gives noise.
    """
    with Path(path).open("rb") as stream:
        head = stream.read(900)
        n_channels = int.from_bytes(head[370:372], "little")
        n_samples = int.from_bytes(head[864:868], "little")
        events = int.from_bytes(head[886:890], "little")
        start = 900 + 75 * n_channels
        size = (events if start < events <= Path(path).stat().st_size else Path(path).stat().st_size) - start
        if not n_channels or size <= 0:
            raise ReadError(Reason("unreadable", "damaged Neuroscan header"))
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


def _neuroscan(path: Path) -> Signal:
    import mne

    data_format = neuroscan_data_format(path)
    notes, keep, source = [], None, path
    try:
        raw = mne.io.read_raw_cnt(path, data_format=data_format)  # type: ignore[arg-type]
    except (IndexError, ValueError):
        # MNE refuses a file whose last rejected span has no end. MNE can read the signal of such a file if the event
        # table is skipped.
        at = struct.unpack("<I", headers.read_range(path, 886, 4))[0]
        source, keep = copy_with_patches(path, {at + 1: bytes(4)})
        raw = mne.io.read_raw_cnt(source, data_format=data_format)  # type: ignore[arg-type]
        notes.append("MNE cannot read the table of events, so only its interruptions and rejected spans are used")
    marks = find_neuroscan_marks(path, float(raw.info["sfreq"]), int(data_format[3:]) // 8)
    return RawSignal(raw, format_="neuroscan", annotations=[], marks=marks, keep=keep, notes=notes)


def _fif(path: Path) -> Any:
    import mne

    try:
        return _check_parts(mne.io.read_raw_fif(path, allow_maxshield=False))
    except ValueError as error:
        if "No raw data" not in str(error):
            raise
    try:
        return mne.read_epochs(path, preload=False, proj=False)
    except Exception:
        raise NotContinuous(Reason("the FIF file contains no recording", "averages or something else")) from None


def _check_parts(raw: BaseRaw) -> BaseRaw:
    """Raise an error if a file of a split recording does not begin where the previous file ends."""
    ends = zip(raw._last_samps, raw._first_samps[1:], strict=False)
    for i, (last, first) in enumerate(ends, start=1):
        if first != last + 1:
            names = [Path(str(name)).name for name in raw.filenames]
            text = f"{names[i]} begins with sample {first}, but {names[i - 1]} ends with sample {last}"
            raise ReadError(Reason("sidecar of another recording", text))
    return raw


MAX_EPOCHS = 2**22
"""Largest number of epochs of an EEGLAB file. MNE allocates memory for every epoch before it reads the file."""


def _eeglab(path: Path) -> Any:
    import mne

    try:
        raw = mne.io.read_raw_eeglab(path)
    except FileNotFoundError:
        text = f"the signal of {path.name} is in a .fdt file, which does not exist"
        raise ReadError(Reason("sidecar missing", text)) from None
    except TypeError as error:
        if not (match := re.search(r"number of trials is (\d+)", str(error))):
            raise
        count = int(match.group(1))
        if count > MAX_EPOCHS:
            text = f"the header states {count} epochs; a recording has at most {MAX_EPOCHS}"
            raise ReadError(Reason("damaged header", text)) from None
        # Replace the events by one event for each epoch, because MNE refuses a file with two events at the same sample.
        events = np.column_stack([np.arange(count), np.zeros(count, int), np.ones(count, int)])
        try:
            return mne.read_epochs_eeglab(path, events=events, event_id={"trial": 1})
        except ValueError as cut:
            if not (short := re.search(r"array of size (\d+) into shape \((\d+),(\d+),(\d+)\)", str(cut))):
                raise
            held, n, length, trials = map(int, short.groups())
            raise ReadError(_other_size(length * trials, held / n)) from None
    data = Path(str(raw.filenames[0]))
    if data.suffix.lower() == ".fdt" and data.stat().st_size != 4 * len(raw.ch_names) * raw.n_times:
        raise ReadError(_other_size(raw.n_times, data.stat().st_size / 4 / len(raw.ch_names)))
    return raw


def _other_size(promised: int, held: float) -> Reason:
    text = f"the header states {promised} samples, but the file has {held:g}"
    return Reason("truncated" if held < promised else "sidecar of another recording", text)


def _as_named(
    path: Path, *keys: str, recode: bool = False, text: str | None = None, contents: Mapping[str, str] | None = None
) -> tuple[Path, str, tempfile.TemporaryDirectory[str] | None]:
    """Prepare a text header so that MNE finds the files whose names are in the header.

    MNE does not find a file if its name in the header contains a folder, or differs from the name on disk in upper and
    lower case. For such a header, this function writes a corrected copy to a temporary folder, together with links to
    the files. With `recode`, the copy is in UTF-8, because some readers accept only UTF-8.

    Parameters
    ----------
    path : Path
        The header.
    *keys : str
        Keys of the header whose values are names of files.
    recode : bool
        Whether the header that MNE reads must be in UTF-8.
    text : str, optional
        Repaired text of the header. By default, the text of the header is read from `path`.
    contents : mapping of str to str, optional
        Repaired texts of files that the header names. The key is the header's key, such as MarkerFile; the value is the
        repaired text of the file.

    Returns
    -------
    path : Path
        The header, or its corrected copy.
    text : str
        Text of the header.
    folder : TemporaryDirectory or None
        Temporary folder with the copy; it must exist as long as the recording is open. None if no copy was needed.
    """
    contents = contents or {}
    original, encoding = headers.decode_text(path.read_bytes())
    text = original if text is None else text
    data, recode = text, (recode and encoding != "utf-8") or text != original or encoding == "utf-16"
    links: dict[str, Path] = {}
    written: dict[str, str] = {}
    for key in keys:
        named = headers.ini_value(text, key)
        if named is None:
            continue
        name = re.split(r"[\\/]", named)[-1].replace("$b", path.stem)
        if key in contents:
            written[name] = contents[key]
        elif name == named and (path.parent / name).exists():
            links[name] = path.parent / name
            continue
        there = files_beside(path).get(name.lower())
        if there is not None and key not in contents:
            links[name] = Path(str(there))
        where = re.compile(rf"^([ \t]*{key}[ \t]*=[ \t]*){re.escape(named)}", re.MULTILINE | re.IGNORECASE)
        data = where.sub(lambda found, name=name: found.group(1) + name, data, count=1)
    if data == text and not recode and not written and all(name == file.name for name, file in links.items()):
        return path, text, None
    folder = tempfile.TemporaryDirectory(prefix="eeg-")
    for name, file in links.items():
        (Path(folder.name) / name).symlink_to(file.resolve())
    for name, content in written.items():
        (Path(folder.name) / name).write_text(content, encoding="utf-8")
    target = Path(folder.name) / path.name
    target.write_bytes(data.encode("utf-8" if recode else encoding))
    return target, text, folder


def _repair_brainvision(path: Path) -> tuple[Repaired, dict[str, str], str, list[str]]:
    """Repair the header and the marker file of a BrainVision recording.

    Returns
    -------
    header : Repaired
        The header.
    contents : dict of str to str
        If the marker file needs a repair: an entry with the key MarkerFile and the repaired content. Otherwise empty.
    markers : str
        Repaired text of the marker file; empty without a marker file.
    notes : list of str
        Notes for the ledger.
    """
    data = path.read_bytes()
    decoded = read_text(data)
    header = repair_header(decoded.text)
    # MNE reads neither UTF-16 nor lines that end with a carriage return alone.
    foreign = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\n" not in data
    header.recoded = bool(decoded.notes) or header.text != decoded.text or foreign
    if header.recoded:
        header.text = CODEPAGE.sub(lambda found: f"{found[1]}UTF-8", header.text, count=1)
    notes = [*(f"header: {note}" for note in decoded.notes), *header.notes]
    named = headers.ini_value(header.text, "MarkerFile")
    if named is None:
        return header, {}, "", notes
    name = re.split(r"[\\/]", named)[-1].replace("$b", path.stem)
    files = files_beside(path)
    file = files.get(name.lower()) or files.get(f"{path.stem}.vmrk".lower())
    if file is None:
        lost = f"the marker file '{name}' does not exist, so interruptions and bad spans are unknown"
        return header, {}, "", [*notes, lost]
    if file.name.lower() != name.lower():
        notes.append(f"the marker file '{name}' does not exist; {file.name} is used")
    decoded = read_text(file.read_bytes())
    markers = repair_markers(decoded.text)
    notes = [*notes, *(f"marker file: {note}" for note in decoded.notes), *markers.notes]
    changed = decoded.recoded or markers.text != decoded.text or file.name.lower() != name.lower()
    text = CODEPAGE.sub(lambda found: f"{found[1]}UTF-8", markers.text, count=1)
    return header, {"MarkerFile": text} if changed else {}, markers.text, notes


def _brainvision_units(raw: BaseRaw, text: str, numbers: list[int]) -> dict[str, Any]:
    """Read the units of a BrainVision header.

    MNE knows few spellings of units, and gives the type misc to a channel whose unit has another spelling.
    """
    listed: dict[int, str] = {}
    for number, line in re.findall(r"^[ \t]*Ch(\d+)[ \t]*=(.*)$", text, re.MULTILINE | re.IGNORECASE):
        listed.setdefault(int(number), (line.split(",") + [""] * 4)[3].strip())
    # In the BrainVision format, the unit is microvolts if the header gives no unit for a channel.
    units = [listed.get(number, "") or "µV" for number in numbers]
    known = ("V", "mV", "µV", "uV", "nV")
    types = [
        "eeg" if kind == "misc" and unit not in known and not names_no_unit(unit) else kind
        for kind, unit in zip(raw.get_channel_types(), units, strict=True)
    ]
    return read_raw_units(raw, units, [float(channel["range"]) for channel in raw.info["chs"]], types)


def _brainvision(path: Path) -> Signal:
    import mne

    header, contents, markers, notes = _repair_brainvision(path)
    if fault := find_unread_layout(header.text):
        raise ReadError(fault)
    path, text, folder = _as_named(
        path, "DataFile", "MarkerFile", text=header.text if header.recoded else None, contents=contents
    )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    raw = mne.io.read_raw_brainvision(path)
    lines = raw._raw_extras[0]["offsets"]
    if lines is not None and (fault := check_text(Path(str(raw.filenames[0])), int(lines[0]))):
        raise ReadError(fault)
    numbers = [i for i in range(1, len(raw.ch_names) + 1) if i not in header.left_out]
    left_out = {raw.ch_names[i - 1]: why for i, why in header.left_out.items()}
    if not numbers:
        raise ReadError(Reason("damaged BrainVision header", "no channel has a resolution (factor) in the header"))
    for number in header.unplaced:
        raw.info["chs"][number - 1]["loc"][:3] = np.nan
    sfreq = float(raw.info["sfreq"])
    # Like MNE, ignore markers that lie beyond the end of the signal.
    annotations = [m for m in read_markers(markers, sfreq, raw.ch_names) if m.onset * sfreq < raw.n_times]
    if left_out:
        raw.pick([number - 1 for number in numbers])
    more = _brainvision_units(raw, text, numbers)
    more |= {"notes": [*more.get("notes", []), *notes], "left_out": left_out, "annotations": annotations}
    points = headers.ini_value(text, "SegmentDataPoints") or ""
    length = int(points) if points.isdigit() else 0
    if (headers.ini_value(text, "SegmentationType") or "NOTSEGMENTED").upper() == "NOTSEGMENTED" or length < 1:
        return RawSignal(raw, format_="brainvision", keep=folder, **more)
    starts = range(0, raw.n_times - length + 1, length)
    segments = [Segment(start=a, stop=a + length, onset=a / sfreq) for a in starts]
    return RawSignal(raw, format_="brainvision", segments=segments, epoched=True, keep=folder, **more)


def _ant(path: Path) -> Signal:
    import mne

    files, stem = files_beside(path), path.stem.lower()
    # The C library of the reader writes outside its memory if the table of segments is damaged. The library does not
    # need the table, so it gets a folder without the table.
    folder = tempfile.TemporaryDirectory(prefix="eeg-")
    events = {Path(str(files[f"{stem}.{end}"])): f"a.{end}" for end in ("evt", "trg") if f"{stem}.{end}" in files}
    link_files((path, *events), Path(folder.name), {path: "a.cnt", **events})
    raw = mne.io.read_raw_ant(Path(folder.name) / "a.cnt")
    units = list(raw._raw_extras[0]["orig_ch_units"])
    # MNE converts only the values of channels with the unit `uv` or `µv`.
    more = read_raw_units(raw, units, [1e-6 if unit in ("uv", "µv") else 1.0 for unit in units])
    sfreq = float(raw.info["sfreq"])
    start = raw.info["meas_date"].timestamp() if raw.info["meas_date"] else None
    table = files.get(f"{stem}.seg")
    if table is None:
        return RawSignal(raw, format_="ant", keep=folder, **more)
    segments = read_ant_segments(Path(str(table)), int(raw.n_times), sfreq, start)
    # MNE computes the times of annotations as if there were no gaps between segments. The true times are computed here
    # from the table of segments.
    triggers = [
        mark._replace(onset=time_of_sample(segments, sfreq, mark.onset * sfreq)) for mark in annotations_of(raw)
    ]
    return RawSignal(raw, format_="ant", segments=segments, annotations=triggers, keep=folder, **more)


def _mff(path: Path) -> Signal:
    import mne

    optional = {"coordinates.xml": [path / "coordinates.xml"]}
    if (path / "signal2.bin").is_file():
        physiology = [path / name for name in ("signal2.bin", "info2.xml", "pnsSet.xml")]
        optional["the physiology (signal2.bin, info2.xml, pnsSet.xml)"] = physiology

    def read(folder: Path) -> BaseRaw:
        return mne.io.read_raw_egi(folder, events_as_annotations=True)

    raw, folder, notes = read_without_broken(read, path, optional)
    about = raw._raw_extras[0]
    marks = find_mff_pauses(about["first_samps"], about["last_samps"], float(raw.info["sfreq"]))
    return RawSignal(raw, format_="mff", marks=marks, keep=folder, notes=notes)


def _curry(path: Path) -> Any:
    import mne

    raw = mne.io.read_raw_curry(path)
    if not isinstance(raw, mne.io.BaseRaw):
        return raw
    factors = [float(factor) for factor in raw._cals]  # MNE does not store the units in `raw.info`.
    # MNE multiplies only values with the units uV and fT by a factor, so the factor 1e-6 means uV.
    units = [
        "uV" if factor == 1e-6 else raw._orig_units.get(name, "") if factor == 1 else ""
        for name, factor in zip(raw.ch_names, factors, strict=True)
    ]
    types = raw.get_channel_types()
    units = [unit if kind == "eeg" else "" for unit, kind in zip(units, types, strict=True)]
    return RawSignal(raw, format_="curry", **read_raw_units(raw, units, factors))


def _nihon(path: Path) -> Signal:
    near = files_beside(path)
    optional = [Path(str(near[name])) for ending in ("log", "pnt") if (name := f"{path.stem}.{ending}".lower()) in near]
    raw, folder, notes = read_without_broken(_mne("nihon"), path, {file.name: [file] for file in optional})
    if f"{path.stem}.21e".lower() not in near:
        notes.append("there is no .21E file, so the channels have the default names of the device")
    return RawSignal(raw, format_="nihon", keep=folder, notes=notes)


def _persyst(path: Path) -> Signal:
    """Open a Persyst recording with its gaps.

    The gaps are computed from the table of sample times in the header, because MNE ignores this table.
    """
    import mne

    decoded = read_text(path.read_bytes()).text
    text, notes = repair_persyst(decoded)
    path, _, folder = _as_named(path, "File", recode=True, text=text if text != decoded else None)
    raw = mne.io.read_raw_persyst(path)
    sfreq = float(raw.info["sfreq"])
    table = re.search(r"^\[SampleTimes\][ \t]*\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    pairs = re.findall(r"^(\d+)=([\d.]+)", table.group(1), re.MULTILINE) if table else []
    marks = []
    for (a, begin), (b, end) in itertools.pairwise(pairs):
        missing = (float(end) - float(begin)) % 86400 - (int(b) - int(a)) / sfreq
        if abs(missing) > 2 / sfreq:
            marks.append(Found("Persyst sample times", int(b) / sfreq))
    return RawSignal(raw, format_="persyst", marks=marks, keep=folder, notes=notes)


def _xdf(path: Path) -> Signal:
    from data_sharding.formats.xdf import open_xdf

    return open_xdf(path)


def _mne(name: str, **options: Any) -> Callable[[Path], BaseRaw]:
    def read(path: Path) -> BaseRaw:
        import mne

        return getattr(mne.io, f"read_raw_{name}")(path, **options)

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "edf": open_records("edf"),
    "bdf": open_records("bdf"),
    "gdf": open_records("gdf"),
    "brainvision": _brainvision,
    "neuroscan": _neuroscan,
    "ant": _ant,
    "fif": _fif,
    "eeglab": with_repairs(_eeglab),
    "nihon": _nihon,
    "persyst": _persyst,
    "nedf": _mne("nedf"),
    "curry": _curry,
    "egi": _mne("egi", events_as_annotations=True),
    "mff": _mff,
    "xdf": _xdf,
}
"""Reader of each format: a function that returns a raw or epochs object of MNE, or a `Signal`."""
FIXED_UNITS = {"eeglab": 1e-6}
"""Factor that converts the values to volts, for formats whose files name no unit, but whose definition sets the
unit."""
UNIT_FACTORS: dict[str, float] = {}
"""Factor that converts the values of the reader to volts, for readers that do not return volts."""
for _format in find_formats():
    if _format.name in READERS:
        raise ValueError(f"two readers have the name '{_format.name}'; rename the one in formats/readers")
    READERS[_format.name] = _format.open
    if _format.suffixes:
        SUFFIXES[_format.name] = _format.suffixes
    if _format.package:
        PACKAGES[_format.name] = _format.package
    if _format.unit_factor is not None:
        UNIT_FACTORS[_format.name] = _format.unit_factor
WALKS: dict[str, Callable[[tuple[Path, ...]], str | None]] = {
    "mff": headers.check_mff,
    "fif": headers.check_fif,
    "xdf": headers.check_xdf,
}
"""Functions that check a whole file before the reader opens it."""


def open_signal(recording: Recording) -> Signal:
    """Open a recording with the reader of its format.

    Parameters
    ----------
    recording : Recording
        Result of `sniffing.sniff`, on a local disk.

    Returns
    -------
    Signal
        The open recording; `Signal.read` reads its samples.

    Raises
    ------
    NotContinuous
        If the file is undamaged, but contains no continuous signal.
    ReadError
        If the file cannot be read. The text of the error is the reason that the job writes to the ledger.

    Notes
    -----
    A damaged file can crash the whole process in some readers, so call this function in a worker process.
    """
    if recording.problem:
        raise (ReadError if recording.continuous else NotContinuous)(recording.problem)
    if recording.format not in READERS:
        raise ReadError(Reason(f"no reader for the format '{recording.format}'"))
    walk = WALKS.get(recording.format)
    files = tuple(Path(str(file)) for file in recording.files)
    if walk and (problem := headers.run_check(walk, recording.format.upper(), files)):
        raise ReadError(problem)
    path, folder = _in_own_folder(recording)
    try:
        for file in files:
            if file.is_file():
                check_hdf5(file)
                check_matlab(file)
        with quiet():
            opened = READERS[recording.format](path)
            signal = opened if not hasattr(opened, "get_channel_types") else _signal_of(opened, recording.format)
            if folder is not None:
                # Keep the folder of links, because the open signal still reads its files through the links.
                signal.keep = (getattr(signal, "keep", None), folder)
    except ReadError:
        raise
    except ImportError as error:
        raise ReadError(_missing(recording.format, error)) from error
    except Exception as error:
        # Remove the patient's data: the error messages of some readers quote the header, which can contain the
        # patient's name.
        reason = unreadable(error, folder.name if folder else "")
        private = private_words(Path(str(recording.path)), recording.format)
        raise ReadError(Reason(reason.category, text=hide(str(reason), private))) from None
    if recording.format in FIXED_UNITS:
        named = dict.fromkeys(signal.info.ch_names, FIXED_UNITS[recording.format])
        signal.info = dataclasses.replace(signal.info, named_units=named)
    mne_object = getattr(signal, "raw", getattr(signal, "epochs", None))
    about = describe(path, recording.format, getattr(mne_object, "info", None))
    # Remove the patient's data: some notes quote an annotation, which can contain the patient's name.
    private = private_words(Path(str(recording.path)), recording.format) if signal.info.notes else []
    notes = [hide(note, private) for note in signal.info.notes]
    signal.info = dataclasses.replace(signal.info, about=about, notes=notes)
    factor = UNIT_FACTORS.get(recording.format)
    if factor is not None:
        note = f"the reader of {recording.format} returns values times {1 / factor:g}; corrected"
        signal.info = dataclasses.replace(signal.info, scale=factor, notes=[*signal.info.notes, note])
    return signal


def _in_own_folder(recording: Recording) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Return a path that the reader can open.

    This path is in a temporary folder with links to the recording's files only.

    The reader of a format may search the folder of a recording for further files. In the temporary folder, the reader
    finds only files that the job has hashed. A link can also give a file the extension that its reader requires.
    """
    path, files = Path(str(recording.path)), tuple(Path(str(file)) for file in recording.files)
    if path.is_dir():
        return path, None
    names: dict[Path, str] = {}
    suffixes = SUFFIXES.get(recording.format)
    if suffixes and not path.name.lower().endswith(suffixes):
        names[path] = f"{path.stem}{suffixes[0]}"
    if recording.format == "eeglab":
        # The .set file may contain another name for its .fdt file. If MNE does not find this name, MNE opens the .fdt
        # file with the base name of the .set file, so the link gets this base name.
        names |= {file: f"{path.stem}.fdt" for file in files if file != path}
    folder = tempfile.TemporaryDirectory(prefix="eeg-")
    link_files(files, Path(folder.name), names)
    return Path(folder.name) / names.get(path, path.name), folder


def _signal_of(opened: Any, format_: str) -> Signal:
    import mne

    if isinstance(opened, mne.io.BaseRaw):
        return RawSignal(opened, format_=format_)
    opened.drop_bad()
    return EpochsSignal(opened, marks=find_marks(format_, annotations_of_epochs(opened)))


def unreadable(error: BaseException, folder: str = "") -> Reason:
    """Convert an error of a reader to a reason for the ledger.

    Parameters
    ----------
    error : BaseException
        The error.
    folder : str
        Path of the temporary folder. This path is removed from the text of the error.

    Returns
    -------
    Reason
        A reason with the category ``unreadable``.
    """
    text = str(error).replace(f"{folder}/", "") if folder else str(error)
    return Reason("unreadable", f"{type(error).__name__}: {' '.join(text.split())[:200]}")


def _missing(format_: str, error: ImportError) -> Reason:
    package = PACKAGES.get(format_, error.name or "")
    try:
        importlib.import_module(package)
    except ImportError:
        return Reason("reader not installed", f"pip install {package}")
    except ValueError:
        pass
    # The package of the reader is installed, but a package that it needs is missing.
    return Reason("reader not installed", " ".join(str(error).split())[:200])
