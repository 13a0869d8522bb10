"""Repair the header of a Persyst recording. One line that MNE cannot parse makes MNE refuse the whole recording."""

from __future__ import annotations

import re
from datetime import datetime

from data_sharding.formats.headers import parse_number

DATES = {"/": "%m/%d/%Y", "-": "%d-%m-%Y", ".": "%Y.%m.%d"}
"""Date formats that MNE can parse. The key is the separator between day, month and year."""
NOBODY = {"birthdate": "/", "sex": "", "hand": "", "testdate": ""}
"""Keys that MNE needs in the section Patient, each with the value that MNE understands as unknown."""


def repair_header(text: str) -> tuple[str, list[str]]:
    """Remove or correct the lines of a Persyst header that MNE cannot parse, and add missing keys.

    Parameters
    ----------
    text : str
        Text of the header. Every line ends with a newline.

    Returns
    -------
    text : str
        The repaired header; equal to the argument `text` if no line needs a repair.
    notes : list of str
        Notes for the ledger. For privacy, a note never contains text from the section about the patient.
    """
    section, lines = "", []
    lost: dict[str, int] = {}
    patient: dict[str, int] = {}
    for line in text.split("\n"):
        content = line.strip()
        if head := re.fullmatch(r"\[(.+)\]", content):
            section = head[1].lower()
        elif content and section == "comments" and not _is_comment(content):
            lost["comments"] = lost.get("comments", 0) + 1
            continue
        elif content and section == "channelmap" and "=" not in content:
            lost[section] = lost.get(section, 0) + 1
            # Keep a line for this channel, because MNE orders the channels by the lines of the section ChannelMap.
            line = f"{content}=0"
        elif content and section != "comments" and "=" not in content:
            lost[section] = lost.get(section, 0) + 1
            continue
        elif section == "patient" and content:
            key, value = (part.strip() for part in content.split("=", 1))
            patient[key.lower()] = len(lines)
            if key.lower() in ("testdate", "testtime") and not _is_time(key.lower(), value):
                lost[key] = 1
                line = f"{key}={'' if key.lower() == 'testdate' else '00:00:00'}"
            elif key.lower() == "birthdate" and not re.search(r"[/-]", value):
                line = f"{key}=/"
        lines.append(line)
    if absent := [f"{key}={value}" for key, value in NOBODY.items() if key not in patient]:
        heads = [i for i, line in enumerate(lines) if line.strip().lower() == "[patient]"]
        at = heads[0] + 1 if heads else len(lines)
        lines[at:at] = absent if heads else ["[Patient]", *absent, ""]
    notes = [
        f"the header's {what} cannot be read" if what in ("TestDate", "TestTime") else f"{count} lines of the header's "
        f"section {what} cannot be read, and are not used"
        for what, count in lost.items()
    ]  # fmt: skip
    return "\n".join(lines), notes


def _is_comment(line: str) -> bool:
    """Return whether a line has the five fields of a comment: onset, duration, two unused fields, and text."""
    cells = line.split(",", 4)
    return len(cells) == 5 and None not in (parse_number(cells[0]), parse_number(cells[1]))


def _is_time(key: str, value: str) -> bool:
    layout = "%H:%M:%S" if key == "testtime" else next((f for mark, f in DATES.items() if mark in value), "")
    if not layout:
        return True  # MNE ignores a date without one of the separators in `DATES`.
    try:
        datetime.strptime(value, layout)
    except ValueError:
        return False
    return True
