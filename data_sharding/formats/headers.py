"""Check whether the header of a recording is consistent with the size of the file.

The numbers in a damaged header can be very large, and a reader that trusts them could use too much memory or time.
Therefore each number in a header is compared with the size of the file before the number is used. A check of a header
accepts a path of pathlib or universal_pathlib, and reads only a few ranges of bytes.
"""

from __future__ import annotations

import codecs
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.formats.units import decode_unit, gdf_unit

MAX_READ = 1 << 22
"""Largest number of header bytes that are read from a file."""
GDF_BYTES = {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8, 16: 4, 17: 8, 18: 16, 279: 3, 535: 3}
"""Number of bytes per sample for each sample type code of GDF."""
BRAINVISION_BYTES = {"INT_16": 2, "UINT_16": 2, "INT_32": 4, "IEEE_FLOAT_32": 4}
NEDF_HEADER = 10240
NIHON_BLOCKS = 1024
"""Largest number of data blocks that are checked in a Nihon Kohden file."""
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
"""Names of the annotation signals of EDF+ and BDF+. A file may have several annotation signals."""
DAMAGED = (ValueError, ArithmeticError, LookupError, struct.error, SyntaxError, TypeError)
"""Errors that can be raised while a damaged header is parsed. (The ParseError of the XML parser is a SyntaxError.)"""


class Damaged(ValueError):
    """Error for a header with numbers that contradict each other."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of the records of an EDF, BDF or GDF file."""

    labels: list[str]
    """Names of all channels, including the annotation signals."""
    units: list[str]
    """Unit of each channel, such as uV; an empty string if the file names no unit."""
    unscaled: dict[int, str]
    """Channels for which the header gives no valid scale. The key is the index of the channel, the value a text with
    the fault."""
    per_record: list[int]
    """Number of samples of each channel in one record."""
    n_records: int
    """Number of records that the header states; zero or negative if the header does not state the number."""
    record_s: float
    """Length of a record in seconds."""
    header_bytes: int
    """Size of the header in bytes; the first record begins after the header."""
    record_bytes: int
    """Size of one record in bytes."""
    interrupted: bool = False
    """True for the EDF+D format, in which records may have gaps between them."""
    width: int = 2
    """Number of bytes per sample, for EDF and BDF."""

    digital: list[tuple[float, float]] = field(default_factory=list)
    """Digital minimum and maximum of each channel; NaN if the header does not give a number."""
    types: list[int] = field(default_factory=list)
    """Sample type code of each channel, for GDF."""

    @property
    def annotated(self) -> bool:
        """Whether the file has a channel with annotations, as in EDF+."""
        return any(label in ANNOTATIONS for label in self.labels)


def read_range(path: AnyPath, start: int, count: int, head: bytes = b"") -> bytes:
    """Read a range of bytes.

    Parameters
    ----------
    path : Path or UPath
        File to read.
    start : int
        Offset of the first byte in the file.
    count : int
        Number of bytes to read; at most `MAX_READ` bytes are read.
    head : bytes
        The first bytes of the file, if the caller has already read them.

    Returns
    -------
    bytes
        The bytes that were read; fewer than `count` at the end of the file.
    """
    if start < 0 or count <= 0:
        return b""
    count = min(count, MAX_READ)
    if start + count <= len(head):
        return head[start : start + count]
    fs = None if isinstance(path, Path) else getattr(path, "fs", None)
    if fs is not None:
        # On an object store, an open file would read megabytes ahead; `cat_file` reads only the requested range.
        return fs.cat_file(path.path, start=start, end=min(start + count, path.stat().st_size))  # type: ignore[union-attr]
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(count)


def size_of(path: AnyPath) -> int:
    """Return the size of a file in bytes."""
    return int(path.stat().st_size)


def decode_text(data: bytes) -> tuple[str, str]:
    """Decode the text of a header that does not name its encoding.

    Parameters
    ----------
    data : bytes
        The header, or the beginning of the header.

    Returns
    -------
    text : str
        The text, decoded as UTF-16 if it begins with a byte order mark of UTF-16, otherwise as UTF-8 if possible,
        otherwise as Latin-1.
    encoding : str
        "utf-16", "utf-8" or "latin-1".
    """
    try:
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return codecs.getincrementaldecoder("utf-16")().decode(data), "utf-16"
        # Use the incremental decoder, because it accepts an incomplete character at the end of `data`.
        return codecs.getincrementaldecoder("utf-8")().decode(data), "utf-8"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def ini_value(text: str, key: str) -> str | None:
    """Find the value of a key in an INI header; upper and lower case of the key do not matter.

    Parameters
    ----------
    text : str
        Text of the header.
    key : str
        Key to find.

    Returns
    -------
    str or None
        The value without surrounding blanks; None if the key is missing.
    """
    match = re.search(rf"^[ \t]*{re.escape(key)}[ \t]*=(.*)$", text, re.MULTILINE | re.IGNORECASE)
    return match.group(1).strip() or None if match else None


def _truncated(promised: int, what: str, held: float) -> Reason:
    return Reason("truncated", f"the header states {promised} {what}, but the file has {held:.10g}")


# --- EDF, BDF, GDF ---------------------------------------------------------------------------------------------------


def edf_layout(path: AnyPath, head: bytes = b"") -> Layout:
    """Parse the header of an EDF or BDF file.

    Parameters
    ----------
    path : Path or UPath
        File to read.
    head : bytes
        The first bytes of the file, if the caller has already read them.

    Returns
    -------
    Layout
        Layout of the records.

    Raises
    ------
    ValueError
        If the header is damaged.
    """
    fixed = read_range(path, 0, 256, head)
    width = 3 if fixed[:8] == b"\xffBIOSEMI" else 2
    n = int(fixed[252:256])
    header_bytes, n_records = _integer(fixed[184:192], 256 * (n + 1)), _integer(fixed[236:244], -1)
    record_s = float(fixed[244:252])
    if n < 1 or header_bytes < 256 * (n + 1) or not 0 <= record_s < math.inf:
        raise Damaged
    header = read_range(path, 256, 256 * n, head)
    if len(header) < 256 * n:
        raise Damaged
    text = header.decode("latin-1")

    def column(offset: int, size: int) -> list[str]:
        start = offset * n
        return [text[start + size * i : start + size * (i + 1)].strip() for i in range(n)]

    per_record = [int(text) for text in column(216, 8)]
    if min(per_record) < 0 or not sum(per_record):
        raise Damaged
    digital = _limits(column(120, 8), column(128, 8))
    unscaled = _unscaled(_limits(column(104, 8), column(112, 8)), digital)
    return Layout(
        labels=column(0, 16),
        units=[decode_unit(unit.encode("latin-1")) for unit in column(96, 8)],
        unscaled={i: fault for i, fault in unscaled.items() if column(0, 16)[i] not in ANNOTATIONS},
        per_record=per_record,
        n_records=n_records,
        record_s=record_s,
        header_bytes=header_bytes,
        record_bytes=width * sum(per_record),
        interrupted=fixed[192:197] in (b"EDF+D", b"BDF+D"),
        width=width,
        digital=digital,
    )


def _integer(field: bytes, default: int) -> int:
    """Return the integer in a field of a header; the default if the field does not contain an integer."""
    try:
        return int(field)
    except ValueError:
        return default


def count_records(path: AnyPath, layout: Layout) -> int:
    """Return how many complete records are between the header and the end of a file."""
    return max(0, (size_of(path) - layout.header_bytes) // layout.record_bytes)


def count_gdf_records(path: AnyPath, layout: Layout) -> int:
    """Return the number of records of a GDF file.

    If the header does not give the number of records, count the records in the file.
    """
    return layout.n_records if layout.n_records > 0 else count_records(path, layout)


def parse_number(text: str) -> float | None:
    """Parse a number in a text field of a header; return None if the text is not a number.

    A decimal comma is allowed.
    """
    try:
        return float(text.strip(" \0").replace(",", "."))
    except ValueError:
        return None


def _number(value: str | float) -> float:
    number = parse_number(value) if isinstance(value, str) else value
    return math.nan if number is None else number


def _limits(low: Sequence[str | float], high: Sequence[str | float]) -> list[tuple[float, float]]:
    return [(_number(a), _number(b)) for a, b in zip(low, high, strict=True)]


def _unscaled(physical: list[tuple[float, float]], digital: list[tuple[float, float]]) -> dict[int, str]:
    """Return the channels whose digital or physical range is not valid, each with the fault.

    A range is not valid if its minimum and maximum are equal, or if one of them is not a number.
    """
    out = {}
    for what, limits in (("digital", digital), ("physical", physical)):
        for i, (a, b) in enumerate(limits):
            if not math.isfinite(b - a):
                out[i] = f"its {what} range is not a number"
            elif a == b:
                out[i] = f"its {what} minimum equals its {what} maximum ({a:g})"
    return out


def check_edf(path: AnyPath, head: bytes = b"") -> tuple[Reason | None, bool]:
    """Compare the header of an EDF or BDF file with the size of the file.

    Parameters
    ----------
    path : Path or UPath
        File to read.
    head : bytes
        The first bytes of the file, if the caller has already read them.

    Returns
    -------
    problem : Reason or None
        The problem that was found; None if the file has no problem.
    continuous : bool
        False if the file is undamaged, but contains no continuous signal.
    """
    layout = edf_layout(path, head)
    signals = [i for i, label in enumerate(layout.labels) if label not in ANNOTATIONS]
    if not signals:
        return Reason("no signal", "the file holds annotations only"), False
    if not layout.record_s:
        return Reason("damaged header", "a record lasts 0 s, so there is no sampling rate"), True
    have = (size_of(path) - layout.header_bytes) / layout.record_bytes
    if layout.n_records > 0 and have < layout.n_records:
        held = max(have, 0)
        return Reason("truncated", f"the header states {layout.n_records} records, but the file has {held:.1f}"), True
    if have < 1:
        return Reason("no signal", "there is no data record"), False
    return None, True


def gdf_layout(path: AnyPath, head: bytes = b"") -> Layout:
    """Parse the header of a GDF file.

    Parameters
    ----------
    path : Path or UPath
        File to read.
    head : bytes
        The first bytes of the file, if the caller has already read them.

    Returns
    -------
    Layout
        Layout of the records.

    Raises
    ------
    ValueError
        If the header is damaged.
    """
    fixed = read_range(path, 0, 256, head)
    old = float(fixed[4:8]) < 1.9
    (n,) = struct.unpack_from("<I" if old else "<H", fixed, 252)
    header_bytes = struct.unpack_from("<q", fixed, 184)[0] if old else 256 * struct.unpack_from("<H", fixed, 184)[0]
    (n_records,) = struct.unpack_from("<q", fixed, 236)
    length, parts = struct.unpack_from("<II", fixed, 244)
    if not 0 < n < 1 << 14 or header_bytes < 256 * (n + 1):
        raise Damaged
    header = read_range(path, 256, 256 * n, head)
    per_record = list(struct.unpack_from(f"<{n}i", header, 216 * n))
    types = struct.unpack_from(f"<{n}i", header, 220 * n)
    physical = _limits(*(struct.unpack_from(f"<{n}d", header, at * n) for at in (104, 112)))
    digital = _limits(*(struct.unpack_from(f"<{n}{'q' if old else 'd'}", header, at * n) for at in (120, 128)))
    if old:
        units = [decode_unit(header[96 * n + 8 * i : 96 * n + 8 * i + 8].split(b"\0")[0]) for i in range(n)]
    else:
        units = [gdf_unit(code) for code in struct.unpack_from(f"<{n}H", header, 102 * n)]
    if min(per_record) < 0 or not sum(per_record):
        raise Damaged
    return Layout(
        labels=[header[16 * i : 16 * i + 16].split(b"\0")[0].decode("latin-1").strip() for i in range(n)],
        units=units,
        unscaled=_unscaled(physical, digital),
        per_record=per_record,
        n_records=n_records,
        record_s=length / parts if length and parts else 1.0,
        header_bytes=header_bytes,
        record_bytes=sum(GDF_BYTES[kind] * count for kind, count in zip(types, per_record, strict=True)),
        digital=digital,
        types=list(types),
    )


def check_gdf(path: AnyPath, head: bytes = b"") -> Reason | None:
    """Compare the header of a GDF file with the size of the file."""
    layout = gdf_layout(path, head)
    have = (size_of(path) - layout.header_bytes) / layout.record_bytes
    return (
        _truncated(layout.n_records, "records", max(have, 0))
        if layout.n_records > 0 and have < layout.n_records
        else None
    )


# --- other formats ---------------------------------------------------------------------------------------------------


def check_brainvision(text: str, data: AnyPath) -> Reason | None:
    """Compare a BrainVision header with its data file. A V-Amp file stores one more channel than its header states."""
    n, number = int(ini_value(text, "NumberOfChannels") or 0), ini_value(text, "DataPoints") or ""
    # If the key DataPoints is missing, readers compute the number of samples from the file size.
    points = int(number) if re.fullmatch(r"-?\d{1,18}", number) else 0
    if n < 1 or points < 0:
        raise Damaged
    if (ini_value(text, "DataFormat") or "BINARY").upper() != "BINARY":
        return None
    stored = n + ("V-Amp Data Header" in text[:64])
    frame = stored * BRAINVISION_BYTES[(ini_value(text, "BinaryFormat") or "INT_16").upper()]
    size = size_of(data)
    if points and size < points * frame:
        return _truncated(points, "samples", size / frame)
    if size % frame:
        return Reason("truncated", f"{size} bytes are not a whole number of samples of {stored} channels")
    return Reason("no signal", "the data file is empty") if not size else None


def check_neuroscan(path: AnyPath, head: bytes = b"") -> Reason | None:
    """Check the header of a Neuroscan CNT file: the event table must begin inside the file."""
    head = read_range(path, 0, 900, head)
    n, rate = struct.unpack_from("<H", head, 370)[0], struct.unpack_from("<H", head, 376)[0]
    events = struct.unpack_from("<I", head, 886)[0]
    size, start = size_of(path), 900 + 75 * n
    if not n or not rate or len(head) < 900:
        raise Damaged
    # The header stores the offset of the event table in only four bytes, so the offset is checked only in files below 2
    # GiB.
    if size < 1 << 31 and start < events < 1 << 31 and events > size:
        return _truncated(events, "bytes of signal", size)
    return Reason("no signal", "the file ends with the header") if size <= start else None


def check_ant(path: AnyPath, head: bytes = b"") -> Reason | None:
    """Compare the length in the RIFF header of an ANT file with the size of the file."""
    head = read_range(path, 0, 12, head)
    promised, offset = struct.unpack_from("<I", head, 4)[0], 8
    if head[:4] == b"RF64":
        promised, offset = struct.unpack_from("<Q", head, 4)[0], 12
    size = size_of(path)
    return _truncated(promised + offset, "bytes", size) if size < promised + offset else None


def check_nedf(path: AnyPath, head: bytes = b"") -> Reason | None:
    """Compare the number of samples in the header of a NEDF file with the size of the file."""
    import defusedxml.ElementTree

    xml = defusedxml.ElementTree.fromstring(read_range(path, 0, NEDF_HEADER, head).split(b"\0")[0])
    n = int(xml.findtext("EEGSettings/TotalNumberOfChannels") or 0)
    samples = int(xml.findtext("EEGSettings/NumberOfRecordsOfEEG") or 0)
    if n < 1 or samples < 0:
        raise Damaged
    if not samples:
        return Reason("no signal", "the header says 0 samples")
    accelerometer = 2 * int(xml.findtext("NumberOfChannelsOfAccelerometer") or 0)
    sample = 3 * n * (3 if xml.find("STIMSettings") is not None else 1) + 4
    full, last = divmod(samples, 5)
    promised = NEDF_HEADER + full * (accelerometer + 5 * sample) + (accelerometer + last * sample if last else 0)
    size = size_of(path)
    return _truncated(promised, "bytes", size) if size < promised else None


def egi_header(head: bytes) -> dict[str, int] | None:
    """Parse the header of an EGI simple binary file.

    Parameters
    ----------
    head : bytes
        The first bytes of the file.

    Returns
    -------
    dict or None
        The fields of the header. None if the version, the date or a number is not plausible: then the file has another
        format.
    """
    if len(head) < 36:
        return None
    version, year, month, day, hour, minute, second, _, rate, n, _, bits, _, samples, events = struct.unpack_from(
        ">i6hi5hih", head
    )
    sane = version in range(2, 8) and 1980 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= 31
    sane = sane and hour in range(24) and minute in range(60) and second in range(61)
    if not (sane and 0 < rate <= 25000 and 0 < n <= 1024 and bits in range(33)):
        return None
    return {"version": version, "rate": rate, "channels": n, "samples": samples, "events": events}


def check_egi(path: AnyPath, head: bytes) -> tuple[Reason | None, bool]:
    """Compare the header of an EGI simple binary file with the size of the file."""
    fields = egi_header(head)
    if fields is None:
        raise Damaged
    if fields["version"] % 2:
        return Reason("epoched", "this is a segmented EGI simple binary file, which cannot be read"), False
    n, events, samples = fields["channels"], fields["events"], fields["samples"]
    if samples <= 0 or events < 0:
        return Reason("no signal", "the header says 0 samples"), False
    promised = 36 + 4 * events + samples * (n + events) * (fields["version"] & 6)
    # The EGI versions 2, 4 and 6 store samples of 2, 4 and 8 bytes.
    if fields["version"] & 6 == 6:
        promised = 36 + 4 * events + samples * (n + events) * 8
    size = size_of(path)
    return (_truncated(promised, "bytes", size), True) if size < promised else (None, True)


def check_curry(data: AnyPath, header: AnyPath) -> Reason | None:
    """Compare a Curry header with its data file."""
    text = read_range(header, 0, MAX_READ).decode("latin-1")

    def number(*keys: str) -> int:
        return int(float(next((value for key in keys if (value := ini_value(text, key))), 0)))

    n, samples = number("NumChannels", "NUM_CHANNELS"), number("NumSamples", "NUM_SAMPLES")
    trials = max(number("NumTrials", "NUM_TRIALS"), 1)
    ascii_ = "ASCII" in (
        (ini_value(text, "DataFormat") or "").upper(),
        (ini_value(text, "DATA_FORMAT") or "").upper(),
    )
    if n < 1:
        raise Damaged
    size = size_of(data)
    if not size:
        return Reason("no signal", "the data file is empty")
    if not ascii_ and samples > 0 and size < 4 * n * samples * trials:
        return _truncated(samples * trials, "samples", size / (4 * n))
    return None


def check_persyst(text: str, data: AnyPath) -> Reason | None:
    """Compare a Persyst header with its data file.

    The data file must contain the same number of samples for each channel.
    """
    n, kind = int(ini_value(text, "WaveformCount") or 0), int(ini_value(text, "DataType") or 0)
    if n < 1 or kind not in (0, 7):
        raise Damaged
    size = size_of(data)
    if size % (n * (4 if kind == 7 else 2)):
        return Reason("truncated", f"{size} bytes are not a whole number of samples of {n} channels")
    return Reason("no signal", "the data file is empty") if not size else None


def check_nihon(path: AnyPath) -> Reason | None:
    """Check that the data blocks of a Nihon Kohden file lie inside the file."""
    size = size_of(path)

    def word(at: int, layout: str) -> int:
        return struct.unpack(layout, read_range(path, at, struct.calcsize(layout)))[0]

    last = 0
    blocks = 0
    for control in range(min(word(0x91, "<B"), 22)):
        address = word(0x92 + 20 * control, "<I")
        for block in range(word(address + 17, "<B")):
            blocks += 1
            if blocks > NIHON_BLOCKS:
                raise Damaged
            at = word(address + 18 + 20 * block, "<I")
            rate, duration, n = word(at + 0x1A, "<H") & 0x3FFF, word(at + 0x1C, "<I"), word(at + 0x26, "<B")
            last = max(last, at + 0x27 + 10 * n + 2 * (n + 1) * (duration * rate // 10))
    return _truncated(last, "bytes", size) if size < last else None


# --- Checks of the whole file, which run before a recording is read, not during the search for recordings. ------------


def check_xdf(files: tuple[Path, ...]) -> Reason | None:
    """Check every chunk of an XDF file."""
    (path,) = files
    size = size_of(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"XDF:":
            return None  # Do not check a gzip stream, because gzip has its own checksum.
        at = 4
        while at < size:
            stream.seek(at)
            head = stream.read(9)
            width = head[0]
            if width not in (1, 4, 8):
                return Reason("damaged", f"no chunk begins at byte {at}")
            at += 1 + width + int.from_bytes(head[1 : 1 + width], "little")
    return _truncated(at, "bytes", size) if at > size else None


def check_mff(files: tuple[Path, ...]) -> Reason | None:
    """Check every block in the signal files of an MFF recording."""
    for path in files:
        if not re.fullmatch(r"signal\d+\.bin", path.name):
            continue
        size, at, block = size_of(path), 0, 0
        with path.open("rb") as stream:
            while at < size:
                stream.seek(at)
                head = stream.read(12)
                if len(head) < 4:
                    return _truncated(at + 4, f"bytes in {path.name}", size)
                # A block begins with a header. If the header is the same as in the previous block, a zero is stored in
                # place of the header.
                if struct.unpack_from("<i", head)[0] == 0:
                    at += 4 + block
                    if not block:
                        return Reason("damaged", f"the first block of {path.name} has no header")
                    continue
                if len(head) < 12:
                    return _truncated(at + 12, f"bytes in {path.name}", size)
                header, block = struct.unpack_from("<ii", head, 4)
                if header < 12 or block < 0:
                    return Reason("damaged", f"the block at byte {at} of {path.name} has no length")
                at += header + block
        if at > size:
            return _truncated(at, f"bytes in {path.name}", size)
        if not size:
            return Reason("no signal", f"{path.name} is empty")
    return None


def check_fif(files: tuple[Path, ...]) -> Reason | None:
    """Check every tag of FIF files."""
    for path in files:
        if not path.name.lower().endswith(".fif"):
            continue
        size, at, seen = size_of(path), 0, 0
        with path.open("rb") as stream:
            while 0 <= at < size:
                stream.seek(at)
                head = stream.read(16)
                if len(head) < 16:
                    return _truncated(at + 16, f"bytes in {path.name}", size)
                _, _, length, following = struct.unpack(">4i", head)
                if length < 0 or (following > 0 and following <= at):
                    return Reason("damaged", f"the tag at byte {at} of {path.name} points to an invalid place")
                if at + 16 + length > size:
                    return _truncated(at + 16 + length, f"bytes in {path.name}", size)
                seen += 1
                if following < 0:
                    break
                at = following or at + 16 + length
    return None


def run_check(check: Callable[..., Any], what: str, *args: Any) -> Any:
    """Run a check of a header. If the header cannot be parsed, return a problem.

    Parameters
    ----------
    check : callable
        One of the `check_` functions of this module.
    what : str
        Name of the format.
    *args
        Arguments for `check`.

    Returns
    -------
    Any
        Result of `check`, or the `Reason` for a header that cannot be parsed.
    """
    try:
        return check(*args)
    except DAMAGED as error:
        return Reason(f"damaged {what} header", str(error) if isinstance(error, Damaged) else "")
