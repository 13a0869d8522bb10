"""A recording opened: channels, rate, and samples on demand, whatever it was read from.

Shapes: n channels, S samples at the recording's rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of samples without interruption: filters and windows never reach over its ends.

    A continuous recording is one segment, one with gaps has one between each two gaps, and an epoched one has one for
    each epoch.
    """

    start: int
    """First sample in the signal's own numbering."""
    stop: int
    """One past the last sample."""
    onset: float
    """Seconds from the recording's beginning at which it began; for epochs without a time of recording, start over
    the rate."""


@dataclass(frozen=True, kw_only=True)
class SignalInfo:
    """What is known of a recording before its samples are read."""

    ch_names: list[str]
    """As in the file."""
    ch_types: list[str]
    """MNE's words: eeg, eog, ecg, stim, misc ...; eeg where the file does not say."""
    positions: list[list[float] | None]
    """Head coordinates in metres, where the file has them."""
    sfreq: float
    """Hz."""
    n_samples: int
    """Samples over all segments."""
    segments: list[Segment]
    """In order, without overlap."""
    line_freq: float | None = None
    """Mains in Hz, where the file or its sidecar says so."""
    unit_known: bool = False
    """True where the source itself vouches for its unit beyond a header field (BIDS channels.tsv, a corpus's
    documentation), or is declared unit-free (standardised) with `scale` 1."""
    scale: float = 1.0
    """What brings the values that `Signal.read` gives, taken as volts, to volts."""
    reference: str = ""
    """As recorded, where known."""
    bads: list[str] = field(default_factory=list)
    """Channels that the source itself marks as bad."""
    bad_spans: list[tuple[float, float, str]] = field(default_factory=list)
    """(begin, end, word) in seconds from the recording's beginning that the source marks as bad."""
    epoched: bool = False
    """True where segments are epochs."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Channels that the file holds but that cannot be read along with `ch_names`, and why."""
    notes: list[str] = field(default_factory=list)
    """What was corrected or could not be told on opening, for the ledger."""


class Signal(Protocol):
    """An open recording."""

    info: SignalInfo

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Samples of some channels.

        Parameters
        ----------
        start, stop : int
            Range in the signal's own numbering; it may reach over several segments.
        picks : list of int
            Channels, by number.

        Returns
        -------
        ndarray, shape (len(picks), stop - start), float64 or float32
            Volts, before `SignalInfo.scale`.
        """
        ...

    def close(self) -> None:
        """Let go of files."""
        ...
