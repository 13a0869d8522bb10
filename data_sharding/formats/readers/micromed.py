"""Read Micromed files (``.trc``) through neo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats.readers import Format

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording


def _recognise(file: File) -> Recording | None:
    if file.head.startswith(b"* MICROMED"):
        version = file.head[175:176]
        fault = Reason("no reader", f"Micromed header version {version[0] if version else 'missing'}, only 4 is read")
        return file.recording("micromed", problem=None if version == b"\x04" else fault)
    if file.suffix == ".trc":
        return file.recording("micromed", problem=Reason("unreadable", "not Micromed: it has no Micromed header"))
    return None


def _open(path: Path) -> Any:
    from neo.rawio import MicromedRawIO

    from data_sharding.formats.readers.neo_signal import NeoSignal

    return NeoSignal(MicromedRawIO(filename=str(path)))


FORMAT = Format(
    name="micromed",
    recognise=_recognise,
    open=_open,
    title="Micromed (`.trc`)",
    recognised_by="`* MICROMED`",
    compared="version",
    package="neo",
)
