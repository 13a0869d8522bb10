"""Read the metadata about the person, the date and the device of a recording.

Headers can hold a name, a birth date and a patient number. Name, birth date and patient number are not stored: `About`
has only an age in years and the year of the recording, and `Patient` is used only to compute a hash (see
docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from data_sharding.common.storage import AnyPath
from data_sharding.formats.headers import DAMAGED, edf_layout, read_range
from data_sharding.formats.signal import About

OLDEST = 90
"""Ages above 90 are stored as 90, because very old people could be recognised by their age."""
UNKNOWN_DATES = frozenset(
    datetime.date(*day)
    for day in ((1900, 1, 1), (1970, 1, 1), (1980, 1, 1), (1985, 1, 1), (1999, 12, 31), (2000, 1, 1))
)
"""Dates that some programs write if the true date is unknown or was removed."""
EARLIEST = 1925
"""Years before 1925 are ignored, because BIDS datasets replace real dates by dates before 1925, for privacy."""
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
NOBODY = frozenset(
    re.findall(
        r"\S+",
        """anon anonym anonymous anonymised anonymized anonymisiert deidentified de-identified code default demo dummy
        edf eeg experiment hidden id initials male female man woman m f w n/a na name nan no noname none not null
        patient patientid person participant proband pseudonym recording removed sex surrogate subject subjectid test
        tester testing unknown unnamed untitled user years yr""",
    )
)
"""Words in a patient field that do not identify a person."""
SEXES = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "w": "F", "woman": "F", "o": "O", "other": "O"}
DATE = re.compile(r"\d{1,2}-[A-Za-z]{3}-\d{4}|\d{1,4}[-./]\d{1,2}[-./]\d{2,4}|(?:19|20)\d{6}")
AGE = re.compile(r"age[:=]?(\d{1,3})|(\d{1,3})(?:yrs?|years?|y|yo|j)", re.IGNORECASE)
AMPLIFIERS = re.compile(
    r"\b(BrainAmp(?: DC| MR(?: ?plus)?| ExG)?|actiCHamp(?: Plus)?|LiveAmp|QuickAmp|V-Amp|actiCAP|eego|EEGO)\b"
)
"""Pattern that finds the name of an amplifier in the comments of a BrainVision header."""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """The person whom the patient field of a header describes. Never print or store the fields of this class."""

    identity: str
    """Text that is the same in all recordings of this patient."""
    code: str
    """The patient's number or code, in lower case; empty if the field has no separate code."""
    names: tuple[str, ...]
    """Words of the patient's name, in lower case."""
    field: str
    """The whole patient field in lower case, with single blanks between the words."""


def years_between(birth: datetime.date, day: datetime.date) -> int | None:
    """Return an age in whole years, at most `OLDEST`.

    Return None if the date of birth and the day of the recording contradict each other, or if the date of birth is a
    placeholder.
    """
    new_year = (birth.month, birth.day) == (1, 1) and birth.year == day.year
    if birth in UNKNOWN_DATES or birth == day or new_year:
        return None
    years = day.year - birth.year - ((day.month, day.day) < (birth.month, birth.day))
    return min(years, OLDEST) if 0 <= years <= 120 else None


def _parse_date(text: str) -> datetime.date | None:
    """Parse a date of EDF+, such as 02-MAY-1951."""
    match = re.fullmatch(r"(\d{1,2})-([A-Za-z]{3})-(\d{4})", text)
    if not match or match[2].upper() not in MONTHS:
        return None
    try:
        return datetime.date(int(match[3]), MONTHS.index(match[2].upper()) + 1, int(match[1]))
    except ValueError:
        return None


def year_of(text: str) -> int | None:
    """Return the year of a date that begins with year, month and day (``2019-05-02T10:00:00``).

    The result is None for a placeholder date (`UNKNOWN_DATES`), and for a year before `EARLIEST`.

    Raises
    ------
    ValueError
        If the text does not begin with a date.
    """
    day = datetime.date.fromisoformat(text[:10])
    return day.year if day not in UNKNOWN_DATES and day.year >= EARLIEST else None


def _is_nobody(word: str) -> bool:
    bare = word.strip("-?*#.()[]").casefold()
    return (
        len(set(bare)) <= 1  # The text is empty, or a placeholder such as X, XXXX or 0000.
        or bare in NOBODY
        or bool(DATE.fullmatch(bare) or AGE.fullmatch(bare))
    )


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s_,;:|]+", text) if word and not _is_nobody(word)]


def _fields(fixed: bytes) -> tuple[list[str], bool]:
    """Return the words in the patient field of an EDF or BDF header, and whether they are ordered as in EDF+."""
    words = fixed[8:88].decode("latin-1").replace("\0", " ").split()
    plus = fixed[192:196] in (b"EDF+", b"BDF+")
    like = len(words) > 3 and words[1] in ("M", "F", "X") and (words[2] == "X" or _parse_date(words[2]) is not None)
    return words, like or (plus and len(words) > 3)


def parse_patient(fixed: bytes, format_: str) -> Patient | None:
    """Parse the patient field of a header.

    Parameters
    ----------
    fixed : bytes
        The first 256 bytes of an EDF, BDF or GDF file.
    format_ : str
        edf, bdf or gdf.

    Returns
    -------
    Patient or None
        None if the field is empty or does not identify a person, as in ``X X X X`` or ``X F X Female_33yr``.
    """
    if format_ == "gdf":
        words, ordered = fixed[8:74].split(b"\0")[0].decode("latin-1").split(), False
    else:
        words, ordered = _fields(fixed)
    field = " ".join(words).casefold()
    if not ordered:
        named = _words(" ".join(words))
        if not named:
            return None
        names = tuple(word.casefold() for word in named if len(word) > 3 and word.isalpha())
        return Patient(identity=" ".join(named).casefold(), code="", names=names, field=field)
    code, birth, name = words[0], words[2], _words(words[3])
    names = tuple(word.casefold() for word in name if len(word) > 2)
    if not _is_nobody(code) or re.fullmatch(r"[1-9]{1,2}", code):
        return Patient(identity=f"code {code.casefold()}", code=code.casefold(), names=names, field=field)
    if not name:
        return None
    return Patient(identity=f"name {' '.join(name).casefold()} {birth.casefold()}", code="", names=names, field=field)


def read_patient(path: AnyPath, format_: str) -> Patient | None:
    """Read the patient field of an EDF, BDF or GDF file.

    Return None if the file cannot be read, or if the field does not identify a person.
    """
    try:
        return parse_patient(read_range(path, 0, 256), format_)
    # Catch all errors, because each library for an object store has its own types of errors. If the file cannot be
    # read, a later step reports this.
    except Exception:
        return None


def private_words(path: AnyPath, format_: str) -> list[str]:
    """Return the words that must be removed from messages, because they are in the patient field of the header.

    Parameters
    ----------
    path : Path or UPath
        The recording.
    format_ : str
        Format of the recording; only edf, bdf and gdf have a patient field.

    Returns
    -------
    list of str
        Words of at least three characters, the longest first.
    """
    if format_ not in ("edf", "bdf", "gdf"):
        return []
    try:
        text = read_range(path, 8, 160 if format_ != "gdf" else 66).decode("latin-1")
    except Exception:
        return []
    found = {word for word in re.split(r"[\s\0]+", text) if len(word) > 2}
    found |= {part for word in found for part in word.split("_") if len(part) > 2}
    found = {word for word in found if len(set(word)) > 1 and word.casefold() not in {*NOBODY, "startdate"}}
    return sorted(found, key=lambda word: (-len(word), word))


def hide(text: str, words: list[str]) -> str:
    """Replace each of the given words in a text by three asterisks."""
    for word in words:
        text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", "***", text, flags=re.IGNORECASE)
    return text


def edf_about(path: AnyPath) -> About:
    """Read age, sex, year, device and filters from the header of an EDF or BDF file.

    Parameters
    ----------
    path : Path or UPath
        The file.

    Returns
    -------
    About
        Age, sex, year, device and filters. Only the date and the device name are read from the EDF+ field "recording",
        because its other words can be the names of the people who made the recording.
    """
    fixed = read_range(path, 0, 256)
    words, ordered = _fields(fixed)
    recorded = fixed[88:168].decode("latin-1").replace("\0", " ").split()
    sex = next((SEXES[w.casefold()] for w in re.split(r"[\s_]+", " ".join(words)) if w.casefold() in SEXES), "")
    if ordered:
        sex = SEXES.get(words[1].casefold(), sex)
    day, device = None, ""
    if recorded[:1] == ["Startdate"] and len(recorded) > 1:
        day = _parse_date(recorded[1])
        device = recorded[4].replace("_", " ") if len(recorded) > 4 and not _is_nobody(recorded[4]) else ""
    if day is None and (match := re.fullmatch(rb"(\d\d)\.(\d\d)\.(\d\d)", fixed[168:176].strip())):
        number = int(match[3])
        with contextlib.suppress(ValueError):
            day = datetime.date(number + (1900 if number > 84 else 2000), int(match[2]), int(match[1]))
    day = None if day in UNKNOWN_DATES else day
    birth = _parse_date(words[2]) if ordered else None
    age: float | None = years_between(birth, day) if birth and day else None
    if age is None:
        said = (AGE.fullmatch(w) for w in re.split(r"[\s_,;]+", " ".join(words)))
        age = next((min(float(m[1] or m[2]), OLDEST) for m in said if m and int(m[1] or m[2]) <= 130), None)
    return About(age=age, sex=sex, year=day.year if day else None, device=device, filters=_edf_filters(path))


def _edf_filters(path: AnyPath) -> str:
    """Return one text with the three filter descriptions that occur most often in the header."""
    layout = edf_layout(path)
    n = len(layout.labels)
    texts = read_range(path, 256 + 136 * n, 80 * n).decode("latin-1")
    count = Counter(
        " ".join(texts[80 * i : 80 * (i + 1)].split())
        for i, label in enumerate(layout.labels)
        if "Annotations" not in label and label != "Status"
    )
    # Ignore descriptions without values: some devices write only zeros, or only the names of the filters.
    count = Counter({text: number for text, number in count.items() if re.search(r"[1-9]|DC", text)})
    return "; ".join(text for text, _ in count.most_common(3))


def mne_about(info: Any) -> About:
    """Read age, sex, year, device and filters from the info object that MNE made for a file.

    Parameters
    ----------
    info : mne.Info
        The info object of a raw or epochs object.

    Returns
    -------
    About
        Age, sex, year, device and filters. A low-pass frequency of half the sampling rate is left out, because MNE
        writes this frequency for files without a filter.
    """
    person, device = info.get("subject_info") or {}, info.get("device_info") or {}
    day = info["meas_date"].date() if info.get("meas_date") is not None else None
    day = None if day in UNKNOWN_DATES else day
    birth = person.get("birthday")
    birth = datetime.date(*birth) if isinstance(birth, tuple) else birth
    age = years_between(birth, day) if isinstance(birth, datetime.date) and day else None
    low, high, rate = float(info["highpass"] or 0), float(info["lowpass"] or 0), float(info["sfreq"])
    filters = [f"high-pass {low:g} Hz"] if low > 0 else []
    filters += [f"low-pass {high:g} Hz"] if 0 < high < 0.499 * rate else []
    return About(
        age=age,
        sex={1: "M", 2: "F"}.get(person.get("sex") or 0, ""),
        year=day.year if day else None,
        device=" ".join(str(device[key]) for key in ("type", "model") if device.get(key)),
        filters=", ".join(filters),
    )


def describe(path: AnyPath, format_: str, info: Any) -> About:
    """Read age, sex, year, device and filters of a file of any format.

    Parameters
    ----------
    path : Path or UPath
        The file that was opened.
    format_ : str
        Format of the recording.
    info : mne.Info or None
        The info object that MNE made for the file; None if a library other than MNE reads the format.

    Returns
    -------
    About
        Age, sex, year, device and filters. If the header cannot be parsed, age, sex, year, device and filters are
        empty, because a recording can be used without this information.
    """
    try:
        if format_ in ("edf", "bdf"):
            return edf_about(path)
        about = mne_about(info) if info is not None else About()
        if format_ == "brainvision" and not about.device:
            found = AMPLIFIERS.search(read_range(path, 0, 1 << 20).decode("latin-1"))
            about = About(**{**vars(about), "device": found.group(1) if found else ""})
        return about
    except (*DAMAGED, AttributeError, OSError):
        return About()
