"""The task of a worker for one recording, and the result that the worker returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.corpora import Item
from data_sharding.dataset.ledger import LedgerRow, Status
from data_sharding.dataset.splits import SplitConfig
from data_sharding.processing.preprocess import PreprocessSpec

WITHOUT_EFFECT = ("subject_from", "about")
"""Fields of `Item` that only describe the recording in the ledger, and do not change the stored samples."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """All data that a worker needs to process one recording."""

    item: Item
    """The recording to process."""
    spec: PreprocessSpec
    """Settings of the preprocessing."""
    split: SplitConfig
    """Which subjects and images are held out."""
    labels: tuple[str, ...]
    """Names of the labels of all corpora; the number of a label is its index in this tuple."""
    work: AnyPath
    """The job's working folder. Its folder ``parts`` contains the windows of each recording."""
    timeout_s: float
    """Time limit of the task in seconds."""
    decoded: Path | None = None
    """Folder of the kept signals (key ``keep_decoded``); None if signals are not kept."""


@dataclass(kw_only=True)
class PartResult:
    """The result that a worker returns for one recording."""

    row: LedgerRow
    """The recording's row in the ledger."""
    part: str = ""
    """Name of the folder with the recording's windows and fingerprint; empty if the recording could not be opened."""
    samples: dict[str, int] = field(default_factory=dict)
    """Number of samples of the recording in each split."""
    signature: list[int] = field(default_factory=list)
    """Numbers that were computed from the signal. For two copies of a signal, some of these numbers are equal (see
    `data_sharding.audit.duplicates.signature`)."""
    may_pass: bool = False
    """Whether the next run should try the recording again, because the cause of the failure may have disappeared."""
    limits: tuple[float, float] | None = None
    """Limits of time (seconds) and memory (GB) under which the recording failed before a part was written; otherwise
    None. A job with other limits tries the recording again."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as a dictionary of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PartResult:
        """Build a result from the values that `to_json` returned."""
        limits = values["limits"]
        return cls(**{**values, "row": LedgerRow(**values["row"]), "limits": tuple(limits) if limits else None})


class SetAside(Exception):
    """A recording cannot be used.

    Parameters
    ----------
    status : str
        quarantined or excluded.
    reason : Reason
        Why the recording cannot be used.
    hint : str
        What the user of ``dreamscale shard`` can do. The ledger shows the hint in brackets after the reason.
    """

    def __init__(self, status: Status, reason: Reason, hint: str = "") -> None:
        super().__init__(status, reason, hint)
        self.status: Status = status
        self.reason, self.hint = reason, hint

    @property
    def full_reason(self) -> Reason:
        """The reason, followed by the hint in brackets if there is a hint."""
        return Reason(self.reason.category, text=f"{self.reason} ({self.hint})") if self.hint else self.reason


def describe_row(row: LedgerRow, item: Item) -> None:
    """Replace what a file's header says about person, device and licence in a ledger row by what the corpus says.

    If the header gives the year of the recording, the year in the tables of the corpus does not replace it, because a
    corpus may shift its dates to hide the true ones.
    """
    row.subject_from = new_row(item).subject_from
    for name, value in item.about.items():
        if name != "recording_year" or row.recording_year is None:
            setattr(row, name, value)


def new_row(item: Item, status: Status = "quarantined", reason: Reason | None = None) -> LedgerRow:
    """Make the ledger row of a recording that has not been opened yet.

    Parameters
    ----------
    item : Item
        The recording.
    status : str
        Status of the recording in the ledger.
    reason : Reason, optional
        Why the recording is not in the shards.
    """
    row = LedgerRow(
        key=item.key,
        corpus=item.corpus,
        path=item.path,
        # The ledger can only store UTF-8, so invalid bytes in a file name are replaced by escape sequences.
        files=[f.name.encode("utf-8", "backslashreplace").decode() for f in item.recording.files],
        format=item.recording.format,
        reader=item.recording.format,
        subject=item.subject,
        session=item.session,
        subject_from=item.subject_from or ("unknown" if item.subject == item.key else "corpus"),
        status=status,
    )
    if reason is not None:
        row.set_reason(status, reason)
    return row
