"""Reads one recording and writes its windows to a folder, the *part* of the recording.

Each Ray task of the first phase calls the function `process_recording` in a child process of the Ray worker.

The signal of a recording is processed in two passes. The first pass reads the recording's file in blocks, measures each
block (`data_sharding.processing.survey`), resamples it, and writes it to a scratch file. After the first pass, the
unit, the bad channels and the mains frequency are known. The second pass (`data_sharding.job.cut_windows`) reads the
signal from the scratch file, filters it, and cuts out the windows. Memory use does not grow with the length of the
recording.

In array shapes, `n` is the number of channels, `S` the number of time samples at the recording's sampling rate, and `T`
the number of time samples in a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.audit.duplicates import signature
from data_sharding.common.files import digest_of, read_json, sha256_file, write_json
from data_sharding.common.reason import Reason
from data_sharding.common.storage import (
    AnyPath,
    as_path,
    commit_folder,
    file_state,
    is_remote,
    localised,
    scratch_folder,
)
from data_sharding.common.untrusted import MAX_NAME
from data_sharding.corpora import Item, open_item
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.formats.channels import Channels, canonical_name, choose, pick_channels, restrict
from data_sharding.formats.kept.signal import KEPT_SCHEMA, KeepingSignal, KeptSignal, NotKept
from data_sharding.formats.kept.store import find_checksums, get_states, note_use, signal_path, store_checksums
from data_sharding.formats.open_signal import PACKAGES, NotContinuous, ReadError, unreadable
from data_sharding.formats.readers import find_formats
from data_sharding.formats.signal import Signal, SignalInfo
from data_sharding.job.cut_windows import Clean, write_windows
from data_sharding.job.task import WITHOUT_EFFECT, PartResult, SetAside, Task, new_row
from data_sharding.processing.faults import MARKED, find_faults
from data_sharding.processing.preprocess import (
    PreprocessSpec,
    band_of,
    check_line_freq,
    reference_rows,
    transient_length,
)
from data_sharding.processing.streaming import MAX_UPSAMPLING, Resampler, Scratch, blocks_of, resampled_length
from data_sharding.processing.survey import Survey, Verdict

PART_SCHEMA = 12
"""Version number in the names of parts. Increase this number if a change of the code changes the results, so that the
job does not use parts of the older code."""
RESULT = "result.json"
"""Name of the file that stores the `PartResult` of a recording in its part."""
SFREQS = (1e-3, 1e7)
"""Lowest and highest possible sampling rate of a recording in Hz."""
MIN_SAMPLES = 16
"""A recording with fewer samples than this is excluded, because its signal is too short for the measurements."""


def get_library_versions() -> dict[str, str]:
    """Return the versions of the libraries on which the bytes of a part (the windows of a recording) depend."""
    import mne
    import scipy
    import zstandard

    return {
        "mne": mne.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "zstandard": zstandard.__version__,
    }


@functools.lru_cache(maxsize=256)
def _checksum(path: Path, state: tuple[int, int, str]) -> str:
    """Return the checksum of a file. The checksum is cached, because one file may contain many recordings."""
    del state
    return sha256_file(path)


def recording_checksum(item: Item, hashes: Sequence[str]) -> str:
    """Return a checksum of the recording's files. If the recording has options, the checksum includes the options.

    Parameters
    ----------
    item : Item
        The recording.
    hashes : sequence of str
        SHA-256 of each file of the recording.

    Returns
    -------
    str
        Hexadecimal checksum. For a recording that consists of one file and has no options, the checksum is the SHA-256
        of the file.
    """
    whole = digest_of(sorted(hashes)) if len(hashes) > 1 else hashes[0]
    # Several recordings in one file have the same files and different options. If the checksum did not include the
    # options, several recordings in one file would look like duplicates.
    return digest_of([whole, item.options]) if item.options else whole


def process_recording(task: Task) -> PartResult:
    """Read a recording, check its signal, and write its windows to a part (a folder for this recording).

    Parameters
    ----------
    task : Task
        The recording to process, and the settings for this recording.

    Returns
    -------
    PartResult
        The ledger row, and the data that the second phase of the job needs. If a finished part of this recording
        exists, the result stored in that part is returned.

    Raises
    ------
    OSError
        If the working folder or the scratch folder cannot be written, or if an object store fails. These errors are not
        faults of the recording.
    """
    files, notes = task.item.recording.files, list[str]()
    known = find_checksums(task.decoded, files) if task.decoded else None
    if known:
        try:
            return _process(
                task,
                {str(i): checksum for i, checksum in enumerate(known[1])},
                sum(size for size, _, _ in known[0]),
                kept=True,
            )
        except NotKept as error:
            notes += [error.note] if error.note else []
    with contextlib.ExitStack() as stack:
        states = get_states(files) if task.decoded else None
        try:
            path, *local = stack.enter_context(localised([task.item.recording.path, *files]))
            hashes = {str(i): _checksum(f, file_state(f)) for i, f in enumerate(local)}
            size = sum(f.stat().st_size for f in local)
        except OSError as error:
            if is_remote(task.item.recording.path):
                raise
            result = PartResult(row=new_row(task.item))
            result.row.set_reason("quarantined", Reason("unreadable", str(error.strerror or error)))
            # The user may correct the permissions of the file, so the next run tries this recording again.
            result.may_pass = True
            return result
        recording = dataclasses.replace(task.item.recording, path=path, files=tuple(local))
        task = dataclasses.replace(task, item=dataclasses.replace(task.item, recording=recording))
        if task.decoded:
            store_checksums(task.decoded, files, states, list(hashes.values()))
            # If `known` is None, the files have new paths or new times, but an earlier job may have stored the signal
            # of files with the same checksums.
            if not known:
                try:
                    return _process(task, hashes, size, kept=True)
                except NotKept as error:
                    notes += [error.note] if error.note else []
        return _process(task, hashes, size, notes=notes)


def _process(
    task: Task, hashes: dict[str, str], size: int, *, kept: bool = False, notes: Sequence[str] = ()
) -> PartResult:
    """Write the part (a folder) of a recording; the checksums of the recording's files are already known.

    If `kept` is True, do not read the recording's files, but the decoded signal that an earlier job stored.

    Raises
    ------
    NotKept
        If `kept` is True, and no stored signal can be used.
    """
    result = PartResult(row=new_row(task.item))
    row = result.row
    row.bytes, row.sha256 = size, recording_checksum(task.item, list(hashes.values()))
    row.notes += notes
    name = _part_name(task, hashes)
    part = task.work / "parts" / name[:2] / name
    if (part / RESULT).is_file():
        return PartResult.from_json(read_json(part / RESULT))
    place = signal_path(task.decoded, _signal_key(task.item, hashes)) if task.decoded else None
    with _unfinished(part) as folder:
        try:
            _fill(task, result, folder, place, kept=kept)
        except SetAside as verdict:
            row.set_reason(verdict.status, verdict.full_reason)
            result.samples = {}
        row.reset_impossible()
        result.part = name
        write_json(folder / RESULT, result.to_json())
        commit_folder(folder, part)
    return result


@contextlib.contextmanager
def _unfinished(part: AnyPath) -> Iterator[Path]:
    """Make a local folder to write a part into.

    On a disk, the local folder is next to the final folder of the part, so that the finished part is moved by renaming.
    For an object store, the local folder is inside the scratch folder.
    """
    if is_remote(part):
        with scratch_folder() as scratch:
            (scratch / "part").mkdir()
            yield scratch / "part"
        return
    folder = Path(part.with_name(f".{part.name}.{uuid.uuid4().hex[:8]}.tmp"))  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part_name(task: Task, hashes: dict[str, str]) -> str:
    item = dataclasses.asdict(dataclasses.replace(task.item, recording=None))  # type: ignore[arg-type]
    for name in WITHOUT_EFFECT:
        item.pop(name)
    item["recording"] = {"format": task.item.recording.format, "files": [f.name for f in task.item.recording.files]}
    trials = [{**t, "image": t["image"] and _image_identity(t["image"])} for t in item["trials"] or ()]
    return digest_of(
        {
            "schema": PART_SCHEMA,
            "item": {**item, "trials": trials if item["trials"] is not None else None},
            "hashes": hashes,
            "spec": task.spec.to_dict(),
            "split": dataclasses.asdict(task.split),
            "labels": list(task.labels),
            "versions": get_library_versions(),
        }
    )


def _signal_key(item: Item, hashes: dict[str, str]) -> str:
    """Return a checksum of all values on which the decoded signal of a recording depends."""
    package = PACKAGES.get(item.recording.format, "")
    package = next((f.package for f in find_formats() if f.name == item.recording.format), package)
    try:
        reader = importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        reader = ""
    return digest_of(
        {
            "schema": [KEPT_SCHEMA, PART_SCHEMA],
            "item": [item.kind, item.options, item.info_patch, item.left_out, item.reason],
            "format": item.recording.format,
            "files": [item.recording.path.name, *(f.name for f in item.recording.files)],
            "hashes": hashes,
            "versions": [get_library_versions(), package, reader],
        }
    )


def _image_identity(image: str) -> list[Any]:
    path = as_path(image)
    return [path.name, *file_state(path)]


def _open(item: Item) -> Signal:
    try:
        return open_item(item)
    except NotContinuous as error:
        raise SetAside("excluded", error.reason) from None
    except ReadError as error:
        raise SetAside("quarantined", error.reason) from None


@contextlib.contextmanager
def _signal_of(item: Item, result: PartResult, folder: Path, place: Path | None, kept: bool) -> Iterator[Signal]:
    """Open the decoded signal that an earlier job stored (if `kept` is True), or the files of the recording.

    If `place` is not None, the signal that is read from the files is stored at the path `place`.
    """
    if place is None:
        with contextlib.closing(_open(item)) as signal:
            yield signal
    elif kept:
        with contextlib.closing(KeptSignal(place)) as signal:
            note_use(place)
            yield signal
    else:
        with contextlib.closing(_open(item)) as signal:
            keeping = KeepingSignal(signal, folder / "signal.tmp")
            try:
                yield keeping
            finally:
                if fault := keeping.finish(place):
                    result.row.notes.append(f"the decoded signal could not be stored: {fault}")


def _fill(task: Task, result: PartResult, folder: Path, place: Path | None, *, kept: bool) -> None:
    """Write the part (the folder with the windows) of a recording.

    The ledger row is filled step by step, so that after an error the row contains all values that are known.
    """
    item = task.item
    if item.recording.problem:
        raise SetAside("quarantined" if item.recording.continuous else "excluded", item.recording.problem)
    with (
        _signal_of(item, result, folder, place, kept) as signal,
        prepare(signal, item, task.spec, result, folder) as (clean, scratch),
    ):
        write_windows(task, result, folder, clean, scratch, signal.info)
    if not result.row.windows:
        counts = ", ".join(f"{n} {why}" for why, n in sorted(result.row.windows_left_out.items()))
        raise SetAside("excluded", Reason("no window left", counts))
    result.row.status = "sharded"


@contextlib.contextmanager
def prepare(
    signal: Signal, item: Item, spec: PreprocessSpec, result: PartResult, folder: Path | None = None
) -> Iterator[tuple[Clean, Scratch]]:
    """Do the first pass over a recording: read, measure and resample its signal, and choose its channels.

    Parameters
    ----------
    signal : Signal
        The open recording.
    item : Item
        Data of the recording that come from the corpus, such as its path, subject and trials.
    spec : PreprocessSpec
        Settings of the preprocessing.
    result : PartResult
        Result of the recording. This function fills in the fields `row` (the ledger row) and `signature` of the result.
    folder : Path, optional
        Folder for the fingerprint file. If None, the fingerprint is not written.

    Yields
    ------
    clean : Clean
        Settings for filtering and for cutting windows.
    scratch : Scratch
        Scratch file with the signal at the target sampling rate. The scratch file is deleted after the ``with`` block.

    Raises
    ------
    SetAside
        If the recording cannot be used.
    """
    info, row = signal.info, result.row
    if not SFREQS[0] <= info.sfreq <= SFREQS[1]:
        raise SetAside("quarantined", Reason("unreadable", f"the sampling rate in the file is {info.sfreq:g} Hz"))
    if long := next((name for name in info.ch_names if len(name) > MAX_NAME), ""):
        raise SetAside("quarantined", Reason("text too long", f"the name of a channel has {len(long)} characters"))
    row.sfreq, row.seconds = info.sfreq, round(info.n_samples / info.sfreq, 4)
    row.reference, row.segments = info.reference, len(info.segments)
    row.notes += info.notes
    row.age, row.sex, row.recording_year = info.about.age, info.about.sex, info.about.year
    row.device, row.device_filters = info.about.device, info.about.filters
    if info.n_samples < MIN_SAMPLES:
        raise SetAside("excluded", Reason("no signal", f"{info.n_samples} samples"))
    channels = pick_channels(info)
    row.channels_by_type, row.channels_left_out = dict(channels.by_type), dict(channels.left_out)
    row.n_eeg, row.montage, row.montage_confidence = len(channels.names), channels.montage, channels.confidence
    row.notes += channels.notes
    if item.reason:
        raise SetAside("excluded", item.reason)
    if not channels.picks:
        others = [n for names in channels.left_out.values() for n in names] or sorted(channels.by_type)
        raise SetAside("excluded", Reason("no EEG channel", f"only {', '.join(others[:5])}"))
    read = _Reading(info, channels, spec)
    with Scratch(len(read.picks)) as scratch:
        survey = read.first_pass(signal, scratch, item.unit_factor or 1.0)
        yield _judge(item, result, read, survey, spec, folder), scratch


class _Reading:
    """Indices of the channels to read: first the EEG channels, then reference channels that are not EEG channels."""

    def __init__(self, info: SignalInfo, channels: Channels, spec: PreprocessSpec) -> None:
        self.info, self.channels, self.spec = info, channels, spec
        low, high = band_of(info.sfreq, spec)
        if high < 2 * low:
            text = f"a sampling rate of {info.sfreq:g} Hz is too low for the band from {low:g} to {2 * low:g} Hz"
            raise SetAside("excluded", Reason("rate too low", text))
        if spec.sfreq > MAX_UPSAMPLING * info.sfreq:
            text = (
                f"the rate is {info.sfreq:g} Hz, and windows of {spec.sfreq:g} Hz have more than {MAX_UPSAMPLING} "
                "times this rate"
            )
            raise SetAside("excluded", Reason("rate too low", text))
        self.names = list(channels.names)
        self.picks = list(channels.picks)
        known = {name.casefold() for name in self.names}
        for wanted in spec.reference_channels:
            if wanted.casefold() in known:
                continue
            found = [
                i
                for i, name in enumerate(info.ch_names)
                if canonical_name(name).casefold() == wanted.casefold() and i not in self.picks
            ]
            if not found:
                raise SetAside("excluded", Reason("no reference", f"channel {wanted} is not in the recording"))
            self.names.append(wanted)
            self.picks.append(found[0])
        self.lengths = [resampled_length(s.stop - s.start, info.sfreq, spec.sfreq) for s in info.segments]
        """Number of samples of each segment at the target sampling rate."""
        self.begins = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        """First sample of each segment in the scratch file."""
        if max(self.lengths, default=0) < spec.window:
            longest = max((s.stop - s.start for s in info.segments), default=0) / info.sfreq
            parts = f"{len(info.segments)} {'epochs' if info.epoched else 'pieces'} of at most "
            text = f"{parts if len(info.segments) > 1 else ''}{longest:.2f} s, a window has {spec.window_s:.2f} s"
            raise SetAside("excluded", Reason("too short", text))

    def first_pass(self, signal: Signal, scratch: Scratch, factor: float) -> Survey:
        """Read the signal in blocks, measure each block, resample it, and write it to the scratch file."""
        info, scale = self.info, 1e6 * self.info.scale
        quality = self.spec.quality
        survey = Survey(len(self.picks), info.sfreq, info.segments, scale, quality=quality, factor=factor)
        passband = band_of(info.sfreq, self.spec)[1]
        resampler, offset = Resampler(info.sfreq, self.spec.sfreq, passband), np.zeros((len(self.picks), 1))
        # Ignore NumPy's warnings about infinite values, because `data_sharding.processing.survey` finds the channels
        # with such values.
        with np.errstate(invalid="ignore", over="ignore"):
            for block in blocks_of(info.segments, len(self.picks)):
                first = block[0].start
                x = _read(signal, first, block[-1].stop, self.picks)
                x = survey.push(first, x)
                for piece in block:
                    segment = info.segments[piece.segment]
                    part = x[:, piece.start - first : piece.stop - first]
                    if piece.start == segment.start:
                        resampler = Resampler(info.sfreq, self.spec.sfreq, passband)
                        # Subtract the first sample of the segment, because a large constant offset would reduce the
                        # precision of float32.
                        offset = scale * part[:, :1]
                    scratch.write(resampler.push(part, scale, offset))
                    if piece.stop == segment.stop:
                        scratch.write(resampler.finish())
        return survey


def _read(signal: Signal, start: int, stop: int, picks: list[int]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = signal.read(start, stop, picks)
    except (MemoryError, NotKept):
        raise
    except Exception as error:
        raise SetAside("quarantined", unreadable(error)) from None
    if x.shape != (len(picks), stop - start):
        raise SetAside("quarantined", Reason("unreadable", f"some of the samples {start} to {stop} are missing"))
    return x


def _judge(
    item: Item, result: PartResult, read: _Reading, survey: Survey, spec: PreprocessSpec, folder: Path | None
) -> Clean:
    """Choose the channels, unit, mains frequency and reference of a recording, and store its fingerprint."""
    info, row, n_eeg = read.info, result.row, len(read.channels.names)
    factor = item.unit_factor if item.unit_factor is not None else 1.0 if info.unit_known else None
    verdict = survey.verdict(factor)
    if item.unit_factor is not None:
        row.notes.append(f"unit factor {item.unit_factor:g} from the config")
    elif info.unit_known:
        verdict.unit = "declared"
    elif read.channels.unknown_unit:
        verdict.unit = "unknown"
    for i, pick in enumerate(read.picks):
        if info.ch_names[pick] in info.bads and i not in verdict.not_finite:
            verdict.bads.setdefault(i, MARKED)
    eeg = _eeg_rows(row, read, verdict)
    channels = restrict(read.channels, eeg, read.channels.selection)
    bad_of = {new: verdict.bads[old] for new, old in enumerate(eeg) if old in verdict.bads}
    amplitude = verdict.amplitude_uv
    row.amplitude_uv, row.unit = round(amplitude, 4) if amplitude > 0.1 else float(f"{amplitude:.4g}"), verdict.unit
    row.unit_factor = info.scale * verdict.factor
    prints = verdict.fingerprint[eeg]
    if prints.shape[1]:
        row.fingerprint = hashlib.sha256(np.round(prints, 2).astype(np.float16).tobytes()).hexdigest()
    chosen, rule = choose(channels, list(bad_of))
    kept = restrict(channels, chosen, rule)
    left_out = {read.names[i]: "NaN or infinite values" for i in verdict.not_finite if i < n_eeg}
    left_out |= {name: "beyond 128 channels" for name in channels.names if name not in kept.names}
    bads = [new for new, old in enumerate(chosen) if old in bad_of]
    row.n_kept, row.channels, row.channel_selection = len(chosen), kept.names, rule
    row.bad_kinds = [bad_of[chosen[i]] for i in bads]
    row.bads = [f"{kept.names[i]}: {kind}" for i, kind in zip(bads, row.bad_kinds, strict=True)]
    points = prints[chosen].astype(np.float16)
    if folder is not None:
        np.save(folder / "fingerprint.npy", points)
    result.signature = signature(points.astype(np.float32))
    _refuse(bad_of, verdict, eeg, read.channels.unknown_unit)
    if item.line_freq is not None:
        row.line_freq, row.line_freq_from = item.line_freq, "config"
    else:
        row.line_freq, row.line_freq_from = verdict.line_freq, "spectrum" if verdict.line_freq else "none found"
        if info.line_freq is not None:
            try:
                row.line_freq, row.line_freq_from = check_line_freq(info.line_freq, "the file's line_freq"), "file"
            except ValueError as error:
                row.notes.append(f"{error}; not used")
    rows = [eeg[i] for i in chosen]
    extra = [i for i in range(len(read.picks)) if i not in rows and (i >= n_eeg or read.names[i] in _named(spec))]
    rows += extra
    dead = [new for new, old in enumerate(rows) if old in verdict.bads or old in verdict.not_finite]
    try:
        reference = reference_rows(len(chosen), spec, dead, [read.names[i] for i in rows])
    except ValueError as error:
        raise SetAside("quarantined", Reason("cannot be preprocessed", str(error))) from None
    reach = transient_length(info.sfreq, spec, row.line_freq) if spec.quality.check else 0
    place = {info.ch_names[read.picks[old]]: new for new, old in enumerate(rows)}
    marked = [(place[name], begin, end) for begin, end, name in info.bad_channel_spans if name in place]
    faults = find_faults(
        survey.cells,
        rows,
        [i for i in range(len(chosen)) if i not in bads],
        segments=info.segments,
        lengths=read.lengths,
        sfreq=info.sfreq,
        spec=spec,
        line_freq=row.line_freq,
        reach=reach,
        marked=marked,
    )
    return Clean(
        channels=kept,
        rows=rows,
        reference=reference,
        bads=bads,
        factor=verdict.factor,
        line_freq=row.line_freq,
        begins=read.begins,
        lengths=read.lengths,
        left_out=left_out,
        faults=faults,
    )


def _named(spec: PreprocessSpec) -> set[str]:
    return set(spec.reference_channels)


def _eeg_rows(row: LedgerRow, read: _Reading, verdict: Verdict) -> list[int]:
    """Return the indices in `read.picks` of the channels with EEG, and note all other channels in the ledger row."""
    n_eeg = len(read.channels.names)
    absent = [i for i in verdict.not_finite if i < n_eeg]
    if len(absent) == n_eeg:
        raise SetAside("quarantined", Reason("the signal has NaN or infinite values in every channel"))
    if absent:
        names = [read.names[i] for i in absent]
        row.notes.append(f"left out, because almost all values are NaN or infinite: {', '.join(names)}")
    left_out = {why: list(names) for why, names in read.channels.left_out.items()}
    for i, what in verdict.not_eeg.items():
        if i < n_eeg:
            left_out.setdefault(f"{what}, by its signal", []).append(read.info.ch_names[read.picks[i]])
    # If the reference is a single channel, its signal becomes zero when the reference is subtracted, so leave this
    # channel out.
    alone = read.spec.reference_channels if len(read.spec.reference_channels) == 1 else []
    zero = [i for i in range(n_eeg) if read.names[i] in alone]
    for i in zero:
        left_out.setdefault("reference", []).append(read.info.ch_names[read.picks[i]])
    row.channels_left_out = left_out
    eeg = [i for i in range(n_eeg) if i not in absent and i not in verdict.not_eeg and i not in zero]
    if not eeg:
        others = [name for names in left_out.values() for name in names]
        raise SetAside("excluded", Reason("no EEG channel", f"only {', '.join(others[:5])}"))
    return eeg


def _refuse(bad_of: dict[int, str], verdict: Verdict, eeg: list[int], unknown_unit: str) -> None:
    """Raise an error if a recording has no usable channel or no plausible unit."""
    if len(bad_of) == len(eeg):
        kinds = Counter(bad_of.values())
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise SetAside("quarantined", Reason("no usable channel", text))
    if verdict.unit != "unknown":
        return
    dead = sum(kind in ("flat", "clipped", "test tone") for kind in bad_of.values())
    if dead > 0.75 * len(eeg):
        text = f"{dead} flat or clipped, the other {len(eeg) - dead} at {verdict.amplitude_uv:.3g} microvolts"
        raise SetAside("quarantined", Reason("no usable channel", text))
    named = f"the file says '{unknown_unit}'" if unknown_unit else "set aside"
    told = f"{named}; the amplitude reads as {verdict.amplitude_uv:.3g} microvolts"
    raise SetAside("quarantined", Reason("unit unknown", told), hint="set the key 'unit_factors' if you know the unit")
