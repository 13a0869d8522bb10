"""One recording to a part of the dataset: what a worker of the Ray job does, in a process that may die.

The signal passes by twice. First block by block out of the file: it is surveyed, and resampled into a scratch file.
Then, with unit, bad channels and mains known, out of the scratch file through the filters into windows. Memory does
not grow with the recording's length.

Shapes: n channels, S samples at the recording's rate, T samples a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.channels import Channels, canonical_name, choose, pick_channels, restrict
from data_sharding.corpora import Item, Trial
from data_sharding.duplicates import signature
from data_sharding.files import digest_of, read_json, sha256_file, write_json
from data_sharding.preprocess import PreprocessSpec, band_of, clean_blocks, reference_rows, window_starts
from data_sharding.readers import NotContinuous, ReadError, open_signal, unreadable
from data_sharding.samples import Sample, ShardWriter
from data_sharding.signals import Segment, Signal, SignalInfo
from data_sharding.splits import SPLITS, SplitConfig
from data_sharding.storage import AnyPath, as_path, commit_folder, file_state, is_remote, localised, scratch_folder
from data_sharding.streaming import Resampler, Scratch, blocks_of, resampled_length
from data_sharding.units import Survey, Verdict

PART_SCHEMA = 3
"""Part of a part's name: raise it when the code's results change, and no older part is taken up again."""
FLOAT16_MAX_UV = 65504.0
MIN_SAMPLES = 16
"""Fewer samples cannot even be measured."""


class SetAside(Exception):
    """A recording is not used: status and reason for the ledger."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker needs for one recording."""

    item: Item
    spec: PreprocessSpec
    split: SplitConfig
    labels: tuple[str, ...]
    """Names of the labels by number, over all corpora."""
    work: AnyPath
    """Folder of the parts."""
    timeout_s: float
    """Seconds that it may take."""


def versions() -> dict[str, str]:
    """Versions of the libraries that shape a part's bytes."""
    import mne
    import scipy
    import zstandard

    return {
        "mne": mne.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "zstandard": zstandard.__version__,
    }


def blank_row(item: Item, status: str, reason: str) -> dict[str, Any]:
    """Ledger row of a recording of which nothing is known but that it is there.

    Parameters
    ----------
    item : Item
        The recording.
    status : str
        sharded, duplicate, quarantined or excluded.
    reason : str
        Why; empty for sharded.

    Returns
    -------
    dict
        All columns of the ledger.
    """
    return {
        "key": item.key,
        "corpus": item.corpus,
        "path": item.path,
        "files": [f.name.encode("utf-8", "backslashreplace").decode() for f in item.recording.files],
        "bytes": 0,
        "sha256": "",
        "fingerprint": "",
        "format": item.recording.format,
        "subject": item.subject,
        "session": item.session,
        "split": "",
        "status": status,
        "reason": reason,
        "channels_by_type": "{}",
        "channels_left_out": "{}",
        "channels": [],
        "n_eeg": 0,
        "n_kept": 0,
        "channel_selection": "",
        "bads": [],
        "montage": "",
        "montage_confidence": 0.0,
        "sfreq": 0.0,
        "seconds": 0.0,
        "amplitude_uv": None,
        "unit": "",
        "unit_factor": None,
        "line_freq": None,
        "line_freq_from": "",
        "windows": 0,
        "seconds_written": 0.0,
        "windows_left_out": "{}",
        "shards": [],
        "notes": [],
    }


def process_recording(task: Task) -> dict[str, Any]:
    """Read a recording, judge it, and commit its windows as a part.

    Parameters
    ----------
    task : Task
        What to do.

    Returns
    -------
    dict
        The ledger row. Beside its columns: ``part`` (name of the part's folder), ``split_samples``, and ``signature``
        (`data_sharding.duplicates.signature`). A part that is committed already is taken as it is.

    Raises
    ------
    OSError
        If the working folder or the scratch cannot be written: the machine's fault, not the recording's.
    """
    with contextlib.ExitStack() as stack:
        row = blank_row(task.item, "quarantined", "")
        files = task.item.recording.files
        try:
            path, *local = stack.enter_context(localised([task.item.recording.path, *files]))
            hashes = {str(i): sha256_file(f) for i, f in enumerate(local)}
            row["bytes"] = sum(f.stat().st_size for f in local)
        except OSError as error:
            if is_remote(task.item.recording.path):
                raise
            # Rights can be given without a change of the file: the next run looks again.
            more = {"part": "", "split_samples": {}, "passing": True}
            return row | {"reason": f"unreadable: {error.strerror or error}"} | more
        row["sha256"] = digest_of(sorted(hashes.values())) if len(hashes) > 1 else hashes["0"]
        if options := getattr(task.item, "options", None):
            # One file, several recordings: its checksum alone would make them copies of one another.
            row["sha256"] = digest_of([row["sha256"], options])
        name = _part_name(task, hashes)
        part = task.work / "parts" / name[:2] / name
        if (part / "row.json").is_file():
            return read_json(part / "row.json")
        recording = dataclasses.replace(task.item.recording, path=path, files=tuple(local))
        task = dataclasses.replace(task, item=dataclasses.replace(task.item, recording=recording))
        folder = stack.enter_context(_unfinished(part))
        try:
            _fill(task, row, folder)
        except SetAside as verdict:
            row |= {"status": verdict.status, "reason": verdict.reason, "split_samples": {}}
        row["part"] = name
        write_json(folder / "row.json", row)
        commit_folder(folder, part)
        return row


@contextlib.contextmanager
def _unfinished(part: AnyPath) -> Iterator[Path]:
    """Folder on this machine to write a part into: beside its place, from where it is only renamed, or in scratch."""
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
            "versions": versions(),
        }
    )


def _image_identity(image: str) -> list[Any]:
    path = as_path(image)
    return [path.name, *file_state(path)]


def _open(item: Item) -> Signal:
    try:
        return open_signal(item.recording)
    except NotContinuous as error:
        raise SetAside("excluded", str(error)) from None
    except ReadError as error:
        raise SetAside("quarantined", str(error)) from None


def _fill(task: Task, row: dict[str, Any], folder: Path) -> None:
    """Do the work; rows of set-aside recordings keep what was learned up to there."""
    item, spec = task.item, task.spec
    if item.recording.problem:
        raise SetAside("quarantined" if item.recording.continuous else "excluded", item.recording.problem)
    signal = _open(item)
    with contextlib.closing(signal):
        info = signal.info
        row |= {"sfreq": info.sfreq, "seconds": round(info.n_samples / info.sfreq, 4)}
        row["notes"] += info.notes
        if info.n_samples < MIN_SAMPLES:
            raise SetAside("excluded", f"no signal: {info.n_samples} samples")
        channels = pick_channels(info)
        row |= {
            "channels_by_type": json.dumps(channels.by_type),
            "channels_left_out": json.dumps(channels.left_out),
            "n_eeg": len(channels.names),
            "montage": channels.montage,
            "montage_confidence": channels.confidence,
        }
        row["notes"] += channels.notes
        if item.reason:
            raise SetAside("excluded", item.reason)
        if not channels.picks:
            others = [n for names in channels.left_out.values() for n in names] or sorted(channels.by_type)
            raise SetAside("excluded", f"no EEG channel: only {', '.join(others[:5])}")
        read = _Reading(info, channels, spec)
        with Scratch(len(read.picks)) as scratch:
            survey = read.first_pass(signal, scratch)
            clean = _judge(item, row, read, survey, spec)
            _write_windows(task, row, folder, clean, scratch, info)
            kept = clean.fingerprint.astype(np.float16)
            np.save(folder / "fingerprint.npy", kept)
            row["signature"] = signature(kept.astype(np.float32))
    if not row["windows"]:
        left = json.loads(row["windows_left_out"])
        raise SetAside("excluded", "no window left: " + ", ".join(f"{n} {why}" for why, n in sorted(left.items())))
    row["status"] = "sharded"


class _Reading:
    """What is read of a recording: its EEG, and after it the reference channels that are none of it."""

    def __init__(self, info: SignalInfo, channels: Channels, spec: PreprocessSpec) -> None:
        self.info, self.channels, self.spec = info, channels, spec
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
                raise SetAside("excluded", f"no reference: channel {wanted} is not in the recording")
            self.names.append(wanted)
            self.picks.append(found[0])
        self.lengths = [resampled_length(s.stop - s.start, info.sfreq, spec.sfreq) for s in info.segments]
        """Samples of each segment at the target rate."""
        self.begins = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        """First sample of each segment in the scratch file."""
        if max(self.lengths, default=0) < spec.window:
            longest = max((s.stop - s.start for s in info.segments), default=0) / info.sfreq
            parts = f"{len(info.segments)} {'epochs' if info.epoched else 'pieces'} of at most "
            raise SetAside(
                "excluded",
                f"too short: {parts if len(info.segments) > 1 else ''}{longest:.2f} s, "
                f"a window has {spec.window_s:.2f} s",
            )

    def first_pass(self, signal: Signal, scratch: Scratch) -> Survey:
        """Read every sample once: survey it, and put it aside at the target rate."""
        info, scale = self.info, 1e6 * self.info.scale
        survey = Survey(len(self.picks), info.sfreq, info.segments, scale)
        passband = band_of(info.sfreq, self.spec)[1]
        resampler, offset = Resampler(info.sfreq, self.spec.sfreq, passband), np.zeros((len(self.picks), 1))
        # Channels without numbers are found by the survey and left out; until then they pass through.
        with np.errstate(invalid="ignore", over="ignore"):
            for block in blocks_of(info.segments, len(self.picks)):
                first = block[0].start
                x = _read(signal, first, block[-1].stop, self.picks)
                survey.push(first, x)
                for piece in block:
                    segment = info.segments[piece.segment]
                    part = x[:, piece.start - first : piece.stop - first]
                    if piece.start == segment.start:
                        resampler = Resampler(info.sfreq, self.spec.sfreq, passband)
                        # An offset of 230 mV would cost float32 its precision, and tells nothing.
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
    except MemoryError:
        raise
    except Exception as error:
        raise SetAside("quarantined", unreadable(error)) from None
    if x.shape != (len(picks), stop - start):
        raise SetAside("quarantined", f"unreadable: samples {start} to {stop} are not all there")
    return x


@dataclass(kw_only=True)
class _Clean:
    """What the second pass is to do."""

    channels: Channels
    """The channels of the windows."""
    rows: list[int]
    """Rows of the scratch file that are filtered: those of the windows first."""
    reference: list[int]
    """Which of `rows` are averaged to the reference."""
    bads: list[int]
    """Bad rows of the windows."""
    factor: float
    """What brings the scratch file to microvolts."""
    line_freq: float | None
    begins: list[int]
    lengths: list[int]
    fingerprint: np.ndarray = field(repr=False)


def _judge(item: Item, row: dict[str, Any], read: _Reading, survey: Survey, spec: PreprocessSpec) -> _Clean:
    """Decide on channels, unit, mains and reference."""
    info, n_eeg = read.info, len(read.channels.names)
    factor = item.unit_factor if item.unit_factor is not None else 1.0 if info.unit_known else None
    verdict = survey.verdict(factor)
    if item.unit_factor is not None:
        row["notes"].append(f"unit factor {item.unit_factor:g} from the config")
    elif info.unit_known:
        verdict.unit = "declared"
    for i, pick in enumerate(read.picks):
        if info.ch_names[pick] in info.bads and i not in verdict.not_finite:
            verdict.bads.setdefault(i, "marked bad")
    eeg = _eeg_rows(row, read, verdict)
    channels = restrict(read.channels, eeg, read.channels.selection)
    bad_of = {new: verdict.bads[old] for new, old in enumerate(eeg) if old in verdict.bads}
    row |= {"amplitude_uv": round(verdict.amplitude_uv, 4), "unit": verdict.unit}
    row["unit_factor"] = info.scale * verdict.factor
    prints = verdict.fingerprint[eeg]
    if prints.shape[1]:
        row["fingerprint"] = hashlib.sha256(np.round(prints, 2).astype(np.float16).tobytes()).hexdigest()
    chosen, rule = choose(channels, list(bad_of))
    kept = restrict(channels, chosen, rule)
    bads = [new for new, old in enumerate(chosen) if old in bad_of]
    row |= {
        "n_kept": len(chosen),
        "channels": kept.names,
        "channel_selection": rule,
        "bads": [f"{kept.names[i]}: {bad_of[chosen[i]]}" for i in bads],
    }
    _refuse(bad_of, verdict, eeg)
    if item.line_freq is not None:
        row["line_freq"], row["line_freq_from"] = item.line_freq, "config"
    elif info.line_freq:
        row["line_freq"], row["line_freq_from"] = float(info.line_freq), "file"
    else:
        row["line_freq"] = verdict.line_freq
        row["line_freq_from"] = "spectrum" if verdict.line_freq else "none found"
    rows = [eeg[i] for i in chosen]
    extra = [i for i in range(len(read.picks)) if i not in rows and (i >= n_eeg or read.names[i] in _named(spec))]
    rows += extra
    dead = [new for new, old in enumerate(rows) if old in verdict.bads or old in verdict.not_finite]
    try:
        reference = reference_rows(len(chosen), spec, dead, [read.names[i] for i in rows])
    except ValueError as error:
        raise SetAside("quarantined", f"cannot be preprocessed: {error}") from None
    return _Clean(
        channels=kept,
        rows=rows,
        reference=reference,
        bads=bads,
        factor=verdict.factor,
        line_freq=row["line_freq"],
        begins=read.begins,
        lengths=read.lengths,
        fingerprint=prints[chosen],
    )


def _named(spec: PreprocessSpec) -> set[str]:
    return set(spec.reference_channels)


def _eeg_rows(row: dict[str, Any], read: _Reading, verdict: Verdict) -> list[int]:
    """Rows that are EEG by their signal, too; the others are named in the ledger."""
    n_eeg = len(read.channels.names)
    absent = [i for i in verdict.not_finite if i < n_eeg]
    if len(absent) == n_eeg:
        raise SetAside("quarantined", "the signal holds NaN or infinite values in every channel")
    if absent:
        names = [read.names[i] for i in absent]
        row["notes"].append(f"NaN or infinite values, left out: {', '.join(names)}")
    left_out = {why: list(names) for why, names in read.channels.left_out.items()}
    for i, what in verdict.not_eeg.items():
        if i < n_eeg:
            left_out.setdefault(f"{what}, by its signal", []).append(read.info.ch_names[read.picks[i]])
    # A channel that everything is referenced to is zero from then on.
    alone = read.spec.reference_channels if len(read.spec.reference_channels) == 1 else []
    zero = [i for i in range(n_eeg) if read.names[i] in alone]
    for i in zero:
        left_out.setdefault("reference", []).append(read.info.ch_names[read.picks[i]])
    row["channels_left_out"] = json.dumps(left_out)
    eeg = [i for i in range(n_eeg) if i not in absent and i not in verdict.not_eeg and i not in zero]
    if not eeg:
        others = [name for names in left_out.values() for name in names]
        raise SetAside("excluded", f"no EEG channel: only {', '.join(others[:5])}")
    return eeg


def _refuse(bad_of: dict[int, str], verdict: Verdict, eeg: list[int]) -> None:
    """Set aside what has no usable channel, or no unit that makes sense."""
    if len(bad_of) == len(eeg):
        kinds = Counter(bad_of.values())
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise SetAside("quarantined", f"no usable channel: {text}")
    if verdict.unit != "unknown":
        return
    dead = sum(kind in ("flat", "clipped", "test tone") for kind in bad_of.values())
    if dead > 0.75 * len(eeg):
        raise SetAside(
            "quarantined",
            f"no usable channel: {dead} flat or clipped, the other {len(eeg) - dead} at "
            f"{verdict.amplitude_uv:.3g} microvolts",
        )
    raise SetAside(
        "quarantined",
        f"unit unknown: set aside; the amplitude reads as {verdict.amplitude_uv:.3g} microvolts "
        "(key 'unit_factors' says what it is)",
    )


@dataclass(frozen=True)
class _Cut:
    """A window to be cut."""

    start: int
    """First sample in its segment, at the target rate."""
    number: int
    """End of its key."""
    split: str
    extra: dict[str, Any]


def _cuts(task: Task, info: SignalInfo, lengths: list[int], left_out: Counter[str]) -> dict[int, list[_Cut]]:
    """Every window that lies in a segment, by segment, in order of time."""
    item, spec = task.item, task.spec
    cuts: dict[int, list[_Cut]] = {}
    if item.trials is None:
        split = task.split.subject(item.subject) if task.split.by_subject else "train"
        number = 0
        for segment, length in enumerate(lengths):
            starts = window_starts(length, spec)
            if len(starts):
                cuts[segment] = [_Cut(int(s), number + i, split, {}) for i, s in enumerate(starts)]
                number += len(starts)
        return cuts
    numbers = {name: i for i, name in enumerate(task.labels)}
    onsets = np.array([segment.onset for segment in info.segments])
    for number, trial in enumerate(item.trials):
        split = task.split.trial(item.subject, trial.image_id, trial.split, getattr(trial, "concept", ""))
        if split is None:
            left_out["crossed cell of subject split and image split"] += 1
            continue
        segment, start = _place(trial, item.trial_offset, info.segments, onsets, spec)
        if segment is None:
            left_out["trial beyond the recording"] += 1
        elif start + spec.window > lengths[segment]:
            last = segment == len(lengths) - 1
            left_out["trial beyond the recording" if last else "over a gap in the recording"] += 1
        else:
            said = {name: getattr(trial, name, "") for name in ("image_id", "label_name", "block", "concept")}
            extra: dict[str, Any] = {name: value for name, value in said.items() if value}
            if trial.label_name:
                extra["label"] = numbers[trial.label_name]
            extra |= {"caption": trial.caption, "image_path": trial.image}
            cuts.setdefault(segment, []).append(_Cut(start, number, split, extra))
    return {segment: sorted(cuts[segment], key=lambda cut: (cut.start, cut.number)) for segment in sorted(cuts)}


def _place(
    trial: Trial, offset_s: float, segments: list[Segment], onsets: np.ndarray, spec: PreprocessSpec
) -> tuple[int | None, int]:
    """Segment in which a trial's window begins, and where in it."""
    own = getattr(trial, "segment", None)
    if own is not None:
        start = round(offset_s * spec.sfreq)
        return (own, start) if 0 <= own < len(segments) and start >= 0 else (None, 0)
    begin = trial.onset + offset_s
    # Half a sample early is rounding.
    segment = int(np.searchsorted(onsets, begin + 0.5 / spec.sfreq, side="right")) - 1
    if segment < 0:
        return None, 0
    return segment, max(0, round((begin - float(onsets[segment])) * spec.sfreq))


def image_type(data: bytes) -> str | None:
    """Extension of an image by its first bytes.

    Parameters
    ----------
    data : bytes
        The file.

    Returns
    -------
    str or None
        jpg, png or webp; None for anything else.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _windows(blocks: Iterator[np.ndarray], cuts: list[_Cut], window: int) -> Iterator[tuple[_Cut, np.ndarray]]:
    """Cut windows, in order of their starts, out of a signal that comes in blocks."""
    held, at, following = None, 0, 0
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=1)
        while following < len(cuts) and cuts[following].start + window <= at + held.shape[1]:
            start = cuts[following].start - at
            yield cuts[following], held[:, start : start + window]
            following += 1
        if following == len(cuts):
            return
        gone = min(cuts[following].start - at, held.shape[1])
        held, at = held[:, gone:], at + gone


def _write_windows(
    task: Task, row: dict[str, Any], folder: Path, clean: _Clean, scratch: Scratch, info: SignalInfo
) -> None:
    """Second pass: filter the segments that hold windows, and write these."""
    item, spec = task.item, task.spec
    left_out: Counter[str] = Counter()
    written: Counter[str] = Counter()
    channels, n = clean.channels, len(clean.channels.names)
    good = np.setdiff1d(np.arange(n), clean.bads)
    spans = np.array([(begin, end) for begin, end, _ in info.bad_spans], float).reshape(-1, 2)
    covered = 0
    base = {
        "n": n,
        "ch_names": channels.names,
        "positions": channels.positions,
        "reference": spec.reference_name,
        "sfreq": spec.sfreq,
        "recording": item.key,
        "subject": item.subject,
        "session": item.session,
        "corpus": item.corpus,
        "bads": [channels.names[i] for i in clean.bads],
    }
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for number, cuts in _cuts(task, info, clean.lengths, left_out).items():
            begin, onset, covered_to = clean.begins[number], info.segments[number].onset, 0

            def read(start: int, stop: int, begin: int = begin) -> np.ndarray:
                return clean.factor * scratch.read(begin + start, begin + stop)[clean.rows]

            blocks = clean_blocks(
                read,
                clean.lengths[number],
                info.sfreq,
                spec,
                line_freq=clean.line_freq,
                reference=clean.reference,
            )
            for cut, x in _windows(blocks, cuts, spec.window):
                window, start_s = x[:n], onset + cut.start / spec.sfreq
                if why := _flaw(window, good, start_s, spans, spec):
                    left_out[why] += 1
                    continue
                extra, image, kind = dict(cut.extra), None, "png"
                if path := extra.pop("image_path", None):
                    image = as_path(path).read_bytes()
                    if (found := image_type(image)) is None:
                        left_out["image is neither jpg, png nor webp"] += 1
                        continue
                    kind = found
                meta = {**base, "start": round(start_s, 6), "split": cut.split, **extra}
                if cut.split not in writers:
                    writers[cut.split] = stack.enter_context(ShardWriter(folder / f"{cut.split}.tar"))
                writers[cut.split].write(
                    Sample(key=f"{item.key}-{cut.number:06d}", eeg=window, meta=meta, image=image, image_ext=kind)
                )
                written[cut.split] += 1
                # Windows may overlap: what counts as written is the signal that they cover.
                covered += cut.start + spec.window - max(covered_to, cut.start)
                covered_to = cut.start + spec.window
    row["seconds_written"] = round(covered / spec.sfreq, 4)
    row["windows"] = sum(written.values())
    row["windows_left_out"] = json.dumps(dict(sorted(left_out.items())))
    row["split_samples"] = {split: written[split] for split in SPLITS if written[split]}
    row["split"] = "+".join(row["split_samples"])


def _flaw(window: np.ndarray, good: np.ndarray, start_s: float, spans: np.ndarray, spec: PreprocessSpec) -> str | None:
    """Why a window is left out."""
    if ((spans[:, 0] < start_s + spec.window_s) & (spans[:, 1] > start_s)).any():
        return "over a span marked as bad"
    if max(-float(window.min()), float(window.max())) > FLOAT16_MAX_UV:
        return "beyond float16 microvolts"
    largest = float(np.ptp(window[good], axis=1).max())
    if not largest:
        return "flat in every good channel"
    if spec.reject_uv and largest > spec.reject_uv:
        return f"peak to peak beyond {spec.reject_uv:g} microvolts"
    return None
