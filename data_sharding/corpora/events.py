"""Reads corpora in which each recording has a table of the images that were shown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, describe
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.folder import KEYS, TRIAL_KEYS, find, make_item
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import Folders, check_folder, check_images, read_text
from data_sharding.corpora.subjects import SubjectFinder
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.marks.interruptions import find_row

IMAGE_COLUMNS = ("image", "stim_file")
"""Names of the column with the image: ``image`` in this project, ``stim_file`` in BIDS."""
NOTHING = ("", "n/a")
"""Texts in a table cell that mean "no value" in BIDS."""
MARK_COLUMNS = ("trial_type", "value", "event_type", "type", "description")
"""Columns of an events table that may name a mark."""


def find_events_file(recording: AnyPath, folders: Folders) -> AnyPath | None:
    """Find the table of events beside a recording.

    Parameters
    ----------
    recording : Path or UPath
        The recording.
    folders : Folders
        Object that lists folders, with a cache.

    Returns
    -------
    Path, UPath or None
        Path of ``<stem>_events.tsv`` in the folder of the recording; None if there is no such file. The stem is the
        name of the recording, with or without its ending ``_eeg`` or ``_raw``.
    """
    stem = re.sub(r"\.fif$", "", recording.stem)
    near = folders(recording.parent)
    for name in (stem, re.sub(r"_(eeg|raw)$", "", stem)):
        if f"{name}_events.tsv" in near:
            return near[f"{name}_events.tsv"]
    return None


def read_marks(table: AnyPath) -> tuple[list[tuple[float, float, str]], list[str]]:
    """Read the interruptions and bad spans in a table of events.

    Parameters
    ----------
    table : Path or UPath
        Tab-separated table with the columns onset and duration (seconds), and at least one of `MARK_COLUMNS`.

    Returns
    -------
    marks : list of (float, float, str)
        Onset and duration in seconds, and text, of each row that the table of interruptions knows.
    notes : list of str
        Notes for the ledger about marks without a usable onset.
    """
    marks, notes = [], []
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter="\t"))
    except csv.Error as error:
        return [], [f"{table.name}: {error}; its marks are not used"]
    for number, row in enumerate(rows, start=2):
        words = [str(row.get(column) or "").strip() for column in MARK_COLUMNS]
        text = next((word for word in words if word not in NOTHING and find_row("bids", word)), "")
        if not text:
            continue
        onset, duration = _seconds(row.get("onset")), _seconds(row.get("duration"))
        if onset is None:
            notes.append(f"{table.name}, line {number}: '{text}' has no onset; not used")
        else:
            marks.append((onset, duration or 0.0, text))
    return marks, notes[:5]


def _seconds(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_trials(
    table: AnyPath, images: AnyPath, *, label_column: str = "label_name", faults: list[str] | None = None
) -> tuple[Trial, ...]:
    """Read the trials of an events table.

    Parameters
    ----------
    table : Path or UPath
        Tab-separated table with the columns onset (seconds) and image or stim_file (relative to `images`). The
        columns label_name, caption, image_id, split, block and concept are optional.
    images : Path or UPath
        Folder of the images.
    label_column : str
        Name of the column with the category.
    faults : list of str, optional
        If given, rows with a wrong value are left out, and this function adds a message for each of them.

    Returns
    -------
    tuple of Trial
        Trials in the order of the table. Rows without an image are other events, so they are skipped.

    Raises
    ------
    RequestError
        If the table cannot be read, or contains a wrong value.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter="\t"))
    except OSError as error:
        raise RequestError(f"{table}: cannot be read ({describe(error)})") from None
    except csv.Error as error:
        raise RequestError(f"{table}: cannot be read ({error})") from None
    if not rows:
        return ()
    if "onset" not in rows[0] or not any(name in rows[0] for name in IMAGE_COLUMNS):
        missing = "onset" if "onset" not in rows[0] else "image"
        raise RequestError(f"{table}: no column '{missing}'; it needs at least onset and image, tab-separated")
    return make_trials(rows, images, str(table), first_line=2, label_column=label_column, faults=faults)


def make_trials(
    rows: Sequence[Mapping[str, Any]],
    images: AnyPath | None,
    where: str,
    *,
    first_line: int,
    label_column: str = "label_name",
    faults: list[str] | None = None,
) -> tuple[Trial, ...]:
    """Make trials from table rows with the onset and the image of each trial.

    Parameters
    ----------
    rows : sequence of mapping
        Table rows with the same columns as in `read_trials`.
    images : Path, UPath or None
        Folder of the images. If None, the corpus has no images, and every row with a label is a trial.
    where : str
        Name of the table, for error messages.
    first_line : int
        Line number of the first row, for error messages.
    label_column : str
        Name of the column with the category.
    faults : list of str, optional
        If given, rows with a wrong value are left out, and this function adds a message for each of them.

    Returns
    -------
    tuple of Trial
        Trials in the order of the rows.

    Raises
    ------
    RequestError
        If a row contains a wrong value, and `faults` is not given. The message names the line of the row.
    """
    trials = []
    for number, row in enumerate(rows, start=first_line):

        def given(key: str, row: Mapping[str, Any] = row) -> str:
            value = str(row.get(key) if row.get(key) is not None else "").strip()
            return "" if value in NOTHING else value

        image = next((given(name) for name in IMAGE_COLUMNS if given(name)), "") if images is not None else ""
        if not image and (images is not None or not given(label_column)):
            continue  # the row is a response or another event, not a trial
        try:
            onset = float(given("onset"))
        except ValueError:
            onset = math.nan
        fault = ""
        if not math.isfinite(onset):
            fault = f"onset '{row.get('onset')}' is not a number of seconds"
        elif given("split") not in (*SPLITS, ""):
            fault = f"split '{given('split')}' must be one of {', '.join(SPLITS)}"
        if fault:
            if faults is None:
                raise RequestError(f"{where}, line {number}: {fault}")
            faults.append(f"{PurePosixPath(where).name}, line {number}: {fault}; not used")
            continue
        label = given(label_column) or (PurePosixPath(image).parent.name or "image")
        name = PurePosixPath(image).with_suffix("").as_posix() if image else ""
        trials.append(
            Trial(
                onset=onset,
                image=str(images / image) if images is not None else "",
                image_id=(given("image_id") or name) if image else "",
                label_name=label,
                caption=given("caption") or label,
                split=given("split"),
                block=given("block"),
                concept=given("concept") or label,
            )
        )
    return tuple(trials)


@register("events")
class EventsCorpus(Adapter):
    """Corpus of EEG that was recorded while images were shown. Every trial becomes a sample."""

    keys = KEYS | TRIAL_KEYS
    needs_images = True

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings below the root folder, with the trials in their tables; see `Adapter.items`."""
        images = check_folder(config.images, "corpora: images")
        root, found = find(config)
        people = SubjectFinder(config, found)
        folders, items, tables = Folders(), [], 0
        for relative, recording in found:
            item = make_item(config, root, relative, recording, people)
            if recording.problem is None:
                table = find_events_file(recording.path, folders)
                if table is None:
                    reason = Reason("no events", f"{recording.path.stem}_events.tsv is not beside it")
                    item = dataclasses.replace(item, reason=item.reason or reason)
                else:
                    tables += 1
                    marks, faults = read_marks(table)
                    patch = {"marks": marks, "notes": faults} if marks or faults else {}
                    item = dataclasses.replace(item, trials=read_trials(table, images), info_patch=patch)
            items.append(item)
        if not any(item.trials for item in items):
            what = "no <recording>_events.tsv beside any recording" if not tables else "the events tables name no image"
            raise RequestError(f"corpora: root '{root}': no paired trials; {what}")
        check_images(items, images)
        return items
