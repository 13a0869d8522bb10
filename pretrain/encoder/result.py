"""What comes of a recording that was encoded.

Letters in names: B windows, N tokens, D width.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """What became of a recording on its way into the encoder."""

    channels_used: list[str]
    """Channels that the encoder saw, in its order, before padding by replication."""
    channels_left_out: dict[str, str]
    """Other channels and why."""
    channel_selection: str
    """How channels were chosen where there are more than 128."""
    channels_bad: list[str]
    """Flat, clipped or out of range: used, but left out of the average reference."""
    sfreq_in: float
    """The recording's rate in Hz."""
    sfreq_model: float
    """Rate that it was resampled to in Hz."""
    band: tuple[float, float]
    """Pass band in Hz that was really applied."""
    line_freq: float | None
    """Mains frequency in Hz that was notched out; None where there was none or it was not asked for."""
    seconds: float
    """Length of the recording."""
    window_seconds: float
    """Length of a window."""
    windows: int
    """Windows encoded."""
    windows_left_out: dict[str, int]
    """Windows that sharding would have left out as well, by reason."""
    seconds_left_out: float
    """Tail too short for a window."""

    def __str__(self) -> str:
        channels = f"{len(self.channels_used)} channels used"
        if self.channels_bad:
            channels += f", {len(self.channels_bad)} of them bad"
        if self.channels_left_out:
            channels += f"; {len(self.channels_left_out)} left out"
        rate = f"{self.sfreq_in:g} Hz -> {self.sfreq_model:g} Hz, {self.band[0]:g} to {self.band[1]:g} Hz"
        if self.line_freq:
            rate += f", {self.line_freq:g} Hz notched"
        windows = f"{self.windows} windows of {self.window_seconds:g} s out of {self.seconds:.1f} s"
        if self.seconds_left_out:
            windows += f"; {self.seconds_left_out:.2f} s at the end left out"
        windows += "".join(f"; {count} left out: {why}" for why, count in self.windows_left_out.items())
        return "\n".join([channels, rate, windows])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """Features of a recording."""

    tokens: np.ndarray
    """[B, N, D] float32, one row of tokens a window."""
    pooled: np.ndarray
    """[B, D] float32, mean over the tokens of each window."""
    times: np.ndarray
    """[B] float64, start of each window in seconds from the recording's start."""
    report: CoverageReport
    """What was used and what was not."""
