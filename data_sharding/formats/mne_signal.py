"""Wrap a recording that MNE opened as a `Signal`. Samples are read on demand, and never across a gap.

In array shapes, n is the number of channels, S the number of samples at the recorded rate, and E the number of epochs.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import clean_position
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.formats.units import read_units

if TYPE_CHECKING:
    import mne
    from mne.io import BaseRaw

CUT = re.compile(r"boundary|(bad|edge) boundary|new segment/.*", re.IGNORECASE)
"""Annotations of EEGLAB, MNE and BrainVision at which signal was removed or the recording started again."""
SKIP = re.compile(r"bad_acq_skip", re.IGNORECASE)
"""MNE's annotation of a time span with placeholder samples, in which nothing was recorded."""
BAD = re.compile(r"bad", re.IGNORECASE)
"""Prefix of annotations that mark a bad time span in MNE."""


class ReadError(ValueError):
    """Error for a recording that cannot be read.

    Parameters
    ----------
    reason : Reason
        Reason in the ledger: why the recording cannot be read.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class NotContinuous(ReadError):
    """Error for a sound file without a continuous signal."""


class RawSignal:
    """A continuous recording that MNE reads on demand.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording to read.
    segments : list of Segment, optional
        Segments, if the file describes its segments more exactly than its annotations do.
    keep : Any
        Object that must exist as long as the recording is open, such as a temporary folder.
    gains : ndarray, optional
        Factor [n] for each channel that converts MNE's values to volts. By default, MNE's values are volts.
    **more : Any
        Other fields of `SignalInfo`.
    """

    def __init__(
        self,
        raw: BaseRaw,
        *,
        segments: list[Segment] | None = None,
        keep: Any = None,
        gains: np.ndarray | None = None,
        **more: Any,
    ) -> None:
        self.raw, self.keep = raw, keep
        self.gains = None if gains is None or (gains == 1).all() else gains
        sfreq, n = float(raw.info["sfreq"]), int(raw.n_times)
        fields: dict[str, Any] = {**_fields(raw.info, raw.get_channel_types()), "bad_spans": bad_spans(raw), **more}
        self.info = SignalInfo(n_samples=n, segments=segments or segments_of(n, sfreq, *interruptions(raw)), **fields)

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        # Read each segment alone, because one of MNE's readers returns wrong samples for a range over several blocks.
        ends = [s.stop for s in self.info.segments if start < s.stop < stop] if len(self.info.segments) > 1 else []
        bounds = [start, *ends, stop]
        with quiet():
            blocks = [self.raw[picks, a:b][0] for a, b in itertools.pairwise(bounds)]
        x = np.asarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1))
        return x if self.gains is None else x * self.gains[picks, None]

    def close(self) -> None:
        """Close the files of the recording."""
        self.raw.close()
        self.keep = None


class EpochsSignal:
    """An epoched recording; each epoch is a segment.

    Parameters
    ----------
    epochs : mne.BaseEpochs
        The epochs. MNE reads epochs on demand if the file format allows this.
    **more : Any
        Other fields of `SignalInfo`.
    """

    def __init__(self, epochs: mne.BaseEpochs, **more: Any) -> None:
        self.epochs = epochs
        epochs.drop_bad()
        count, length, sfreq = len(epochs), len(epochs.times), float(epochs.info["sfreq"])
        if not count:
            raise NotContinuous(Reason("epoched", "0 trials"))
        self._length = length
        self.info = SignalInfo(
            n_samples=count * length,
            segments=[Segment(start=i * length, stop=(i + 1) * length, onset=i * length / sfreq) for i in range(count)],
            epoched=True,
            tmin=float(epochs.times[0]),
            **(_fields(epochs.info, epochs.get_channel_types()) | more),
        )

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        first, last = start // self._length, (max(stop, start + 1) - 1) // self._length + 1
        with quiet():
            x_enT = self.epochs.get_data(picks=np.array(picks), item=slice(first, last), copy=False)
        x = np.moveaxis(x_enT, 0, 1).reshape(len(picks), -1)
        return x[:, start - first * self._length : stop - first * self._length]

    def close(self) -> None:
        """Close the files of the recording."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and warnings of MNE; important facts are in the ledger."""
    import mne

    with warnings.catch_warnings(), mne.utils.use_log_level("ERROR"):
        warnings.simplefilter("ignore")
        yield


def _fields(info: mne.Info, types: Any) -> dict[str, Any]:
    """Return those fields of `SignalInfo` that MNE gives for every recording."""
    return {
        "ch_names": list(info["ch_names"]),
        "ch_types": list(types),
        "positions": [_position(channel) for channel in info["chs"]],
        "sfreq": float(info["sfreq"]),
        "line_freq": float(info["line_freq"]) if info["line_freq"] else None,
        "bads": list(info["bads"]),
        "reference": "average" if info["custom_ref_applied"] else "",
    }


def read_raw_units(
    raw: BaseRaw, units: Sequence[str], applied: Sequence[float], types: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read the units of a recording that MNE opened; return the arguments of `RawSignal`.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.
    units : sequence of str
        Unit of each channel, as the file writes it.
    applied : sequence of float
        Factor by which MNE multiplies the values of each channel.
    types : sequence of str, optional
        Types of the channels, if they differ from MNE's.

    Returns
    -------
    dict
        Types, factors, unknown units and notes.
    """
    found = read_units(raw.ch_names, types or raw.get_channel_types(), units, applied)
    return {**found.fields, "gains": found.gains}


def _position(channel: dict[str, Any]) -> list[float] | None:
    from mne.io.constants import FIFF

    xyz = np.asarray(channel["loc"][:3], float)
    known = channel["coord_frame"] in (FIFF.FIFFV_COORD_HEAD, FIFF.FIFFV_COORD_UNKNOWN)
    return clean_position(xyz.tolist()) if known else None


def _annotations(raw: BaseRaw) -> list[tuple[float, float, str]]:
    """Return onset (in seconds from the first sample), duration and text of each annotation."""
    found = raw.annotations
    # MNE counts onsets from sample number 0, but the first sample in the file may have a higher number.
    first = float(raw.first_time)
    durations = np.nan_to_num(np.asarray(found.duration, float))
    return [
        (float(onset) - first, float(duration), str(word))
        for onset, duration, word in zip(found.onset, durations, found.description, strict=True)
    ]


def bad_spans(raw: BaseRaw) -> list[tuple[float, float, str]]:
    """Find the time spans that the annotations of a recording mark as bad.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording to read.

    Returns
    -------
    list of (float, float, str)
        For each span: start and end in seconds from the first sample, and text of the annotation.
    """
    return [
        (onset, onset + duration, word)
        for onset, duration, word in _annotations(raw)
        if BAD.match(word) and not SKIP.match(word) and not CUT.fullmatch(word) and duration > 0
    ]


def interruptions(raw: BaseRaw, also: str = "") -> tuple[list[int], list[tuple[int, int]]]:
    """Find the interruptions that the annotations of a recording show.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording to read.
    also : str
        Text of the annotation that marks a new run in this file format.

    Returns
    -------
    cuts : list of int
        Index of the first sample of each run.
    skips : list of (int, int)
        Ranges of samples in which nothing was recorded.
    """
    sfreq, cuts, skips = float(raw.info["sfreq"]), [], []
    for onset, duration, word in _annotations(raw):
        if SKIP.match(word):
            skips.append((round(onset * sfreq), round((onset + duration) * sfreq)))
        elif CUT.fullmatch(word) or (also and word == also):
            # EEGLAB and MNE set the annotation half a sample before the first sample of the new run. EEGLAB's duration
            # is the length of the removed signal, so the duration is not used here.
            cuts.append(int(np.ceil(onset * sfreq - 1e-3)))
    return cuts, skips


def segments_of(n: int, sfreq: float, cuts: list[int], skips: list[tuple[int, int]]) -> list[Segment]:
    """Divide a recording into segments without interruption.

    Parameters
    ----------
    n : int
        Number of samples of the recording.
    sfreq : float
        Sampling rate in Hz.
    cuts : list of int
        Index of the first sample of each run.
    skips : list of (int, int)
        Ranges of samples in which nothing was recorded.

    Returns
    -------
    list of Segment
        Segments in the order of time.
    """
    edges = sorted({0, n, *(c for c in [*cuts, *(e for skip in skips for e in skip)] if 0 < c < n)})
    gone = np.zeros(len(edges), bool)
    for a, b in skips:
        gone[np.searchsorted(edges, a) : np.searchsorted(edges, b)] = True
    return [
        Segment(start=a, stop=b, onset=a / sfreq)
        for a, b, skipped in zip(edges, edges[1:], gone[:-1], strict=False)
        if not skipped
    ]
