"""Does the second pass over a recording: filters the signal in the scratch file and cuts it into windows.

Letters in array shapes: n is the number of channels, T the number of samples in a window.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.storage import as_path
from data_sharding.corpora import Trial
from data_sharding.dataset.samples import Sample, ShardWriter
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.channels import Channels
from data_sharding.formats.signal import Segment, SignalInfo
from data_sharding.job.task import PartResult, Task
from data_sharding.processing.preprocess import PreprocessSpec, clean_blocks, window_starts
from data_sharding.processing.streaming import Scratch

FLOAT16_MAX_UV = 65504.0


@dataclass(kw_only=True)
class Clean:
    """Instructions for the second pass over the scratch file."""

    channels: Channels
    """Channels that the windows contain."""
    rows: list[int]
    """Rows of the scratch file to filter. The rows of `channels` come first, extra rows for the reference come last."""
    reference: list[int]
    """Positions in `rows` of the channels whose mean is the reference."""
    bads: list[int]
    """Positions in `channels` of the bad channels."""
    factor: float
    """Factor that converts the values in the scratch file to microvolts."""
    line_freq: float | None
    """Mains frequency in Hz that is filtered out; None if no mains frequency was found."""
    begins: list[int]
    """First sample of each segment in the scratch file."""
    lengths: list[int]
    """Number of samples of each segment in the scratch file."""
    left_out: dict[str, str]
    """EEG channels that the windows do not contain. Maps channel names to reasons."""


@dataclass(frozen=True)
class Cut:
    """A window to cut out of the signal."""

    start: int
    """First sample of the window at the target sampling rate, counted from the start of the segment."""
    number: int
    """Number of the window in the recording. The key of the sample ends with this number."""
    split: str
    """Split that the window belongs to."""
    extra: dict[str, Any]
    """Metadata of the trial; empty for a recording without trials."""


def plan_windows(lengths: list[int], spec: PreprocessSpec, split: str = "") -> dict[int, list[Cut]]:
    """Plan the windows of a recording without trials.

    Parameters
    ----------
    lengths : list of int
        Number of samples of each segment at the target sampling rate.
    spec : PreprocessSpec
        Settings of the preprocessing, with the length and the stride of the windows.
    split : str
        Name of the split for all windows.

    Returns
    -------
    dict
        Windows of each segment in order of time, by the number of the segment.
    """
    cuts: dict[int, list[Cut]] = {}
    number = 0
    for segment, length in enumerate(lengths):
        starts = window_starts(length, spec)
        if len(starts):
            cuts[segment] = [Cut(int(s), number + i, split, {}) for i, s in enumerate(starts)]
            number += len(starts)
    return cuts


def clean_windows(
    clean: Clean,
    scratch: Scratch,
    info: SignalInfo,
    spec: PreprocessSpec,
    cuts: dict[int, list[Cut]],
    left_out: Counter[str],
) -> Iterator[tuple[int, Cut, float, np.ndarray]]:
    """Filter all segments that contain windows, and cut the windows out of them.

    Parameters
    ----------
    clean : Clean
        The instructions of the first pass.
    scratch : Scratch
        The signal at the target sampling rate.
    info : SignalInfo
        Description of the recording.
    spec : PreprocessSpec
        Settings of the preprocessing.
    cuts : dict
        Windows of each segment in order of time, by the number of the segment.
    left_out : Counter
        Number of windows that cannot be used, by reason. This function increases the numbers.

    Yields
    ------
    segment : int
        Number of the segment that contains the window.
    cut : Cut
        The planned window.
    start : float
        Start of the window in seconds from the start of the recording.
    window : ndarray, shape (n, T), float32
        The signal of the window in microvolts.
    """
    n = len(clean.channels.names)
    good = np.setdiff1d(np.arange(n), clean.bads)
    spans = np.array([(begin, end) for begin, end, _ in info.bad_spans], float).reshape(-1, 2)
    for number, wanted in cuts.items():
        begin, onset = clean.begins[number], info.segments[number].onset

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
        for cut, x in _windows(blocks, wanted, spec.window):
            window, start_s = x[:n], onset + cut.start / spec.sfreq
            if why := _find_flaw(window, good, start_s, spans, spec):
                left_out[why] += 1
            else:
                yield number, cut, start_s, window


def _plan_cuts(task: Task, info: SignalInfo, lengths: list[int], left_out: Counter[str]) -> dict[int, list[Cut]]:
    """Plan the windows of a recording. The result lists the windows of each segment in order of time."""
    item, spec = task.item, task.spec
    cuts: dict[int, list[Cut]] = {}
    if item.trials is None:
        split = task.split.subject(item.subject) if task.split.by_subject else "train"
        return plan_windows(lengths, spec, split)
    numbers = {name: i for i, name in enumerate(task.labels)}
    onsets = np.array([segment.onset for segment in info.segments])
    for number, trial in enumerate(item.trials):
        split = task.split.trial(item.subject, trial.image_id, trial.split, trial.concept)
        if split is None:
            left_out["crossed cell of subject split and image split"] += 1
            continue
        segment, start = _locate(trial, item.trial_offset, info.segments, onsets, spec)
        if segment is None:
            left_out["trial beyond the recording"] += 1
        elif start + spec.window > lengths[segment]:
            last = segment == len(lengths) - 1
            left_out["trial beyond the recording" if last else "over a gap in the recording"] += 1
        else:
            values = {name: getattr(trial, name) for name in ("image_id", "label_name", "block", "concept")}
            extra: dict[str, Any] = {name: value for name, value in values.items() if value}
            if trial.label_name:
                extra["label"] = numbers[trial.label_name]
            extra |= {"caption": trial.caption, "image_path": trial.image}
            cuts.setdefault(segment, []).append(Cut(start, number, split, extra))
    return {segment: sorted(cuts[segment], key=lambda cut: (cut.start, cut.number)) for segment in sorted(cuts)}


def _locate(
    trial: Trial, offset_s: float, segments: list[Segment], onsets: np.ndarray, spec: PreprocessSpec
) -> tuple[int | None, int]:
    """Return the segment in which the window of a trial begins (None if there is none), and the first sample there."""
    if trial.segment is not None:
        start = round(offset_s * spec.sfreq)
        return (trial.segment, start) if 0 <= trial.segment < len(segments) and start >= 0 else (None, 0)
    begin = trial.onset + offset_s
    # If a window begins up to half a sample before a segment, this is a rounding error: the window is in the segment.
    segment = int(np.searchsorted(onsets, begin + 0.5 / spec.sfreq, side="right")) - 1
    if segment < 0:
        return None, 0
    return segment, max(0, round((begin - float(onsets[segment])) * spec.sfreq))


def detect_image_type(data: bytes) -> str | None:
    """Detect the type of an image from the first bytes of its file.

    Parameters
    ----------
    data : bytes
        Content of the image file.

    Returns
    -------
    str or None
        File extension of the type: jpg, png or webp; None for any other type.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _windows(blocks: Iterator[np.ndarray], cuts: list[Cut], window: int) -> Iterator[tuple[Cut, np.ndarray]]:
    """Cut windows out of a signal that comes in blocks. The windows must be sorted by their first sample."""
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


def write_windows(
    task: Task, result: PartResult, folder: Path, clean: Clean, scratch: Scratch, info: SignalInfo
) -> None:
    """Do the second pass over a recording: filter all segments that contain windows, and write the windows.

    Parameters
    ----------
    task : Task
        The recording and the settings for it.
    result : PartResult
        Result of the recording. This function fills in `samples`, and the columns about windows in the ledger row.
    folder : Path
        Folder for the files ``train.tar``, ``val.tar`` and ``test.tar``.
    clean : Clean
        The instructions of the first pass.
    scratch : Scratch
        The signal at the target sampling rate.
    info : SignalInfo
        Description of the recording.
    """
    item, spec = task.item, task.spec
    left_out: Counter[str] = Counter()
    written: Counter[str] = Counter()
    channels = clean.channels
    covered, segment, covered_to = 0, -1, 0
    base = {
        "n": len(channels.names),
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
        cuts = _plan_cuts(task, info, clean.lengths, left_out)
        for number, cut, start_s, window in clean_windows(clean, scratch, info, spec, cuts, left_out):
            extra, image, kind = dict(cut.extra), None, "png"
            if path := extra.pop("image_path", None):
                image = as_path(path).read_bytes()
                if (found := detect_image_type(image)) is None:
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
            # Windows may overlap, so the sum of their lengths would count some samples twice.
            if number != segment:
                segment, covered_to = number, 0
            covered += cut.start + spec.window - max(covered_to, cut.start)
            covered_to = cut.start + spec.window
    result.samples = {split: written[split] for split in SPLITS if written[split]}
    row = result.row
    row.seconds_written, row.windows = round(covered / spec.sfreq, 4), sum(written.values())
    row.windows_left_out = dict(sorted(left_out.items()))
    row.split = "+".join(result.samples)


def _find_flaw(
    window: np.ndarray, good: np.ndarray, start_s: float, spans: np.ndarray, spec: PreprocessSpec
) -> str | None:
    """Return the reason why a window is left out; None if the window can be used."""
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
