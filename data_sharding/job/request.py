"""The config of a sharding job, and the plan of the job. The plan is made without opening any recording."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_sharding.audit.hold_back import HoldBack, HoldBackConfig
from data_sharding.common.config import to_dict
from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.storage import AnyPath, as_path, describe, file_state, is_remote, is_storage_error
from data_sharding.common.untrusted import MAX_LABELS
from data_sharding.corpora import CorpusConfig, Item, describe_design, list_items
from data_sharding.dataset.shard_reader import LONGEST
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.announce import describe_empty_splits, describe_subjects
from data_sharding.job.cluster import RayConfig
from data_sharding.job.task import WITHOUT_EFFECT
from data_sharding.processing.preprocess import PreprocessSpec

FileState = tuple[int, int, str]
"""Size of a file in bytes, time of its last change in nanoseconds, and for a file on an object store also its
checksum."""


@dataclass(kw_only=True)
class ShardConfig:
    """Make a dataset of WebDataset shards from EEG recordings of any format."""

    corpora: list[CorpusConfig]
    """List of corpora. Each entry contains the path of a folder with recordings, and the kind of the corpus."""
    output: str
    """Folder of the dataset, or a URL such as s3://bucket/folder. If the folder contains a finished dataset, the job
    adds new recordings to it, and withdraws recordings that were removed or have changed."""
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    """Preprocessing: sampling rate, frequency band, reference and window. The preprocessing is stored in the dataset
    and in each encoder that is trained on the dataset."""
    encoder: str = ""
    """Folder of an encoder package that will read the dataset. The preprocessing of the encoder replaces the keys of
    `preprocess`, except for `reject_uv` and `quality`. A window keeps its duration if the encoder can read it."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which subjects and images are held out for validation and test."""
    hold_back: HoldBackConfig = field(default_factory=HoldBackConfig)
    """Recordings, subjects and datasets (such as benchmarks) whose data must not be in the new dataset."""
    samples_per_shard: int = 4096
    """Largest number of samples in a shard."""
    compact: bool = False
    """Remove withdrawn samples: shards with withdrawn samples are written again without these samples. The old shards
    are deleted, so former versions of the dataset cannot be read after this."""
    keep_decoded: bool = False
    """Store the decoded signals on disk, without loss. A later job with another window, frequency band, sampling rate
    or output reads the stored signals instead of the recordings."""
    decoded: str = ""
    """Folder of the decoded signals, on a disk. Jobs with different outputs can use the same folder of decoded signals.
    If the key is empty, the folder 'decoded' next to the output is used."""
    decoded_gb: float = 0.0
    """Largest size of the decoded signals in 10^9 bytes. At the end of a job, the signals that were not used for the
    longest time are deleted until the remaining signals fit. The value 0 means no limit."""
    allowed_set_aside: float = 0.05
    """Largest fraction of the recordings that may be quarantined. If a larger fraction is quarantined, the job ends
    with exit code 3."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The Ray cluster that runs the job, and limits for each recording."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora: the list is empty; name at least one corpus")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if self.decoded_gb < 0:
            raise ValueError(f"decoded_gb must not be negative, got {self.decoded_gb}")
        if not 0 <= self.allowed_set_aside <= 1:
            raise ValueError(f"allowed_set_aside is a fraction between 0 and 1, got {self.allowed_set_aside}")


@dataclass(kw_only=True)
class Plan:
    """All data that the job has before the first recording is opened."""

    items: dict[str, Item]
    """All recordings of the job, by key."""
    states: dict[str, list[FileState]]
    """For the key of each recording: the state of each of its files, that is, size, modification time, and checksum
    from an object store. The state of each file is read only once."""
    labels: list[str]
    """Names of the labels; the number of a label is its index in this list."""
    request: str
    """Checksum of the config, the files, the trials and the subjects. If the finished dataset has the same checksum,
    the job has nothing to do."""
    hold_back: HoldBack
    """Recordings and images that must not be in the dataset."""
    corpora: list[dict[str, str]] = field(default_factory=list)
    """Description of the order in which each corpus showed its categories; see
    `data_sharding.corpora.design.describe_design`."""
    subjects: list[str] = field(default_factory=list)
    """Lines for the terminal about subjects that are unknown or not confirmed; see `describe_subjects`."""
    images: dict[str, FileState] = field(default_factory=dict)
    """State of each image file (see `states`), by the path of the file."""
    corpus_of: dict[str, int] = field(default_factory=dict)
    """Index of the corpus in the config, by the key of the recording."""

    def size(self, key: str) -> int:
        """Return the size of a recording.

        Parameters
        ----------
        key : str
            Key of the recording.

        Returns
        -------
        int
            Total size of the recording's files in bytes.
        """
        return sum(max(size, 0) for size, _, _ in self.states[key])

    def identity(self, key: str, settings: str) -> str:
        """Return a checksum of all values that determine the result of a recording.

        Parameters
        ----------
        key : str
            Key of the recording.
        settings : str
            Checksum of the settings that are the same for all recordings.

        Returns
        -------
        str
            The checksum. The checksum also depends on the size, the modification time and the object-store checksum of
            each file.
        """
        item = self.items[key]
        shown = sorted({t.image for t in item.trials or ()})
        value = [settings, _content(item), self.states[key], [self.images.get(image) for image in shown]]
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _content(item: Item) -> dict[str, Any]:
    """Return a recording's fields as a dictionary for a checksum; `dataclasses.asdict` would copy every trial."""
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name not in WITHOUT_EFFECT}
    recording = item.recording
    values["recording"] = [recording.format, [str(f) for f in recording.files], recording.problem]
    values["trials"] = None if item.trials is None else [list(vars(trial).values()) for trial in item.trials]
    return values


def reduce_config(config: ShardConfig) -> dict[str, Any]:
    """Return the keys of the config that determine the content of the dataset.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    dict
        The config in JSON types. The keys output, encoder, compact, keep_decoded, decoded, decoded_gb, ray and
        allowed_set_aside are left out.
    """
    values = to_dict(config)
    for key in ("output", "encoder", "compact", "keep_decoded", "decoded", "decoded_gb", "ray", "allowed_set_aside"):
        values.pop(key)
    return values


def refuse_memory(text: str, key: str) -> None:
    """Raise an error for a ``memory://`` path, because other processes cannot access such a path.

    Parameters
    ----------
    text : str
        A path of the config.
    key : str
        The key of the config, for the error message.

    Raises
    ------
    RequestError
        If the path begins with ``memory://``.
    """
    if text.startswith("memory://"):
        raise RequestError(
            f"{key} '{text}': is in the memory of one process, so the job's workers cannot access it; "
            "give a folder or an object store"
        )


def resolve_output(output: str) -> AnyPath:
    """Return the path of the dataset's folder.

    Parameters
    ----------
    output : str
        The path as it is written in the config.

    Returns
    -------
    Path or UPath
        The path is absolute, because the workers have other working directories than this process.

    Raises
    ------
    RequestError
        If the workers cannot access the path.
    """
    refuse_memory(output, "output")
    path = as_path(output)
    return path if "://" in output and not output.startswith("file:") else path.resolve()


def resolve_decoded(config: ShardConfig) -> Path | None:
    """Return the folder of the decoded signals.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    Path or None
        An absolute path; None if signals are not kept.

    Raises
    ------
    RequestError
        If the folder is not on a disk, or if the folder is inside the output or inside a corpus.
    """
    if not config.keep_decoded:
        return None
    output = resolve_output(config.output)
    if not config.decoded and is_remote(output):
        raise RequestError(
            "keep_decoded: the output is on an object store; set the key 'decoded' to a folder on a disk"
        )
    path = as_path(config.decoded) if config.decoded else output.parent / "decoded"
    if is_remote(path):
        raise RequestError(f"decoded '{config.decoded}': decoded signals are kept on a disk; give a folder on a disk")
    folder = Path(str(path)).resolve()
    for name, other in [("output", output), *(("corpora: root", as_path(c.root)) for c in config.corpora)]:
        if not is_remote(other) and folder.is_relative_to(Path(str(other)).resolve()):
            raise RequestError(f"decoded '{folder}': is inside {name} '{other}'; choose another folder")
    return folder


def _states(files: Iterable[AnyPath]) -> list[FileState]:
    """Return each file's size, time and checksum; a placeholder for an unreadable file (a worker reports the error)."""
    states = []
    for file in files:
        try:
            states.append(file_state(file))
        except Exception as error:
            if not is_storage_error(error):
                raise
            states.append((-1, 0, describe(error)))
    return states


def check_trial_span(where: str, corpus: CorpusConfig, spec: PreprocessSpec) -> None:
    """Raise an error if the trials of a corpus are too short for the window that models read, or too long to store.

    Parameters
    ----------
    where : str
        Name of the corpus in the config, for the error message.
    corpus : CorpusConfig
        Config of the corpus.
    spec : PreprocessSpec
        Settings of the preprocessing, with the length of the window.

    Raises
    ------
    RequestError
        If `tmax` is too early, or if the trials would be too long to store.
    """
    begin = max(corpus.tmin or 0.0, 0.0)
    if corpus.tmax is not None and spec.to_samples(corpus.tmax) - spec.to_samples(begin) < spec.window:
        raise RequestError(
            f"{where}: tmax {corpus.tmax:g} is too early, because models read {spec.window_s:g} s from {begin:g} s on; "
            f"set tmax to {begin + spec.window_s:g} or later, or shorten preprocess.window ({spec.window} samples)"
        )
    longest = LONGEST / spec.sfreq
    if max(-(corpus.tmin or 0.0), 0.0) + max(corpus.tmax or 0.0, 0.0) > longest:
        raise RequestError(
            f"{where}: 'tmin' and 'tmax' make trials too long; a stored trial has at most {longest:g} s, so set 'tmin' "
            "and 'tmax' closer together"
        )


def make_plan(config: ShardConfig) -> Plan:
    """Find the recordings, and make all checks that do not open any recording.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    Plan
        The recordings, and all data about them that is available before they are opened.

    Raises
    ------
    RequestError
        If a corpus is missing or empty, a corpus of images has no trials, two recordings have the same key, or no
        subject is left for training.
    """
    items: dict[str, Item] = {}
    designs: list[dict[str, str]] = []
    lines: list[str] = []
    corpus_of: dict[str, int] = {}
    for number, corpus in enumerate(config.corpora):
        refuse_memory(corpus.root, "corpora: root")
        check_trial_span(f"corpora[{number}]", corpus, config.preprocess)
        listed = list_items(corpus)
        designs.append(describe_design(corpus, listed))
        lines += describe_subjects(corpus, listed)
        for item in listed:
            if item.key in items:
                raise RequestError(
                    f"corpora: '{item.path}' of corpus '{item.corpus}' exists twice; give the corpora "
                    "different names, or remove one of them"
                )
            items[item.key] = item
            corpus_of[item.key] = number
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
    if config.split.by_subject:
        lines += describe_empty_splits(config.split, usable)
    people = [[key, item.subject, item.subject_from, item.about] for key, item in sorted(items.items())]
    images = {path: _states([as_path(path)])[0] for path in sorted({t.image for _, t in shown if t.image})}
    labels = sorted({trial.label_name for _, trial in shown})
    if len(labels) > MAX_LABELS:
        raise RequestError(
            f"corpora: the trials have {len(labels)} different labels; at most {MAX_LABELS} labels are allowed, so use "
            "categories of images as labels"
        )
    return Plan(
        items=items,
        states=states,
        labels=labels,
        request=digest_of(
            {
                "config": reduce_config(config),
                "files": listing,
                "people": people,
                "trials": trials,
                "hold_back": hold_back.identity,
            }
        ),
        hold_back=hold_back,
        corpora=designs,
        subjects=lines,
        images=images,
        corpus_of=corpus_of,
    )
