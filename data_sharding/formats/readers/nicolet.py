"""Read Nicolet recordings with a text header (``.data`` and ``.head``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.reason import Reason
from data_sharding.formats import headers
from data_sharding.formats.readers import Format

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File, Recording


def _recognise(file: File) -> Recording | None:
    header = file.near.get(f"{file.stem}.head".lower()) if file.suffix == ".data" else None
    if header is None:
        return None
    text = file.all_text(header)
    samples, channels = (re.search(rf"^{key}=(\d+)", text, re.MULTILINE) for key in ("num_samples", "num_channels"))
    if not text.startswith("start_ts=") and "elec_names=" not in text:
        return None
    if not samples or not channels:
        fault = Reason("damaged Nicolet header", "num_samples or num_channels is missing")
    else:
        promised, size = 2 * int(samples[1]) * int(channels[1]), headers.size_of(file.path)
        fault = Reason("truncated", f"the header states {promised} bytes, but the file has {size}")
        fault = fault if size < promised else None
    return file.recording("nicolet", header.name, problem=fault)


def _open(path: Path) -> Any:
    import mne

    return mne.io.read_raw_nicolet(path, ch_type="eeg")


FORMAT = Format(
    name="nicolet",
    recognise=_recognise,
    open=_open,
    title="Nicolet (`.data`, `.head`)",
    recognised_by="keys of the `.head` file",
    compared="samples",
)
