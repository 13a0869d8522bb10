"""Repair the header and the marker file of a BrainVision recording. One damaged line makes MNE refuse the recording."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.channels import is_electrode
from data_sharding.formats.marks.interruptions import Annotation

CHANNEL = re.compile(r"^([ \t]*Ch(\d+)[ \t]*=)(.*)$", re.MULTILINE | re.IGNORECASE)
CODEPAGE = re.compile(r"^([ \t]*Codepage[ \t]*=[ \t]*)(.*?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
ELSEWHERE = (1.0, 0.0, 0.0)
"""Placeholder coordinates of channels without a position. After MNE has opened the file, the placeholders are
removed."""
MARKER = re.compile(r"^[ \t]*Mk(\d+)[ \t]*=(.*)$", re.MULTILINE | re.IGNORECASE)


@dataclass
class Repaired:
    """A header or marker file with corrected lines."""

    text: str
    """The corrected text; equal to the original text if no line needs a correction."""
    notes: list[str] = field(default_factory=list)
    """Notes for the ledger."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Channels without a scale: the key is the number of the channel (from 1), the value is the reason."""
    unplaced: set[int] = field(default_factory=set)
    """Numbers of the channels (from 1) that have placeholder coordinates in `text`."""
    recoded: bool = False
    """Whether the text must be written again in UTF-8: the file has another encoding, lines that end with a carriage
    return alone, or a wrong code page."""


def section(text: str, name: str) -> tuple[int, int]:
    """Return the start and the end of a section of an INI text.

    If the section is missing, both positions are the end of the text.
    """
    head = re.search(rf"^[ \t]*\[{name}\][ \t]*$", text, re.MULTILINE | re.IGNORECASE)
    if head is None:
        return len(text), len(text)
    following = re.compile(r"^[ \t]*\[[^\]\n]*\][ \t]*$", re.MULTILINE).search(text, head.end())
    return head.end(), following.start() if following else len(text)


def read_text(data: bytes) -> Repaired:
    """Decode the bytes of a header or marker file.

    If the file names an unknown or wrong code page, the name is replaced by UTF-8 in the text.
    """
    text, encoding = headers.decode_text(data)
    changed = encoding != "utf-8" or "\n" not in text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    named = CODEPAGE.search(text)
    page = named[2] if named else ""
    try:
        data.decode("cp1252" if page.upper() == "ANSI" else codecs.lookup(page or "utf-8").name)
    except LookupError:
        note = f"the code page '{page[:20]}' is unknown"
    except UnicodeDecodeError:
        if not page:
            return Repaired(text, recoded=True)
        note = f"the text does not fit the code page '{page[:20]}'"
    else:
        return Repaired(text, recoded=changed)
    text = CODEPAGE.sub(lambda found: f"{found[1]}UTF-8", text, count=1)
    return Repaired(text, [note], recoded=True)


AGAIN = "export the recording again, for example as EDF, or as BrainVision with BinaryFormat=IEEE_FLOAT_32"


def find_unread_layout(text: str) -> Reason | None:
    """Return the reason if MNE cannot read the samples of a BrainVision recording with this header; otherwise None."""

    def value(key: str) -> str:
        return (headers.ini_value(text, key) or "").strip().upper()

    if value("UseBigEndianOrder") == "YES":
        fault = f"the samples are big-endian (UseBigEndianOrder=YES); {AGAIN}"
        return Reason("no reader for big-endian BrainVision", text=fault)
    if value("DataFormat") == "ASCII":
        columns = value("SkipColumns")
        if value("DataOrientation") == "VECTORIZED":
            return text_layout("each line is a channel (DataOrientation=VECTORIZED)")
        return None if columns in ("", "0") else text_layout(f"other columns come first (SkipColumns={columns[:9]})")
    if value("BinaryFormat") == "UINT_16":
        fault = f"the samples have the format UINT_16; {AGAIN}"
        return Reason("no reader for BrainVision with UINT_16", text=fault)
    return None


def text_layout(fault: str) -> Reason:
    """Return the reason for BrainVision samples that are stored as text in a layout that MNE does not read."""
    text = f"the samples are stored as text (DataFormat=ASCII), and {fault}; {AGAIN}"
    return Reason("no reader for this text of BrainVision", text=text)


def check_text(data: Path, begin: int) -> Reason | None:
    """Return the reason if MNE cannot divide the first line of samples into numbers; otherwise None.

    Parameters
    ----------
    data : Path
        The data file, with text.
    begin : int
        Position of the first line of samples in the file.
    """
    line = headers.read_range(data, begin, 1 << 16).split(b"\n")[0].strip()
    return None if b" " in line or b"," in line else text_layout("neither spaces nor commas separate the numbers")


def repair_header(text: str) -> Repaired:
    """Correct the lines for channels and coordinates in a BrainVision header.

    Parameters
    ----------
    text : str
        Text of the header. Every line ends with a newline.

    Returns
    -------
    Repaired
        The corrected header. A channel without a name gets a name. If two channels have the same name, the second
        channel gets a number. `left_out` contains the channels whose line is missing or has no resolution. `unplaced`
        contains the channels whose coordinates are not numbers, or are 0, 0, 0 (unknown position).
    """
    out = Repaired(text)
    try:
        count = int(headers.ini_value(text, "NumberOfChannels") or 0)
    except ValueError:
        return out
    begin, end = section(text, "Channel Infos")
    if not 0 < count < 1 << 14 or begin == len(text):
        return out
    rows = {int(number): line.split(",") for _, number, line in reversed(CHANNEL.findall(text[begin:end]))}
    names: list[str] = []
    lines = []
    for number in range(1, count + 1):
        cells = [cell.strip() for cell in rows.get(number, [])]
        name = cells[0] if cells and cells[0] else f"Ch{number}"
        given, suffix = name, 2
        while name in names:
            name, suffix = f"{given}-{suffix}", suffix + 1
        names.append(name)
        if name != given:
            out.notes.append(f"two channels are named '{given}': the first keeps this name, the other is '{name}'")
        if len(cells) < 3:
            out.left_out[number] = "no scale: the header's row of the channel is missing or too short"
        elif cells[2] and not _positive(cells[2]):
            out.left_out[number] = f"no scale: the header's resolution '{cells[2][:20]}' is not a positive number"
        elif cells[0] == name:
            lines.append(None)
            continue
        good = (
            [*cells[1:2], "1" if number in out.left_out else cells[2], *cells[3:]]
            if len(cells) > 2
            else ["", "1", "µV"]
        )
        lines.append(f"Ch{number}={','.join([name, *good])}")
    if any(lines):
        kept = CHANNEL.sub(lambda found: _replace(found, lines), text[begin:end])
        missing = [line for number, line in enumerate(lines, start=1) if line and number not in rows]
        out.text = text[:begin] + "\n".join([kept.rstrip("\n"), *missing]) + "\n\n" + text[end:]
    for number, why in out.left_out.items():
        out.notes.append(f"channel {names[number - 1]} is left out: {why}")
    return _repair_coordinates(out, names)


def _replace(found: re.Match[str], lines: list[str | None]) -> str:
    number = int(found[2])
    return (lines[number - 1] if number <= len(lines) else None) or found[0]


def _repair_coordinates(out: Repaired, names: list[str]) -> Repaired:
    """Write a line with coordinates for every channel, and add channels without usable coordinates to `unplaced`."""
    begin, end = section(out.text, "Coordinates")
    if begin == len(out.text):
        return out
    electrodes, rows = is_electrode(names), {}
    for _, number, content in CHANNEL.findall(out.text[begin:end]):
        cells = [_number(cell) for cell in content.split(",")]
        if len(cells) == 3 and all(map(math.isfinite, cells)):
            rows.setdefault(int(number), cells)
    lines, lost = [], []
    for number, name in enumerate(names, start=1):
        cells = rows.get(number)
        # MNE changes the type of a channel at 0, 0, 0, and raises an error for a channel without coordinates.
        if cells is None or (cells[0] == 0 and electrodes[number - 1]):
            out.unplaced.add(number)
            lost += [name] if cells is None else []
            cells = ELSEWHERE
        lines.append(f"Ch{number}={','.join(f'{cell:g}' for cell in cells)}")
    if out.unplaced:
        out.text = f"{out.text[:begin]}\n" + "\n".join(lines) + f"\n\n{out.text[end:]}"
    if lost:
        out.notes.append(f"the coordinates of some channels are not three numbers: {', '.join(lost[:5])} ({len(lost)})")
    return out


def repair_markers(text: str) -> Repaired:
    """Remove the invalid lines of a marker file, and the invalid dates in New Segment lines.

    Parameters
    ----------
    text : str
        Text of the marker file. Every line ends with a newline.

    Returns
    -------
    Repaired
        The text without invalid dates, and without the lines of markers that have no valid position.
    """
    out = Repaired(text)
    broken, dates = [], []
    begin, end = section(text, "Marker Infos")

    def check(found: re.Match[str]) -> str:
        cells = found[2].split(",")
        if len(cells) < 4 or not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", cells[2]):
            broken.append(found[0].strip())
            return ""
        # A marker line ends with a date if it has more than five fields, or more than nine characters in its last
        # field.
        date = cells[-1].strip() if len(cells) > 5 or len(cells[-1].strip()) > 9 else ""
        if cells[0].strip().casefold() == "new segment" and not _is_date(date):
            dates.append(date)
            return f"Mk{found[1]}={','.join([*cells[:4], '0'])}"
        return found[0]

    content = MARKER.sub(check, text[begin:end])
    if content != text[begin:end]:
        out.text = text[:begin] + content + text[end:]
    for lines, what in (
        (broken, "cannot be parsed, and are not used"),
        (dates, "have an invalid date, which is not used"),
    ):
        if lines:
            out.notes.append(f"{len(lines)} entries of the marker file {what}, the first is '{lines[0][:60]}'")
    return out


def read_markers(text: str, sfreq: float, names: Sequence[str]) -> list[Annotation]:
    """Read the markers of a marker file with their channels, because MNE does not read the channels of markers.

    Parameters
    ----------
    text : str
        Text of the marker file from `repair_markers`.
    sfreq : float
        Sampling rate in Hz.
    names : sequence of str
        Names of all channels of the header.

    Returns
    -------
    list of Annotation
        The markers. The text of a marker is its type and its description, as in MNE. The channel number 0 means all
        channels. The first marker is left out if its type is New Segment, because it only says that the recording
        begins.
    """
    begin, end = section(text, "Marker Infos")
    out = []
    for i, (_, content) in enumerate(MARKER.findall(text[begin:end])):
        cells = [cell.strip().replace(r"\1", ",") for cell in content.split(",")]
        kind, words, position, size = cells[:4]
        number = int(cells[4]) if len(cells) > 4 and re.fullmatch(r"\d{1,6}", cells[4]) else 0
        if i or kind.casefold() != "new segment":
            length = int(size) / sfreq if re.fullmatch(r"\d{1,18}", size) else 0.0
            channels = (names[number - 1],) if 0 < number <= len(names) else ()
            out.append(Annotation((int(position) - 1) / sfreq, length, f"{kind}/{words}", channels))
    return out


def _is_date(text: str) -> bool:
    """Return whether MNE can parse a BrainVision date (year, month, day, hour, minute, second and microseconds)."""
    from datetime import datetime

    if not text.isdigit() or len(text) != 20:
        return text == ""
    if text == "0" * 20:
        return True
    try:
        datetime.strptime(text, "%Y%m%d%H%M%S%f")
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> bool:
    return 0 < _number(text) < math.inf
