"""Read recordings with the raw readers of the package neo.

The raw readers of neo read samples on demand, and report the time of each part of a recording.

In array shapes, n is the number of channels, and S the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import is_electrode
from data_sharding.formats.edf import unique_names
from data_sharding.formats.mne_signal import NotContinuous
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.formats.units import read_units


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A part of the recording, called a segment in neo.

    Pieces without a gap between them are joined to one `Segment`.
    """

    block: int
    number: int
    start: int
    stop: int


class NeoSignal:
    """A recording that neo reads on demand.

    Parameters
    ----------
    reader : neo.rawio.BaseRawIO
        neo's reader of this recording. Its method ``parse_header`` must not have been called yet.
    only_electrodes : bool
        If True, only channels with names of scalp electrodes are used as EEG. Use True for amplifiers that also record
        intracranial electrodes: their files do not say which channels are on the scalp.
    """

    def __init__(self, reader: Any, *, only_electrodes: bool = False) -> None:
        reader.parse_header()
        self.reader: Any = reader
        channels = reader.header["signal_channels"]
        streams = reader.header["signal_streams"]["id"].tolist()
        if not len(channels):
            raise NotContinuous(Reason("no signal", "the file holds no continuous channel"))
        rows = {stream: np.flatnonzero(channels["stream_id"] == stream) for stream in streams}
        labels = [str(name).strip() for name in channels["name"]]
        electrodes = np.array(is_electrode(labels))
        # A stream is a set of channels with one sampling rate.
        chosen = max(streams, key=lambda stream: (electrodes[rows[stream]].sum(), len(rows[stream])))
        self._stream, own = streams.index(chosen), rows[chosen]
        sfreq = float(channels["sampling_rate"][own[0]])
        names, twice = unique_names([labels[i] for i in own])
        types = ["eeg" if electrodes[i] or not only_electrodes else "seeg" for i in own]
        units = read_units(names, types, [str(channels["units"][i]) for i in own], [1.0] * len(own))
        self._scale = tuple(np.asarray(channels[key][own], float)[:, None] for key in ("gain", "offset"))
        self._gains = units.gains[:, None]
        self._pieces, segments = self._list_pieces(sfreq)
        others = [labels[i] for i in range(len(labels)) if i not in set(own.tolist())]
        self.info = SignalInfo(
            **{**units.fields, "notes": [*twice, *units.notes]},
            ch_names=names,
            positions=[None] * len(names),
            sfreq=sfreq,
            n_samples=self._pieces[-1].stop if self._pieces else 0,
            segments=segments,
            left_out=dict.fromkeys(others, "another stream of the file"),
        )

    def _list_pieces(self, sfreq: float) -> tuple[list[_Piece], list[Segment]]:
        pieces: list[_Piece] = []
        segments: list[Segment] = []
        first, end = None, -np.inf
        for block, count in enumerate(self.reader.header["nb_segment"]):
            for number in range(count):
                size = int(self.reader.get_signal_size(block, number, self._stream))
                if not size:
                    continue
                begin = float(self.reader.get_signal_t_start(block, number, self._stream))
                first = begin if first is None else first
                start = pieces[-1].stop if pieces else 0
                pieces.append(_Piece(block=block, number=number, start=start, stop=start + size))
                if segments and abs(begin - end) < 0.5 / sfreq:
                    start, onset = segments[-1].start, segments[-1].onset
                    segments[-1] = Segment(start=start, stop=pieces[-1].stop, onset=onset)
                else:
                    # If the clock was set back, the segment begins at the end of the previous segment.
                    earliest = segments[-1].onset + (start - segments[-1].start) / sfreq if segments else 0.0
                    onset = max(begin - first, earliest)
                    segments.append(Segment(start=start, stop=start + size, onset=onset))
                end = begin + size / sfreq
        return pieces, segments

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        out = np.zeros((len(picks), stop - start))
        for piece in self._pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                out[:, a - start : b - start] = self.reader.get_analogsignal_chunk(
                    block_index=piece.block,
                    seg_index=piece.number,
                    i_start=a - piece.start,
                    i_stop=b - piece.start,
                    stream_index=self._stream,
                    channel_indexes=list(picks),
                ).T
        gain, offset = self._scale
        return (out * gain[picks] + offset[picks]) * self._gains[picks]

    def close(self) -> None:
        """Close the files of the recording."""
        self.reader = None
