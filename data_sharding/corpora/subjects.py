"""Finds the subject of each recording of a corpus, and data about the subject.

Several sources are tried, and the first source that contains a subject's name is used: the table in the key 'subjects';
the key 'subject_pattern'; sub-X in the path; the patient's code in the header of an EDF+ or BDF+ file; common file
naming schemes (`data_sharding.corpora.naming`); other text in the patient field of an EDF, BDF or GDF file. If no
source contains a subject's name, the subject of the recording is unknown.
"""

from __future__ import annotations

import csv
import fnmatch
import functools
import hashlib
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, describe
from data_sharding.corpora.base import CorpusConfig
from data_sharding.corpora.naming import BIDS, recognise
from data_sharding.corpora.paths import expand, read_text
from data_sharding.formats.about import OLDEST, SEXES, Patient, read_patient
from data_sharding.formats.sniffing import Recording

NOTHING = ("", "n/a", "na", "nan", "unknown")
"""Texts in a table cell that mean "no value"."""
HEADERS = ("edf", "bdf", "gdf")
"""Formats with a patient field."""
THREADS = 16
"""Number of headers that are read at the same time."""


@dataclass(frozen=True, kw_only=True)
class Who:
    """The subject of a recording."""

    subject: str
    """Name of the subject; the key of the recording if the subject is unknown."""
    session: str = ""
    """Name of the session; empty if unknown."""
    source: str
    """Source of the subject's name, as in the column `subject_from` of the ledger."""
    about: dict[str, Any] = field(default_factory=dict)
    """Age, sex and group of the subject, if known."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    line: int
    path: str
    patient: str
    subject: str
    about: dict[str, Any]


def parse_age(text: str) -> float | None:
    """Parse an age in years.

    Parameters
    ----------
    text : str
        The age, such as ``34``, ``0.5`` or ``89+``.

    Returns
    -------
    float or None
        The age; 90 for an age of 90 or more and for an open range such as ``89+``. None if the text says that the age
        is unknown.

    Raises
    ------
    ValueError
        If the text is not an age.
    """
    text = text.strip().casefold()
    if text in NOTHING:
        return None
    match = re.fullmatch(r">?\s*(\d{1,3}(?:[.,]\d+)?)\s*(\+|yrs?|years?|y)?", text)
    if not match or float(match[1].replace(",", ".")) > 130:
        raise ValueError(f"age '{text[:20]}' is not a number of years")
    age = float(match[1].replace(",", "."))
    return float(OLDEST) if age >= OLDEST or match[2] == "+" or text.startswith(">") else age


def parse_sex(text: str) -> str:
    """Parse a sex: return M, F or O, or an empty text if the sex is unknown. Other texts raise ValueError."""
    text = text.strip().casefold()
    if text in NOTHING:
        return ""
    if text not in SEXES:
        raise ValueError(f"sex '{text[:20]}' is not M, F or O")
    return SEXES[text]


def describe_person(row: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return age, sex and group from a row of a table, and a message for each invalid value."""
    about: dict[str, Any] = {}
    faults = []
    for name, parse in (("age", parse_age), ("sex", parse_sex), ("group", str.strip)):
        try:
            value = parse(row.get(name) or "")
        except ValueError as error:
            faults.append(str(error))
            continue
        if value is not None and str(value).casefold() not in NOTHING:
            about[name] = value
    return about, faults


def _read_table(config: CorpusConfig) -> tuple[AnyPath, list[_Row]]:
    """Read and check the table in the key 'subjects'."""
    path = expand(config.subjects, "corpora: subjects")
    try:
        text = read_text(path)
    except Exception as error:  # Each object store has its own classes of errors, so catch all.
        why = "no such file" if isinstance(error, FileNotFoundError) else describe(error)
        raise RequestError(f"corpora: subjects '{path}': cannot be read ({why})") from None
    first = text.split("\n", 1)[0]
    delimiter = max("\t;,", key=first.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [(table.line_num, [cell.strip() for cell in cells]) for cells in table if any(map(str.strip, cells))]
    except csv.Error as error:
        raise RequestError(f"corpora: subjects '{path}', line {table.line_num}: {error}") from None
    head = [name.casefold() for name in lines[0][1]] if lines else []
    column = {"participant_id": "subject"}
    head = [column.get(name, name) for name in head]
    if "subject" not in head or len(set(head)) < len(head):
        raise RequestError(
            f"corpora: subjects '{path}': the first line must have the column 'subject', and no column twice; each row "
            "names recordings in the column 'path' (a path below root, or a glob pattern) or 'patient'"
        )
    rows = []
    for line, cells in lines[1:]:
        where = f"corpora: subjects '{path}', line {line}"
        if len(cells) != len(head):
            raise RequestError(f"{where}: {len(cells)} cells, but the first line has {len(head)} columns")
        values = dict(zip(head, cells, strict=True))
        about, faults = describe_person(values)
        if faults:
            raise RequestError(f"{where}: {faults[0]}")
        if values["subject"].casefold() in NOTHING:
            raise RequestError(f"{where}: the column 'subject' is empty; name the subject, or remove the row")
        named = [name for name in ("path", "patient") if values.get(name, "").casefold() not in NOTHING]
        if ("path" in head or "patient" in head) and len(named) != 1:
            raise RequestError(f"{where}: fill in either the column 'path' or the column 'patient'")
        filled = {name: values[name] for name in named}
        rows.append(
            _Row(
                line=line,
                path=filled.get("path", ""),
                patient=filled.get("patient", ""),
                subject=values["subject"],
                about=about,
            )
        )
    if not rows:
        raise RequestError(f"corpora: subjects '{path}': the table has no rows")
    return path, rows


@functools.lru_cache(maxsize=100_000)
def hash_identity(identity: str, secret: str) -> str:
    """Return a pseudonym for the patient whose name or number is in a recording's header.

    Parameters
    ----------
    identity : str
        Text that is the same in all recordings of the patient.
    secret : str
        Secret text. Without the secret, nobody can compute the pseudonym of a known patient.

    Returns
    -------
    str
        ``id-`` and 12 hexadecimal digits.
    """
    # Without a secret, somebody could find a patient by hashing all possible patient numbers. The hash is slow on
    # purpose, so that this search takes very long.
    salt = hashlib.sha256(f"dreamscale subject {secret}".encode()).digest()
    return f"id-{hashlib.scrypt(identity.encode(), salt=salt, n=2**11, r=8, p=1, dklen=6).hex()}"


class SubjectFinder:
    """Finds the subject of each recording of a corpus.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    found : sequence of (str, Recording or None)
        For each recording, a pair of its path below root and the recording itself. If the pair has None in place of the
        recording, the header of this recording is not read.

    Raises
    ------
    RequestError
        If the table or the pattern in the config is wrong, for example if a row of the table or the pattern matches no
        recording.
    """

    def __init__(self, config: CorpusConfig, found: Sequence[tuple[str, Recording | None]]) -> None:
        self.config = config
        self.secret = _read_secret(config)
        self._patients: dict[str, Patient | None] = {}
        self._rows: dict[str, _Row] = {}
        self._people: dict[str, dict[str, Any]] = {}
        paths = [relative for relative, _ in found]
        if config.subject_pattern and not any(re.search(config.subject_pattern, path) for path in paths):
            raise RequestError(
                f"corpora: subject_pattern '{config.subject_pattern}' matches no recording under {config.root}; "
                f"a path is, for example, '{paths[0] if paths else ''}'"
            )
        table, rows = _read_table(config) if config.subjects else (None, [])
        by_patient = any(row.patient for row in rows)
        self._read_headers([(path, r) for path, r in found if r and (by_patient or self._needs_header(path))])
        self._prepare_hashes()
        self._match(table, [row for row in rows if row.path or row.patient], paths)
        self._describe(table, [row for row in rows if not row.path and not row.patient], paths)

    def _needs_header(self, path: str) -> bool:
        if self.config.subject_pattern:
            return not re.search(self.config.subject_pattern, path)
        return not re.search(BIDS.pattern, path)

    def _read_headers(self, wanted: list[tuple[str, Recording]]) -> None:
        wanted = [(path, recording) for path, recording in wanted if recording.format in HEADERS]
        with ThreadPoolExecutor(THREADS) as pool:
            patients = pool.map(lambda pair: read_patient(pair[1].path, pair[1].format), wanted)
            self._patients = {path: patient for (path, _), patient in zip(wanted, patients, strict=True)}

    def _prepare_hashes(self) -> None:
        """Compute the hashes in several threads, because hashing is slow on purpose. `hash_identity` caches them."""
        used = {p.identity for path, p in self._patients.items() if p and (p.code or not recognise(path).subject)}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda identity: hash_identity(identity, self.secret), sorted(used)))

    def _match(self, table: AnyPath | None, rows: list[_Row], paths: list[str]) -> None:
        """Assign the rows of the table to recordings.

        Each row must match a recording, and no two rows may match the same recording.
        """
        known = set(paths)
        exact: dict[str, list[_Row]] = {}
        globs: list[tuple[re.Pattern[str], _Row]] = []
        patients: dict[str, list[_Row]] = {}
        for row in rows:
            if row.patient:
                patients.setdefault(" ".join(row.patient.casefold().split()), []).append(row)
            elif re.search(r"[*?\[]", row.path) and row.path not in known:
                globs.append((re.compile(fnmatch.translate(row.path)), row))
            else:
                exact.setdefault(row.path, []).append(row)
        used: set[int] = set()
        for path in paths:
            fitting = [*exact.get(path, []), *(row for pattern, row in globs if pattern.match(path))]
            if (patient := self._patients.get(path)) is not None:
                names = {patient.code, patient.field, self._hash(patient)}
                fitting += [row for name in sorted(names - {""}) for row in patients.get(name, [])]
            if len(fitting) > 1:
                raise RequestError(
                    f"corpora: subjects '{table}': lines {fitting[0].line} and {fitting[1].line} both match the "
                    f"recording '{path}'; keep one of them"
                )
            for row in fitting:
                self._rows[path] = row
                used.add(row.line)
        for row in rows:
            if row.line not in used:
                # A patient number must not be written to a log, so the message contains only the line number of the
                # row.
                what = f"path '{row.path}'" if row.path else "the patient"
                raise RequestError(
                    f"corpora: subjects '{table}', line {row.line}: {what} matches no recording under "
                    f"{self.config.root}; correct the row, or remove it"
                )

    def _describe(self, table: AnyPath | None, rows: list[_Row], paths: list[str]) -> None:
        """Store the age, sex and group in the rows without path and patient, by the name of the subject."""
        named = {self(path, "").subject for path in paths} if rows else set()
        for row in rows:
            if row.subject in self._people:
                raise RequestError(f"corpora: subjects '{table}', line {row.line}: '{row.subject}' has two rows")
            self._people[row.subject] = row.about
        if rows and not any(name in named or f"sub-{name}" in named for name in self._people):
            raise RequestError(
                f"corpora: subjects '{table}': no row has the name of a subject under {self.config.root}; the subjects "
                f"are {', '.join(sorted(named - {''})[:5]) or 'unknown'}; add the column 'path'"
            )

    def _hash(self, patient: Patient) -> str:
        return hash_identity(patient.identity, self.secret)

    def __call__(self, relative: str, key: str) -> Who:
        """Find the subject of a recording.

        Parameters
        ----------
        relative : str
            Path of the recording, relative to the root of the corpus.
        key : str
            Key of the recording, which is used as the name of an unknown subject.

        Returns
        -------
        Who
            The subject, the session, and the source of the name.
        """
        session = re.search(r"(?:^|[/_])(ses-[A-Za-z0-9]+)", relative)
        found = session.group(1) if session else ""
        about: dict[str, Any] = {}
        if row := self._rows.get(relative):
            subject, source, about = row.subject, "table", row.about
        elif self.config.subject_pattern and (match := re.search(self.config.subject_pattern, relative)):
            groups = match.groupdict()
            subject, source = groups["subject"] or key, "config" if groups["subject"] else "unknown"
            found = groups.get("session") or ("" if "session" in groups else found)
        elif not self.config.subject_pattern and (match := re.search(BIDS.pattern, relative)):
            subject, source = match.group("subject"), "bids"
        else:
            subject, source = self._from_header_or_path(relative, key)
        if not about:
            about = self._people.get(subject) or self._people.get(subject.removeprefix("sub-"), {})
        return Who(subject=subject, session=found, source=source, about=about)

    def _from_header_or_path(self, relative: str, key: str) -> tuple[str, str]:
        patient = self._patients.get(relative)
        name = "" if self.config.subject_pattern else recognise(relative).subject
        if patient is not None and patient.code:
            # If the path already shows the patient code, a hash would hide nothing, so use the name in the path.
            return name if name.casefold() == patient.code else self._hash(patient), "header"
        if name:
            return name, "recognised"
        return (self._hash(patient), "header") if patient is not None else (key, "unknown")

    def shows_name(self, relative: str) -> bool:
        """Return whether the path of a recording contains the patient's name or number, which is also in the header."""
        patient = self._patients.get(relative)
        if patient is None:
            return False
        words = {patient.code, *patient.names} - {recognise(relative).subject.casefold()}
        return any(len(word) > 3 and word in relative.casefold() for word in words)


def _read_secret(config: CorpusConfig) -> str:
    if not config.salt_variable:
        return ""
    secret = os.environ.get(config.salt_variable, "")
    if not secret:
        raise RequestError(
            f"corpora: salt_variable '{config.salt_variable}': this environment variable is not set; set it to the "
            "secret text with which the patients' identities are hashed, or remove the key"
        )
    return secret
