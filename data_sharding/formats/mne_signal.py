"""Make a `Signal` of a recording that MNE has opened. The signal is read on demand.

In array shapes, n is the number of channels, S the number of samples at the recorded rate, and E the number of epochs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import clean_position
from data_sharding.formats.marks.interruptions import Annotation, Found, divide, find_marks, match_channels
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.formats.units import read_units

if TYPE_CHECKING:
    import mne
    from mne.io import BaseRaw


class ReadError(ValueError):
    """Error for a recording that cannot be read.

    Parameters
    ----------
    reason : Reason
        Reason, for the ledger, why the recording cannot be read.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class NotContinuous(ReadError):
    """Error for an undamaged file without a continuous signal."""


class RawSignal:
    """A continuous recording that MNE reads on demand.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording to read.
    format_ : str
        Name of the file format; empty for a recording in memory.
    segments : list of Segment, optional
        Segments that the file itself describes, before they are divided at marks.
    annotations : list of Annotation, optional
        Annotations that replace the annotations of MNE, if MNE reads them wrongly.
    marks : iterable of Found
        Marks that the reader found in the file outside the annotations.
    keep : Any
        Object that must exist as long as the recording is open, such as a temporary folder.
    gains : ndarray, optional
        Factors [n] that convert MNE's values of each channel to volts. By default, MNE's values are taken as volts.
    **more : Any
        Further fields of `SignalInfo`.
    """

    def __init__(
        self,
        raw: BaseRaw,
        *,
        format_: str = "",
        segments: list[Segment] | None = None,
        annotations: list[Annotation] | None = None,
        marks: Iterable[Found] = (),
        keep: Any = None,
        gains: np.ndarray | None = None,
        **more: Any,
    ) -> None:
        self.raw, self.keep = raw, keep
        self.gains = None if gains is None or (gains == 1).all() else gains
        sfreq, n = float(raw.info["sfreq"]), int(raw.n_times)
        found = [*find_marks(format_, annotations_of(raw) if annotations is None else annotations), *marks]
        found, unknown = match_channels(found, more.get("ch_names", raw.ch_names), more.get("left_out", ()))
        divided = divide(segments or [Segment(start=0, stop=n, onset=0.0)], sfreq, found)
        if n and not divided.segments:
            rows = ", ".join(sorted({mark.name for mark in found if mark.length > 0}))
            raise NotContinuous(Reason("no signal", f"the whole recording is marked: {rows}"))
        spans = {"bad_spans": divided.bad_spans, "bad_channel_spans": divided.bad_channel_spans}
        fields: dict[str, Any] = {**_fields(raw.info, raw.get_channel_types()), **spans, **more}
        fields["notes"] = [*fields.get("notes", []), *unknown, *divided.notes]
        self.info = SignalInfo(n_samples=n, segments=divided.segments, **fields)

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        # Read each segment separately, because one reader of MNE returns wrong samples for a range that spans several
        # blocks of the file.
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
    """A recording that consists of epochs; each epoch is a segment.

    Parameters
    ----------
    epochs : mne.BaseEpochs
        The epochs. MNE reads epochs on demand if the file format allows this.
    marks : iterable of Found
        Marks inside epochs. Times are those of a signal in which all epochs follow each other without gaps.
    **more : Any
        Further fields of `SignalInfo`.
    """

    def __init__(self, epochs: mne.BaseEpochs, *, marks: Iterable[Found] = (), **more: Any) -> None:
        self.epochs = epochs
        epochs.drop_bad()
        count, length, sfreq = len(epochs), len(epochs.times), float(epochs.info["sfreq"])
        if not count:
            raise NotContinuous(Reason("epoched", "0 trials"))
        self._length = length
        whole = [Segment(start=i * length, stop=(i + 1) * length, onset=i * length / sfreq) for i in range(count)]
        found, unknown = match_channels(_end_in_epoch(marks, length, sfreq), epochs.ch_names, ())
        divided = divide(whole, sfreq, found)
        if not divided.segments:
            raise NotContinuous(Reason("no signal", "all epochs are marked as gaps"))
        fields: dict[str, Any] = _fields(epochs.info, epochs.get_channel_types()) | more
        fields["notes"] = [*fields.get("notes", []), *unknown, *divided.notes]
        self.info = SignalInfo(
            n_samples=count * length,
            segments=divided.segments,
            epoched=True,
            tmin=float(epochs.times[0]),
            bad_spans=divided.bad_spans,
            bad_channel_spans=divided.bad_channel_spans,
            **fields,
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


def annotations_of_epochs(epochs: mne.BaseEpochs) -> list[Annotation]:
    """Return the annotations inside the epochs.

    Times are those of a signal in which all epochs follow each other without gaps.

    An annotation that overlaps several epochs is returned once for each epoch, with an onset that is not before the
    beginning of the epoch.
    """
    found = epochs.annotations
    if found is None or not len(found):
        return []
    length, sfreq = len(epochs.times), float(epochs.info["sfreq"])
    # In MNE, onset 0 of annotations and sample number 0 of events are the same time. Sample numbers count samples of
    # the continuous recording from which the epochs were cut.
    starts = epochs.events[:, 0] / (epochs._raw_sfreq or sfreq) + epochs.times[0]
    out = []
    for onset, duration, text, names in zip(
        found.onset, np.nan_to_num(found.duration), found.description, found.ch_names, strict=True
    ):
        for i in np.flatnonzero((starts < onset + max(duration, 0.5 / sfreq)) & (starts + length / sfreq > onset)):
            begin = max(float(onset - starts[i]), 0.0)
            rest = max(float(onset + duration - starts[i]) - begin, 0.0)
            out.append(Annotation(i * length / sfreq + begin, rest, str(text), tuple(map(str, names))))
    return out


def _end_in_epoch(marks: Iterable[Found], length: int, sfreq: float) -> list[Found]:
    """Cut off each mark at the end of its epoch, because the next epoch is from another time of the recording."""
    found = []
    for mark in marks:
        end = (math.floor(mark.begin * sfreq / length + 1e-6) + 1) * length / sfreq
        found.append(dataclasses.replace(mark, length=min(mark.length, max(0.0, end - mark.begin))))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and warnings of MNE, because the ledger contains the important facts."""
    import mne

    with warnings.catch_warnings(), mne.utils.use_log_level("ERROR"):
        warnings.simplefilter("ignore")
        yield


def _fields(info: mne.Info, types: Any) -> dict[str, Any]:
    """Return the fields of `SignalInfo` that MNE can fill for every recording."""
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
    """Read the units of a recording that MNE opened; return them as arguments of `RawSignal`.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.
    units : sequence of str
        Unit of each channel, as the file writes it.
    applied : sequence of float
        Factor by which MNE multiplies the values of each channel.
    types : sequence of str, optional
        Types of the channels. By default, MNE's types are used.

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


def annotations_of(raw: BaseRaw) -> list[Annotation]:
    """Return the annotations of a recording, with onsets in seconds from the first sample."""
    found = raw.annotations
    # MNE measures onsets from sample number 0. The first sample in the file can have a higher number, so subtract its
    # time.
    first = float(raw.first_time)
    durations = np.nan_to_num(np.asarray(found.duration, float))
    return [
        Annotation(float(onset) - first, float(duration), str(word), tuple(map(str, names)))
        for onset, duration, word, names in zip(found.onset, durations, found.description, found.ch_names, strict=True)
    ]
