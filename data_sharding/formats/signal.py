"""Interface of an open recording of any format: its metadata, and a method that reads samples on demand.

In array shapes, n is the number of channels, and S the number of samples at the recorded rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the signal without gaps. Filters and windows never cross the ends of a segment.

    A continuous recording is one segment. In a recording with gaps, a new segment begins after each gap. In an epoched
    recording, each epoch is a segment.
    """

    start: int
    """Index of the segment's first sample in the signal."""
    stop: int
    """Index of the segment's last sample, plus one."""
    onset: float
    """Time of the segment's first sample, in seconds from the beginning of the recording. For epochs whose times are
    unknown, the onset is `start` divided by the sampling rate."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Metadata of a recording about the person, the date and the device. These metadata do not identify the person."""

    age: float | None = None
    """Age of the person in years on the day of the recording; 90 for all higher ages; None if unknown."""
    sex: str = ""
    """M, F, or empty if unknown."""
    year: int | None = None
    """Year of the recording; None if unknown."""
    device: str = ""
    """Name of the recording device, without a serial number; empty if unknown."""
    filters: str = ""
    """Filters that were applied before the file was written; empty if unknown."""


@dataclass(frozen=True, kw_only=True)
class SignalInfo:
    """Metadata of a recording, known before its samples are read."""

    ch_names: list[str]
    """Names of the channels in the file."""
    ch_types: list[str]
    """Types of the channels, as in MNE: eeg, eog, ecg, stim, misc ...; eeg if the file does not give a type."""
    positions: list[list[float] | None]
    """Position of each channel in head coordinates, in metres; None if the file does not give a position."""
    sfreq: float
    """Sampling rate in Hz."""
    n_samples: int
    """Total number of samples of all segments."""
    segments: list[Segment]
    """Segments of the recording in the order of time, without overlap."""
    line_freq: float | None = None
    """Mains frequency in Hz, if the file or its sidecar gives it."""
    unit_known: bool = False
    """True if the unit comes from a more reliable source than the header, such as BIDS channels.tsv or the
    documentation of a corpus. `unit_known` is also true for values that the documentation calls standardised (without a
    unit); `scale` is a nominal factor for these values."""
    scale: float = 1.0
    """Factor that converts the values of `Signal.read` to volts."""
    reference: str = ""
    """Reference of the recording; empty if the reference is unknown."""
    bads: list[str] = field(default_factory=list)
    """Names of the channels that the file or its sidecar marks as bad."""
    named_units: dict[str, float] = field(default_factory=dict)
    """For each channel whose unit the file names: name of the channel, and factor that converts this unit to volts."""
    assumed_units: dict[str, float] = field(default_factory=dict)
    """For each channel without a unit in the file: name of the channel, and factor that converts its assumed unit to
    volts."""
    unknown_units: dict[str, str] = field(default_factory=dict)
    """For each channel that may be an electrode and has an unknown unit: name of the channel, and unit as the file
    writes it."""
    bad_spans: list[tuple[float, float, str]] = field(default_factory=list)
    """Bad time spans that the file or its sidecar marks: start and end in seconds from the recording's beginning, and
    text."""
    bad_channel_spans: list[tuple[float, float, str]] = field(default_factory=list)
    """Spans in which the file or its sidecar marks a single channel as bad: start and end in seconds from the
    recording's beginning, and name of the channel. During such a span, the other channels are not bad."""
    epoched: bool = False
    """Whether the segments of the recording are epochs."""
    intracranial: bool = False
    """Whether electrodes inside the skull (the types in `channels.INTRACRANIAL`) are used too."""
    tmin: float = 0.0
    """For epochs: time of the first sample of every epoch, in seconds after the event of the epoch; negative if the
    epoch begins before its event."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Channels of the file that are not in `ch_names`, because they cannot be read; each with the reason."""
    about: About = field(default_factory=About)
    """Metadata about person, year and device, if the file has them."""
    notes: list[str] = field(default_factory=list)
    """Notes for the ledger: corrections and unknown values that were found when the recording was opened."""


class Signal(Protocol):
    """An open recording."""

    info: SignalInfo

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels.

        Parameters
        ----------
        start, stop : int
            Range of sample indices. The range may contain several segments.
        picks : list of int
            Indices of the channels to read.

        Returns
        -------
        ndarray, shape (len(picks), stop - start), float64 or float32
            The samples. The samples multiplied by `SignalInfo.scale` are volts.
        """
        ...

    def close(self) -> None:
        """Close the files of the recording."""
        ...


class ScaledSignal:
    """A signal whose channels are multiplied by additional factors.

    Parameters
    ----------
    signal : Signal
        The signal.
    gains : ndarray, shape (n,)
        Factor of each channel of the signal.
    """

    def __init__(self, signal: Signal, gains: np.ndarray) -> None:
        self.signal, self.gains, self.info = signal, gains, signal.info

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        return self.signal.read(start, stop, picks) * self.gains[picks, None]

    def close(self) -> None:
        """Close the files of the recording."""
        self.signal.close()
