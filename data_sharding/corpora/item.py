"""A recording as its corpus lists it, and the trials in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.sniffing import Recording


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One presentation of an image, or one labelled stretch of signal."""

    onset: float
    """Seconds from the start of the recording. For trials with a `segment`, only their order matters."""
    image: str
    """Path of the image; empty if the trial has a label only."""
    image_id: str
    """Identifies the image; empty without an image."""
    label_name: str
    """Category of the image or of the trial."""
    caption: str
    """Description of the image."""
    split: str
    """Split that the corpus itself assigns: train, val, test or `splits.TRAIN_OR_VAL`; empty if it assigns none."""
    segment: int | None = None
    """For signals that are cut into epochs: number of the segment that holds this trial. The window begins at the start
    of this segment."""
    block: str = ""
    """Name of the block of trials of one category that this trial is part of, if it is known."""
    concept: str = ""
    """What the image shows, if the corpus names it. If concepts are held out, no concept is in two splits."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A recording, with everything that its corpus says about it."""

    key: str
    """Unique name of the recording. The keys of its samples begin with it."""
    corpus: str
    """Name of the corpus."""
    path: str
    """Path relative to the root of the corpus."""
    recording: Recording
    """Its files and their format."""
    subject: str
    """The subject."""
    session: str
    """The session; may be empty."""
    unit_factor: float | None = None
    """Factor to true volts from the config, if it gives one."""
    line_freq: float | None = None
    """Mains frequency in Hz from the config, if it gives one."""
    trial_offset: float = 0.0
    """Seconds from the onset of an image to the start of its window."""
    trials: tuple[Trial, ...] | None = None
    """The trials; None for a continuous recording."""
    reason: Reason | None = None
    """Why the corpus excludes the recording before it is opened; None if it does not."""
    kind: str = "folder"
    """Kind of the corpus, whose adapter opens the recording."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the adapter needs to open the recording, such as which of several recordings in one file. Plain JSON
    types. Two items of the same file differ here, which makes their checksums in the ledger differ, too."""
    info_patch: dict[str, Any] = field(default_factory=dict)
    """What sidecar files say about the recording; see `patch_signal`. Plain JSON types."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of trials that the corpus leaves out of `trials`, by reason."""
