"""What all kinds of corpora share: the config, the interface of an adapter, and the table of kinds."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from data_sharding.common.config_errors import find_fault
from data_sharding.common.errors import one_line
from data_sharding.corpora.item import Item
from data_sharding.corpora.patch import patch_signal
from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import Signal

ADAPTERS: dict[str, Adapter] = {}
"""One adapter for each kind of corpus, by the name of the kind."""
COMMON_KEYS = ("kind", "root", "name", "line_freq", "options")
"""Keys that every kind of corpus has."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A collection of recordings."""

    kind: str = "folder"
    """folder: continuous recordings, cut into windows. events: recordings with a table of the images shown beside
    each; every trial becomes a sample. bids: a BIDS dataset with its sidecars. eeg_imagenet, things_eeg2: these two
    published datasets as they are released. arrays: .npy, .npz or .mat files, each described by a JSON or YAML
    file."""
    root: str
    """Folder with the recordings. ${NAME} is replaced by the environment variable NAME."""
    name: str = ""
    """Name of the corpus in the ledger. Empty: the first folder below root in which the recording is, or the name of
    root."""
    images: str = ""
    """Folder of the images, for corpora of EEG and images; the names of images are relative to it."""
    trial_offset: float = 0.0
    """Seconds from an image's onset to the start of its window."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to ignore, relative to root."""
    unit_factors: dict[str, float] = field(default_factory=dict)
    """For recordings that were set aside as 'unit unknown': a glob pattern relative to root, and the factor that the
    values (read as volts) must be multiplied by to become true volts."""
    line_freq: float | None = None
    """Mains frequency in Hz. Empty: taken from the file, or else from the spectrum."""
    subject_pattern: str = ""
    """Regular expression that is searched in the path below root, with the named group 'subject' and optionally
    'session'. Empty: the BIDS parts sub-X and ses-X; without them, every recording is a subject of its own."""
    intracranial: bool = False
    """Also use recordings whose path contains ECoG, iEEG or SEEG. By default they are excluded."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that only this kind of corpus has; docs/corpora.md lists them."""

    def __post_init__(self) -> None:
        # Messages do not name the corpus: whoever reads the config knows its place in the list and adds it.
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
        if adapter.needs_images and not self.images:
            raise ValueError(f"kind {self.kind} needs the key 'images', the folder of the images")
        try:
            groups = re.compile(self.subject_pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"subject_pattern '{self.subject_pattern}' is not a valid regular expression ({error})"
            ) from None
        if self.subject_pattern and "subject" not in groups:
            raise ValueError(f"subject_pattern '{self.subject_pattern}' needs a group (?P<subject>...)")
        adapter.read_options(self)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a kind of corpus that has none."""


class Adapter:
    """A kind of corpus: lists the recordings and opens them."""

    kind: ClassVar[str] = ""
    """Name of the kind; set by `register`."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of `CorpusConfig` that this kind uses, in addition to `COMMON_KEYS`."""
    needs_images: ClassVar[bool] = False
    """Whether the key 'images' is required."""
    options: ClassVar[type] = NoOptions
    """Dataclass of the options that only this kind has."""

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings of a corpus.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.

        Returns
        -------
        list of Item
            Sorted by path. Recordings that cannot be used are among them, with the reason.

        Raises
        ------
        RequestError
            If something is missing that the user can repair.
        """
        raise NotImplementedError

    def open(self, item: Item) -> Signal:
        """Open a recording whose files are on a local disk.

        Parameters
        ----------
        item : Item
            One of `items`, with `recording` on a local disk.

        Returns
        -------
        Signal
            The recording.

        Raises
        ------
        ReadError
            If the recording cannot be read, with the reason for the ledger.
        """
        return patch_signal(open_signal(item.recording), item.info_patch)

    def design(self, config: CorpusConfig, measured: tuple[str, str]) -> tuple[str, str]:
        """Say in which order categories were shown.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.
        measured : tuple of (str, str)
            The result of `data_sharding.corpora.design.measure_order` for its trials: the design (block, random or
            unknown), and the evidence in a sentence.

        Returns
        -------
        tuple of (str, str)
            The design and the evidence, with what is known of this kind of corpus beside its trials.
        """
        return measured

    def read_options(self, config: CorpusConfig) -> Any:
        """Read the options of a config into the dataclass of this kind.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.

        Returns
        -------
        object
            An instance of `options`.

        Raises
        ------
        ValueError
            If an option is unknown or has a wrong value; the message names it.
        """
        known = [entry.name for entry in dataclasses.fields(self.options)]
        for name in config.options:
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
        except Exception as error:  # errors of jsonargparse, and the ValueError of the options themselves
            raise ValueError(f"options: {one_line(error)}") from None


AdapterType = TypeVar("AdapterType", bound=Adapter)


def register(kind: str) -> Callable[[type[AdapterType]], type[AdapterType]]:
    """Register a kind of corpus.

    Parameters
    ----------
    kind : str
        Its name, the value of the key 'kind'.

    Returns
    -------
    callable
        Decorator for an `Adapter`.
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
        The corpus.

    Returns
    -------
    list of Item
        Sorted by path. Recordings that cannot be used are among them, with the reason.

    Raises
    ------
    RequestError
        If a folder is missing or holds no recording; for corpora with images also if there is no trial, or if an
        image is missing.
    """
    return [dataclasses.replace(item, kind=config.kind) for item in ADAPTERS[config.kind].items(config)]


def open_item(item: Item) -> Signal:
    """Open a recording whose files are on a local disk.

    Parameters
    ----------
    item : Item
        One of `list_items`; if its corpus is on an object store, with `recording` replaced by local copies.

    Returns
    -------
    Signal
        The recording, with everything that its corpus says about it.

    Raises
    ------
    NotContinuous
        If the files are sound but hold no continuous signal.
    ReadError
        If the recording cannot be read. Both errors carry the reason for the ledger.

    Notes
    -----
    Some readers crash the whole process on a damaged file, so call this in a process that may die.
    """
    return ADAPTERS[item.kind].open(item)
