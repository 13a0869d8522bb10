"""Makes a `Signal` from arrays. The signal is one continuous recording, or has one segment for each epoch.

Letters in array shapes: C is the number of channels, T the number of time points in a segment.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_sharding.formats.signal import Segment, SignalInfo

NOMINAL_V = 1e-5
"""Volts that represent the value 1 of a standardised signal (a signal without a unit): 10 microvolts, which is about
the standard deviation of EEG."""
STANDARDISED = "the values are standardised and have no physical unit; the value 1 is stored as 10 microvolts"


class ArraySignal:
    """A signal that consists of arrays. The arrays are in memory or memory-mapped.

    Parameters
    ----------
    part : callable
        Function that takes the number of a segment and returns the array [C, T] of this segment. The function is called
        when the segment is read.
    lengths : sequence of int
        Number of time points of each segment.
    sfreq : float
        Sampling rate in Hz.
    ch_names : sequence of str
        Names of the channels.
    **more : Any
        Further fields of `SignalInfo`. By default, all channels are EEG channels without a position.
    """

    def __init__(
        self,
        part: Callable[[int], np.ndarray],
        lengths: Sequence[int],
        sfreq: float,
        ch_names: Sequence[str],
        **more: Any,
    ) -> None:
        self._part = part
        ends = np.cumsum(lengths)
        self._starts = [0, *(int(end) for end in ends[:-1])]
        fields: dict[str, Any] = {
            "ch_types": ["eeg"] * len(ch_names),
            "positions": [None] * len(ch_names),
            "epoched": len(lengths) > 1,
        }
        self.info = SignalInfo(
            ch_names=list(ch_names),
            sfreq=float(sfreq),
            n_samples=int(ends[-1]) if len(lengths) else 0,
            segments=[
                Segment(start=start, stop=int(end), onset=start / sfreq)
                for start, end in zip(self._starts, ends, strict=True)
            ],
            **(fields | more),
        )

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read a range of time points of the given channels; see `Signal.read`."""
        blocks = []
        number = max(0, bisect.bisect_right(self._starts, start) - 1)
        while start < stop and number < len(self._starts):
            segment = self.info.segments[number]
            x_CT = self._part(number)[picks, start - segment.start : min(stop, segment.stop) - segment.start]
            blocks.append(x_CT if x_CT.dtype in (np.float32, np.float64) else x_CT.astype(np.float64))
            start, number = min(stop, segment.stop), number + 1
        if not blocks:
            return np.zeros((len(picks), 0))
        return np.asarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1))

    def close(self) -> None:
        """Release the arrays of the signal."""
        self._part = _closed


def _closed(number: int) -> np.ndarray:
    raise ValueError("the signal is closed")
