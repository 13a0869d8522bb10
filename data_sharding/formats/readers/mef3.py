"""Read MEF3 recordings (folder ``.mefd``) through pymef. Only channels with names of scalp electrodes are EEG.

In array shapes, n is the number of channels, and S the number of samples.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.common.untrusted import is_special
from data_sharding.formats.channels import is_electrode
from data_sharding.formats.edf import unique_names
from data_sharding.formats.mne_signal import NotContinuous, ReadError
from data_sharding.formats.readers import Format
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.formats.units import read_units

if TYPE_CHECKING:
    from data_sharding.formats.sniffing import File

HEADER_BYTES = 1024
"""Size of the header of each MEF3 file."""
INDEX = np.dtype(
    [("at", "<i8"), ("time", "<i8"), ("first", "<i8"), ("count", "<u4"), ("size", "<u4"), ("other", "V24")]
)
"""Layout of an entry of an index file (``.tidx``): offset of the block, start time, first sample, number of samples,
and size of the block in bytes."""
JITTER_S = 0.1
"""A jump of the times between two blocks is a gap from this length on, in seconds, even if the file does not say so."""


def _recognise(file: File) -> None:
    """Return None for every file, because `sniffing` recognises the folder ``.mefd`` itself."""


def check_blocks(path: Path) -> Reason | None:
    """Compare every entry of each index with the previous entry, and with the size of the signal file.

    Parameters
    ----------
    path : Path
        The ``.mefd`` folder.

    Returns
    -------
    Reason or None
        The fault of the recording; None if all files are complete. pymef trusts the index, so it must not open a
        recording with a fault.
    """
    if special := next((file for file in sorted(path.rglob("*")) if is_special(file)), None):
        return Reason("unreadable", f"{special.name} is a device, a socket or a named pipe; remove it")
    found = sorted(path.glob("*.timd/*.segd/*.tmet"))
    if not found:
        return Reason("no signal", "the folder contains no signal (*.timd/*.segd/*.tmet)")
    for header in found:
        index, data = header.with_suffix(".tidx"), header.with_suffix(".tdat")
        if not header.is_file():
            return Reason("unreadable", f"{header.name} is not a file; copy the recording again")
        for file in (index, data):
            if not file.is_file():
                return Reason("sidecar missing", f"{file.name} is missing")
        content = index.stat().st_size - HEADER_BYTES
        if content < INDEX.itemsize or content % INDEX.itemsize:
            return Reason("truncated", f"the size of {index.name} is not a whole number of entries")
        if fault := _check_index(index, data):
            return fault
    return None


def _check_index(index: Path, data: Path) -> Reason | None:
    entries = np.frombuffer(index.read_bytes(), INDEX, offset=HEADER_BYTES)
    at, first = entries["at"], entries["first"]
    count, size = entries["count"].astype(np.int64), entries["size"].astype(np.int64)
    if (wrong := (at < HEADER_BYTES) | (count == 0) | (size == 0)).any():
        return Reason("damaged", f"entry {wrong.argmax()} of {index.name} is not the place of a block of samples")
    if (wrong := at > data.stat().st_size - size).any():
        end = int(at[wrong.argmax()]) + int(size[wrong.argmax()])
        return Reason("truncated", f"{index.name} promises {end} bytes, but {data.name} has less")
    if (wrong := first[1:] != first[:-1] + count[:-1]).any():
        place = wrong.argmax() + 1
        return Reason("damaged", f"entry {place} of {index.name} does not begin where the previous block ends")
    return None


class MEF3Signal:
    """A MEF3 recording whose samples pymef reads on demand.

    Parameters
    ----------
    path : Path
        The ``.mefd`` folder.
    """

    def __init__(self, path: Path) -> None:
        from pymef.mef_session import MefSession

        if fault := check_blocks(path):
            raise ReadError(fault)
        try:
            self._session: Any = MefSession(str(path), "")
        except RuntimeError as error:
            if "password" not in str(error):
                raise
            text = "the recording is encrypted with a password; save it without a password"
            raise ReadError(Reason("encrypted", text=text)) from None
        channels = {about["name"]: about for about in self._session.read_ts_channel_basic_info()}
        if not channels:
            raise NotContinuous(Reason("no signal", "the folder contains no channel"))
        # Channels with other rates or other interruptions than most electrodes are left out.
        blocks = {name: self._session.get_channel_toc(name) for name in channels}
        for name, about in channels.items():
            if not (np.isfinite(sfreq := float(about["fsamp"][0])) and sfreq > 0):
                raise ReadError(Reason("damaged header", f"the sampling rate of channel {name} is {sfreq:g} Hz"))
            _, count, first, _ = blocks[name]
            if (first[1:] != first[:-1] + count[:-1]).any():
                text = f"the parts (*.segd) of channel {name} do not follow each other; copy the recording again"
                raise ReadError(Reason("truncated", text))
        kinds = {name: (float(channels[name]["fsamp"][0]), blocks[name][1:].tobytes()) for name in channels}
        electrodes = dict(zip(channels, is_electrode(list(channels)), strict=True))
        counts = Counter({kinds[name]: 0 for name in channels})
        for name in channels:
            counts[kinds[name]] += 1 + len(channels) * electrodes[name]
        chosen, _ = counts.most_common(1)[0]
        self._names = [name for name in channels if kinds[name] == chosen]
        sfreq, own = chosen[0], [channels[name] for name in self._names]
        names, twice = unique_names(self._names)
        types = ["eeg" if electrodes[name] else "seeg" for name in self._names]
        factors = np.array([float(about["ufact"][0]) for about in own])
        # A factor of zero means that the file states no factor.
        texts = [_text(about["unit"]) if factor else "no factor" for about, factor in zip(own, factors, strict=True)]
        units = read_units(names, types, texts, [1.0] * len(own))
        self._gains = (np.where(factors == 0, 1.0, factors) * units.gains)[:, None]
        segments = _list_segments(blocks[self._names[0]], sfreq)
        line = float(self._session.session_md["time_series_metadata"]["section_2"]["AC_line_frequency"][0])
        self.info = SignalInfo(
            **{**units.fields, "notes": [*twice, *units.notes]},
            ch_names=names,
            positions=[None] * len(names),
            sfreq=sfreq,
            n_samples=segments[-1].stop,
            segments=segments,
            line_freq=line if line in (50.0, 60.0) else None,
            left_out={
                name: "another sampling rate" if kinds[name][0] != sfreq else "other interruptions than other channels"
                for name in channels
                if kinds[name] != chosen
            },
        )

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        x_nS = self._session.read_ts_channels_sample([self._names[i] for i in picks], [[start, stop]])
        return np.asarray(x_nS, float).reshape(len(picks), stop - start) * self._gains[picks]

    def close(self) -> None:
        """Close the files of the recording."""
        self._session.close()


def _text(value: Any) -> str:
    return bytes(value[0]).split(b"\0")[0].decode("utf-8", "replace").strip()


def _list_segments(blocks: np.ndarray, sfreq: float) -> list[Segment]:
    """Return the segments between the gaps.

    Parameters
    ----------
    blocks : ndarray of int, shape (4, number of blocks)
        For each block: whether a gap is before the block, number of samples, first sample, and time in microseconds.
    sfreq : float
        Sampling rate in Hz.

    Returns
    -------
    list of Segment
        Segments in the order of their times.
    """
    segments: list[Segment] = []
    zero = int(blocks[3, 0])
    # `expected` is the time of the next block by the clock of the file, and `correction` is added to this clock.
    expected = correction = 0.0
    for marked, count, start, time in blocks.T.tolist():
        begin = (time - zero) / 1e6
        # Each block is compared with the previous block only, so that a slow drift of the clock is not a gap.
        if segments and abs(begin - expected) < (0.5 / sfreq if marked else JITTER_S):
            last = segments[-1]
            segments[-1] = Segment(start=last.start, stop=start + count, onset=last.onset)
        else:
            if segments:
                # If the clock was set back, the segment begins at the end of the previous segment, and all later
                # segments are moved by the same time.
                last = segments[-1]
                end = last.onset + (last.stop - last.start) / sfreq
                correction = max(correction, end - begin)
            segments.append(Segment(start=start, stop=start + count, onset=begin + correction))
        expected = begin + count / sfreq
    return segments


FORMAT = Format(
    name="mefd",
    recognise=_recognise,
    open=MEF3Signal,
    title="MEF3 (folder `.mefd`)",
    recognised_by="name of the folder",
    compared="every block of each file",
    package="pymef",
)
