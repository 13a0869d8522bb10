"""Readers of those file formats whose reader is one small module.

Each module of this folder that defines ``FORMAT`` describes one file format.

To add a format, add a module to this folder. `data_sharding.formats.sniffing` calls ``FORMAT.recognise``, and
`data_sharding.formats.open_signal` calls ``FORMAT.open``. Import heavy libraries inside the functions `recognise` and
`open`.
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
    """Function that takes a `sniffing.File` and returns ``file.recording(name, ...)``, or None for another format.

    The function should check the header and not the file name. `sniffing` first tests the formats that it knows itself,
    and calls `recognise` only if none of them matches. If the file has the extension of this format but a damaged
    header, the function returns ``file.recording(name, problem=...)``. If the function returned None for a damaged
    file, the ledger would not list the file.
    """
    open: Callable[[Path], Any]
    """Function that opens the file and returns a `Signal`, or a raw or epochs object of MNE.

    The function raises `mne_signal.ReadError` if the file is damaged, and `mne_signal.NotContinuous` if the file has no
    continuous signal. Other exceptions become a `ReadError` with the exception's text.
    """
    suffixes: tuple[str, ...] = ()
    """File extensions that the reader accepts. A file with another extension is opened through a link with the first of
    these extensions."""
    title: str = ""
    """Name and file extensions for ``docs/formats.md``, such as ``Nexstim eXimia (`.nxe`)``."""
    recognised_by: str = ""
    """Part of the file by which the format is recognised, for ``docs/formats.md``."""
    compared: str = ""
    """Numbers in the header that are compared with the size of the file, for ``docs/formats.md``."""
    package: str = ""
    """Optional package that `open` needs. If the package is not installed, the ledger shows the command that installs
    the package."""
    unit_factor: float | None = None
    """Factor that converts the values that `open` returns to volts; None if these values are volts."""


@functools.cache
def find_formats() -> tuple[Format, ...]:
    """Return the formats of all modules of this folder, sorted by module name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))
