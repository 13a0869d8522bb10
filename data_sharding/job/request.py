"""The config of a sharding job, and the plan made from it without opening any recording."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_sharding.audit.hold_back import HoldBack, HoldBackConfig
from data_sharding.common.config import to_dict
from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.storage import AnyPath, as_path, describe, file_state, is_storage_error
from data_sharding.corpora import CorpusConfig, Item, describe_design, list_items
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.cluster import RayConfig
from data_sharding.processing.preprocess import PreprocessSpec

FileState = tuple[int, int, str]
"""Size in bytes, time of the last change in nanoseconds, and the checksum of an object store."""


@dataclass(kw_only=True)
class ShardConfig:
    """Make a dataset of WebDataset shards from EEG recordings of any format."""

    corpora: list[CorpusConfig]
    """The corpora: a list, in which each entry names a folder of recordings and its kind."""
    output: str
    """Folder of the dataset, or a URL such as s3://bucket/folder. A finished dataset in it is never replaced."""
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    """Sampling rate, band, reference and window. They are stored in the dataset and in every encoder trained on it."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which subjects and images are held out for validation and test."""
    hold_back: HoldBackConfig = field(default_factory=HoldBackConfig)
    """Recordings, subjects and datasets (such as benchmarks) that must not enter the dataset."""
    samples_per_shard: int = 4096
    """Largest number of samples in a shard."""
    allowed_set_aside: float = 0.05
    """If a larger share of the recordings is quarantined, the job ends with exit code 3."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray cluster on which the job runs, and limits for each recording."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora: the list is empty; name at least one corpus")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if not 0 <= self.allowed_set_aside <= 1:
            raise ValueError(f"allowed_set_aside is a share between 0 and 1, got {self.allowed_set_aside}")


@dataclass(kw_only=True)
class Plan:
    """Everything that is known before any recording is opened."""

    items: dict[str, Item]
    """Recordings by key."""
    states: dict[str, list[FileState]]
    """State of each file of a recording, by the recording's key. The files are looked up only once."""
    labels: list[str]
    """Names of the labels; the number of a label is its place in this list."""
    request: str
    """Checksum of the config and the list of files, by which a finished dataset is recognised."""
    hold_back: HoldBack
    """What is held back, with the recordings that its names match."""
    corpora: list[dict[str, str]] = field(default_factory=list)
    """For each corpus, the order in which it shows categories (`data_sharding.corpora.design.describe_design`)."""
    images: dict[str, FileState] = field(default_factory=dict)
    """State of each image file, by path."""

    def size(self, key: str) -> int:
        """Return the size of a recording.

        Parameters
        ----------
        key : str
            The recording.

        Returns
        -------
        int
            Bytes of all its files together.
        """
        return sum(max(size, 0) for size, _, _ in self.states[key])

    def identity(self, key: str, settings: str) -> str:
        """Return a checksum of everything that the result of a recording depends on.

        Parameters
        ----------
        key : str
            The recording.
        settings : str
            Checksum of the settings that are the same for all recordings.

        Returns
        -------
        str
            The checksum. It changes when a file changes its size, its time or its checksum on an object store.
        """
        item = self.items[key]
        shown = sorted({t.image for t in item.trials or ()})
        value = [settings, _content(item), self.states[key], [self.images.get(image) for image in shown]]
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _content(item: Item) -> dict[str, Any]:
    """Return the content of an item for a checksum; `dataclasses.asdict` would copy every trial."""
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    recording = item.recording
    values["recording"] = [recording.format, [str(f) for f in recording.files], recording.problem]
    values["trials"] = None if item.trials is None else [list(vars(trial).values()) for trial in item.trials]
    return values


def reduce_config(config: ShardConfig) -> dict[str, Any]:
    """Return the part of the config that determines the dataset.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    dict
        Plain JSON types, without the keys output, ray and allowed_set_aside.
    """
    values = to_dict(config)
    for key in ("output", "ray", "allowed_set_aside"):
        values.pop(key)
    return values


def refuse_memory(text: str, key: str) -> None:
    """Refuse a path in fsspec's memory, which other processes cannot see.

    Parameters
    ----------
    text : str
        A path of the config.
    key : str
        The config's key, for the message.

    Raises
    ------
    RequestError
        If the path begins with ``memory://``.
    """
    if text.startswith("memory://"):
        raise RequestError(
            f"{key} '{text}': is in the memory of one process, where the job's workers cannot see it; "
            "give a folder or an object store"
        )


def resolve_output(output: str) -> AnyPath:
    """Return the path of the dataset.

    Parameters
    ----------
    output : str
        The path as it is written in the config.

    Returns
    -------
    Path or UPath
        An absolute path, because workers have other working directories.

    Raises
    ------
    RequestError
        If workers cannot reach it.
    """
    refuse_memory(output, "output")
    path = as_path(output)
    return path if "://" in output and not output.startswith("file:") else path.resolve()


def _states(files: Iterable[AnyPath]) -> list[FileState]:
    """Return the states of files. A file that cannot be looked up gets a stand-in; its worker will find the reason."""
    states = []
    for file in files:
        try:
            states.append(file_state(file))
        except Exception as error:
            if not is_storage_error(error):
                raise
            states.append((-1, 0, describe(error)))
    return states


def make_plan(config: ShardConfig) -> Plan:
    """Find the recordings, and check everything that can be checked without opening them.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    Plan
        The recordings and everything that is known about them.

    Raises
    ------
    RequestError
        If a corpus is missing or empty, a corpus of images has no trials, two recordings have the same key, or no
        subject is left for training.
    """
    items: dict[str, Item] = {}
    designs: list[dict[str, str]] = []
    for corpus in config.corpora:
        refuse_memory(corpus.root, "corpora: root")
        listed = list_items(corpus)
        designs.append(describe_design(corpus, listed))
        for item in listed:
            if item.key in items:
                raise RequestError(
                    f"corpora: '{item.path}' of corpus '{item.corpus}' is listed twice; give the corpora "
                    "different names, or take one of them out"
                )
            items[item.key] = item
    hold_back = HoldBack.plan(config.hold_back, items.values())
    if config.hold_back.datasets:
        items = {item.key: item for item in hold_back.drop_held_back_images(list(items.values()))}
    usable = [item for item in items.values() if item.recording.problem is None and item.reason is None]
    config.split.check_subjects({item.subject for item in usable})
    shown = [(item, trial) for item in usable for trial in item.trials or ()]
    continuous = any(item.trials is None for item in usable)
    if (
        shown
        and not continuous
        and not any(config.split.trial(i.subject, t.image_id, t.split, t.concept) == "train" for i, t in shown)
    ):
        raise RequestError(
            "split: no trial is left for train, because no training subject saw a training image; change the split"
        )
    states = {key: _states(item.recording.files) for key, item in items.items()}
    listing = [
        [key, [[f.name, state[0]] for f, state in zip(item.recording.files, states[key], strict=True)]]
        for key, item in sorted(items.items())
    ]
    trials = [
        [key, [[t.onset, t.image_id, t.label_name, t.caption, t.split, t.concept, t.segment] for t in i.trials or ()]]
        for key, i in sorted(items.items())
    ]
    images = {path: _states([as_path(path)])[0] for path in sorted({t.image for _, t in shown if t.image})}
    return Plan(
        items=items,
        states=states,
        labels=sorted({trial.label_name for _, trial in shown}),
        request=digest_of(
            {"config": reduce_config(config), "files": listing, "trials": trials, "hold_back": hold_back.identity}
        ),
        hold_back=hold_back,
        corpora=designs,
        images=images,
    )
