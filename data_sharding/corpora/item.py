"""A recording as its corpus lists it, and the trials in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_sharding.common.reason import Reason
from data_sharding.formats.sniffing import Recording


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An image shown, or a label given."""

    onset: float
    """Seconds from the recording's start; of trials with a `segment`, only their order counts."""
    image: str
    """Path of the image; empty where there is a label only."""
    image_id: str
    """What tells images apart; empty without an image."""
    label_name: str
    """Its category."""
    caption: str
    """Its description."""
    split: str
    """What the corpus says: train, val, test, `splits.TRAIN_OR_VAL`; empty where it says nothing."""
    segment: int | None = None
    """Epoched signals: the segment that the trial is, at whose start its window begins."""
    block: str = ""
    """Run of trials of one category shown together, where that is known."""
    concept: str = ""
    """What is on the image, where the corpus names it; never on images of two splits if concepts are held out."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A recording with what its corpus says about it."""

    key: str
    """Unique, and the start of its samples' keys."""
    corpus: str
    """Name of the corpus."""
    path: str
    """Relative to the corpus's root."""
    recording: Recording
    """The files."""
    subject: str
    """Who."""
    session: str
    """When; may be empty."""
    unit_factor: float | None = None
    """From the config."""
    line_freq: float | None = None
    """From the config."""
    trial_offset: float = 0.0
    """Seconds."""
    trials: tuple[Trial, ...] | None = None
    """None for a continuous recording."""
    reason: Reason | None = None
    """Why the corpus already excludes it."""
    kind: str = "folder"
    """Kind of corpus whose adapter opens it."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the adapter needs to open it: which of several recordings in one file, and the like. JSON-like. Two items of
    one file differ in it, and by it in the ledger's checksum."""
    info_patch: dict[str, Any] = field(default_factory=dict)
    """What files beside the recording say about it; see `patched`. JSON-like."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Trials that the corpus itself does not list among `trials`, by reason."""
