"""Read Blackrock files (``.ns1`` to ``.ns9``) through neo. Only channels with names of scalp electrodes are EEG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats.mne_signal import ReadError
from data_sharding.formats.readers import Format

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording


def _recognise(file: File) -> Recording | None:
    numbered = re.fullmatch(r"\.ns[1-9]", file.suffix)
    if file.head[:8] in (b"NEURALSG", b"NEURALCD", b"BRSMPGRP"):
        fault = None if numbered else Reason("unreadable", "a Blackrock file must be named .ns1 to .ns9")
        return file.recording("blackrock", problem=fault)
    if numbered or file.suffix == ".nsx":
        return file.recording("blackrock", problem=Reason("unreadable", "not Blackrock: it has no Blackrock header"))
    return None


def _open(path: Path) -> Any:
    from neo.rawio import BlackrockRawIO

    from data_sharding.formats.readers.neo_signal import NeoSignal

    if not (number := re.fullmatch(r"\.ns([1-9])", path.suffix.lower())):
        raise ReadError(Reason("unreadable", "a Blackrock file must be named .ns1 to .ns9"))
    reader = BlackrockRawIO(filename=str(path.with_suffix("")), nsx_to_load=int(number[1]), load_nev=False)
    return NeoSignal(reader, only_electrodes=True)


FORMAT = Format(
    name="blackrock",
    recognise=_recognise,
    open=_open,
    title="Blackrock (`.ns1` to `.ns9`)",
    recognised_by="`NEURALSG`, `NEURALCD` or `BRSMPGRP`",
    compared="not compared",
    package="neo",
)
