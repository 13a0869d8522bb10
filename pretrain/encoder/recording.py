"""Convert a recording to windows, with the same code that sharding uses for the pretraining data.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.formats.signal import Signal, SignalInfo
from data_sharding.formats.units import to_volts
from data_sharding.processing.preprocess import PreprocessSpec

if TYPE_CHECKING:
    import mne

    from data_sharding.job.cut_windows import CleanWindow
    from data_sharding.processing.account import Account

LINE_FREQS = (40.0, 70.0)
"""Lowest and highest mains frequency in Hz that a user may give. The power grid has 50 or 60 Hz, but the frequency of
small generators can differ."""
MAX_OVERLAP = 64
"""Largest number of overlapping windows that may contain the same time sample of a recording. The work of encoding a
recording grows with the overlap."""
MAX_BATCH = 2**27
"""Largest number of signal values in one forward pass. If windows are long, fewer of them than `batch_size` are encoded
in one forward pass."""


@dataclass(kw_only=True)
class Windows:
    """Windows of a recording, ready for `PreprocessSpec.scale_for_model`."""

    names: list[str]
    """Names of the channels, in the order of the rows."""
    positions: list[list[float] | None]
    """Position of each channel's electrode in metres, None for an unknown position."""
    left_out: dict[str, str]
    """Channels of the recording that are not in the windows, each with the reason."""
    selection: str
    """Rule by which channels were chosen, if the recording has more than 128 channels."""
    bads: list[str]
    """Bad channels, e.g. flat, clipped or noisy channels. Bad channels stay in the windows, but are left out of the
    average reference."""
    sfreq: float
    """Sampling rate of the recording in Hz."""
    line_freq: float | None
    """Mains frequency in Hz, as given for the recording or detected in its spectrum."""
    seconds: float
    """Length of the recording in seconds."""
    most: int
    """Largest number of windows that `stream` can yield; `stream` skips windows that cannot be used."""
    account: Account = field(repr=False)
    """Counts of the windows and seconds that were left out. The counts are complete after `stream` has ended."""
    stream: Iterator[CleanWindow] = field(repr=False)
    """Iterator over the usable windows: start in seconds, signal [C, T] in float32 microvolts, and bad channels."""


@contextlib.contextmanager
def windows_of(
    recording: Any, spec: PreprocessSpec, *, unit_factor: float | None = None, line_freq: float | None = None
) -> Iterator[Windows]:
    """Convert a recording to windows. Channels, units and filters are chosen in the same way as in sharding.

    Parameters
    ----------
    recording : mne.io.BaseRaw, mne.BaseEpochs, data_sharding.formats.signal.Signal or tuple
        A recording, or ``(x, ch_names, sfreq, unit)`` where x is an array [C, samples].
    spec : PreprocessSpec
        The preprocessing that was used in the pretraining.
    unit_factor : float, optional
        Factor that converts the recording's values to volts, if the recording states a wrong unit. With `unit_factor`,
        the recording is used even if its amplitude is not plausible for EEG.
    line_freq : float, optional
        Mains frequency in Hz, within `LINE_FREQS`. By default the mains frequency is detected in the recording.

    Yields
    ------
    Windows
        The windows. Read the windows inside the ``with`` block, because the filtered signal is a temporary file that
        is deleted at the end of the block.

    Raises
    ------
    RequestError
        If sharding would leave out the whole recording (the message gives the reason), or if an argument has an
        impossible value.
    """
    check_numbers(unit_factor=unit_factor, line_freq=line_freq)
    if spec.window > MAX_OVERLAP * spec.stride:
        raise RequestError(
            f"the preprocessing of the encoder cuts a window of {spec.window} samples every {spec.stride} samples; "
            f"encoding needs a stride of at least 1/{MAX_OVERLAP} of the window, so set the key 'stride' in the file "
            "preprocess.json of the encoder package"
        )
    from data_sharding.corpora import Item
    from data_sharding.formats.open_signal import Recording
    from data_sharding.job.cut_windows import clean_windows, plan_windows
    from data_sharding.job.process_recording import prepare
    from data_sharding.job.task import PartResult, SetAside, new_row
    from data_sharding.processing.account import Account

    signal = _wrap(recording)
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
    result, info = PartResult(row=new_row(item)), signal.info
    with contextlib.ExitStack() as stack:
        try:
            clean, scratch = stack.enter_context(prepare(signal, item, spec, result))
        except SetAside as verdict:
            hint = "; unit_factor can give the right factor to volts" if result.row.unit == "unknown" else ""
            raise RequestError(f"the recording cannot be used: {verdict.reason}{hint}") from None
        names = clean.channels.names
        left_out = {name: kind for kind, found in result.row.channels_left_out.items() for name in found}
        left_out |= {name: kind for name, kind in zip(info.ch_names, info.ch_types, strict=True) if kind != "eeg"}
        left_out |= clean.left_out
        cuts = plan_windows(clean, info, spec)
        account = Account(clean.lengths, clean.faults, spec, whole=True)

        def stream() -> Iterator[CleanWindow]:
            for found in clean_windows(clean, scratch, info, spec, cuts, account):
                account.write(found.segment, found.cut.start, found.cut.start + spec.window, found.kinds)
                yield found

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
            account=account,
            stream=stream(),
        )


def check_numbers(*, unit_factor: float | None, line_freq: float | None) -> None:
    """Raise an error if `unit_factor` or `line_freq` has a value that no recording can have.

    Parameters
    ----------
    unit_factor, line_freq : float, optional
        See `windows_of`.

    Raises
    ------
    RequestError
        If one of the two numbers is given and its value is impossible.
    """
    if unit_factor is not None and not 0 < unit_factor < math.inf:
        raise RequestError(f"unit_factor is {unit_factor}; it must be above 0 and finite, or left out")
    low, high = LINE_FREQS
    if line_freq is not None and not low <= line_freq <= high:
        raise RequestError(
            f"line_freq is {line_freq}; mains have 50 or 60 Hz, so it must be from {low:g} to {high:g}; without "
            "line_freq the frequency is found in the recording"
        )


def open_recording(path: str | Path) -> Signal:
    """Open a recording in any format that sharding reads.

    Parameters
    ----------
    path : str or Path
        Path of the recording.

    Returns
    -------
    data_sharding.formats.signal.Signal
        The opened recording; its time samples are read later.

    Raises
    ------
    RequestError
        If there is no such file, if the file is not a recording, or if the file cannot be read.
    """
    from data_sharding.formats.open_signal import ReadError, open_signal
    from data_sharding.formats.sniffing import sniff

    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path}: no such file; give the path of a recording")
    try:
        found = sniff(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if found is None:
        raise RequestError(f"{path}: not an EEG recording in a known format; docs/formats.md lists the formats")
    try:
        return open_signal(found)
    except ReadError as error:
        raise RequestError(f"{path}: {error}") from None


def _wrap(recording: Any) -> Signal:
    """Convert an MNE object or a tuple (see `windows_of`) to a `Signal`; a `Signal` is returned unchanged."""
    import mne

    from data_sharding.formats.mne_signal import EpochsSignal, RawSignal

    if isinstance(recording, tuple):
        recording = _make_raw(recording)
    if isinstance(recording, mne.io.BaseRaw | mne.BaseEpochs) and not recording.ch_names:
        raise RequestError("the recording has no channel; give the file that holds the signal, not its annotations")
    if isinstance(recording, mne.io.BaseRaw):
        return RawSignal(recording)
    if isinstance(recording, mne.BaseEpochs):
        return EpochsSignal(recording.copy())
    if isinstance(getattr(recording, "info", None), SignalInfo):
        return recording
    raise RequestError(
        f"cannot encode a {type(recording).__name__}; give an mne Raw or Epochs object or (x, ch_names, sfreq, unit)"
    )


def _make_raw(recording: tuple[Any, ...]) -> mne.io.BaseRaw:
    import mne

    if len(recording) != 4:
        raise RequestError(f"the tuple has {len(recording)} values; give (x, ch_names, sfreq, unit)")
    x, names, sfreq, unit = recording
    factor = to_volts(str(unit))
    if factor is None:
        raise RequestError(f"unit '{unit}' is unknown; use one of V, mV, uV, nV")
    x, names = np.asarray(x, dtype=np.float64), _check_names(names)
    if x.ndim != 2 or len(x) != len(names):
        raise RequestError(f"x has shape {x.shape}, but there are {len(names)} channel names")
    if not isinstance(sfreq, numbers.Real) or not 0 < float(sfreq) < math.inf:
        raise RequestError(f"sfreq must be a number of Hz above 0, got {sfreq!r}")
    return mne.io.RawArray(x * factor, mne.create_info(names, float(sfreq), "eeg"), verbose="ERROR")


def _check_names(names: Sequence[str]) -> list[str]:
    out = [str(name) for name in names]
    twice = sorted({name for name in out if out.count(name) > 1})
    if twice:
        raise RequestError(f"every channel needs a different name; these occur twice: {', '.join(twice[:3])}")
    return out
