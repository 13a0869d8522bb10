"""What every kind of corpus shares: its config, what it lists, and the table of kinds."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from data_sharding.common.errors import one_line
from data_sharding.corpora.item import Item
from data_sharding.corpora.patch import patched
from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import Signal

ADAPTERS: dict[str, Adapter] = {}
"""Kinds of corpora by name."""
COMMON_KEYS = ("kind", "root", "name", "line_freq", "options")
"""Keys that every kind knows."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A collection of recordings."""

    kind: str = "folder"
    """folder: continuous recordings, cut into windows. events: beside each recording a table of the images shown, one
    sample a trial. bids: a BIDS dataset with its sidecars. eeg_imagenet, things_eeg2: those published sets as they are
    released. arrays: .npy, .npz or .mat files, each described by a JSON or YAML file."""
    root: str
    """Folder with the recordings; ${NAME} stands for an environment variable."""
    name: str = ""
    """Name in the ledger; empty: the first folder below root that a recording lies in, or root's own name."""
    images: str = ""
    """Folder that the images' names are relative to; for corpora of EEG and images."""
    trial_offset: float = 0.0
    """Seconds from an image's onset to the start of its window."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns, relative to root, of what is not looked at."""
    unit_factors: dict[str, float] = field(default_factory=dict)
    """Glob pattern, relative to root, to the factor that brings a recording's values, read as volts, to volts.
    For recordings that were set aside as 'unit unknown'."""
    line_freq: float | None = None
    """Mains frequency in Hz; empty: from the file, else from the spectrum."""
    subject_pattern: str = ""
    """Regular expression with the named groups 'subject' and, if wanted, 'session', searched in the path relative to
    root. Empty: BIDS parts sub-X and ses-X, else every recording is a subject of its own."""
    intracranial: bool = False
    """Take recordings whose path names them ECoG, iEEG or SEEG, too; they are excluded otherwise."""
    options: dict[str, Any] = field(default_factory=dict)
    """What only this kind of corpus knows; docs/corpora.md lists the keys."""

    def __post_init__(self) -> None:
        adapter = ADAPTERS.get(self.kind)
        if adapter is None:
            near = difflib.get_close_matches(self.kind, ADAPTERS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(ADAPTERS))}"
            raise ValueError(f"corpora: '{self.root}' has the unknown kind '{self.kind}'; {hint}")
        for entry in dataclasses.fields(self):
            if entry.name in COMMON_KEYS or entry.name in adapter.keys:
                continue
            default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()  # type: ignore[misc]
            if getattr(self, entry.name) != default:
                others = sorted(kind for kind, other in ADAPTERS.items() if entry.name in other.keys)
                raise ValueError(
                    f"corpora: '{self.root}' has the key '{entry.name}' but is of kind {self.kind}; "
                    f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it"
                )
        if adapter.needs_images and not self.images:
            raise ValueError(
                f"corpora: '{self.root}' is of kind {self.kind} and needs the key 'images', the folder of the images"
            )
        try:
            groups = re.compile(self.subject_pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"corpora: subject_pattern '{self.subject_pattern}' is no regular expression ({error})"
            ) from None
        if self.subject_pattern and "subject" not in groups:
            raise ValueError(f"corpora: subject_pattern '{self.subject_pattern}' needs a group (?P<subject>...)")
        adapter.read_options(self)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Kinds of corpora without options of their own."""


class Adapter:
    """A kind of corpus: lists its recordings, and opens them."""

    kind: ClassVar[str] = ""
    """Filled in by `register`."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of `CorpusConfig`, beside those that every kind knows, that mean something here."""
    needs_images: ClassVar[bool] = False
    """Whether the key 'images' must be there."""
    options: ClassVar[type] = NoOptions
    """Dataclass of the kind's own options."""

    def items(self, config: CorpusConfig) -> list[Item]:
        """All recordings of a corpus.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.

        Returns
        -------
        list of Item
            Sorted by path; those that cannot be used are among them, with the reason.

        Raises
        ------
        RequestError
            If something is missing that the user can mend.
        """
        raise NotImplementedError

    def open(self, item: Item) -> Signal:
        """Open a recording whose files are on a local disk.

        Parameters
        ----------
        item : Item
            Of `items`, with `recording` on a local disk.

        Returns
        -------
        Signal
            The recording.

        Raises
        ------
        readers.ReadError
            With the reason for the ledger.
        """
        return patched(open_signal(item.recording), item.info_patch)

    def design(self, config: CorpusConfig, measured: tuple[str, str]) -> tuple[str, str]:
        """Say in which order categories were shown.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.
        measured : tuple of (str, str)
            What the order of its trials shows (`data_sharding.corpora.design.order_of`): the design (block, random or
            unknown), and the evidence in a sentence.

        Returns
        -------
        tuple of (str, str)
            The design and the evidence, with what is known of this kind of corpus beside its trials.
        """
        return measured

    def read_options(self, config: CorpusConfig) -> Any:
        """Options of a config in the kind's own dataclass.

        Parameters
        ----------
        config : CorpusConfig
            The corpus.

        Returns
        -------
        object
            An `Adapter.options`.

        Raises
        ------
        ValueError
            Naming the option that is unknown or has a bad value.
        """
        known = [entry.name for entry in dataclasses.fields(self.options)]
        for name in config.options:
            if name not in known:
                what = f"its options are {', '.join(known)}" if known else "it has no options"
                raise ValueError(f"corpora: '{config.root}' has the option '{name}' but is of kind {self.kind}; {what}")
        if not config.options:
            return self.options()
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(self.options, nested_key=None)
        try:
            return self.options(**vars(parser.parse_object(dict(config.options))))
        except Exception as error:  # jsonargparse's own errors, and the options' ValueError
            raise ValueError(f"corpora: '{config.root}', options: {one_line(error)}") from None


AdapterType = TypeVar("AdapterType", bound=Adapter)


def register(kind: str) -> Callable[[type[AdapterType]], type[AdapterType]]:
    """Make a kind of corpus known.

    Parameters
    ----------
    kind : str
        The word for the key 'kind'.

    Returns
    -------
    callable
        Decorator of an `Adapter`.
    """

    def enter(cls: type[AdapterType]) -> type[AdapterType]:
        cls.kind = kind
        ADAPTERS[kind] = cls()
        return cls

    return enter


def list_items(config: CorpusConfig) -> list[Item]:
    """All recordings of a corpus.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.

    Returns
    -------
    list of Item
        Sorted by path; recordings that cannot be used are among them, with the reason.

    Raises
    ------
    RequestError
        If a folder is missing, there is no recording, or (with images) no trial or an image that is not there.
    """
    return [dataclasses.replace(item, kind=config.kind) for item in ADAPTERS[config.kind].items(config)]


def open_item(item: Item) -> Signal:
    """Open a recording whose files are on a local disk.

    Parameters
    ----------
    item : Item
        Of `list_items`; where its corpus is remote, with `recording` replaced by local files.

    Returns
    -------
    Signal
        The recording, with what its corpus says about it.

    Raises
    ------
    readers.NotContinuous
        If it is sound, but holds no signal to train on.
    readers.ReadError
        With the reason for the ledger.

    Notes
    -----
    Some readers can take the process down on a damaged file. Call this where that is survivable.
    """
    return ADAPTERS[item.kind].open(item)
