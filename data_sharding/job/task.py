"""What a worker gets for one recording, and what it returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.corpora import Item
from data_sharding.dataset.ledger import LedgerRow, Status
from data_sharding.dataset.splits import SplitConfig
from data_sharding.processing.preprocess import PreprocessSpec


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker needs for one recording."""

    item: Item
    """The recording."""
    spec: PreprocessSpec
    """How its signal is processed."""
    split: SplitConfig
    """Which subjects and images are held out."""
    labels: tuple[str, ...]
    """Names of the labels over all corpora; a label's number is its place here."""
    work: AnyPath
    """Folder of the parts."""
    timeout_s: float
    """Seconds that the task may take."""


@dataclass(kw_only=True)
class PartResult:
    """What a worker returns for one recording."""

    row: LedgerRow
    """The recording's row in the ledger."""
    part: str = ""
    """Name of the folder with its windows and fingerprint; empty if the recording could not be opened."""
    samples: dict[str, int] = field(default_factory=dict)
    """Number of samples in the part, by split."""
    signature: list[int] = field(default_factory=list)
    """Numbers that copies of the same signal share (`data_sharding.audit.duplicates.signature`)."""
    may_pass: bool = False
    """Whether the fault may be gone at the next run, so that the recording is tried again then."""
    limits: tuple[float, float] | None = None
    """Time limit (s) and memory limit (GB) under which a recording without a part was given up; another limit is
    another chance."""

    def to_json(self) -> dict[str, Any]:
        """Return the result in JSON's types."""
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
        Why.
    hint : str
        What the user of ``dreamscale shard`` can do; it stands in brackets behind the reason in the ledger.
    """

    def __init__(self, status: Status, reason: Reason, hint: str = "") -> None:
        super().__init__(status, reason, hint)
        self.status: Status = status
        self.reason, self.hint = reason, hint

    @property
    def full_reason(self) -> Reason:
        """The reason with the hint behind it."""
        return Reason(self.reason.category, text=f"{self.reason} ({self.hint})") if self.hint else self.reason


def new_row(item: Item, status: Status = "quarantined", reason: Reason | None = None) -> LedgerRow:
    """Make the ledger row of a recording that was not opened yet.

    Parameters
    ----------
    item : Item
        The recording.
    status : str
        A status of the ledger.
    reason : Reason, optional
        Why it is not sharded.
    """
    row = LedgerRow(
        key=item.key,
        corpus=item.corpus,
        path=item.path,
        # A name that is not UTF-8 cannot be stored as it is.
        files=[f.name.encode("utf-8", "backslashreplace").decode() for f in item.recording.files],
        format=item.recording.format,
        reader=item.recording.format,
        subject=item.subject,
        session=item.session,
        status=status,
    )
    if reason is not None:
        row.set_reason(status, reason)
    return row
