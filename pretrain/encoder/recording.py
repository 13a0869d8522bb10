"""A recording to the windows that the encoder was pretrained on, by the very code of sharding.

Shapes: n channels, T samples a window.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.formats.signal import Signal, SignalInfo
from data_sharding.processing.preprocess import PreprocessSpec

if TYPE_CHECKING:
    import mne

UNITS = {"V": 1e6, "mV": 1e3, "uV": 1.0, "µV": 1.0, "μV": 1.0, "nV": 1e-3}
"""Factor to microvolts."""
LINE_FREQS = (40.0, 70.0)
"""Hz between which a mains frequency lies: 50 or 60 everywhere, and generators drift."""


@dataclass(kw_only=True)
class Windows:
    """Windows of a recording, ready for `PreprocessSpec.scale_for_model`."""

    names: list[str]
    """Channels of the rows."""
    positions: list[list[float] | None]
    """Electrodes of the rows in metres, None where not known."""
    left_out: dict[str, str]
    """Other channels of the recording, and why."""
    selection: str
    """How channels were chosen where there are more than 128."""
    bads: list[str]
    """Channels that are flat, clipped, noisy or out of range: kept, but left out of the average reference."""
    sfreq: float
    """The recording's rate in Hz."""
    line_freq: float | None
    """Mains frequency in Hz, from the recording or found in its spectrum."""
    seconds: float
    """Length of the recording."""
    most: int
    """Windows that `stream` can give: all of them, where none is flawed."""
    tails: float
    """Seconds at the ends of its segments that are too short for a window."""
    flawed: Counter[str] = field(default_factory=Counter)
    """Reason to windows that were left out; complete once `stream` has ended."""
    stream: Iterator[tuple[float, np.ndarray]] = field(repr=False)
    """Start in seconds and [n, T] float32 microvolts of every other one."""


@contextlib.contextmanager
def windows_of(
    recording: Any, spec: PreprocessSpec, *, unit_factor: float | None = None, line_freq: float | None = None
) -> Iterator[Windows]:
    """Bring a recording to windows, with the channels, units and filters that sharding would give it.

    Parameters
    ----------
    recording : mne.io.BaseRaw, mne.BaseEpochs, data_sharding.formats.signal.Signal or tuple
        A recording, or ``(x, ch_names, sfreq, unit)`` with x an array [n, samples].
    spec : PreprocessSpec
        The preprocessing of the pretraining.
    unit_factor : float, optional
        Factor to true volts, where the file's unit is wrong; the amplitude is not judged then.
    line_freq : float, optional
        Mains frequency in Hz, within `LINE_FREQS`, where it is known better than from the recording.

    Yields
    ------
    Windows
        To be used up inside the context: the filtered signal lies on disk, and is gone afterwards.

    Raises
    ------
    RequestError
        If the recording cannot be used, with sharding's reason, or a number makes no sense.
    """
    check_numbers(unit_factor=unit_factor, line_freq=line_freq)
    from data_sharding.corpora import Item
    from data_sharding.formats.open_signal import Recording
    from data_sharding.job.cut_windows import clean_windows, whole_windows
    from data_sharding.job.process_recording import prepare
    from data_sharding.job.task import PartResult, SetAside, new_row

    if isinstance(recording, tuple):
        unit_factor = unit_factor or 1.0
    recorded = _recorded(recording)
    item = Item(
        key="recording",
        corpus="",
        path="",
        recording=Recording(path=Path(), format="", files=()),
        subject="",
        session="",
        unit_factor=unit_factor,
        line_freq=line_freq,
    )
    result, info, flawed = PartResult(row=new_row(item)), recorded.info, Counter()
    with contextlib.ExitStack() as stack:
        try:
            clean, scratch = stack.enter_context(prepare(recorded, item, spec, result))
        except SetAside as verdict:
            hint = "; unit_factor says how to correct it" if result.row.unit == "unknown" else ""
            raise RequestError(f"the recording cannot be used: {verdict.reason}{hint}") from None
        names = clean.channels.names
        left_out = {name: kind for kind, found in result.row.channels_left_out.items() for name in found}
        left_out |= {name: kind for name, kind in zip(info.ch_names, info.ch_types, strict=True) if kind != "eeg"}
        left_out |= clean.left_out
        cuts = whole_windows(clean.lengths, spec)
        ends = {segment: found[-1].start + spec.window for segment, found in cuts.items()}
        tails = sum(length - ends.get(segment, 0) for segment, length in enumerate(clean.lengths))
        yield Windows(
            names=names,
            positions=clean.channels.positions,
            left_out=left_out,
            selection=clean.channels.selection,
            bads=[names[i] for i in clean.bads],
            sfreq=info.sfreq,
            line_freq=clean.line_freq,
            seconds=result.row.seconds,
            most=sum(map(len, cuts.values())),
            tails=tails / spec.sfreq,
            flawed=flawed,
            stream=((start, x) for _, _, start, x in clean_windows(clean, scratch, info, spec, cuts, flawed)),
        )


def check_numbers(*, unit_factor: float | None, line_freq: float | None) -> None:
    """Refuse what no recording can have.

    Parameters
    ----------
    unit_factor, line_freq : float, optional
        As for `windows_of`.

    Raises
    ------
    RequestError
        If one is given and makes no sense.
    """
    if unit_factor is not None and not 0 < unit_factor < math.inf:
        raise RequestError(f"unit_factor is {unit_factor}; it must be above 0 and finite, or left out")
    low, high = LINE_FREQS
    if line_freq is not None and not low <= line_freq <= high:
        raise RequestError(
            f"line_freq is {line_freq}; the mains have 50 or 60 Hz, so it must be from {low:g} to {high:g}; leave it "
            "out to have it found in the recording"
        )


def open_recording(path: str | Path) -> Signal:
    """Open any readable file.

    Parameters
    ----------
    path : str or Path
        A recording in any format that sharding reads.

    Returns
    -------
    data_sharding.formats.signal.Signal
        The recording, its samples not read yet.

    Raises
    ------
    RequestError
        If there is no such file, or it is no recording, or it cannot be read.
    """
    from data_sharding.formats.open_signal import ReadError, open_signal
    from data_sharding.formats.sniffing import sniff

    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path}: no such recording")
    try:
        found = sniff(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    if found is None:
        raise RequestError(f"{path}: not an EEG recording of a known format")
    try:
        return open_signal(found)
    except ReadError as error:
        raise RequestError(f"{path}: {error}") from None


def _recorded(recording: Any) -> Signal:
    """Behind one interface: what MNE reads, arrays, and what has that interface already."""
    import mne

    from data_sharding.formats.mne_signal import EpochsSignal, RawSignal

    if isinstance(recording, tuple):
        recording = _raw_of(recording)
    if isinstance(recording, mne.io.BaseRaw | mne.BaseEpochs) and not recording.ch_names:
        raise RequestError("the recording has no channel; give the file that holds the signal, not its annotations")
    if isinstance(recording, mne.io.BaseRaw):
        return RawSignal(recording)
    if isinstance(recording, mne.BaseEpochs):
        return EpochsSignal(recording.copy())
    if isinstance(getattr(recording, "info", None), SignalInfo):
        return recording
    raise RequestError(f"cannot encode a {type(recording).__name__}; give an mne Raw or (x, ch_names, sfreq, unit)")


def _raw_of(recording: tuple[Any, ...]) -> mne.io.BaseRaw:
    import mne

    if len(recording) != 4:
        raise RequestError("an array is encoded as (x, ch_names, sfreq, unit)")
    x, names, sfreq, unit = recording
    if unit not in UNITS:
        raise RequestError(f"unit '{unit}' is unknown; use one of V, mV, uV, nV")
    x, names = np.asarray(x, dtype=np.float64), _distinct(names)
    if x.ndim != 2 or len(x) != len(names):
        raise RequestError(f"x has shape {x.shape}, but there are {len(names)} channel names")
    if not isinstance(sfreq, numbers.Real) or not 0 < float(sfreq) < math.inf:
        raise RequestError(f"sfreq must be a number of Hz above 0, got {sfreq!r}")
    return mne.io.RawArray(x * (UNITS[unit] * 1e-6), mne.create_info(names, float(sfreq), "eeg"), verbose="ERROR")


def _distinct(names: Sequence[str]) -> list[str]:
    out = [str(name) for name in names]
    twice = sorted({name for name in out if out.count(name) > 1})
    if twice:
        raise RequestError(f"channel names must differ; more than once: {', '.join(twice[:3])}")
    return out
