"""Recognise files that are not read: recordings without a reader here, and files that are no recordings.

Each function takes the file as `sniffing` found it, and returns a `Finding`, or None for another kind of file.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_sharding.common.reason import Reason


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a file is, and why it is not read."""

    format: str
    """Name of the kind of file, for the ledger."""
    reason: Reason
    """What the file is, and what the user can do."""
    excluded: bool = False
    """True if the file holds no continuous recording. Otherwise the file is a recording that is set aside."""
    files: tuple[str, ...] = ()
    """Names of other files in the same folder that belong to this one."""
