"""Open recordings of any maker as a `Signal`: lazily, with their gaps, and with what the file knows about itself.

Shapes: n channels, S samples at the recording's rate, E epochs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding import headers
from data_sharding.channels import canonical_name, is_site, kind_of, place_of
from data_sharding.signals import Segment, Signal, SignalInfo
from data_sharding.sniffing import Recording, find_recordings, sniff  # noqa: F401

if TYPE_CHECKING:
    import mne
    from mne.io import BaseRaw

PACKAGES = {
    "ant": "antio",
    "curry": "curryreader",
    "eeglab": "pymatreader",
    "mff": "mffpy",
    "nedf": "defusedxml",
    "xdf": "pyxdf",
}
"""What MNE's reader of a format, or ours, needs besides."""
UNIT_FACTORS = {"eximia": 1e-6}
"""Formats whose reader returns another unit than volts, with the factor to volts.

eXimia: a converter of 10 V and 16 bits behind a gain of 2000 has 0.0763 microvolts a bit, and MNE's reader returns
that number as if it were volts.
"""
CUT = re.compile(r"boundary|(bad|edge) boundary|new segment/.*", re.IGNORECASE)
"""Annotations of EEGLAB, MNE and BrainVision for a place at which signal was cut out or recording began anew."""
SKIP = re.compile(r"bad_acq_skip", re.IGNORECASE)
"""MNE's annotation for a span in which nothing was recorded, though it is filled with samples."""
BAD = re.compile(r"bad", re.IGNORECASE)
"""Beginning of the annotations that MNE, and those who follow it, mark bad spans with."""
VOLTS = re.compile(r"[munpµμ\x83\xca�?]{0,2}v(olts?)?|(micro|milli|nano)volts?", re.IGNORECASE)
"""Physical dimensions that are a voltage; makers write micro in many code pages."""


class ReadError(ValueError):
    """A recording cannot be read; the message is the reason for the ledger."""


class NotContinuous(ReadError):
    """The file is sound, but holds no signal to train on."""


# --- signals ---------------------------------------------------------------------------------------------------------


class RawSignal:
    """A continuous recording behind MNE's lazy reader.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.
    segments : list of Segment, optional
        Runs without interruption, where the file knows them better than its annotations do.
    keep : Any
        What must live as long as the recording.
    **more : Any
        Other fields of `SignalInfo`.
    """

    def __init__(self, raw: BaseRaw, *, segments: list[Segment] | None = None, keep: Any = None, **more: Any) -> None:
        self.raw, self._keep = raw, keep
        sfreq, n = float(raw.info["sfreq"]), int(raw.n_times)
        fields: dict[str, Any] = {**_fields(raw.info, raw.get_channel_types()), "bad_spans": bad_spans(raw), **more}
        self.info = SignalInfo(n_samples=n, segments=segments or _segments(n, sfreq, *_interruptions(raw)), **fields)

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Samples of some channels; see `Signal.read`."""
        # One reader of MNE mixes up ranges that reach over the file's blocks, so none ever does.
        ends = [s.stop for s in self.info.segments if start < s.stop < stop] if len(self.info.segments) > 1 else []
        bounds = [start, *ends, stop]
        with _quiet():
            blocks = [self.raw[picks, a:b][0] for a, b in itertools.pairwise(bounds)]
        return np.asarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1))

    def close(self) -> None:
        """Let go of files."""
        self.raw.close()
        self._keep = None


class EpochsSignal:
    """An epoched recording: one segment an epoch.

    Parameters
    ----------
    epochs : mne.BaseEpochs
        The epochs; read when they are asked for where the format allows it.
    **more : Any
        Other fields of `SignalInfo`.
    """

    def __init__(self, epochs: mne.BaseEpochs, **more: Any) -> None:
        self.epochs = epochs
        epochs.drop_bad()
        count, length, sfreq = len(epochs), len(epochs.times), float(epochs.info["sfreq"])
        if not count:
            raise NotContinuous("epoched: 0 trials")
        self._length = length
        self.info = SignalInfo(
            n_samples=count * length,
            segments=[Segment(start=i * length, stop=(i + 1) * length, onset=i * length / sfreq) for i in range(count)],
            epoched=True,
            **(_fields(epochs.info, epochs.get_channel_types()) | more),
        )

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Samples of some channels; see `Signal.read`."""
        first, last = start // self._length, (max(stop, start + 1) - 1) // self._length + 1
        with _quiet():
            x_enT = self.epochs.get_data(picks=np.array(picks), item=slice(first, last), copy=False)
        x = np.moveaxis(x_enT, 0, 1).reshape(len(picks), -1)
        return x[:, start - first * self._length : stop - first * self._length]

    def close(self) -> None:
        """Let go of files."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import mne

    with warnings.catch_warnings(), mne.utils.use_log_level("ERROR"):
        warnings.simplefilter("ignore")
        yield


def _fields(info: mne.Info, types: Any) -> dict[str, Any]:
    """Fields of `SignalInfo` that any of MNE's recordings knows."""
    return {
        "ch_names": list(info["ch_names"]),
        "ch_types": list(types),
        "positions": [_position(channel) for channel in info["chs"]],
        "sfreq": float(info["sfreq"]),
        "line_freq": float(info["line_freq"]) if info["line_freq"] else None,
        "bads": list(info["bads"]),
        "reference": "average" if info["custom_ref_applied"] else "",
    }


def _position(channel: dict[str, Any]) -> list[float] | None:
    from mne.io.constants import FIFF

    xyz = np.asarray(channel["loc"][:3], float)
    known = channel["coord_frame"] in (FIFF.FIFFV_COORD_HEAD, FIFF.FIFFV_COORD_UNKNOWN)
    return place_of(xyz.tolist()) if known else None


def _annotations(raw: BaseRaw) -> list[tuple[float, float, str]]:
    """Onset in seconds from the first sample, duration, and word."""
    found = raw.annotations
    first = raw.first_time if found.orig_time is not None else 0.0
    durations = np.nan_to_num(np.asarray(found.duration, float))
    return [
        (float(onset) - first, float(duration), str(word))
        for onset, duration, word in zip(found.onset, durations, found.description, strict=True)
    ]


def bad_spans(raw: BaseRaw) -> list[tuple[float, float, str]]:
    """Spans that a recording's own annotations call bad.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.

    Returns
    -------
    list of (float, float, str)
        Begin and end in seconds from the first sample, and the word.
    """
    return [
        (onset, onset + duration, word)
        for onset, duration, word in _annotations(raw)
        if BAD.match(word) and not SKIP.match(word) and not CUT.fullmatch(word) and duration > 0
    ]


def _interruptions(raw: BaseRaw) -> tuple[list[int], list[tuple[int, int]]]:
    """Samples at which a run begins, and ranges of samples in which nothing was recorded."""
    sfreq, cuts, skips = float(raw.info["sfreq"]), [], []
    for onset, duration, word in _annotations(raw):
        if SKIP.match(word):
            skips.append((round(onset * sfreq), round((onset + duration) * sfreq)))
        elif CUT.fullmatch(word):
            # EEGLAB and MNE put the mark half a sample before the first of the new run. EEGLAB's duration is the
            # length of what is gone, not of what is there.
            cuts.append(int(np.ceil(onset * sfreq - 1e-3)))
    return cuts, skips


def _segments(n: int, sfreq: float, cuts: list[int], skips: list[tuple[int, int]]) -> list[Segment]:
    edges = sorted({0, n, *(c for c in [*cuts, *(e for skip in skips for e in skip)] if 0 < c < n)})
    gone = np.zeros(len(edges), bool)
    for a, b in skips:
        gone[np.searchsorted(edges, a) : np.searchsorted(edges, b)] = True
    return [
        Segment(start=a, stop=b, onset=a / sfreq)
        for a, b, skipped in zip(edges, edges[1:], gone[:-1], strict=False)
        if not skipped
    ]


# --- EDF, BDF and GDF ------------------------------------------------------------------------------------------------


def _records(format_: str) -> Callable[[Path], Signal]:
    """Reader of the formats with records, whose channels may have several rates and units."""

    def read(path: Path) -> Signal:
        import mne

        layout = headers.gdf_layout(path) if format_ == "gdf" else headers.edf_layout(path)
        count = _rate_of_eeg(layout)
        signals = [i for i, label in enumerate(layout.labels) if i != layout.notes and "Annotations" not in label]
        # MNE would bring all channels to the highest rate, block by block: each block's edges would ring.
        others = {
            layout.labels[i]: f"another rate: {layout.per_record[i] / (layout.record_s or 1):g} Hz"
            for i in signals
            if layout.per_record[i] != count
        }
        kept = {layout.labels[i] for i in signals if layout.per_record[i] == count}
        if clash := sorted(kept & set(others)):
            raise ReadError(f"channel '{clash[0]}' is there at several rates, and its names cannot be told apart")
        options: dict[str, Any] = {} if format_ == "gdf" else {"encoding": "latin1"}
        raw: BaseRaw = getattr(mne.io, f"read_raw_{format_}")(path, exclude=sorted(others), **options)
        more: dict[str, Any] = {"left_out": others} if others else {}
        units = [layout.units[i] for i in signals if layout.per_record[i] == count]
        types = list(raw.get_channel_types())
        if len(units) == len(types):
            for i, unit in enumerate(units):
                if types[i] == "eeg" and unit and not VOLTS.fullmatch(unit):
                    types[i] = "misc"
            more["ch_types"] = types
        if layout.interrupted:
            # MNE takes the records as if they followed one another, and drops what is noted beyond that.
            runs, notes = headers.edf_runs(path, layout)
            more["segments"] = [Segment(start=a * count, stop=b * count, onset=onset) for a, b, onset in runs]
            more["bad_spans"] = [(a, b, word) for a, b, word in notes if BAD.match(word) and b > a]
        return RawSignal(raw, **more)

    return read


def _rate_of_eeg(layout: headers.Layout) -> int:
    """Samples a record of the channels that are EEG by name; the most frequent where they differ."""
    counts: Counter[int] = Counter()
    for label, unit, count in zip(layout.labels, layout.units, layout.per_record, strict=True):
        if "Annotations" in label or count < 1:
            continue
        name = canonical_name(label)
        other = kind_of(name) is not None or bool(unit and not VOLTS.fullmatch(unit))
        # Electrode sites decide; without any, names that may be EEG; without any, whatever there is.
        counts[count] += 1 if other else 10**6 if is_site(name) or label.upper().startswith("EEG") else 1000
    if not counts:
        raise NotContinuous("no signal: no channel has samples")
    return max(counts, key=lambda count: (counts[count], count))


# --- other formats ---------------------------------------------------------------------------------------------------


def neuroscan_data_format(path: str | Path) -> str:
    """Bits of a Neuroscan CNT file, which its header does not say reliably.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        ``"int16"`` or ``"int32"``.

    Raises
    ------
    ReadError
        If the header is damaged.

    Notes
    -----
    The size of the data block over channels and samples decides where the header's counts agree with it. Otherwise
    both readings are compared: one sample of 32 bits taken for two of 16 alternates between a smooth and a noisy
    half, and two of 16 taken for one of 32 are ruled by the noise of every other channel; the smoother one is right.
    """
    with Path(path).open("rb") as stream:
        head = stream.read(900)
        n_channels = int.from_bytes(head[370:372], "little")
        n_samples = int.from_bytes(head[864:868], "little")
        events = int.from_bytes(head[886:890], "little")
        start = 900 + 75 * n_channels
        size = (events if start < events <= Path(path).stat().st_size else Path(path).stat().st_size) - start
        if not n_channels or size <= 0:
            raise ReadError("unreadable: damaged Neuroscan header")
        for bits in (16, 32):
            if n_samples and n_channels * n_samples * bits // 8 == size:
                return f"int{bits}"
        stream.seek(start)
        block = stream.read(min(size, n_channels * 4 * 2000))
    rough = {}
    for name, dtype in (("int16", "<i2"), ("int32", "<i4")):
        frame = n_channels * np.dtype(dtype).itemsize
        x = np.frombuffer(block[: len(block) // frame * frame], dtype).reshape(-1, n_channels).astype(float)
        rough[name] = np.median(np.diff(x, axis=0).std(0) / np.maximum(x.std(0), 1e-12))
    return min(rough, key=lambda name: rough[name])


def _neuroscan(path: Path) -> BaseRaw:
    import mne

    return mne.io.read_raw_cnt(path, data_format=neuroscan_data_format(path))  # type: ignore[arg-type]


def _fif(path: Path) -> Any:
    import mne

    try:
        return mne.io.read_raw_fif(path, allow_maxshield=False)
    except ValueError as error:
        if "No raw data" not in str(error):
            raise
    try:
        return mne.read_epochs(path, preload=False, proj=False)
    except Exception:
        raise NotContinuous("no recording in the FIF file: averages or something else") from None


def _eeglab(path: Path) -> Any:
    import mne

    try:
        raw = mne.io.read_raw_eeglab(path)
    except TypeError as error:
        if not (match := re.search(r"number of trials is (\d+)", str(error))):
            raise
        count = int(match.group(1))
        # Own events: the file's may fall on the same sample, which MNE refuses.
        events = np.column_stack([np.arange(count), np.zeros(count, int), np.ones(count, int)])
        return mne.read_epochs_eeglab(path, events=events, event_id={"trial": 1})
    data = Path(str(raw.filenames[0]))
    if data.suffix.lower() == ".fdt" and data.stat().st_size < 4 * len(raw.ch_names) * raw.n_times:
        held = data.stat().st_size / 4 / len(raw.ch_names)
        raise ReadError(f"truncated: the header promises {raw.n_times} samples, the file holds {held:g}")
    return raw


def _as_named(path: Path, *keys: str) -> tuple[Path, str, tempfile.TemporaryDirectory[str] | None]:
    """A text header whose files lie beside it under exactly the names that it gives them.

    Where it names another folder, perhaps of another system, or upper case for lower, MNE's readers find nothing: then
    a header without these faults is written to a temporary folder, beside links to the files.
    """
    data = text = path.read_bytes().decode("latin-1")
    links: dict[str, Path] = {}
    for key in keys:
        named = headers.ini_value(text, key)
        if named is None:
            continue
        name = re.split(r"[\\/]", named)[-1].replace("$b", path.stem)
        if name == named and (path.parent / name).exists():
            links[name] = path.parent / name
            continue
        for file in path.parent.iterdir():
            if file.name.lower() == name.lower():
                links[name] = file
        data = data.replace(named, name, 1)
    if data == text and all(name == file.name for name, file in links.items()):
        return path, text, None
    folder = tempfile.TemporaryDirectory(prefix="eeg-")
    for name, file in links.items():
        (Path(folder.name) / name).symlink_to(file.resolve())
    target = Path(folder.name) / path.name
    target.write_bytes(data.encode("latin-1"))
    return target, text, folder


def _brainvision(path: Path) -> Signal:
    import mne

    path, text, folder = _as_named(path, "DataFile", "MarkerFile")
    raw = mne.io.read_raw_brainvision(path)
    text = text.replace("\r\n", "\n")
    length = int(headers.ini_value(text, "SegmentDataPoints") or 0)
    if (headers.ini_value(text, "SegmentationType") or "NOTSEGMENTED").upper() == "NOTSEGMENTED" or length < 1:
        return RawSignal(raw, keep=folder)
    sfreq = float(raw.info["sfreq"])
    starts = range(0, raw.n_times - length + 1, length)
    return RawSignal(
        raw, segments=[Segment(start=a, stop=a + length, onset=a / sfreq) for a in starts], epoched=True, keep=folder
    )


def _persyst(path: Path) -> Signal:
    """Persyst's recording with the interruptions that its table of sample times tells, which MNE passes over."""
    import mne

    path, text, folder = _as_named(path, "File")
    raw = mne.io.read_raw_persyst(path)
    sfreq = float(raw.info["sfreq"])
    text = text.replace("\r\n", "\n")
    table = re.search(r"^\[SampleTimes\][ \t]*\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    pairs = re.findall(r"^(\d+)=([\d.]+)", table.group(1), re.MULTILINE) if table else []
    cuts = []
    for (a, begin), (b, end) in itertools.pairwise(pairs):
        missing = (float(end) - float(begin)) % 86400 - (int(b) - int(a)) / sfreq
        if abs(missing) > 2 / sfreq:
            cuts.append(int(b))
    marked, skips = _interruptions(raw)
    return RawSignal(raw, segments=_segments(raw.n_times, sfreq, cuts + marked, skips), keep=folder)


def _xdf(path: Path) -> Signal:
    from data_sharding.xdf import open_xdf

    return open_xdf(path)


def _mne(name: str, **options: Any) -> Callable[[Path], BaseRaw]:
    def read(path: Path) -> BaseRaw:
        import mne

        return getattr(mne.io, f"read_raw_{name}")(path, **options)

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "edf": _records("edf"),
    "bdf": _records("bdf"),
    "gdf": _records("gdf"),
    "brainvision": _brainvision,
    "neuroscan": _neuroscan,
    "ant": _mne("ant"),
    "fif": _fif,
    "eeglab": _eeglab,
    "nihon": _mne("nihon"),
    "persyst": _persyst,
    "nedf": _mne("nedf"),
    "curry": _mne("curry"),
    "eximia": _mne("eximia"),
    "egi": _mne("egi", events_as_annotations=True),
    "mff": _mne("egi", events_as_annotations=True),
    "xdf": _xdf,
}
"""Format to its reader, which returns a raw or epochs of MNE's, or a `Signal`."""
WALKS: dict[str, Callable[[tuple[Path, ...]], str | None]] = {
    "mff": headers.check_mff,
    "fif": headers.check_fif,
    "xdf": headers.check_xdf,
}
"""What is checked over the whole file before a reader is let loose on it."""


def open_signal(recording: Recording) -> Signal:
    """Open a recording with the reader of its format.

    Parameters
    ----------
    recording : Recording
        What `sniffing.sniff` found, on a local disk.

    Returns
    -------
    Signal
        The recording; samples are read when they are asked for.

    Raises
    ------
    NotContinuous
        If the file is sound, but there is no signal to train on.
    ReadError
        With the reason for the ledger.

    Notes
    -----
    Some readers can take the process down on a damaged file. Call this where that is survivable.
    """
    if recording.problem:
        raise (ReadError if recording.continuous else NotContinuous)(recording.problem)
    if recording.format not in READERS:
        raise ReadError(f"no reader for the format '{recording.format}'")
    walk = WALKS.get(recording.format)
    files = tuple(Path(str(file)) for file in recording.files)
    if walk and (problem := headers.guarded(walk, recording.format.upper(), files)):
        raise ReadError(problem)
    try:
        with _quiet():
            opened = READERS[recording.format](Path(str(recording.path)))
            signal = opened if not hasattr(opened, "get_channel_types") else _signal_of(opened)
    except ReadError:
        raise
    except ImportError as error:
        raise ReadError(_missing(recording.format, error)) from error
    except Exception as error:
        raise ReadError(unreadable(error)) from error
    factor = UNIT_FACTORS.get(recording.format)
    if factor is not None:
        note = f"the reader of {recording.format} returns values times {1 / factor:g}; corrected"
        signal.info = dataclasses.replace(signal.info, scale=factor, notes=[*signal.info.notes, note])
    return signal


def _signal_of(opened: Any) -> Signal:
    import mne

    return RawSignal(opened) if isinstance(opened, mne.io.BaseRaw) else EpochsSignal(opened)


def unreadable(error: BaseException) -> str:
    """Reason of the ledger for what a reader raised.

    Parameters
    ----------
    error : BaseException
        What it raised.

    Returns
    -------
    str
        One line.
    """
    return f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _missing(format_: str, error: ImportError) -> str:
    package = PACKAGES.get(format_, error.name or "")
    try:
        importlib.import_module(package)
    except ImportError:
        return f"reader not installed: pip install {package}"
    except ValueError:
        pass
    # The package is there, and what it needs itself is not.
    return f"reader not installed: {' '.join(str(error).split())[:200]}"
