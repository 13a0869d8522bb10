"""List the trials for which images are generated, with the presentations from whose EEG each image is generated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset


class NotApplicableError(Exception):
    """Raised if a control cannot be made from the data. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial for which an image is generated: the presentations of one image to one subject."""

    key: str
    """Key of the first presentation, which is also the name of the image file."""
    numbers: list[int]
    """Numbers of the trial's presentations in the dataset."""
    source: list[int]
    """Numbers of the presentations from whose EEG the image is generated; empty if no EEG is used."""
    source_keys: list[str]
    """Keys of the presentations in `source`."""
    meta: dict[str, Any]
    """Metadata of the first presentation."""

    def describe(self) -> dict[str, Any]:
        """Return the entry of the trial in generated.json."""
        entry: dict[str, Any] = {
            "key": self.key,
            "eeg_key": self.source_keys[0] if self.source_keys else None,
            "repeats": len(self.source) or len(self.numbers),
            "image_id": self.meta["image_id"],
            "label": self.meta["label"],
            "subject": self.meta["subject"],
            "file": f"images/{self.key}.png",
            "real_file": f"real/{self.key}.png",
        }
        return entry | ({"eeg_keys": self.source_keys} if len(self.source_keys) > 1 else {})


def list_trials(dataset: EEGDataset, groups: list[list[int]], sources: list[list[int]]) -> list[Trial]:
    """Read and check the keys and the metadata of trials.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the split.
    groups : list of list of int
        Groups of presentations of one image to one subject, from `group_repeats`.
    sources : list of list of int
        For each group in `groups`, the presentations from whose mean EEG the image is generated; an empty list if no
        EEG is used.

    Returns
    -------
    list of Trial
        One trial for each group.

    Raises
    ------
    RequestError
        If a key is not a valid file name or occurs twice, or if the metadata have no image_id, label or subject.
    """
    trials: dict[str, Trial] = {}
    for group, source in zip(groups, sources, strict=True):
        key, meta = dataset.key(group[0]), dataset.meta(group[0])
        if key in trials or not {"image_id", "label", "subject"} <= meta.keys():
            fault = "is in the dataset twice" if key in trials else "has no image_id, label or subject"
            raise RequestError(f"{dataset.path}: sample {key} {fault}; make the dataset again")
        source_keys = [dataset.key(number) for number in source]
        trials[key] = Trial(key=key, numbers=group, source=source, source_keys=source_keys, meta=meta)
    return list(trials.values())


def trial_seed(seed: int, key: str) -> int:
    """Return the seed of a trial's noise: 63 bits of a hash of the config's seed and the trial's key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def sample_seed(seed: int, key: str, number: int) -> int:
    """Return the seed of one of a trial's images. Image 0 has the seed of the trial (see `trial_seed`)."""
    return trial_seed(seed, f"sample {number}:{key}" if number else key)


def derange(n: int, seed: int) -> np.ndarray:
    """Draw a random permutation without fixed points; all such permutations are equally likely.

    Parameters
    ----------
    n : int
        Length of the permutation, at least 2.
    seed : int
        Seed for drawing the permutation.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 to n - 1.
    """
    assert n > 1
    rng = np.random.default_rng([seed, n])
    # About one permutation in three has no fixed point, so the loop ends after a few rounds.
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order
