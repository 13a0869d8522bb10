"""Find test trials whose EEG was also in the data that trained the model.

A model that remembers the EEG of a training trial can name the image of this trial again, without any knowledge about
new EEG. In array shapes, n is the number of test trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_sharding.audit.fingerprints import window_digest
from data_sharding.audit.leakage import Contents, find_shared_windows
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.splits import SPLITS
from pretrain.evidence.trials import TrialTable, group_recordings, join_tables, tabulate_trials

TRAINING, PRETRAINING = "training trials", "pretraining data"
"""Names of the data that trained a model, for `pretrain.evidence.rules.Evidence.known_eeg`."""
ROUNDING_S = 1e-4
"""Two windows overlap in time only if they share more than this duration in seconds, because stored times are
rounded."""
PART = 256
"""Number of trials whose EEG is in memory at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownEEG:
    """The EEG of a split that is also in the data that trained a model."""

    trials: Mapping[str, NDArray[np.bool_]]
    """For `TRAINING` and, if the pretraining data were compared, for `PRETRAINING`, an array [n] that is True for
    trials whose EEG is also in these data."""
    people_in_pretraining: int = 0
    """Number of people in the split who also have EEG in the pretraining data."""


def digest_windows(dataset: EEGDataset) -> NDArray[np.uint64]:
    """Compute a checksum of each trial's EEG, over the part of the trial that `dataset` reads.

    If two trials have equal EEG of the same channels in the same order, their checksums are equal, whatever the names
    of the recordings.
    """
    digests_n = np.empty(len(dataset), np.uint64)
    with progress("checksums of the EEG", len(dataset), enabled=len(dataset) >= 10_000) as advance:
        for start in range(0, len(dataset), PART):
            part = dataset.pack(range(start, min(start + PART, len(dataset))))
            windows = np.split(part.eeg, np.cumsum(part.channels)[:-1])
            digests_n[start : start + len(windows)] = [window_digest(window) for window in windows]
            advance(len(windows))
    return digests_n


def overlap_in_time(test: TrialTable, train: TrialTable, window_s: float) -> NDArray[np.bool_]:
    """Tell which test trials have EEG that overlaps in time with the EEG of a training trial of the same recording.

    Parameters
    ----------
    test, train : TrialTable
        Test trials and training trials.
    window_s : float
        Duration in seconds of the EEG of a trial. The EEG of all trials has the same duration, and begins at the same
        delay after the picture.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for a test trial with an overlap. A trial with an unknown recording or an unknown time has no overlap.
    """
    both, n = join_tables(test, train), len(test)
    known = np.isfinite(both.times_n) & (both.recordings_n != "")
    group = np.where(known, group_recordings(both), -1)
    found_n = np.zeros(n, bool)
    for recording in np.intersect1d(group[:n], group[n:]):
        if recording < 0:
            continue
        rows, times = np.flatnonzero(group[:n] == recording), np.sort(both.times_n[n:][group[n:] == recording])
        after = np.searchsorted(times, test.times_n[rows])
        nearest = np.stack([times[np.clip(after - shift, 0, len(times) - 1)] for shift in (0, 1)])
        found_n[rows] = np.abs(nearest - test.times_n[rows]).min(axis=0) < window_s - ROUNDING_S
    return found_n


def find_eeg_of_training(train: EEGDataset, data: EEGDataset) -> NDArray[np.bool_]:
    """Tell which trials of a split have EEG that is also in the training trials.

    Parameters
    ----------
    train, data : EEGDataset
        Train split, and the split of the test trials. `train` and `data` must read the same part of each trial.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for a trial of `data` whose EEG is equal to the EEG of a training trial, or overlaps in time with the EEG
        of a training trial of the same recording.
    """
    table, train_table = (tabulate_trials(part, images_needed=False) for part in (data, train))
    overlap_n = overlap_in_time(table, train_table, data.n_times / data.spec.sfreq)
    return overlap_n | np.isin(digest_windows(data), digest_windows(train))


def find_eeg_of_contents(
    before: Contents, contents: Contents, data: EEGDataset, *, same_recording: bool = True
) -> NDArray[np.bool_]:
    """Tell which trials of a split have EEG that is also in the train split of the pretraining dataset.

    Parameters
    ----------
    before, contents : Contents
        Contents of the pretraining dataset, and of the dataset of the trials.
    data : EEGDataset
        Split of the trials.
    same_recording : bool
        A key is the unique name of a recording in a dataset. If true, windows are compared by time if their recordings
        have the same key, or if their signals show that one recording is stored under two keys. If false, windows are
        compared by time only in the second case.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for a trial whose window (its EEG as models read it) is equal to a window of the train split of the
        pretraining dataset, or overlaps in time with such a window of the same recording. If the windows in `contents`
        were not decoded, windows are compared by time only.
    """
    train = before.split == SPLITS.index("train")
    seen = replace(
        before,
        recording=before.recording[train],
        split=before.split[train],
        start=before.start[train],
        stored=before.stored[train],
        digest=before.digest[train] if len(before.digest) else before.digest,
    )
    shared = find_shared_windows(seen, contents, same_recording=same_recording) & (
        contents.split == SPLITS.index(data.split)
    )
    places = {
        (contents.recordings[recording], round(float(start), 3))
        for recording, start in zip(contents.recording[shared], contents.start[shared], strict=True)
    }
    trials = data.trials
    starts_n = np.array(trials.numbers("start"), np.float64) + np.maximum(trials.numbers("onset"), 0) / data.spec.sfreq
    names, codes_n = trials.values("recording"), trials.codes("recording")
    found = [
        (names[code] or "", round(start, 3)) in places for code, start in zip(codes_n, starts_n.tolist(), strict=True)
    ]
    return np.array(found, bool)


def count_people_of_pretraining(before: Contents, contents: Contents, split: str) -> int:
    """Count the people (corpus and name) of a split who also have EEG in the train split of the pretraining dataset."""

    def list_people(of: Contents, name: str) -> set[tuple[str, str]]:
        recordings = np.unique(of.recording[of.split == SPLITS.index(name)])
        return {of.people[number] for number in recordings} & of.known_subjects()

    return len(list_people(before, "train") & list_people(contents, split))


def find_known_eeg(
    train: EEGDataset, data: EEGDataset, before: Contents | None = None, contents: Contents | None = None
) -> KnownEEG:
    """Find the EEG of a split that is also in the training trials and, if `before` is given, in the pretraining data.

    Parameters
    ----------
    train, data : EEGDataset
        Train split, and the split of the test trials. `train` and `data` must read the same part of each trial.
    before, contents : Contents, optional
        Contents of the pretraining dataset, and of the dataset of the trials. With `contents`, a recording that is
        stored under two keys (names) is found by its signal, as in ``dreamscale verify``.

    Returns
    -------
    KnownEEG
        The trials whose EEG is also in these data, and the number of people who also have EEG in the pretraining data.
    """
    known = {TRAINING: find_eeg_of_training(train, data)}
    if contents is None:
        return KnownEEG(trials=known)
    # If one recording is stored under two keys, for example with the channels in another order, no checksums are equal.
    # Compare the windows of such recordings by time.
    known[TRAINING] |= find_eeg_of_contents(contents, contents, data, same_recording=False)
    if before is None:
        return KnownEEG(trials=known)
    known[PRETRAINING] = find_eeg_of_contents(before, contents, data)
    return KnownEEG(trials=known, people_in_pretraining=count_people_of_pretraining(before, contents, data.split))
