"""The result of encoding a recording: its features, and a report about the parts of the recording that were used.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """Report about the parts of a recording that were encoded, and about their preprocessing."""

    channels_used: list[str]
    """Channels that were encoded, in the order of the rows. Copies of channels, made by padding, are not listed."""
    channels_left_out: dict[str, str]
    """Channels that were not encoded, each with the reason."""
    channel_selection: str
    """Rule by which channels were chosen, if the recording has more than 128 channels."""
    channels_bad: list[str]
    """Bad channels, e.g. flat, clipped or noisy channels. Bad channels are encoded, but left out of the average
    reference."""
    sfreq_in: float
    """Sampling rate of the recording in Hz."""
    sfreq_model: float
    """Sampling rate of the encoder in Hz, to which the recording was resampled."""
    band: tuple[float, float]
    """Pass band in Hz that was applied. If the recording's sampling rate is low, the applied band is narrower than the
    band in the preprocessing."""
    line_freq: float | None
    """Mains frequency in Hz that was removed by a notch filter; None if no notch filter was applied."""
    seconds: float
    """Length of the recording in seconds."""
    window_seconds: float
    """Length of a window in seconds."""
    windows: int
    """Number of windows that were encoded."""
    windows_left_out: dict[str, int]
    """Number of windows that were not encoded, by reason. Sharding and encoding leave out windows for the same
    reasons."""
    seconds_left_out: dict[str, float]
    """Seconds of the recording that no encoded window contains, for each reason."""
    bad_in_windows: dict[str, int] = dataclasses.field(default_factory=dict)
    """For each kind of fault, the number of encoded windows in which a channel has this fault, although the channel is
    good in the recording as a whole."""

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
        windows += "".join(f"; {seconds:.2f} s left out: {why}" for why, seconds in self.seconds_left_out.items())
        windows += "".join(f"; {count} left out: {why}" for why, count in self.windows_left_out.items())
        windows += "".join(f"; {count} with a bad channel: {kind}" for kind, count in self.bad_in_windows.items())
        return "\n".join([channels, rate, windows])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """The features of a recording, and a report about the encoding."""

    tokens: np.ndarray
    """[B, N, D] float32, the tokens of each window."""
    pooled: np.ndarray
    """[B, D] float32, the mean over the tokens of each window."""
    times: np.ndarray
    """[B] float64, the start of each window in seconds from the start of the recording."""
    report: CoverageReport
    """Report that lists which channels and windows were encoded, and which were left out."""
