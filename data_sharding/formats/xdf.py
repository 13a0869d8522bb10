"""The EEG stream of an XDF file (LabStreamingLayer), whose samples carry a clock instead of a rate.

Shapes: n channels, S samples.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.reason import Reason
from data_sharding.formats.channels import clean_position
from data_sharding.formats.mne_signal import NotContinuous, ReadError
from data_sharding.formats.signal import Segment, Signal, SignalInfo

TO_VOLTS = {"microvolts": 1e-6, "uv": 1e-6, "µv": 1e-6, "μv": 1e-6, "microvolt": 1e-6, "millivolts": 1e-3, "mv": 1e-3}
TO_VOLTS |= {"nanovolts": 1e-9, "nv": 1e-9, "volts": 1.0, "v": 1.0, "": 1.0}
"""Units that streams declare; without one, values are taken as volts and the amplitude shows that they are not."""
TYPES = {"eeg": "eeg", "eog": "eog", "ecg": "ecg", "ekg": "ecg", "emg": "emg", "": "eeg"}
STEADY = 1e-4
"""Relative difference of the clock's rate from the nominal one below which the nominal one is taken."""
GAP = 1.5
"""Sample intervals after which signal is missing."""
MAX_JITTER = 0.25
"""Share of intervals that may be off by more than half before a stream has no rate."""


class ArraySignal:
    """A recording that its reader cannot but load as a whole.

    Parameters
    ----------
    x : ndarray, shape (S, n)
        Samples in the file's unit.
    factors : ndarray, shape (n,)
        What brings each channel to volts.
    info : SignalInfo
        What is known of it.
    """

    def __init__(self, x: np.ndarray, factors: np.ndarray, info: SignalInfo) -> None:
        self.x, self.factors, self.info = x, factors, info

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Samples of some channels; see `Signal.read`."""
        return self.x[start:stop, picks].T.astype(np.float64) * self.factors[picks, None]

    def close(self) -> None:
        """Let go of files."""


def open_xdf(path: Path) -> Signal:
    """Open the one EEG stream of an XDF file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Signal
        Its samples, at the rate that the clock shows; where samples are missing, a segment ends.

    Raises
    ------
    NotContinuous
        If there is no stream of type EEG.
    ReadError
        If there are several, or the stream has no rate.
    """
    import pyxdf

    streams = pyxdf.resolve_streams(str(path))
    eeg = [
        s for s in streams if str(s.get("type", "")).strip().lower() == "eeg" and s.get("channel_format") != "string"
    ]
    if not eeg:
        kinds = sorted({str(s.get("type") or "untyped") for s in streams}) or ["none"]
        raise NotContinuous(Reason("no stream of type EEG", f"only {', '.join(kinds)}"))
    if len(eeg) > 1:
        names = ", ".join(str(s.get("name") or s["stream_id"]) for s in eeg)
        text = f"{len(eeg)} streams of type EEG ({names}), and nothing says which is meant; export one of them"
        raise ReadError(Reason("several streams of type EEG", text=text))
    streams, _ = pyxdf.load_xdf(str(path), select_streams=[eeg[0]["stream_id"]])
    stream = streams[0]
    x, stamps = np.asarray(stream["time_series"]), np.asarray(stream["time_stamps"], float)
    if x.ndim != 2 or len(x) < 2:
        raise NotContinuous(Reason("no signal", f"{len(x)} samples"))
    sfreq = _rate(float(stream["info"]["nominal_srate"][0] or 0), stamps)
    wide = np.flatnonzero(np.diff(stamps) > GAP / sfreq) + 1
    edges = [0, *wide.tolist(), len(x)]
    names, types, factors, positions = _channels(stream["info"].get("desc"), x.shape[1])
    return ArraySignal(
        x,
        factors,
        SignalInfo(
            ch_names=names,
            ch_types=types,
            positions=positions,
            sfreq=sfreq,
            n_samples=len(x),
            segments=[
                Segment(start=a, stop=b, onset=float(stamps[a] - stamps[0])) for a, b in itertools.pairwise(edges)
            ],
        ),
    )


def _rate(nominal: float, stamps: np.ndarray) -> float:
    """Rate by the clock, over the intervals without a gap."""
    steps = np.diff(stamps)
    median = float(np.median(steps))
    if not median > 0 or float(np.mean(np.abs(steps - median) > median / 2)) > MAX_JITTER:
        raise ReadError(Reason("the stream has no steady rate", "its time stamps are irregular"))
    whole = steps[steps < GAP * median]
    effective = 1.0 / float(whole.mean())
    return nominal if nominal > 0 and abs(effective / nominal - 1) < STEADY else round(effective, 2)


def _channels(desc: Any, n: int) -> tuple[list[str], list[str], np.ndarray, list[list[float] | None]]:
    """Names, types, factors to volts and places, as far as the stream declares them."""
    try:
        declared = desc[0]["channels"][0]["channel"]
    except (TypeError, KeyError, IndexError):
        declared = []
    if len(declared) != n:
        declared = [{}] * n

    def word(channel: Any, key: str) -> str:
        value = (channel.get(key) or [""])[0]
        return value.strip() if isinstance(value, str) else ""

    names: list[str] = []
    for i, channel in enumerate(declared, start=1):
        name = word(channel, "label") or str(i)
        names.append(name if name not in names else f"{name}-{i}")
    units = [word(channel, "unit").lower() for channel in declared]
    kinds = [TYPES.get(word(channel, "type").lower(), "misc") for channel in declared]
    types = [kind if unit in TO_VOLTS else "misc" for kind, unit in zip(kinds, units, strict=True)]
    factors = np.array([TO_VOLTS.get(unit, 1.0) for unit in units])
    return names, types, factors, [_place(channel) for channel in declared]


def _place(channel: Any) -> list[float] | None:
    try:
        location = channel["location"][0]
        return clean_position([float(location[axis][0]) / 1000 for axis in ("X", "Y", "Z")])  # Millimetres.
    except (TypeError, KeyError, IndexError, ValueError):
        return None
