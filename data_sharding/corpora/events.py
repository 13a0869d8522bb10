"""Recordings with a table of the images shown beside each."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import PurePosixPath
from typing import Any

from data_sharding.corpora.base import (
    Adapter,
    CorpusConfig,
    Folders,
    Item,
    Trial,
    check_images,
    folder_of,
    read_text,
    register,
)
from data_sharding.corpora.folder import KEYS, find, item_of
from data_sharding.errors import RequestError
from data_sharding.splits import SPLITS
from data_sharding.storage import AnyPath, describe

IMAGE_COLUMNS = ("image", "stim_file")
"""Columns that name an image: ours, and BIDS's."""
NOTHING = ("", "n/a")
"""What BIDS writes where there is nothing."""


def events_file(recording: AnyPath, folders: Folders) -> AnyPath | None:
    """Table of the images shown during a recording.

    Parameters
    ----------
    recording : Path or UPath
        The recording.
    folders : Folders
        What lies where.

    Returns
    -------
    Path, UPath or None
        ``<stem>_events.tsv`` beside it, where BIDS's suffix ``_eeg`` and MNE's ``_raw`` do not count to the stem.
    """
    stem = re.sub(r"\.fif$", "", recording.stem)
    near = folders(recording.parent)
    for name in (stem, re.sub(r"_(eeg|raw)$", "", stem)):
        if f"{name}_events.tsv" in near:
            return near[f"{name}_events.tsv"]
    return None


def read_trials(table: AnyPath, images: AnyPath, *, label_column: str = "label_name") -> tuple[Trial, ...]:
    """Trials of an events table.

    Parameters
    ----------
    table : Path or UPath
        Tab-separated: onset in seconds, and image or stim_file, relative to `images`. Read if there: label_name,
        caption, image_id, split, block, concept.
    images : Path or UPath
        Folder of the images.
    label_column : str
        Column of the category.

    Returns
    -------
    tuple of Trial
        In the table's order; rows that name no image are other events, and passed over.

    Raises
    ------
    RequestError
        If the table cannot be read, naming the line.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter="\t"))
    except OSError as error:
        raise RequestError(f"{table}: cannot be read ({describe(error)})") from None
    except csv.Error as error:
        raise RequestError(f"{table}: cannot be read ({error})") from None
    if not rows:
        return ()
    column = next((name for name in IMAGE_COLUMNS if name in rows[0]), None)
    if column is None or "onset" not in rows[0]:
        missing = "image" if column is None else "onset"
        raise RequestError(f"{table}: no column '{missing}'; it needs at least onset and image, tab-separated")
    trials = []
    for number, row in enumerate(rows, start=2):
        image = (row[column] or "").strip()
        if image in NOTHING:
            continue  # tables hold responses and other events, too

        def given(key: str, row: dict[str, Any] = row) -> str:
            value = (row.get(key) or "").strip()
            return "" if value in NOTHING else value

        try:
            onset = float(row["onset"])
        except (TypeError, ValueError):
            onset = math.nan
        if not math.isfinite(onset):
            raise RequestError(f"{table}, line {number}: onset '{row['onset']}' is no number of seconds")
        if given("split") not in (*SPLITS, ""):
            raise RequestError(f"{table}, line {number}: split '{given('split')}' is none of {', '.join(SPLITS)}")
        label = given(label_column) or (PurePosixPath(image).parent.name or "image")
        trials.append(
            Trial(
                onset=onset,
                image=str(images / image),
                image_id=given("image_id") or PurePosixPath(image).with_suffix("").as_posix(),
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
    """EEG recorded while images were shown: one sample a trial."""

    keys = KEYS | {"images", "trial_offset"}
    needs_images = True

    def items(self, config: CorpusConfig) -> list[Item]:
        """All recordings under the root, with their tables; see `Adapter.items`."""
        images = folder_of(config.images, "corpora: images")
        root, found = find(config)
        folders, items, tables = Folders(), [], 0
        for relative, recording in found:
            item = item_of(config, root, relative, recording)
            if recording.problem is None:
                table = events_file(recording.path, folders)
                if table is None:
                    reason = f"no events: {recording.path.stem}_events.tsv is not beside it"
                    item = dataclasses.replace(item, reason=item.reason or reason)
                else:
                    tables += 1
                    item = dataclasses.replace(item, trials=read_trials(table, images))
            items.append(item)
        if not any(item.trials for item in items):
            what = "no <recording>_events.tsv beside any recording" if not tables else "the events tables name no image"
            raise RequestError(f"corpora: root '{root}': no paired trials; {what}")
        check_images(items, images)
        return items
