"""What a sharding job is asked to do, checked as far as it can be without opening a recording."""

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
from data_sharding.corpora import CorpusConfig, Item, design_of, list_items
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.cluster import RayConfig
from data_sharding.processing.preprocess import PreprocessSpec

FileState = tuple[int, int, str]
"""Size, time of the last change in nanoseconds, and a store's own checksum."""


@dataclass(kw_only=True)
class ShardConfig:
    """Recordings of any maker to a dataset of WebDataset shards."""

    corpora: list[CorpusConfig]
    """Where the recordings are."""
    output: str
    """Folder of the dataset, or a URL as s3://bucket/folder; a finished different dataset there is never replaced."""
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    """Rate, band, reference and window; stored with the dataset and with every encoder trained on it."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Who and what is held out."""
    hold_back: HoldBackConfig = field(default_factory=HoldBackConfig)
    """Benchmarks that must not enter the dataset."""
    samples_per_shard: int = 4096
    """Most samples a tar."""
    allowed_set_aside: float = 0.05
    """Share of the recordings found that may be quarantined before the job ends with exit code 3."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Where the job runs."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora: the list is empty; name at least one corpus")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if not 0 <= self.allowed_set_aside <= 1:
            raise ValueError(f"allowed_set_aside is a share between 0 and 1, got {self.allowed_set_aside}")


@dataclass(kw_only=True)
class Plan:
    """What is to be done, known before any recording is opened."""

    items: dict[str, Item]
    """Recordings by key."""
    states: dict[str, list[FileState]]
    """States of each recording's files, by key: looked at once."""
    labels: list[str]
    """Names of the labels by number."""
    request: str
    """Checksum of config and file listing: the same for the same request."""
    hold_back: HoldBack
    """What is held back, its names resolved."""
    corpora: list[dict[str, str]] = field(default_factory=list)
    """What is known of each corpus's design."""
    images: dict[str, FileState] = field(default_factory=dict)
    """States of the images shown, by path."""

    def size(self, key: str) -> int:
        """Bytes of a recording's files.

        Parameters
        ----------
        key : str
            The recording.

        Returns
        -------
        int
            Their sum.
        """
        return sum(max(size, 0) for size, _, _ in self.states[key])

    def identity(self, key: str, settings: str) -> str:
        """Checksum of all that a recording's row depends on.

        Parameters
        ----------
        key : str
            The recording.
        settings : str
            Checksum of what is the same for all recordings.

        Returns
        -------
        str
            Another one as soon as a file has changed, by size, time or a store's checksum.
        """
        item = self.items[key]
        shown = sorted({t.image for t in item.trials or ()})
        value = [settings, _content(item), self.states[key], [self.images.get(image) for image in shown]]
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _content(item: Item) -> dict[str, Any]:
    """What an item says, without copying its trials one by one."""
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    recording = item.recording
    values["recording"] = [recording.format, [str(f) for f in recording.files], recording.problem]
    values["trials"] = None if item.trials is None else [list(vars(trial).values()) for trial in item.trials]
    return values


def essence(config: ShardConfig) -> dict[str, Any]:
    """The config without what does not change the dataset.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    dict
        JSON-like.
    """
    values = to_dict(config)
    for key in ("output", "ray", "allowed_set_aside"):
        values.pop(key)
    return values


def refuse_memory(text: str, key: str) -> None:
    """Refuse fsspec's memory for what several processes must see.

    Parameters
    ----------
    text : str
        A path of the config.
    key : str
        The config's key, for the message.

    Raises
    ------
    RequestError
        If it is of ``memory://``.
    """
    if text.startswith("memory://"):
        raise RequestError(
            f"{key} '{text}': lies in the memory of one process, and the job's workers are others; "
            "give a folder or an object store"
        )


def place_of(output: str) -> AnyPath:
    """Where the dataset goes.

    Parameters
    ----------
    output : str
        As in the config.

    Returns
    -------
    Path or UPath
        Absolute: the workers' own folders are others.

    Raises
    ------
    RequestError
        If the workers could not reach it.
    """
    refuse_memory(output, "output")
    path = as_path(output)
    return path if "://" in output and not output.startswith("file:") else path.resolve()


def _states(files: Iterable[AnyPath]) -> list[FileState]:
    """States of files; one that is gone, or that may not be looked at, has its worker find out why."""
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
    """Find the recordings and check everything that can be checked without opening them.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    Plan
        What is to be done.

    Raises
    ------
    RequestError
        If a corpus is missing, empty or unpaired, keys clash, or nobody is left to train on.
    """
    items: dict[str, Item] = {}
    designs: list[dict[str, str]] = []
    for corpus in config.corpora:
        refuse_memory(corpus.root, "corpora: root")
        listed = list_items(corpus)
        designs.append(design_of(corpus, listed))
        for item in listed:
            if item.key in items:
                raise RequestError(
                    f"corpora: '{item.path}' of corpus '{item.corpus}' is listed twice; give the corpora "
                    "different names, or take one of them out"
                )
            items[item.key] = item
    hold_back = HoldBack.plan(config.hold_back, items.values())
    if config.hold_back.datasets:
        items = {item.key: item for item in hold_back.without_images(list(items.values()))}
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
            "split: no trial is left for train: no training subject saw a training image; change the split"
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
            {"config": essence(config), "files": listing, "trials": trials, "hold_back": hold_back.identity}
        ),
        hold_back=hold_back,
        corpora=designs,
        images=images,
    )
