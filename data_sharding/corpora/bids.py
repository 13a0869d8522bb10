"""Reads BIDS datasets, whose sidecar files describe channels, positions, mains frequency, reference and events.

This module does not use mne-bids to read the sidecars, for two reasons: a dataset may be on an object store, and an
invalid sidecar must affect only the recordings to which it applies. The tests use mne-bids to write BIDS datasets.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, describe
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.events import read_trials
from data_sharding.corpora.folder import KEYS, TRIAL_KEYS, add_marks, find, make_item
from data_sharding.corpora.item import Item
from data_sharding.corpora.paths import (
    NOTHING,
    Folders,
    check_folder,
    check_images,
    parse_table,
    read_text,
    relative_path,
    root_name,
)
from data_sharding.corpora.subjects import SubjectFinder, describe_person
from data_sharding.formats.about import year_of
from data_sharding.formats.units import names_no_unit
from data_sharding.processing.preprocess import check_line_freq

NOT_RAW = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
"""Top-level folders of a BIDS dataset that do not contain raw recordings."""
TYPES = {
    "EEG": "eeg",
    "EOG": "eog",
    "HEOG": "eog",
    "VEOG": "eog",
    "ECG": "ecg",
    "EMG": "emg",
    "TRIG": "stim",
    "GSR": "gsr",
    "RESP": "resp",
    "TEMP": "temperature",
    "PUPIL": "pupil",
    "EYEGAZE": "eyegaze",
    "SEEG": "seeg",
    "ECOG": "ecog",
    "DBS": "dbs",
}
"""Dictionary from channel types in channels.tsv to channel types in MNE. All other types in channels.tsv become
misc."""
METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
SYSTEMS = {"captrak": (0, 1, 2), "eeglab": (1, 0, 2)}
"""For each coordinate system, the three axes (as indices) that become x, y and z in MNE's head coordinates."""
MOST_FAULTS = 5
"""Largest number of notes about faults in one table."""
FARTHEST_M = 0.2
"""Largest plausible distance in metres between an electrode and the centre of the head."""
NAME = re.compile(r"(?P<entities>sub-[^_]+(?:_[A-Za-z]+-[^_]+)*)_(?P<suffix>[A-Za-z]+)(?P<extension>\..+)?")


@dataclass(frozen=True, kw_only=True)
class BIDSOptions:
    """Options for a BIDS dataset: which participants and which column of labels to use."""

    participants: dict[str, list[str]] = field(default_factory=dict)
    """Participants to use. Dictionary from columns of participants.tsv to lists of values, for example {group:
    [control]}. Participants with values that are not in the lists are excluded."""
    label_column: str = "label_name"
    """Column of events.tsv with the category of a trial. If the column is missing, the name of the image's folder is
    the category."""


class _Broken(ValueError):
    """Error: a sidecar file cannot be read."""


@register("bids")
class BIDSCorpus(Adapter):
    """Corpus of recordings in a BIDS dataset. If the key 'images' is set, each trial is paired with its image."""

    keys = KEYS - {"subject_pattern"} | TRIAL_KEYS
    options = BIDSOptions

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all raw recordings of the dataset; see `Adapter.items`."""
        options: BIDSOptions = self.read_options(config)
        root = check_folder(config.root, "corpora: root")
        images = check_folder(config.images, "corpora: images") if config.images else None
        folders = Folders()
        if "dataset_description.json" not in folders(root):
            raise RequestError(
                f"corpora: root '{root}': not a BIDS dataset, because dataset_description.json is missing; give the "
                "top folder of the dataset, or use kind: folder"
            )
        people = _participants(root, folders, options)
        described, participants = _describe_participants(root, folders)
        licence = _read_license(root)
        named = dataclasses.replace(config, name=config.name or root_name(root))
        found = find(dataclasses.replace(config, exclude=[*config.exclude, *(f"{name}/*" for name in NOT_RAW)]))[1]
        sidecars, finder = _Sidecars(root, folders), SubjectFinder(config, found)
        items = []
        for relative, recording in found:
            item = make_item(named, root, relative, recording, finder)
            parts = relative.split("/")
            about = {"license": licence} if licence else {}
            about |= described.get(parts[0], {}) | _read_device(sidecars, recording.path)
            item = dataclasses.replace(item, about=about | item.about)
            kind = parts[-2] if len(parts) > 2 else ""
            match = NAME.fullmatch(parts[-1])
            if item.reason or recording.problem:
                pass
            elif not parts[0].startswith("sub-") or match is None or match["suffix"] not in ("eeg", "ieeg"):
                named_so = Reason("not named as BIDS names EEG", "sub-X/[ses-X/]eeg/sub-X_..._eeg")
                item = dataclasses.replace(item, reason=named_so)
            elif kind != "eeg" and not (kind == "ieeg" and config.intracranial):
                lies = f"the recording is in the folder of {kind or 'another kind'}"
                item = dataclasses.replace(item, reason=Reason("no EEG", lies))
            elif why := _left_out(people, options, parts[0]):
                item = dataclasses.replace(item, reason=why)
            else:
                item = _described(item, sidecars, images, options.label_column)
                year, fault = _read_year(sidecars, recording.path)
                if year:
                    item = dataclasses.replace(item, about={"recording_year": year} | item.about)
                if more := [note for note in (participants.get(parts[0], participants.get("")), fault) if note]:
                    notes = [*item.info_patch.get("notes", []), *more]
                    item = dataclasses.replace(item, info_patch={**item.info_patch, "notes": notes})
            items.append(item)
        if images is not None:
            if not any(item.trials for item in items):
                raise RequestError(
                    f"corpora: root '{root}': no events.tsv names an image in the column 'stim_file' or 'image', so no "
                    "trial has an image; add the column, or remove the key 'images'"
                )
            check_images(items, images)
        return items


def _described(item: Item, sidecars: _Sidecars, images: AnyPath | None, label_column: str) -> Item:
    """Add the data of the sidecars to a recording. Invalid parts of a sidecar are not used; a note says so."""
    recording = item.recording
    try:
        patch = _patch(sidecars, recording.path)
        trials, reason = None, None
        table = sidecars.nearest(recording.path, "events", ".tsv")
        if table is not None:
            item = add_marks(item, table)
        if images is not None:
            faults = []
            if table is not None:
                trials = read_trials(table, images, label_column=label_column, faults=faults)
            if faults:
                patch["notes"] = [*patch.get("notes", []), *faults[:MOST_FAULTS]]
                item = dataclasses.replace(item, left_out={**item.left_out, "wrong row in events.tsv": len(faults)})
            reason = Reason("no events", "no events.tsv belongs to the recording") if table is None else None
    except (RequestError, OSError) as error:
        text = describe(error) if isinstance(error, OSError) else one_line(error)
        problem = Reason("sidecar broken", text)
        return dataclasses.replace(item, recording=dataclasses.replace(recording, problem=problem))
    if notes := [*item.info_patch.get("notes", []), *patch.get("notes", [])]:
        patch["notes"] = notes
    return dataclasses.replace(item, info_patch=item.info_patch | patch, trials=trials, reason=reason)


class _Sidecars:
    """Finds the sidecars of a recording according to the inheritance principle of BIDS.

    A sidecar applies to a recording if the recording is in the sidecar's folder or in a subfolder, and if the
    recording's name contains all entities (such as ``task-rest``) of the sidecar's name. If two sidecars set the same
    value, the value of the sidecar whose folder is nearer to the recording is used.
    """

    def __init__(self, root: AnyPath, folders: Folders) -> None:
        self.root, self.folders = root, folders
        self._parsed: dict[str, Any] = {}
        self._inherited: dict[str, list[tuple[set[str], str, str, AnyPath]]] = {}

    def _files(self, folder: AnyPath) -> list[tuple[set[str], str, str, AnyPath]]:
        key = str(folder)
        if key not in self._inherited:
            out = []
            for name, path in self.folders(folder).items():
                match = re.fullmatch(r"((?:[A-Za-z]+-[^_]+_)*)([A-Za-z]+)(\.tsv|\.json)", name)
                if match:
                    out.append((set(match[1].strip("_").split("_")) - {""}, match[2], match[3], path))
            self._inherited[key] = out
        return self._inherited[key]

    def all(self, recording: AnyPath, suffix: str, extension: str) -> list[AnyPath]:
        """Return all sidecars of a recording; the last sidecar is in the folder nearest to the recording."""
        match = NAME.fullmatch(recording.name)
        entities = set(match["entities"].split("_")) if match else set()
        out, folder = [], recording.parent
        while True:
            fitting = [
                (len(own), path)
                for own, word, ending, path in self._files(folder)
                # The entity ``space-...`` (the coordinate system of the positions) is not in the recording's name, so
                # ignore it.
                if word == suffix and ending == extension and {e for e in own if not e.startswith("space-")} <= entities
            ]
            out += [path for _, path in sorted(fitting, key=lambda pair: (-pair[0], pair[1].name))]
            if str(folder) == str(self.root) or folder == folder.parent:
                return out[::-1]
            folder = folder.parent

    def nearest(self, recording: AnyPath, suffix: str, extension: str) -> AnyPath | None:
        """Return the sidecar in the folder nearest to the recording; None if the recording has no such sidecar."""
        found = self.all(recording, suffix, extension)
        return found[-1] if found else None

    def json(self, path: AnyPath) -> dict[str, Any]:
        """Read a JSON file that contains an object (keys with values)."""
        key = str(path)
        if key not in self._parsed:
            try:
                value = json.loads(read_text(path))
            except (ValueError, RecursionError) as error:
                raise _Broken(f"{path.name}: not valid JSON ({one_line(error)[:100]})") from None
            if not isinstance(value, dict):
                raise _Broken(f"{path.name}: must be a JSON object (keys with values)")
            self._parsed[key] = value
        return self._parsed[key]

    def tsv(self, path: AnyPath, faults: list[str], *columns: str) -> list[dict[str, str]]:
        """Read the rows of a table, and check that the table has the given columns.

        A message about each invalid row is added to `faults`.
        """
        key = str(path)
        if key not in self._parsed:
            broken: list[str] = []
            self._parsed[key] = (_rows(path, broken), broken)
        rows, broken = self._parsed[key]
        faults += broken[:MOST_FAULTS]
        if rows and (missing := [name for name in columns if name not in rows[0]]):
            raise _Broken(f"{path.name}: no column '{missing[0]}'")
        return rows


def _rows(path: AnyPath, faults: list[str] | None = None) -> list[dict[str, str]]:
    """Read the rows of a table.

    With `faults`, invalid rows are left out, and a message about each of them is added to `faults`. Without `faults`,
    an invalid row raises an error.
    """
    try:
        rows = parse_table(read_text(path))
    except csv.Error as error:
        raise _Broken(f"{path.name}: {error}") from None
    whole = []
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            fault = f"{path.name}, line {number}: its number of columns differs from the first line"
            if faults is None:
                raise _Broken(fault)
            faults.append(f"{fault}; not used")
        else:
            whole.append({str(key): str(value).strip() for key, value in row.items()})
    return whole


def _patch(sidecars: _Sidecars, recording: AnyPath) -> dict[str, Any]:
    """Return the data about a recording from its sidecars, in the form that `patch_signal` takes as `patch`."""
    patch: dict[str, Any] = {}
    notes: list[str] = []
    about: dict[str, Any] = {}
    suffix = "ieeg" if recording.parent.name == "ieeg" else "eeg"
    for path in sidecars.all(recording, suffix, ".json"):
        try:
            about |= sidecars.json(path)
        except _Broken as error:
            notes.append(f"{error}; not used")
    line = about.get("PowerLineFrequency", "n/a")
    if line not in NOTHING:
        try:
            patch["line_freq"] = check_line_freq(line, "PowerLineFrequency")
        except ValueError as error:
            notes.append(f"{error}; not used")
    reference = about.get("EEGReference", about.get("iEEGReference", ""))
    if isinstance(reference, str) and reference.strip() not in NOTHING:
        patch["reference"] = reference.strip()
    if (path := sidecars.nearest(recording, "channels", ".tsv")) is not None:
        patch |= _channels(sidecars, path, notes)
    try:
        positions = _positions(sidecars, recording, notes)
    except _Broken as error:
        positions = {}
        notes.append(f"{error}; positions not used")
    if positions:
        patch["positions"] = positions
    if notes:
        patch["notes"] = notes
    return patch


def _channels(sidecars: _Sidecars, path: AnyPath, notes: list[str]) -> dict[str, Any]:
    """Return types, units and bad channels from channels.tsv. Faults of channels.tsv are added to `notes`."""
    try:
        rows = sidecars.tsv(path, notes, "name")
    except _Broken as error:
        notes.append(f"{error}; not used")
        return {}
    notes += [
        f"{path.name}: channel '{name}' is listed {count} times; the first line is used"
        for name, count in Counter(row["name"] for row in rows).items()
        if count > 1
    ]
    first = {row["name"]: row for row in reversed(rows)}
    rows = [row for row in rows if first[row["name"]] is row]
    if rows and (missing := [column for column in ("type", "units") if column not in rows[0]]):
        notes.append(f"{path.name}: no column {' and no column '.join(missing)}")
    return {
        "types": {
            row["name"]: TYPES.get(row["type"].upper(), "misc") for row in rows if row.get("type", "") not in NOTHING
        },
        "units": {row["name"]: row["units"] for row in rows if not names_no_unit(row.get("units", ""))},
        "bads": [row["name"] for row in rows if row.get("status", "").lower() == "bad"],
    }


def _positions(sidecars: _Sidecars, recording: AnyPath, notes: list[str]) -> dict[str, list[float]]:
    """Return electrode positions in metres in head coordinates.

    If positions cannot be used, the reason is added to `notes`.
    """
    table = sidecars.nearest(recording, "electrodes", ".tsv")
    if table is None:
        return {}
    frame = sidecars.nearest(recording, "coordsystem", ".json")
    if frame is None:
        notes.append("the positions in electrodes.tsv are not used, because there is no coordsystem.json")
        return {}
    about = sidecars.json(frame)
    system = str(about.get("EEGCoordinateSystem", about.get("iEEGCoordinateSystem", ""))).lower()
    unit = str(about.get("EEGCoordinateUnits", about.get("iEEGCoordinateUnits", "")))
    if system not in SYSTEMS or unit not in METRES:
        named = f"the coordinate system '{system or 'none'}' with the unit '{unit or 'none'}'"
        notes.append(f"positions are not used, because {named} cannot be read")
        return {}
    out: dict[str, list[float]] = {}
    for row in sidecars.tsv(table, notes, "name", "x", "y", "z"):
        if any(row[axis] in NOTHING for axis in "xyz"):
            continue
        try:
            own = [float(row[axis]) * METRES[unit] for axis in "xyz"]
        except ValueError:
            notes.append(f"{table.name}: the position of '{row['name']}' is not a number; not used")
            continue
        # In EEGLAB, x points to the nose and y to the left ear. In MNE, x points to the right ear and y to the nose.
        place = [own[axis] for axis in SYSTEMS[system]]
        place[0] *= -1 if system == "eeglab" else 1
        if not math.dist(place, (0, 0, 0)) <= FARTHEST_M:
            far = f"one position is more than {FARTHEST_M:g} m from the middle of the head"
            notes.append(f"the positions are not used, because {far}; check the unit '{unit}'")
            return {}
        out[row["name"]] = place
    return out


def _read_device(sidecars: _Sidecars, recording: AnyPath) -> dict[str, Any]:
    """Return device, filters and task from the JSON sidecars of a recording."""
    about: dict[str, Any] = {}
    for path in sidecars.all(recording, "ieeg" if recording.parent.name == "ieeg" else "eeg", ".json"):
        with contextlib.suppress(_Broken, OSError):  # `_patch` reads the same file and adds a note if it is invalid.
            about |= sidecars.json(path)

    def text(key: str) -> str:
        value = about.get(key)
        return one_line(value)[:80] if isinstance(value, str) and value.strip() not in NOTHING else ""

    def filters(key: str) -> str:
        value = about.get(key)
        if not isinstance(value, dict):
            return text(key)
        parts = []
        for name, settings in value.items():
            values = settings.values() if isinstance(settings, dict) else [settings]
            parts.append(f"{name}: {', '.join(str(entry) for entry in values)}")
        return one_line("; ".join(parts))[:160]

    device = " ".join(filter(None, (text("Manufacturer"), text("ManufacturersModelName"))))
    found = {"device": device, "device_filters": filters("HardwareFilters"), "task": text("TaskName")}
    return {name: value for name, value in found.items() if value}


def _read_year(sidecars: _Sidecars, recording: AnyPath) -> tuple[int | None, str]:
    """Return the year of a recording in the column acq_time of scans.tsv, and a note if the table cannot be used.

    The note never contains the time, because the day and the month of a recording are private.
    """
    table = sidecars.nearest(recording, "scans", ".tsv")
    if table is None:
        return None, ""
    try:
        rows = sidecars.tsv(table, [], "filename")
    except (_Broken, OSError) as error:
        return None, f"{table.name} not used: {describe(error) if isinstance(error, OSError) else one_line(error)}"
    own = relative_path(recording, table.parent).rsplit(".", 1)[0]
    times = [row.get("acq_time", "") for row in rows if row["filename"].removeprefix("./").rsplit(".", 1)[0] == own]
    if not times or times[0] in NOTHING:
        return None, ""
    try:
        return year_of(times[0]), ""
    except ValueError:
        return None, f"{table.name}: the acq_time of the recording is not a date as BIDS writes it; not used"


def _read_license(root: AnyPath) -> str:
    """Return the licence in dataset_description.json; an empty text if the file does not contain a licence."""
    try:
        value = json.loads(read_text(root / "dataset_description.json")).get("License")
    except (ValueError, AttributeError, RecursionError, OSError):
        return ""
    return one_line(value)[:80] if isinstance(value, str) and value.strip() not in NOTHING else ""


def _describe_participants(root: AnyPath, folders: Folders) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the data about each subject in participants.tsv, and notes for subjects with an invalid value.

    If participants.tsv cannot be read at all, the note has the key "" and is added to every recording.
    """
    path = folders(root).get("participants.tsv")
    if path is None:
        return {}, {}
    try:
        rows = _rows(path)
        unit = _age_unit(root, folders)
    except (_Broken, OSError) as error:
        return {}, {"": f"participants.tsv not used: {one_line(error)}"}
    out, notes = {}, {}
    for row in rows:
        values = {key.casefold(): value for key, value in row.items()}
        name = row.get("participant_id", "")
        about, faults = describe_person(values)
        if unit is None:
            about.pop("age", None)
        elif "age" in about:
            about["age"] = round(about["age"] * unit, 2)
        out[name] = about
        if faults:
            notes[name] = f"participants.tsv: {'; '.join(faults)}; left out"
    return out, notes


def _age_unit(root: AnyPath, folders: Folders) -> float | None:
    """Return the factor that converts ages in participants.tsv to years; None if the unit of the ages is unknown."""
    path = folders(root).get("participants.json")
    if path is None:
        return 1.0
    try:
        column = json.loads(read_text(path)).get("age", {})
    except (ValueError, AttributeError, RecursionError):
        return 1.0
    unit = str(column.get("Units", "")) if isinstance(column, dict) else ""
    word = unit.strip().casefold()
    years = {"": 1.0, "y": 1.0, "year": 1.0, "month": 1 / 12, "mo": 1 / 12, "week": 7 / 365.25, "day": 1 / 365.25}
    return years.get(word.removesuffix("s"), 1.0 if "year" in word else None)


def _participants(root: AnyPath, folders: Folders, options: BIDSOptions) -> dict[str, Mapping[str, str]]:
    """Return the row of each subject in participants.tsv; empty if the option 'participants' is not set."""
    if not options.participants:
        return {}
    path = folders(root).get("participants.tsv")
    if path is None:
        raise RequestError(
            f"corpora: root '{root}': participants.tsv is missing; add this table, or remove the option 'participants'"
        )
    try:
        rows = _rows(path)
    except (_Broken, OSError) as error:
        raise RequestError(f"{path}: cannot be read ({one_line(error)})") from None
    for column, wanted in options.participants.items():
        there = sorted({row.get(column, "") for row in rows})
        if not rows or column not in rows[0]:
            raise RequestError(f"{path}: the column '{column}' is missing; correct the option 'participants'")
        for value in wanted:
            if value not in there:
                raise RequestError(
                    f"{path}: no participant has '{value}' in the column '{column}'; correct the option "
                    f"'participants'; the column has, for example, {', '.join(there[:8])}"
                )
    return {row.get("participant_id", ""): row for row in rows}


def _left_out(people: dict[str, Mapping[str, str]], options: BIDSOptions, subject: str) -> Reason | None:
    for column, wanted in options.participants.items():
        value = people.get(subject, {}).get(column)
        if value not in wanted:
            return Reason("participants.tsv", f"{column} is {value or 'not given'} (option 'participants')")
    return None
