"""Read Neuralynx recordings through neo: a folder of ``.ncs`` files, one for each channel.

Only channels with names of scalp electrodes are EEG.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.readers import Format

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording

HEADER_BYTES, RECORD_BYTES = 16384, 1044


def _recognise(file: File) -> Recording | None:
    if file.suffix != ".ncs":
        return None
    # All .ncs files of a folder are one recording, with one row in the ledger. The path of the recording in the ledger
    # is the path of its first file.
    names = sorted(entry.name for entry in file.near.values() if entry.suffix.lower() == ".ncs")
    if file.path.name != names[0]:
        return None
    problem = None
    if not file.head.startswith(b"######## Neuralynx"):
        problem = Reason("unreadable", "not Neuralynx: it has no Neuralynx header")
    for name in names:
        if problem is None and (headers.size_of(file.near[name.lower()]) - HEADER_BYTES) % RECORD_BYTES:
            problem = Reason("truncated", f"the size of {name} is not a whole number of records")
    return file.recording("neuralynx", *names[1:], problem=problem)


def _open(path: Path) -> Any:
    from neo.rawio import NeuralynxRawIO

    from data_sharding.formats.readers.neo_signal import NeoSignal

    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix.lower() == ".ncs")
    # The true sampling rate differs a little from the nominal rate, so deviations of the time stamps below 1 ms are not
    # gaps.
    reader = NeuralynxRawIO(dirname=str(path.parent), include_filenames=names, gap_tolerance_ms=1.0)
    return NeoSignal(reader, only_electrodes=True)


FORMAT = Format(
    name="neuralynx",
    recognise=_recognise,
    open=_open,
    title="Neuralynx (folder of `.ncs`)",
    recognised_by="first line",
    compared="each file has a whole number of records",
    package="neo",
)
