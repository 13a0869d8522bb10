"""Read Nexstim eXimia files (``.nxe``), which have no header and 64 channels of 16-bit samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.readers import Format

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording

FRAME_BYTES = 64 * 2


def _recognise(file: File) -> Recording | None:
    if file.suffix != ".nxe":
        return None
    # The file has no header, so only its size can be checked.
    size = headers.size_of(file.path)
    fault = Reason("truncated", f"{size} bytes are not a whole number of 64-channel frames")
    return file.recording("eximia", problem=None if size and size % FRAME_BYTES == 0 else fault)


def _open(path: Path) -> Any:
    import mne

    return mne.io.read_raw_eximia(path)


FORMAT = Format(
    name="eximia",
    recognise=_recognise,
    open=_open,
    title="Nexstim eXimia (`.nxe`)",
    recognised_by="name of the file, because the format has no header",
    compared="whole samples",
    # The amplifier has a gain of 2000 and a 16-bit converter for 10 V, so one bit is 0.0763 microvolts. MNE's reader
    # returns microvolts instead of volts, so its values are multiplied by 1e-6.
    unit_factor=1e-6,
)
