"""A table of the trials with their times, and permutations that move EEG only between trials near in time.

EEG drifts over minutes: electrodes dry, and people get tired. If pictures of one category are shown one after the
other, a model can predict the category from the drift. The shuffle within neighbourhoods shows whether a model uses the
drift. A neighbourhood is a short sequence of consecutive trials of one recording, whatever the labels of the trials.
The drift is nearly equal in all trials of a neighbourhood, so a model that uses the drift gives nearly the same answer
after the shuffle within neighbourhoods.

- In a block design, the trials of a neighbourhood have the same label. The shuffle within neighbourhoods therefore does
  not change any score, so a score that comes from the response looks like a score that comes from the drift.
- In a random order, the trials of a neighbourhood have different labels. The shuffle within neighbourhoods gives each
  trial a response to another picture, so a score that comes from the response falls to chance.

A neighbourhood must not be chosen by the labels: if all its trials had the same label, the shuffle would change no
score, whatever the design.

In array shapes, n is the number of trials.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_sharding.common.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from data_sharding.dataset.dataset import EEGDataset

NEIGHBOURS = 8
"""Number of consecutive trials in a neighbourhood, by default. Two trials of a neighbourhood of eight trials are three
trials apart on average."""
BY_CHANCE = 0.01
"""If all trials of each recording have the same label, and the probability of this in a random order of the trials is
higher than `BY_CHANCE`, this counts as chance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialTable:
    """Label, image, person and time of each trial of a split.

    `data_sharding.dataset.trials.TrialTable` is another class: it holds all metadata of the trials, as stored in the
    dataset. The `TrialTable` in this file holds only those properties of a trial that an evaluation may use without
    reading the EEG.
    """

    labels_n: NDArray[np.int64]
    """[n] label of each trial, as a number."""
    images_n: NDArray[np.str_]
    """[n] name of each trial's image. Copies of an image must have one name; see `merge_copies`."""
    subjects_n: NDArray[np.str_]
    """[n] person of each trial."""
    sessions_n: NDArray[np.str_]
    """[n] session of each trial. An empty name stands for the only session of a person."""
    recordings_n: NDArray[np.str_]
    """[n] recording of each trial. An empty name stands for an unknown recording."""
    times_n: NDArray[np.float64]
    """[n] time of each trial, in seconds from the start of the recording. NaN stands for an unknown time."""

    def __post_init__(self) -> None:
        kinds = {"labels_n": np.int64, "times_n": np.float64}
        for name in (field.name for field in fields(self)):
            values_n = np.asarray(getattr(self, name))
            if name == "labels_n" and values_n.size and values_n.dtype.kind not in "iub":
                raise RequestError(f"labels_n has the type {values_n.dtype}; give each label as a whole number")
            object.__setattr__(self, name, values_n.astype(kinds.get(name, np.str_)))
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if len(set(shapes.values())) > 1 or len(self.labels_n.shape) != 1:
            raise RequestError(
                f"the columns of the trial table have the shapes {shapes}; give one value for each trial"
            )
        if np.isinf(self.times_n).any():
            raise RequestError("times_n has an infinite time; give a time in seconds, or NaN for an unknown time")

    def __len__(self) -> int:
        return len(self.labels_n)

    def select(self, chosen_n: ArrayLike) -> TrialTable:
        """Return a table with only the chosen trials.

        Parameters
        ----------
        chosen_n : array of bool or of int
            Mask, or indices, of the chosen trials.

        Returns
        -------
        TrialTable
            The chosen trials.
        """
        chosen = np.asarray(chosen_n)
        chosen = chosen if chosen.dtype == bool else chosen.astype(np.int64)
        return TrialTable(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def join_tables(*tables: TrialTable) -> TrialTable:
    """Return one table with the trials of several tables, in the given order."""
    names = [field.name for field in fields(TrialTable)]
    return TrialTable(**{name: np.concatenate([getattr(table, name) for table in tables]) for name in names})


def tabulate_trials(dataset: EEGDataset, *, times_known: bool = True, images_needed: bool = True) -> TrialTable:
    """Read the trial table of one split of a dataset.

    Parameters
    ----------
    dataset : EEGDataset
        The split. Every sample must be a trial with a label, a person and, by default, an image.
    times_known : bool
        False if the files of the dataset do not keep the order of the trials, such as those of preprocessed
        THINGS-EEG2. The time of every trial then counts as unknown.
    images_needed : bool
        False for a dataset whose trials may have no image. If all trials of a recording have the same label, the trials
        without an image get the name of the recording as their image, because these trials are parts of one long event.
        If the labels in a recording differ, each trial without an image gets a unique name as its image.

    Returns
    -------
    TrialTable
        One row for each sample. The time of a trial is the time at which the image appeared. If two trials of a
        recording have the same time, all times of this recording count as unknown, because real trials cannot begin at
        the same time.

    Raises
    ------
    RequestError
        If a sample has no label or no person, or has no image although an image is needed.
    """
    stored = dataset.trials
    labels_n = np.array(stored.numbers("label"), np.int64)

    def column(name: str) -> NDArray[np.str_]:
        values = np.array([value or "" for value in stored.values(name)], np.str_)
        return values[stored.codes(name)]

    images_n, people_n = column("image_id"), column("subject")
    no_image_n = (images_n == "") & images_needed
    for name, missing_n in (("label", labels_n < 0), ("image_id", no_image_n), ("subject", people_n == "")):
        if missing_n.any():
            raise RequestError(
                f"{dataset.path} ({dataset.split}): {int(missing_n.sum())} samples have no {name}; make the dataset "
                "from recordings with labelled trials"
            )
    subjects_n = np.char.add(np.char.add(column("corpus"), "/"), people_n)
    times_n = np.array(stored.numbers("start"), np.float64) + stored.numbers("onset") / dataset.spec.sfreq
    table = TrialTable(
        labels_n=labels_n,
        images_n=images_n,
        subjects_n=subjects_n,
        sessions_n=column("session"),
        recordings_n=column("recording"),
        times_n=times_n if times_known else np.full(len(labels_n), np.nan),
    )
    group_n = group_recordings(table)
    pairs = np.stack([group_n.astype(np.float64), table.times_n])
    unique, count = np.unique(pairs, axis=1, return_counts=True)
    doubtful = unique[0, (count > 1) & np.isfinite(unique[1])]
    return replace(
        table,
        times_n=np.where(np.isin(group_n, doubtful), np.nan, table.times_n),
        images_n=_name_missing_images(table, dataset.split),
    )


def _name_missing_images(table: TrialTable, split: str) -> NDArray[np.str_]:
    """Return the name of each trial's image; a trial without an image gets a name by the rules in `tabulate_trials`."""
    if (table.images_n != "").all():
        return table.images_n
    group_n = group_recordings(table)
    pairs = np.unique(np.stack([group_n, table.labels_n]), axis=1)
    is_constant_n = (np.bincount(pairs[0])[group_n] == 1) & (table.recordings_n != "")
    places = zip(table.subjects_n, table.sessions_n, table.recordings_n, strict=True)
    of_recording_n = np.array([f"recording {'/'.join(place)}" for place in places])
    own_n = np.array([f"trial {number} of {split}" for number in range(len(table))])
    return np.where(table.images_n != "", table.images_n, np.where(is_constant_n, of_recording_n, own_n))


def merge_copies(images_n: ArrayLike, copies: Iterable[tuple[str, str]]) -> NDArray[np.str_]:
    """Give all copies of an image one name, so that copies do not count as several images.

    Parameters
    ----------
    images_n : array of str, shape (n,)
        Name of the image of each trial.
    copies : iterable of (str, str)
        Each pair contains two names of the same image, for example from ``dreamscale verify``.

    Returns
    -------
    ndarray of str, shape (n,)
        The new name for each trial. All images that are connected by pairs, directly or through other images, get the
        alphabetically first of their names.
    """
    first: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := first.get(name, name)) != name:
            name = above
        return name

    for pair in copies:
        low, high = sorted(root(name) for name in pair)
        first[high] = low
    names, image_n = np.unique(np.asarray(images_n, np.str_), return_inverse=True)
    return np.array([root(str(name)) for name in names], np.str_)[image_n]


def group_by(*columns_n: ArrayLike) -> NDArray[np.int64]:
    """Number the groups of trials that have the same value in every column, such as the same person and session.

    Parameters
    ----------
    *columns_n : array, shape (n,)
        Columns of texts or numbers.

    Returns
    -------
    ndarray of int, shape (n,)
        Number of each trial's group: 0, 1, 2 and so on.
    """
    group_n = np.zeros(len(np.asarray(columns_n[0])), np.int64)
    for column_n in columns_n:
        names, code_n = np.unique(np.asarray(column_n), return_inverse=True)
        group_n = np.unique(group_n * len(names) + code_n, return_inverse=True)[1].astype(np.int64)
    return group_n


def group_recordings(table: TrialTable) -> NDArray[np.int64]:
    """Give each recording a number, and return the number of each trial's recording.

    Parameters
    ----------
    table : TrialTable
        The trials.

    Returns
    -------
    ndarray of int, shape (n,)
        Two trials have the same number if they have the same person, session and recording. Trials with unknown
        recording count as one recording if they have the same person and session.
    """
    return group_by(table.subjects_n, table.sessions_n, table.recordings_n)


def sort_by_time(table: TrialTable) -> NDArray[np.int64]:
    """Return the indices of all trials, sorted by recording and then by time; unknown times come last."""
    return np.lexsort((table.times_n, group_recordings(table)))


def find_blocks(table: TrialTable) -> NDArray[np.int64]:
    """Give a number to each block: a sequence of consecutive trials of one recording with the same label.

    Parameters
    ----------
    table : TrialTable
        The trials.

    Returns
    -------
    ndarray of int, shape (n,)
        Number of each trial's block. A trial with unknown time is a separate block.
    """
    order, group_n = sort_by_time(table), group_recordings(table)
    label, group, unknown = table.labels_n[order], group_n[order], np.isnan(table.times_n[order])
    begins = np.ones(len(table), bool)
    begins[1:] = (label[1:] != label[:-1]) | (group[1:] != group[:-1]) | unknown[1:]
    blocks_n = np.empty(len(table), np.int64)
    blocks_n[order] = np.cumsum(begins) - 1
    return blocks_n


def find_neighbourhoods(table: TrialTable, size: int = NEIGHBOURS) -> NDArray[np.int64]:
    """Divide each recording into neighbourhoods: short sequences of consecutive trials, whatever their labels.

    Parameters
    ----------
    table : TrialTable
        The trials.
    size : int
        Number of trials in a neighbourhood, at least 2. A recording of n trials has n / `size` neighbourhoods, rounded
        to a whole number, and at least one. The sizes of the neighbourhoods of a recording differ by at most one trial.

    Returns
    -------
    ndarray of int, shape (n,)
        Number of each trial's neighbourhood. A trial with unknown time is alone in its neighbourhood, because its
        neighbours are unknown.

    Raises
    ------
    RequestError
        If `size` is below 2.
    """
    if size < 2:
        raise RequestError(f"the size of a neighbourhood is {size}; give at least 2 trials")
    order, group_n = sort_by_time(table), group_recordings(table)
    found_n = np.empty(len(table), np.int64)
    count = 0
    for start, stop in _runs(group_n[order]):
        rows = order[start:stop]
        known = rows[np.isfinite(table.times_n[rows])]
        parts = np.array_split(known, max(1, round(len(known) / size))) if len(known) else []
        for part in [*parts, *(rows[len(known) :, None])]:
            found_n[part] = count
            count += 1
    return found_n


def _runs(values_n: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the start and the stop of each sequence of equal values."""
    edges = np.flatnonzero(np.diff(values_n)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(values_n)], strict=True)) if len(values_n) else []


def label_is_constant_in_recordings(table: TrialTable) -> bool:
    """Tell whether each recording has only one label, so that the recording reveals the label.

    Parameters
    ----------
    table : TrialTable
        The test trials, together with the training trials if the caller has them.

    Returns
    -------
    bool
        True if all trials of each recording have the same label, and if the probability of this in a random order of
        the trials is at most `BY_CHANCE`. In a table with only one label, or with only one trial in each recording,
        this probability is 1, so the result is False.
    """
    if not len(table):
        return False
    group_n = group_recordings(table)
    pairs = np.unique(np.stack([group_n, table.labels_n]), axis=1)
    if pairs.shape[1] > group_n.max() + 1:
        return False
    _, label_n = np.unique(table.labels_n, return_inverse=True)
    share_L = np.bincount(label_n) / len(table)
    # In a random order, all n trials of a recording have a given label with the probability share ** n, where share is
    # the label's share of all trials. Add these probabilities over the labels.
    chance = [np.log((share_L**n).sum()) for n in np.bincount(group_n)]
    return bool(np.sum(chance) <= np.log(BY_CHANCE))


def derange_within(groups_n: ArrayLike, images_n: ArrayLike, seed: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give each trial the EEG of another trial of its group; if possible, the two trials show different images.

    Parameters
    ----------
    groups_n : array, shape (n,)
        Group of each trial: its neighbourhood (`find_neighbourhoods`), recording, session or person.
    images_n : array, shape (n,)
        Image of each trial.
    seed : int
        Seed of the random numbers.

    Returns
    -------
    order_n : ndarray of int, shape (n,)
        A permutation of the trials: trial i gets the EEG of trial ``order_n[i]`` of the same group. As many trials as
        possible get the EEG of another image.
    alone_n : ndarray of bool, shape (n,)
        True for a trial that is alone in its group and keeps its own EEG. The caller must leave these trials out of the
        control, and report their number. The array does not mark trials that got the EEG of another trial with the same
        image; ``images_n[order_n] == images_n`` finds them.
    """
    groups, group_n = np.unique(np.asarray(groups_n), return_inverse=True)
    _, image_n = np.unique(np.asarray(images_n), return_inverse=True)
    rng = np.random.default_rng([seed, len(group_n)])
    order_n = np.arange(len(group_n))
    alone_n = np.bincount(group_n, minlength=len(groups))[group_n] == 1
    # Sort the trials by group, and within a group by image: the images are in random order, and so are the trials of an
    # image. In a group of `size` trials, a cyclic shift by s trials then gives every trial another image if no image
    # has more than s trials or more than size - s trials.
    rank = rng.permutation(int(image_n.max(initial=-1)) + 1)
    rows_n = np.lexsort((rng.permutation(len(group_n)), rank[image_n], group_n))
    for start, stop in _runs(group_n[rows_n]):
        rows, size = rows_n[start:stop], stop - start
        most = int(np.unique(image_n[rows], return_counts=True)[1].max())
        if size > 1:
            shift = int(rng.integers(most, size - most + 1)) if 2 * most <= size else most % size or 1
            order_n[rows] = np.roll(rows, -shift)
    return order_n, alone_n
