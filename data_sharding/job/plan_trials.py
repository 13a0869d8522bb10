"""Plan which part of the signal is stored for each trial.

In this module, a sample is a time sample at the target sampling rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.corpora import Item, Trial
from data_sharding.dataset.shard_reader import LONGEST
from data_sharding.formats.signal import SignalInfo
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec

AT_EDGE = "at the edge of the recording, of an epoch or of a gap"


@dataclass(frozen=True)
class Cut:
    """A window or a trial to cut out of the signal. A sample is here a time sample at the target sampling rate."""

    start: int
    """First sample of the cut, counted from the start of the segment."""
    number: int
    """Number of the window or trial in the recording. The key of the sample ends with this number."""
    split: str
    """Split that the window belongs to."""
    extra: dict[str, Any]
    """Metadata of the trial; empty for a recording without trials."""
    length: int
    """Number of samples of the cut."""
    onset: int | None = None
    """Sample at which the image appeared, counted from the start of the segment; negative if the image appeared before
    the segment, and None for a recording without trials."""
    needed: int = 0
    """First sample of the window that models read, counted from `start`. A trial that lacks a part of the window that
    models read is left out."""
    missing: str = ""
    """Reason why a part of the trial outside the window that models read is not stored; empty if the whole trial is
    stored."""

    def shorten(self, begin: int, stop: int, why: str) -> Cut:
        """Return a shorter cut with the samples from `begin` to `stop - 1`, counted from the start of this cut."""
        if begin == 0 and stop == self.length:
            return self
        return dataclasses.replace(
            self,
            start=self.start + begin,
            length=stop - begin,
            needed=self.needed - begin,
            missing=self.missing or why,
        )


def plan_trials(task: Task, info: SignalInfo, lengths: Sequence[int], left_out: Counter[str]) -> dict[int, list[Cut]]:
    """Plan which part of the signal is stored for each trial of a recording.

    A trial is stored if the window that models read is inside one segment (a part of the signal without interruption).
    The window that models read begins at the onset of the image, or at the trial's `tmin` if `tmin` is positive. The
    parts of the trial before and after the window are also stored, as far as these parts are inside the segment.

    Parameters
    ----------
    task : Task
        The recording with its trials, and the settings for processing the recording.
    info : SignalInfo
        Description of the recording.
    lengths : sequence of int
        Number of time samples of each segment.
    left_out : Counter
        Number of trials that cannot be used, for each reason. This function adds the trials of the recording that
        cannot be used.

    Returns
    -------
    dict
        Dictionary from the number of each segment to its trials, sorted by time.
    """
    item, spec = task.item, task.spec
    trials = item.trials or ()
    labels = {name: i for i, name in enumerate(task.labels)}
    repeats, places = count_repeats(trials), _Places(item, info, spec)
    tmin, tmax = item.trial_span(spec.window_s, epoched=info.epoched)
    cuts: dict[int, list[Cut]] = {}
    for number, trial in enumerate(trials):
        split = task.split.trial(item.subject, trial.image_id, trial.split, trial.concept)
        if split is None:
            left_out["crossed cell of subject split and image split"] += 1
            continue
        place = places.find(number, trial)
        if place is None:
            left_out[places.nowhere] += 1
            continue
        segment, needed, onset = place
        length = lengths[segment]
        if needed + spec.window > length:
            last = segment == len(lengths) - 1 and not info.epoched
            early = f"the epoch ends before the window of {spec.window_s:g} s"
            gap = early if info.epoched else "overlaps a gap in the recording"
            left_out["trial beyond the recording" if last else gap] += 1
            continue
        begin = 0 if tmin == -math.inf else onset + spec.to_samples(tmin)
        stop = length if tmax == math.inf else onset + spec.to_samples(tmax)
        # If a segment begins up to half a sample after the window that models read, this window begins at the first
        # sample of the segment, so it can end after the last sample of the trial.
        begin, stop = min(begin, needed), max(stop, needed + spec.window)
        if min(stop, length) - max(begin, 0) > LONGEST:
            left_out[f"trial of more than {LONGEST} samples"] += 1
            continue
        extra: dict[str, Any] = {
            name: value for name in ("image_id", "label_name", "block", "concept") if (value := getattr(trial, name))
        }
        if trial.label_name:
            extra["label"] = labels[trial.label_name]
        if trial.image_id:
            extra["repeat"] = repeats[number]
        extra |= {"caption": trial.caption, "image_path": trial.image}
        whole = Cut(begin, number, split, extra, stop - begin, onset, needed - begin)
        stored = whole.shorten(max(-begin, 0), min(stop, length) - begin, AT_EDGE)
        cuts.setdefault(segment, []).append(stored)
    return {segment: sorted(cuts[segment], key=lambda cut: (cut.start, cut.number)) for segment in sorted(cuts)}


def count_repeats(trials: Sequence[Trial]) -> list[int]:
    """For each trial of a recording, count the earlier presentations of the trial's image.

    Parameters
    ----------
    trials : sequence of Trial
        Trials of the recording.

    Returns
    -------
    list of int
        For each trial, the number of earlier presentations of the same image in this recording.
    """
    seen: Counter[str] = Counter()
    out = [0] * len(trials)
    for number in sorted(range(len(trials)), key=lambda n: (trials[n].onset, n)):
        out[number] = seen[trials[number].image_id]
        seen[trials[number].image_id] += 1
    return out


class _Places:
    """Finds the segment of each trial, and the first time sample of this segment that is needed for the trial.

    The first needed sample is the first sample of the window that models read. This window begins at the onset of the
    image, or `tmin` seconds after the onset if `tmin` is positive. If the segment begins later, the first needed sample
    is the first sample of the segment.
    """

    def __init__(self, item: Item, info: SignalInfo, spec: PreprocessSpec) -> None:
        self.info, self.spec = info, spec
        tmin, _ = item.trial_span(spec.window_s, epoched=info.epoched)
        # An image appears on the screen `delay_s` seconds after its trigger.
        self.delay_s, self.after_onset = item.stimulus_delay_ms / 1000, spec.to_samples(max(tmin, 0.0))
        self.shift_s = self.delay_s + max(tmin, 0.0)
        self.begins = np.array([segment.onset for segment in info.segments])
        self.nowhere = "trial beyond the recording"
        self.epochs: list[int] | None = None
        if info.epoched and any(trial.segment is None for trial in item.trials or ()):
            self.nowhere = "the table does not describe the epochs"
            self.epochs = self._assign_epochs(item.trials or ())

    def find(self, number: int, trial: Trial) -> tuple[int, int, int] | None:
        """Return the index of the trial's segment, and the first needed sample and the onset in this segment.

        Return None if no segment contains the trial.
        """
        sfreq, count = self.spec.sfreq, len(self.info.segments)
        if self.info.epoched or trial.segment is not None:
            segment = trial.segment if trial.segment is not None else self.epochs[number] if self.epochs else -1
            if not 0 <= segment < count:
                return None
            # Round the time of the first sample, not the time of the onset, so that the epoch contains its first sample
            # if `tmin` is the time of this sample.
            onset = -self.spec.to_samples(self.info.tmin - self.delay_s)
            return segment, max(0, onset + self.after_onset), onset
        time = trial.onset + self.shift_s
        # A window that begins at most half a sample before a segment belongs to the segment, because such a small
        # distance is a rounding error.
        segment = int(np.searchsorted(self.begins, time + 0.5 / sfreq, side="right")) - 1
        if segment < 0:
            return None
        onset = self.spec.to_samples(trial.onset + self.delay_s - float(self.begins[segment]))
        return segment, max(0, onset + self.after_onset), onset

    def _assign_epochs(self, trials: Sequence[Trial]) -> list[int] | None:
        """Return the epoch of each trial of a table; None if the table does not describe the epochs.

        If the table has as many trials as there are epochs, trial `i` belongs to epoch `i`. Otherwise, each onset must
        equal the time of an epoch's event; an error of half a sample is allowed. If a single onset differs from the
        times of all events, no trial is used. A table with other onsets may also contain rejected epochs, or may
        contain times of the original continuous recording; if such a table was used, a trial could get the signal of
        another image.
        """
        places = [trial.place or (0, 0) for trial in trials]
        if all(count == len(self.begins) for _, count in places):
            return [number for number, _ in places]
        events = self.begins - self.info.tmin
        onsets = np.array([trial.onset for trial in trials])
        after = np.searchsorted(events, onsets).clip(1, max(len(events) - 1, 1))
        pairs = np.stack([after - 1, after.clip(max=len(events) - 1)])
        distances = abs(events[pairs] - onsets)
        best = distances.argmin(axis=0)
        exact = distances.min(axis=0) <= 0.5 / self.info.sfreq + 1e-6
        return pairs[best, np.arange(len(onsets))].tolist() if exact.all() else None
