"""The classes `Item` (a recording of a corpus) and `Trial` (a trial in a recording)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.sniffing import Recording


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One presentation of an image, or a section of the signal with a label."""

    onset: float
    """Time at which the image appeared, or at which the labelled section begins, in seconds from the start of the
    recording. If `segment` is set, only the order of the onsets is used."""
    image: str
    """Path of the image. Empty if the trial has a label but no image."""
    image_id: str
    """Unique name of the image. Empty if the trial has no image."""
    label_name: str
    """Category of the image or of the trial."""
    caption: str
    """Description of the image."""
    split: str
    """Split of the trial in the corpus: train, val, test or `splits.TRAIN_OR_VAL`; empty if the corpus has no split."""
    segment: int | None = None
    """Index, from 0, of the epoch that contains this trial, if the signal consists of epochs. None if the trial is
    found by its onset. `SignalInfo.tmin` is the time from the onset to the first sample of the epoch."""
    place: tuple[int, int] | None = None
    """Index of the trial in its events table, and number of trials in the table; None if the trial has no events
    table."""
    block: str = ""
    """Name of the block in which this trial was shown. Empty if the block is not known."""
    concept: str = ""
    """Name of the concept that the image shows, if known. With ``split.by: concept``, no concept is in two splits."""


BASELINE_S = -0.2
"""Default start of the stored trials of a continuous recording, in seconds from the onset."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A recording, with all data that its corpus has about it."""

    key: str
    """Unique name of the recording. The keys of the recording's samples begin with this name."""
    corpus: str
    """Name of the corpus."""
    path: str
    """Path of the recording, relative to the root of the corpus."""
    recording: Recording
    """Files of the recording, and their format."""
    subject: str
    """Name of the subject."""
    session: str
    """Name of the session; may be empty."""
    subject_from: str = ""
    """Source of the subject's name, as in the column `subject_from` of the ledger. The default is "unknown" if
    `subject` equals `key`, and "corpus" otherwise."""
    about: dict[str, Any] = field(default_factory=dict)
    """Data of the corpus about person, device and licence, for the ledger's columns `age`, `sex`, `group`,
    `recording_year`, `device`, `device_filters`, `task` and `license`. If only values of `about` change, the job does
    not read the recording again."""
    unit_factor: float | None = None
    """Factor that converts the values to true volts, if the config contains a factor for this recording."""
    line_freq: float | None = None
    """Mains frequency in Hz, if the config contains this frequency."""
    tmin: float | None = None
    """Start of each stored trial in seconds from the onset of its image; None for the default (see `trial_span`)."""
    tmax: float | None = None
    """End of each stored trial in seconds from the onset of its image; None for the default (see `trial_span`)."""
    stimulus_delay_ms: float = 0.0
    """Milliseconds from the trigger of an image to its appearance on the screen."""
    trials: tuple[Trial, ...] | None = None
    """Trials of the recording; None for a continuous recording without trials."""
    reason: Reason | None = None
    """Reason why the recording is excluded without being opened; None if the recording is not excluded."""
    kind: str = "folder"
    """Kind of the corpus, whose adapter opens the recording."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values in JSON types that the adapter needs to open the recording. If one file contains several recordings, the
    options identify the recording in the file, so that the recordings have different checksums in the ledger."""
    info_patch: dict[str, Any] = field(default_factory=dict)
    """Information about the recording from its sidecar files, in JSON types; see `patch_signal`."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of trials that the corpus leaves out, for each reason."""

    def trial_span(self, window_s: float, *, epoched: bool) -> tuple[float, float]:
        """Return the time range of the signal that is stored for each trial, in seconds from the onset of the image.

        Parameters
        ----------
        window_s : float
            Length of the model's input window in seconds.
        epoched : bool
            Whether the recording consists of epochs.

        Returns
        -------
        tmin, tmax : float
            Start and end of the range. If the config sets no range, a trial of a continuous recording is stored from
            `BASELINE_S` to one window after the onset, and an epoch is stored completely (the range is infinite).
        """
        tmin = self.tmin if self.tmin is not None else -math.inf if epoched else BASELINE_S
        if self.tmax is not None:
            return tmin, self.tmax
        return tmin, math.inf if epoched else max(tmin, 0.0) + window_s
