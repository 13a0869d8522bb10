"""Record each use of a test split in a log, so that a reader of a result knows how often the test data were used.

If many models are tested on the same data, and only the best result is published, the result is too good. The log
``openings.jsonl`` is in the folder of the dataset. If the folder of the dataset cannot be written, the log is in a
folder that the command chooses: the folder of its result, or the folder above.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.common.untrusted import check_group, check_text, parse_json, read_limited

NAME = "openings.jsonl"
"""Name of the log. Each line is the JSON object of one opening."""
GUARDED = ("test",)
"""Splits whose openings are recorded."""
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
"""How the log is opened. A symbolic link is not followed, and the command does not wait for a named pipe."""
_KEYS = ("time", "command", "split", "dataset_id", "model_digest", "config_digest")


@dataclass(frozen=True, kw_only=True)
class Openings:
    """How often a split was opened (used to test a model), according to the log."""

    openings: int
    """How often the split was opened."""
    models: int
    """Number of different models for which the split was opened."""
    log: str
    """Path of the log."""

    def describe(self, split: str) -> str:
        """Say in one sentence how often the split was opened."""
        times = "once" if self.openings == 1 else f"{self.openings} times"
        models = "1 model" if self.models == 1 else f"{self.models} different models"
        return f"The {split} split was opened {times} so far, for {models} ({self.log})."


def record_opening(
    dataset: str | AnyPath,
    split: str,
    *,
    command: str,
    dataset_id: str,
    model_digest: str,
    config: Mapping[str, Any],
    fallback: str | Path,
) -> Openings | None:
    """Add one opening of a split to the log, and count all openings.

    Parameters
    ----------
    dataset : str, Path or UPath
        Folder of the dataset.
    split : str
        Name of the split. Only the splits in `GUARDED` are recorded.
    command : str
        Name of the command that opens the split.
    dataset_id : str
        Id of the version of the dataset.
    model_digest : str
        SHA-256 of the model; empty if the command uses no model.
    config : mapping
        Config of the command. The log of openings holds only a digest of the config, because a config names folders of
        the user.
    fallback : str or Path
        Existing folder in which the log is written if the folder of the dataset is read-only.

    Returns
    -------
    Openings or None
        The number of openings, including this opening; None if the split is not guarded.

    Raises
    ------
    RequestError
        If neither the dataset nor the fallback can be written, or if the log is damaged.
    """
    if split not in GUARDED:
        return None
    line = json.dumps(
        dict(
            zip(
                _KEYS,
                (
                    datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    command,
                    split,
                    dataset_id,
                    model_digest,
                    digest_of(dict(config)),
                ),
                strict=True,
            )
        )
    )
    place = as_path(dataset)
    folders = [place, Path(fallback)] if isinstance(place, Path) else [Path(fallback)]
    for folder in folders:
        try:
            # Write the line with one call in append mode, so that the lines of two commands do not mix.
            descriptor = os.open(folder / NAME, FLAGS, 0o644)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            failed = error
            continue
        found = count_openings(folder / NAME, split)
        assert found is not None
        return found
    raise RequestError(
        f"{folders[-1] / NAME}: cannot record that the {split} split is opened ({failed.strerror}); make the folder "
        "writable"
    )


def count_openings(log: Path, split: str) -> Openings | None:
    """Count how often commands opened a split to evaluate a model on its samples, according to a log.

    Parameters
    ----------
    log : Path
        The log file, with one line for each opening.
    split : str
        Name of the split.

    Returns
    -------
    Openings or None
        The number of openings; None if there is no log.

    Raises
    ------
    RequestError
        If a line of the log is not a valid entry.
    """
    if not log.is_file():
        return None
    entries = []
    for number, line in enumerate(read_limited(log).splitlines(), start=1):
        try:
            entry = check_group(parse_json(line), str(log), f"line {number}")
        except ValueError:
            raise RequestError(f"{log}: line {number} is not JSON; repair the line, or move the log away") from None
        for key in _KEYS:
            check_text(entry.get(key), str(log), f"{key} of line {number}")
        entries.append(entry)
    of_split = [entry for entry in entries if entry["split"] == split]
    models = {entry["model_digest"] for entry in of_split if entry["model_digest"]}
    return Openings(openings=len(of_split), models=len(models), log=str(log))
