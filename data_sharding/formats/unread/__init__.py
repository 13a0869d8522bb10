"""Recognise files that this package does not read: recordings in other formats, and files that are not recordings.

The functions `recognise_...` of the modules take a `sniffing.File`, and return a `Finding`, or None if the file is of
another kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_sharding.common.reason import Reason


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Kind of a file, and the reason why the file is not read."""

    format: str
    """Name of the kind of file, for the ledger."""
    reason: Reason
    """Description of the file, and what the user can do."""
    excluded: bool = False
    """True if the file contains no continuous recording; False if the file is a recording, which is quarantined."""
    files: tuple[str, ...] = ()
    """Names of other files in the same folder that belong to this file."""
