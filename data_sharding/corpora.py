"""Corpora: which recordings there are, whose they are, and which trials they hold."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_sharding.errors import RequestError
from data_sharding.readers import Recording, find_recordings
from data_sharding.samples import safe_key
from data_sharding.splits import SPLITS

INTRACRANIAL = re.compile(r"(?:^|[_\W])(ecog|ieeg|seeg)(?:$|[_\W])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A collection of recordings."""

    kind: Literal["folder", "events"] = "folder"
    """folder: continuous recordings, cut into windows. events: beside each recording a table of the images shown,
    one sample a trial."""
    root: str
    """Folder with the recordings; ${NAME} stands for an environment variable."""
    name: str = ""
    """Name in the ledger; empty: the first folder below root that a recording lies in, or root's own name."""
    images: str = ""
    """Kind events: folder that the tables' column 'image' is relative to."""
    trial_offset: float = 0.0
    """Kind events: seconds from an event's onset to the start of its window."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns, relative to root, of what is not looked at."""
    unit_factors: dict[str, float] = field(default_factory=dict)
    """Glob pattern, relative to root, to the factor that brings a recording's values, read as volts, to volts.
    For recordings that were set aside as 'unit unknown'."""
    line_freq: float | None = None
    """Mains frequency in Hz; empty: from the file, else from the spectrum."""
    subject_pattern: str = ""
    """Regular expression with the named groups 'subject' and, if wanted, 'session', searched in the path relative to
    root. Empty: BIDS parts sub-X and ses-X, else every recording is a subject of its own."""
    intracranial: bool = False
    """Take recordings whose path names them ECoG, iEEG or SEEG, too; they are excluded otherwise."""

    def __post_init__(self) -> None:
        if self.kind == "events" and not self.images:
            raise ValueError(
                f"corpora: '{self.root}' is of kind events and needs the key 'images', the folder of the images"
            )
        if self.kind == "folder" and self.images:
            raise ValueError(f"corpora: '{self.root}' has the key 'images' but is of kind folder; set kind: events")
        try:
            groups = re.compile(self.subject_pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"corpora: subject_pattern '{self.subject_pattern}' is no regular expression ({error})"
            ) from None
        if self.subject_pattern and "subject" not in groups:
            raise ValueError(f"corpora: subject_pattern '{self.subject_pattern}' needs a group (?P<subject>...)")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An image shown."""

    onset: float
    """Seconds from the recording's start."""
    image: str
    """Path of the image."""
    image_id: str
    """What tells images apart."""
    label_name: str
    """Its category."""
    caption: str
    """Its description."""
    split: str
    """The table's column 'split'; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A recording with what its corpus says about it."""

    key: str
    """Unique, and the start of its samples' keys."""
    corpus: str
    """Name of the corpus."""
    path: str
    """Relative to the corpus's root."""
    recording: Recording
    """The files."""
    subject: str
    """Who."""
    session: str
    """When; may be empty."""
    unit_factor: float | None = None
    """From the config."""
    line_freq: float | None = None
    """From the config."""
    trial_offset: float = 0.0
    """Seconds."""
    trials: tuple[Trial, ...] | None = None
    """None for a continuous recording."""
    reason: str | None = None
    """Why the corpus already excludes it."""


def expand(text: str, key: str) -> Path:
    """Expand ``${NAME}`` and ``~`` in a path.

    Parameters
    ----------
    text : str
        The path as in the config.
    key : str
        The config's key, for the message.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    RequestError
        If a variable is not set.
    """
    out = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", out):
        raise RequestError(
            f"{key} '{text}': the environment variable {unset.group(1)} is not set; export it or write the path out"
        )
    return Path(out).expanduser()


def _folder(text: str, key: str) -> Path:
    path = expand(text, key)
    if not path.is_dir():
        raise RequestError(f"{key} '{path}': no such folder")
    if not os.access(path, os.R_OK | os.X_OK):
        raise RequestError(f"{key} '{path}': no permission to read it")
    return path


def recording_key(corpus: str, relative: str) -> str:
    """Key of a recording: readable, unique, short enough for a tar's header.

    Parameters
    ----------
    corpus : str
        The corpus's name.
    relative : str
        Path relative to the corpus's root.

    Returns
    -------
    str
        At most 69 characters of ``[A-Za-z0-9_-]``.
    """
    full = relative if relative.startswith(f"{corpus}/") else f"{corpus}/{relative}"
    slug = safe_key(full)[-60:].strip("-_")
    return f"{slug}-{hashlib.sha256(f'{corpus}/{relative}'.encode()).hexdigest()[:8]}"


def _who(config: CorpusConfig, relative: str, key: str) -> tuple[str, str]:
    if config.subject_pattern:
        match = re.search(config.subject_pattern, relative)
        if not match:
            return key, ""
        groups = match.groupdict()
        return groups["subject"], groups.get("session") or ""
    subject = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", relative)
    session = re.search(r"(?:^|[/_])(ses-[A-Za-z0-9]+)", relative)
    return subject.group(1) if subject else key, session.group(1) if session else ""


def events_file(recording: Path) -> Path | None:
    """Table of the images shown during a recording.

    Parameters
    ----------
    recording : Path
        The recording.

    Returns
    -------
    Path or None
        ``<stem>_events.tsv`` beside it, where BIDS's suffix ``_eeg`` and MNE's ``_raw`` do not count to the stem.
    """
    stem = re.sub(r"\.fif$", "", recording.stem)
    for name in (stem, re.sub(r"_(eeg|raw)$", "", stem)):
        path = recording.with_name(f"{name}_events.tsv")
        if path.is_file():
            return path
    return None


def _read_trials(table: Path, images: Path) -> tuple[Trial, ...]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{table}: cannot be read ({error})") from None
    if rows and (missing := {"onset", "image"} - set(rows[0])):
        raise RequestError(f"{table}: no column '{min(missing)}'; it needs at least onset and image, tab-separated")
    trials = []
    for number, row in enumerate(rows, start=2):
        image = (row["image"] or "").strip()
        if image in ("", "n/a"):
            continue  # BIDS tables hold responses and other events, too.
        try:
            onset = float(row["onset"])
        except (TypeError, ValueError):
            raise RequestError(f"{table}, line {number}: onset '{row['onset']}' is no number of seconds") from None
        path = images / image
        given = {key: (row.get(key) or "").strip() for key in ("label_name", "caption", "image_id", "split")}
        if given["split"] in ("n/a", ""):
            given["split"] = ""
        elif given["split"] not in SPLITS:
            raise RequestError(f"{table}, line {number}: split '{given['split']}' is none of {', '.join(SPLITS)}")
        label = given["label_name"] or (Path(image).parent.name or "image")
        trials.append(
            Trial(
                onset=onset,
                image=str(path),
                image_id=given["image_id"] or Path(image).with_suffix("").as_posix(),
                label_name=label,
                caption=given["caption"] or label,
                split=given["split"],
            )
        )
    return tuple(trials)


def list_items(config: CorpusConfig) -> list[Item]:
    """All recordings of a corpus.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.

    Returns
    -------
    list of Item
        Sorted by path; recordings that cannot be used are among them, with the reason.

    Raises
    ------
    RequestError
        If a folder is missing, there is no recording, or (kind events) no trial or an image that is not there.
    """
    root = _folder(config.root, "corpora: root")
    images = _folder(config.images, "corpora: images") if config.images else None
    found = []
    for recording in find_recordings(root):
        # A name that is no UTF-8 could not stand in the ledger.
        relative = recording.path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        if not any(fnmatch.fnmatch(relative, pattern) for pattern in config.exclude):
            found.append((relative, recording))
    if not found:
        raise RequestError(f"corpora: root '{root}': no recording found there; check the path and the key 'exclude'")
    items, tables = [], 0
    for relative, recording in found:
        name = config.name or (relative.split("/")[0] if "/" in relative else root.resolve().name)
        key = recording_key(name, relative)
        subject, session = _who(config, relative, key)
        values: dict[str, Any] = {}
        for pattern, factor in config.unit_factors.items():
            if fnmatch.fnmatch(relative, pattern):
                values["unit_factor"] = factor
        if not config.intracranial and INTRACRANIAL.search(relative):
            values["reason"] = "intracranial: the path names it so; this dataset is of scalp EEG (key 'intracranial')"
        if images is not None and recording.problem is None:
            table = events_file(recording.path)
            if table is None:
                values["reason"] = f"no events: {recording.path.stem}_events.tsv is not beside it"
            else:
                tables += 1
                values["trials"] = _read_trials(table, images)
        items.append(
            Item(
                key=key,
                corpus=name,
                path=relative,
                recording=recording,
                subject=subject,
                session=session,
                line_freq=config.line_freq,
                trial_offset=config.trial_offset,
                **values,
            )
        )
    for pattern in config.unit_factors:
        if not any(fnmatch.fnmatch(relative, pattern) for relative, _ in found):
            raise RequestError(f"corpora: unit_factors '{pattern}' matches no recording under {root}")
    if images is not None:
        if not any(item.trials for item in items):
            what = "no <recording>_events.tsv beside any recording" if not tables else "the events tables name no image"
            raise RequestError(f"corpora: root '{root}': no paired trials; {what}")
        shown = sorted({trial.image for item in items for trial in item.trials or ()})
        absent = [image for image in shown if not Path(image).is_file()]
        if absent:
            raise RequestError(
                f"corpora: images '{images}': {len(absent)} of {len(shown)} images are missing, the first is "
                f"{absent[0]}"
            )
    return items
