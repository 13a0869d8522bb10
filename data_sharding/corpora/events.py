"""Reads corpora in which each recording has a table of the images that were shown."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, describe
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.folder import KEYS, TRIAL_KEYS, add_marks, find, make_item
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import (
    NOTHING,
    Folders,
    check_folder,
    check_images,
    find_events_file,
    parse_table,
    read_text,
)
from data_sharding.corpora.subjects import SubjectFinder
from data_sharding.dataset.splits import SPLITS

IMAGE_COLUMNS = ("image", "stim_file")
"""Names of the column with the image: ``image`` is the name in Dreamscale, and ``stim_file`` the name in BIDS."""


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
        If `faults` is given, rows with a wrong value are left out, and this function adds a message about each left-out
        row to `faults`.

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
        rows = parse_table(read_text(table))
    except OSError as error:
        raise RequestError(f"{table}: cannot be read ({describe(error)})") from None
    except csv.Error as error:
        raise RequestError(f"{table}: cannot be read ({error})") from None
    if not rows:
        return ()
    if "onset" not in rows[0] or not any(name in rows[0] for name in IMAGE_COLUMNS):
        missing = "onset" if "onset" not in rows[0] else "image"
        raise RequestError(
            f"{table}: the column '{missing}' is missing; the table needs at least the columns 'onset' and 'image', "
            "separated by tabs"
        )
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
    """Make trials from the rows of a table that contains the onset and the image of each trial.

    Parameters
    ----------
    rows : sequence of mapping
        Table rows with the same columns as in `read_trials`.
    images : Path, UPath or None
        Folder of the images. None if the corpus has no images; every row with a label is then a trial.
    where : str
        Name of the table, for error messages.
    first_line : int
        Line number of the first row, for error messages.
    label_column : str
        Name of the column with the category.
    faults : list of str, optional
        If `faults` is given, rows with a wrong value are left out, and this function adds a message about each left-out
        row to `faults`.

    Returns
    -------
    tuple of Trial
        Trials in the order of the rows.

    Raises
    ------
    RequestError
        If a row contains a wrong value, and `faults` is not given. The message contains the line number of the row.
    """
    trials = []
    for number, row in enumerate(rows, start=first_line):

        def given(key: str, row: Mapping[str, Any] = row) -> str:
            value = str(row.get(key) if row.get(key) is not None else "").strip()
            return "" if value in NOTHING else value

        image = next((given(name) for name in IMAGE_COLUMNS if given(name)), "") if images is not None else ""
        if not image and (images is not None or not given(label_column)):
            continue  # The row is an event without an image, such as a key press, so it is not a trial.
        try:
            onset = float(given("onset"))
        except ValueError:
            onset = math.nan
        fault = ""
        if not math.isfinite(onset):
            fault = f"the onset '{row.get('onset')}' is not a number of seconds"
        elif given("split") not in (*SPLITS, ""):
            fault = f"the split '{given('split')}' must be one of {', '.join(SPLITS)}"
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
    return tuple(dataclasses.replace(trial, place=(i, len(trials))) for i, trial in enumerate(trials))


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
                    reason = Reason("no events", f"{recording.path.stem}_events.tsv is not in the recording's folder")
                    item = dataclasses.replace(item, reason=item.reason or reason)
                else:
                    tables += 1
                    item = dataclasses.replace(add_marks(item, table), trials=read_trials(table, images))
            items.append(item)
        if not any(item.trials for item in items):
            what = (
                "the events tables name no image; fill in their column 'image'"
                if tables
                else "no recording has an events table; write RECORDING_events.tsv next to each recording"
            )
            raise RequestError(f"corpora: root '{root}': {what}")
        check_images(items, images)
        return items
