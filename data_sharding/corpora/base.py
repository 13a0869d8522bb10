"""The config of a corpus, the base class of adapters, and the dictionary of all kinds of corpora."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from data_sharding.common.config_errors import find_fault
from data_sharding.common.errors import one_line, show
from data_sharding.common.reason import Reason
from data_sharding.common.untrusted import MAX_NAME, MAX_TEXT, check_text
from data_sharding.corpora.item import Item
from data_sharding.corpora.patch import patch_signal
from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import Signal
from data_sharding.processing.preprocess import check_line_freq

ADAPTERS: dict[str, Adapter] = {}
"""Dictionary from the name of each kind of corpus to its adapter."""
TRIAL_TEXTS = {**dict.fromkeys(("image_id", "label_name", "concept", "block"), MAX_NAME), "caption": MAX_TEXT}
"""Largest number of characters of each text of a trial."""
COMMON_KEYS = ("kind", "root", "name", "line_freq", "license", "options")
"""Config keys that are valid for every kind of corpus."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A corpus: a collection of recordings."""

    RENAMED: ClassVar[dict[str, str]] = {"trial_offset": "tmin"}

    kind: str = "folder"
    """Kind of the corpus. folder: continuous recordings, which are cut into windows. events: recordings, each with a
    table of the images that were shown; every trial becomes a sample. bids: a BIDS dataset with its sidecar files.
    eeg_imagenet: the released files of EEG-ImageNet. things_eeg2: the released files of THINGS-EEG2. arrays: .npy,
    .npz or .mat files, each described by a JSON or YAML file."""
    root: str
    """Folder that contains the recordings. ${NAME} is replaced by the value of the environment variable NAME."""
    name: str = ""
    """Name of the corpus in the ledger. If empty, the corpus of a recording has the name of the first folder below root
    in the recording's path, or the name of root if the recording is directly in root."""
    images: str = ""
    """Folder of the images, for corpora of EEG and images. Paths of images are relative to the folder of the images."""
    tmin: float | None = None
    """Start of each stored trial, in seconds from the onset of its image. If empty, a trial is stored from 0.2 s before
    the onset, or from the start of its epoch if the recording consists of epochs. Models read a trial from its onset,
    or from tmin if tmin is later."""
    tmax: float | None = None
    """End of each stored trial, in seconds from the onset of its image. If empty, a trial is stored to the end of the
    window that models read, or to the end of its epoch if the recording consists of epochs."""
    stimulus_delay_ms: float = 0.0
    """Delay in milliseconds from the trigger (the onset in the events) to the appearance of the image on the screen.
    The delay is added to every onset."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to ignore, relative to root."""
    unit_factors: dict[str, float] = field(default_factory=dict)
    """Dictionary from glob patterns of paths, relative to root, to factors. If a recording matches a pattern, its
    values times the factor of this pattern are volts. Use this key for recordings that were quarantined because of an
    unknown unit."""
    line_freq: float | None = None
    """Mains frequency in Hz. If empty, the frequency is read from the recording's file, or found in the spectrum."""
    subject_pattern: str = ""
    """Regular expression that finds the subject in the path below root. The expression must have the named group
    'subject', and may have the named group 'session'. If empty, subjects are recognised from the paths and the headers,
    and the job prints these subjects. A recording for which no subject is found is treated as a separate subject."""
    subjects: str = ""
    """Table (.tsv or .csv) of the subjects. A row finds its recordings by the column 'path' (a path below root, or a
    glob pattern) or by the column 'patient' (the patient code in EDF headers). The column 'subject' contains the name
    of the subject. The columns age, sex and group are optional."""
    salt_variable: str = ""
    """Name of an environment variable that contains a secret text. The names and numbers of patients in headers are
    hashed with this secret text. Without a secret text, a person who knows a patient's number can find the patient in
    the dataset."""
    license: str = ""
    """Licence of the corpus, such as CC-BY-4.0. If empty, the licence in dataset_description.json of a BIDS dataset is
    used."""
    intracranial: bool = False
    """If true, intracranial EEG is used as well: recordings with ECoG, iEEG or SEEG in the path, and channels of the
    types SEEG, ECOG and DBS. By default, intracranial recordings are excluded, and intracranial channels are left
    out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that are valid only for this kind of corpus. The file docs/corpora.md lists all options."""

    def __post_init__(self) -> None:
        # The messages below do not say which corpus is wrong, because the caller adds the index of the corpus in the
        # list.
        adapter = ADAPTERS.get(self.kind)
        if adapter is None:
            near = difflib.get_close_matches(self.kind, ADAPTERS, n=1)
            hint = f"did you mean '{near[0]}'? The" if near else "the"
            raise ValueError(f"unknown kind '{self.kind}'; {hint} kinds are {', '.join(sorted(ADAPTERS))}")
        for entry in dataclasses.fields(self):
            if entry.name in COMMON_KEYS or entry.name in adapter.keys:
                continue
            default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()  # type: ignore[misc]
            if getattr(self, entry.name) != default:
                others = sorted(kind for kind, other in ADAPTERS.items() if entry.name in other.keys)
                raise ValueError(
                    f"the key '{entry.name}' does not belong to kind {self.kind}; remove it, or use a kind that has it "
                    f"({', '.join(others)})"
                )
        if self.tmin is not None and self.tmax is not None and self.tmax <= self.tmin:
            raise ValueError(f"the key 'tmax' ({self.tmax:g} s) must be later than 'tmin' ({self.tmin:g} s)")
        if self.line_freq is not None:
            check_line_freq(self.line_freq, "line_freq")
        if abs(self.stimulus_delay_ms) > 1000:
            raise ValueError(
                f"the key 'stimulus_delay_ms' is {self.stimulus_delay_ms:g}, which is more than a second; give the "
                "delay in milliseconds, at most 1000"
            )
        if adapter.needs_images and not self.images:
            raise ValueError(f"the key 'images' is missing; kind {self.kind} needs the folder of the images")
        try:
            groups = re.compile(self.subject_pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"subject_pattern '{self.subject_pattern}' is not a valid regular expression ({error})"
            ) from None
        if self.subject_pattern and "subject" not in groups:
            raise ValueError(
                f"subject_pattern '{self.subject_pattern}' has no group (?P<subject>...); put this group around "
                "the name of the subject"
            )
        adapter.read_options(self)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Empty dataclass for kinds of corpora that have no options."""


class Adapter:
    """Base class of adapters. Each kind of corpus has one adapter, which lists the recordings and opens them."""

    kind: ClassVar[str] = ""
    """Name of the kind. The decorator `register` sets this name."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of `CorpusConfig` that are valid for this kind, in addition to `COMMON_KEYS`."""
    needs_images: ClassVar[bool] = False
    """Whether this kind of corpus requires the key 'images'."""
    options: ClassVar[type] = NoOptions
    """Dataclass of the options that are valid only for this kind."""

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings of a corpus.

        Parameters
        ----------
        config : CorpusConfig
            Config of the corpus.

        Returns
        -------
        list of Item
            Recordings, sorted by path. The list includes recordings that cannot be used, with the reason.

        Raises
        ------
        RequestError
            If a folder or a file of the corpus is missing or wrong, and the user can correct it.
        """
        raise NotImplementedError

    def open(self, item: Item) -> Signal:
        """Open a recording whose files are on a local disk.

        Parameters
        ----------
        item : Item
            One of the recordings that `items` returned. The files in `recording` must be on a local disk.

        Returns
        -------
        Signal
            Signal of the recording.

        Raises
        ------
        ReadError
            If the recording cannot be read. The error contains the reason for the ledger.
        """
        return patch_signal(open_signal(item.recording), item.info_patch)

    def design(self, config: CorpusConfig, measured: tuple[str, str]) -> tuple[str, str]:
        """Return whether the experiment showed the categories in blocks or in random order.

        Parameters
        ----------
        config : CorpusConfig
            Config of the corpus.
        measured : tuple of (str, str)
            Result of `data_sharding.corpora.design.measure_order` for the trials of the corpus: the design (block,
            random or unknown), and a sentence with the evidence.

        Returns
        -------
        tuple of (str, str)
            The design and the evidence. By default, the result is `measured`. If the design of a corpus is published,
            the adapter returns the published design.
        """
        return measured

    def read_options(self, config: CorpusConfig) -> Any:
        """Read the options of a config into the dataclass of this kind of corpus.

        Parameters
        ----------
        config : CorpusConfig
            Config of the corpus.

        Returns
        -------
        object
            An instance of the dataclass in `options`.

        Raises
        ------
        ValueError
            If an option is unknown or has a wrong value. The message names the option.
        """
        known = [entry.name for entry in dataclasses.fields(self.options)]
        for name in config.options:
            if name in getattr(self.options, "RENAMED", {}):
                raise ValueError(f"kind {self.kind} has no option '{name}' any more; {self.options.RENAMED[name]}")
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean '{near[0]}'? The" if near else "the"
                which = f"{hint} options are {', '.join(known)}" if known else "this kind has no options"
                raise ValueError(f"unknown option '{name}' for kind {self.kind}; {which}")
        if fault := find_fault(self.options, config.options, "options"):
            raise ValueError(fault)
        if not config.options:
            return self.options()
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(self.options, nested_key=None)
        try:
            return self.options(**vars(parser.parse_object(dict(config.options))))
        except Exception as error:  # jsonargparse and the dataclass raise different types of errors.
            raise ValueError(f"options: {one_line(error)}") from None


AdapterType = TypeVar("AdapterType", bound=Adapter)


def register(kind: str) -> Callable[[type[AdapterType]], type[AdapterType]]:
    """Make a decorator that adds an adapter class to `ADAPTERS`, the dictionary of all kinds of corpora.

    Parameters
    ----------
    kind : str
        Name of the kind, as in the key 'kind' of the config.

    Returns
    -------
    callable
        Decorator for a subclass of `Adapter`.
    """

    def enter(cls: type[AdapterType]) -> type[AdapterType]:
        cls.kind = kind
        ADAPTERS[kind] = cls()
        return cls

    return enter


def list_items(config: CorpusConfig) -> list[Item]:
    """List all recordings of a corpus.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.

    Returns
    -------
    list of Item
        Recordings, sorted by path. A recording that cannot be used is in the list as well, with the reason in
        `Item.reason` or in the `problem` of its `Recording`.

    Raises
    ------
    RequestError
        If a folder is missing or contains no recording; for a corpus with images, also if no recording has a trial, or
        if an image is missing.
    """
    given = {"license": config.license} if config.license else {}
    return [
        dataclasses.replace(_check_texts(item, config), kind=config.kind, about=item.about | given)
        for item in ADAPTERS[config.kind].items(config)
    ]


def _check_texts(item: Item, config: CorpusConfig) -> Item:
    """Exclude a recording if the name or the caption of one of its trials is too long for a dataset.

    Raises
    ------
    RequestError
        If the name of the subject or of the session is too long for the ledger.
    """
    for what in ("subject", "session"):
        check_text(getattr(item, what), f"{config.root}, recording '{show(item.path)}'", f"the {what}")
    for trial in item.trials or ():
        for what, most in TRIAL_TEXTS.items():
            if len(text := getattr(trial, what)) > most:
                detail = f"the {what} of a trial has {len(text)} characters; at most {most} characters are allowed"
                return dataclasses.replace(item, trials=(), reason=Reason("text too long", detail))
    return item


def open_item(item: Item) -> Signal:
    """Open a recording whose files are on a local disk.

    Parameters
    ----------
    item : Item
        One of the recordings that `list_items` returned. If the corpus is on an object store, the paths in `recording`
        must be the paths of local copies of the files.

    Returns
    -------
    Signal
        Signal of the recording, with all information that the corpus has about the recording.

    Raises
    ------
    NotContinuous
        If the files can be read, but contain no continuous signal.
    ReadError
        If the recording cannot be read. Like `NotContinuous`, `ReadError` contains the reason for the ledger.

    Notes
    -----
    Some readers crash the whole process if a file is damaged, so call this function in a child process.
    """
    return ADAPTERS[item.kind].open(item)
