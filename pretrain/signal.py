"""A recording to the microvolts that the encoder was pretrained on: the same channels, units and mains as in sharding.

Shapes: n channels, S samples at the recording's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.errors import RequestError
from data_sharding.samples import N_PADDED
from data_sharding.signals import Signal as Recorded
from data_sharding.signals import SignalInfo

if TYPE_CHECKING:
    import mne

UNITS = {"V": 1e6, "mV": 1e3, "uV": 1.0, "µV": 1.0, "μV": 1.0, "nV": 1e-3}
"""Factor to microvolts."""


@dataclass(kw_only=True)
class Signal:
    """EEG of a recording, ready for `data_sharding.preprocess.preprocess`."""

    x_uv: np.ndarray
    """[n, S] microvolts."""
    names: list[str]
    """Channels of the rows."""
    positions: list[list[float] | None]
    """Electrodes of the rows in metres, None where not known."""
    left_out: dict[str, str]
    """Other channels of the recording, and why."""
    selection: str
    """How channels were chosen where there are more than 128."""
    bads: list[int]
    """Rows that are flat, clipped or out of range: kept, but left out of the average reference."""
    sfreq: float
    """Rate in Hz."""
    line_freq: float | None
    """Mains frequency in Hz, from the recording or found in its spectrum."""
    segments: list[tuple[int, int]]
    """Runs of samples without interruption: nothing is to be filtered or cut over their ends."""


def open_recording(path: str | Path) -> tuple[Recorded, float]:
    """Open any readable file.

    Parameters
    ----------
    path : str or Path
        A recording in any format that sharding reads.

    Returns
    -------
    recorded : data_sharding.signals.Signal
        The recording, its signal not loaded yet; it knows itself what brings its values to volts.
    factor : float
        1: what else to multiply with.

    Raises
    ------
    RequestError
        If there is no such file, or it is no recording, or it cannot be read.
    """
    from data_sharding.readers import ReadError, open_signal
    from data_sharding.sniffing import sniff

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
        return open_signal(found), 1.0
    except ReadError as error:
        raise RequestError(f"{path}: {error}") from None


def signal_of(
    recording: Any, *, unit_factor: float | None = None, line_freq: float | None = None, reader_factor: float = 1.0
) -> Signal:
    """Bring a recording to microvolts, with the channels that sharding would keep.

    Parameters
    ----------
    recording : mne.io.BaseRaw, mne.BaseEpochs, data_sharding.signals.Signal or tuple
        A recording, or ``(x, ch_names, sfreq, unit)`` with x an array [n, S].
    unit_factor : float, optional
        Factor to true volts, where the file's unit is wrong; the amplitude is not judged then.
    line_freq : float, optional
        Mains frequency in Hz, where it is known better than from the recording.
    reader_factor : float
        What else to multiply with.

    Returns
    -------
    Signal
        Microvolts and what is known of them.

    Raises
    ------
    RequestError
        If there is no EEG, the amplitudes are none that EEG has, or values are missing in every channel.
    """
    from data_sharding.channels import choose, pick_channels, restrict
    from data_sharding.units import assess, line_frequency

    if isinstance(recording, tuple):
        unit_factor = unit_factor or 1.0
    recorded = _recorded(recording)
    info = recorded.info
    channels = pick_channels(info)
    if not channels.picks:
        raise RequestError(f"no EEG channel in the recording: it has {', '.join(sorted(channels.by_type))}")
    x_uv = np.asarray(recorded.read(0, info.n_samples, channels.picks), np.float64) * (1e6 * info.scale * reader_factor)
    left_out = {name: kind for kind, names in channels.left_out.items() for name in names}
    left_out |= {name: kind for name, kind in zip(info.ch_names, info.ch_types, strict=True) if kind != "eeg"}
    finite = np.isfinite(x_uv).all(axis=1)
    if not finite.any():
        raise RequestError("the recording holds NaN or infinite values in every channel")
    if not finite.all():
        left_out |= {channels.names[i]: "NaN or infinite values" for i in np.flatnonzero(~finite)}
        channels, x_uv = restrict(channels, np.flatnonzero(finite).tolist(), channels.selection), x_uv[finite]
    sfreq = info.sfreq
    verdict = assess(x_uv, sfreq, factor=unit_factor)
    if verdict.unit == "unknown":
        raise RequestError(
            f"the recording's amplitude reads as {verdict.amplitude_uv:.3g} microvolts, which is not EEG's; "
            "its unit is wrong, or it holds no EEG (unit_factor says how to correct it)"
        )
    rows, rule = choose(channels, list(verdict.bads), N_PADDED)
    kept = restrict(channels, rows, rule)
    left_out |= {name: f"beyond {N_PADDED} channels" for name in channels.names if name not in kept.names}
    bads = [new for new, old in enumerate(rows) if old in verdict.bads]
    x_uv = x_uv[rows] * verdict.factor
    if len(bads) == len(rows):
        raise RequestError("no usable channel in the recording: all are flat, clipped or out of range")
    if line_freq is None:
        line_freq = info.line_freq or line_frequency(x_uv, sfreq, bads)
    return Signal(
        x_uv=x_uv,
        names=kept.names,
        positions=kept.positions,
        left_out=left_out,
        selection=rule,
        bads=bads,
        sfreq=sfreq,
        line_freq=float(line_freq) if line_freq else None,
        segments=[(segment.start, segment.stop) for segment in info.segments],
    )


def _recorded(recording: Any) -> Recorded:
    """Behind one interface: what MNE reads, arrays, and what has that interface already."""
    import mne

    from data_sharding.mne_signal import EpochsSignal, RawSignal

    if isinstance(recording, tuple):
        return RawSignal(_raw_of(recording))
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
    if not sfreq > 0:
        raise RequestError(f"sfreq must be positive, got {sfreq}")
    return mne.io.RawArray(x * (UNITS[unit] * 1e-6), mne.create_info(names, float(sfreq), "eeg"), verbose="ERROR")


def _distinct(names: Sequence[str]) -> list[str]:
    out = [str(name) for name in names]
    twice = sorted({name for name in out if out.count(name) > 1})
    if twice:
        raise RequestError(f"channel names must differ; more than once: {', '.join(twice[:3])}")
    return out
