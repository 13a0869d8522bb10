"""Reads a folder of recordings in any layout, in the file formats of EEG manufacturers."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, describe
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.item import Item
from data_sharding.corpora.paths import (
    Folders,
    check_folder,
    find_events_file,
    read_marks,
    recording_key,
    relative_path,
    root_name,
)
from data_sharding.corpora.subjects import SubjectFinder
from data_sharding.formats.sniffing import Recording, find_recordings

NAME_IN_PATH = "the path contains the name or number of the patient in the header; rename the file to hide it"
"""Note for the ledger about a path with the name of the patient. Everybody who reads the ledger or the report can see
the path."""
INTRACRANIAL = re.compile(r"(?:^|[_\W])(ecog|ieeg|seeg)(?:$|[_\W])", re.IGNORECASE)
KEYS = frozenset({"exclude", "unit_factors", "subject_pattern", "subjects", "salt_variable", "intracranial"})
"""Config keys for corpora whose recordings are in the file formats of EEG manufacturers."""
TRIAL_KEYS = frozenset({"images", "tmin", "tmax", "stimulus_delay_ms"})
"""Config keys that are valid for corpora with trials."""


def trial_values(config: CorpusConfig) -> dict[str, Any]:
    """Return the fields of `Item` that say which part of each trial is stored."""
    return {"tmin": config.tmin, "tmax": config.tmax, "stimulus_delay_ms": config.stimulus_delay_ms}


def is_excluded(config: CorpusConfig, relative: str) -> bool:
    """Return whether the config excludes a path.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    relative : str
        Path relative to the root of the corpus.

    Returns
    -------
    bool
        True if the path matches a pattern in the key 'exclude'.
    """
    return any(fnmatch.fnmatch(relative, pattern) for pattern in config.exclude)


def make_item(
    config: CorpusConfig, root: AnyPath, relative: str, recording: Recording, people: SubjectFinder, **more: Any
) -> Item:
    """Make the `Item` of a recording from its path and the config.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    root : Path or UPath
        Root folder of the corpus.
    relative : str
        Path of the recording, relative to the root folder.
    recording : Recording
        Files of the recording.
    people : SubjectFinder
        Object that finds the subject of the recording.
    **more : Any
        Further fields of `Item`.

    Returns
    -------
    Item
        The recording, with all information from its path and the config.
    """
    name = config.name or (relative.split("/")[0] if "/" in relative else root_name(root))
    key = recording_key(name, relative)
    who = people(relative, key)
    for pattern, factor in config.unit_factors.items():
        if fnmatch.fnmatch(relative, pattern):
            more["unit_factor"] = factor
    named_inside = INTRACRANIAL.search(relative)
    if config.intracranial:
        patch: dict[str, Any] = {"intracranial": True}
        if named_inside:
            patch["inside"] = "ecog" if named_inside[1].lower() == "ecog" else "seeg"
        more["info_patch"] = patch | more.get("info_patch", {})
    elif named_inside:
        text = "the path names intracranial EEG, and only scalp EEG is used; set the key 'intracranial' to change this"
        more["reason"] = Reason("intracranial", text)
    task = re.search(r"(?:^|[/_])task-([A-Za-z0-9]+)", relative)
    if people.shows_name(relative):
        given = more.get("info_patch", {})
        more["info_patch"] = {**given, "notes": [*given.get("notes", []), NAME_IN_PATH]}
    about = who.about | ({"task": task.group(1)} if task else {}) | more.pop("about", {})
    values: dict[str, Any] = {
        "corpus": name,
        "subject": who.subject,
        "session": who.session,
        "subject_from": who.source,
        "about": about,
    }
    return Item(
        key=key,
        path=relative,
        recording=recording,
        line_freq=config.line_freq,
        **(values | trial_values(config) | more),
    )


def check_unit_factors(config: CorpusConfig, paths: list[str]) -> None:
    """Raise an error if a pattern in the key 'unit_factors' matches no recording.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    paths : list of str
        Paths of all recordings, relative to the root of the corpus.

    Raises
    ------
    RequestError
        If a pattern matches no recording. The message names the pattern.
    """
    for pattern in config.unit_factors:
        if not any(fnmatch.fnmatch(path, pattern) for path in paths):
            raise RequestError(
                f"corpora: the pattern '{pattern}' of the key 'unit_factors' matches no recording under {config.root}; "
                "correct or remove the pattern"
            )


def find(config: CorpusConfig) -> tuple[AnyPath, list[tuple[str, Recording]]]:
    """Find the recordings of a corpus by the content of their files.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.

    Returns
    -------
    root : Path or UPath
        Root folder of the corpus.
    found : list of (str, Recording)
        For each recording, a pair of its path relative to the root folder and the recording itself; sorted by path.

    Raises
    ------
    RequestError
        If the folder does not exist or contains no recording.
    """
    root = check_folder(config.root, "corpora: root")
    found = [(relative_path(recording.path, root), recording) for recording in find_recordings(root)]
    found = [(relative, recording) for relative, recording in found if not is_excluded(config, relative)]
    if not found:
        raise RequestError(f"corpora: root '{root}': no recording found there; check the path and the key 'exclude'")
    check_unit_factors(config, [relative for relative, _ in found])
    return root, found


def add_marks(item: Item, table: AnyPath | None) -> Item:
    """Add the interruptions and bad spans of a table of events to a recording.

    Parameters
    ----------
    item : Item
        The recording.
    table : Path, UPath or None
        Events table ``<stem>_events.tsv`` of the recording; None if the recording has no events table.

    Returns
    -------
    Item
        The recording. If the table cannot be read, a note for the ledger is added.
    """
    if table is None or item.recording.problem:
        return item
    try:
        marks, notes = read_marks(table)
    except OSError as error:
        marks, notes = [], [f"{table.name} is not used: {describe(error)}"]
    if not marks and not notes:
        return item
    patch = {**item.info_patch, "notes": [*item.info_patch.get("notes", []), *notes]}
    return dataclasses.replace(item, info_patch=patch | ({"marks": marks} if marks else {}))


@register("folder")
class FolderCorpus(Adapter):
    """Corpus of continuous recordings, which are cut into windows."""

    keys = KEYS

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings below the root folder; see `Adapter.items`."""
        root, found = find(config)
        people, folders = SubjectFinder(config, found), Folders()
        items = [make_item(config, root, relative, recording, people) for relative, recording in found]
        return [add_marks(item, find_events_file(item.recording.path, folders)) for item in items]
