"""Formats that fit into one file: each module of this folder describes one format as ``FORMAT``.

A new format is a new file here. `data_sharding.formats.sniffing` asks it whether a file has this format, and
`data_sharding.formats.open_signal` opens the file with it. Import heavy libraries inside the functions.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format of EEG recordings."""

    name: str
    """Name of the format in the ledger."""
    recognise: Callable[[Any], Any]
    """Takes a `sniffing.File`; returns ``file.recording(name, ...)``, or None if the file has another format.

    The header should decide, not the name of the file. The formats that `sniffing` knows are asked first. If the suffix
    is that of this format but the header is damaged, return ``file.recording(name, problem=...)``: after None the file
    gets no row in the ledger.
    """
    open: Callable[[Path], Any]
    """Opens the file: returns a `Signal`, or a raw or epochs object of MNE.

    Raise `mne_signal.ReadError` if the file is damaged, and `mne_signal.NotContinuous` if the file has no continuous
    signal. Other exceptions become a `ReadError` with the exception's text.
    """
    suffixes: tuple[str, ...] = ()
    """Endings of which the reader requires one; a file with another ending is opened through a link."""
    package: str = ""
    """Optional package that `open` needs; if it is not installed, the reason in the ledger names it."""
    unit_factor: float | None = None
    """Factor that converts the values of `open` to volts, where the reader returns another unit."""


@functools.cache
def find_formats() -> tuple[Format, ...]:
    """Return the formats of all modules of this folder, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))
