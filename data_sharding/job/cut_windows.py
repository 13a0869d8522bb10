"""Does the second pass over a recording: filters the signal in the scratch file and cuts it into windows.

Letters in array shapes: n is the number of channels, T the number of samples in a window.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_sharding.common.storage import as_path
from data_sharding.common.untrusted import MAX_IMAGE, open_image, read_limited
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.samples import Sample, ShardWriter
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.channels import Channels
from data_sharding.formats.signal import SignalInfo
from data_sharding.job.plan_trials import Cut, plan_trials
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
            cuts[segment] = [Cut(int(s), number + i, split, {}, spec.window) for i, s in enumerate(starts)]
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
        The planned window. If a part of a trial outside the model's window cannot be used, the cut is shorter.
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
        for planned, x in _windows(blocks, wanted):

            def find_flaw(begin: int, stop: int, cut: Cut = planned, x: np.ndarray = x, onset: float = onset) -> str:
                start_s = onset + (cut.start + begin) / spec.sfreq
                return _find_flaw(x[:n, begin:stop], good, start_s, spans, spec) or ""

            cut, why = _shorten_to_good_part(planned, spec.window, find_flaw)
            if cut is None:
                left_out[why] += 1
            else:
                begin = cut.start - planned.start
                yield number, cut, onset + cut.start / spec.sfreq, x[:n, begin : begin + cut.length]


def _shorten_to_good_part(cut: Cut, window: int, find_flaw: Callable[[int, int], str]) -> tuple[Cut | None, str]:
    """Leave out the part of a trial before or after the model's window if this part has a flaw.

    Parameters
    ----------
    cut : Cut
        The window or the trial.
    window : int
        Number of samples of the model's window.
    find_flaw : callable
        Function of the first and the last sample (plus one) of a part of the cut, counted from its start. It returns
        the flaw of this part, or an empty text.

    Returns
    -------
    cut : Cut or None
        The trial without the parts that have a flaw; None if the model's window itself has a flaw.
    why : str
        The flaw of the model's window, if it has one.
    """
    begin, stop = cut.needed, cut.needed + window
    if why := find_flaw(begin, stop):
        return None, why
    before = find_flaw(0, begin) if begin else ""
    after = find_flaw(stop, cut.length) if stop < cut.length else ""
    return cut.shorten(begin if before else 0, stop if after else cut.length, before or after), ""


def _plan_cuts(task: Task, info: SignalInfo, lengths: list[int], left_out: Counter[str]) -> dict[int, list[Cut]]:
    """Plan the windows of a recording. The result lists the windows of each segment in order of time."""
    item, spec = task.item, task.spec
    if item.trials is None:
        split = task.split.subject(item.subject) if task.split.by_subject else "train"
        return plan_windows(lengths, spec, split)
    return plan_trials(task, info, lengths, left_out)


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


def _windows(blocks: Iterator[np.ndarray], cuts: list[Cut]) -> Iterator[tuple[Cut, np.ndarray]]:
    """Cut windows out of a signal that comes in blocks. The windows must be sorted by their first sample."""
    held, at, following = None, 0, 0
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=1)
        while following < len(cuts) and cuts[following].start + cuts[following].length <= at + held.shape[1]:
            start = cuts[following].start - at
            yield cuts[following], held[:, start : start + cuts[following].length]
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
    spans: list[tuple[int, int]] = []
    missing: Counter[str] = Counter()
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
                image, fault = _read_image(path)
                if (found := detect_image_type(image)) is None or fault:
                    left_out[fault or "image is neither jpg, png nor webp"] += 1
                    continue
                kind = found
            meta = {**base, "start": round(start_s, 6), "split": cut.split, **extra}
            if cut.onset is not None:
                meta["onset"] = cut.onset - cut.start
                spans.append((cut.start - cut.onset, cut.start - cut.onset + cut.length))
                missing[cut.missing] += 1
            if cut.split not in writers:
                writers[cut.split] = stack.enter_context(ShardWriter(folder / f"{cut.split}.tar"))
            writers[cut.split].write(
                Sample(key=f"{item.key}-{cut.number:06d}", eeg=window, meta=meta, image=image, image_ext=kind)
            )
            written[cut.split] += 1
            # Windows may overlap, so the sum of their lengths would count some samples twice.
            if number != segment:
                segment, covered_to = number, 0
            covered += max(0, cut.start + cut.length - max(covered_to, cut.start))
            covered_to = max(covered_to, cut.start + cut.length)
    result.samples = {split: written[split] for split in SPLITS if written[split]}
    row = result.row
    row.seconds_written, row.windows = round(covered / spec.sfreq, 4), sum(written.values())
    row.windows_left_out = dict(sorted(left_out.items()))
    row.split = "+".join(result.samples)
    if spans:
        _describe_trials(row, spans, missing, spec)


def _read_image(path: str) -> tuple[bytes, str]:
    """Read an image, and say why the image cannot be used; the reason is empty for a good image."""
    data = read_limited(as_path(path), MAX_IMAGE)
    if detect_image_type(data) is None:
        return data, ""
    digest = hashlib.sha256(data).digest()
    if digest not in _image_faults:
        _image_faults[digest] = ""
        try:
            open_image(data)
        except OSError:
            _image_faults[digest] = "image is damaged or too large"
    return data, _image_faults[digest]


_image_faults: dict[bytes, str] = {}
"""Fault of each image that this process has decoded, by checksum. Many trials show the same image."""


def _describe_trials(row: LedgerRow, spans: list[tuple[int, int]], missing: Counter[str], spec: PreprocessSpec) -> None:
    """Fill in the columns about trials, and count the trials of which a part before or after the window is missing."""
    row.trial_tmin = round(min(begin for begin, _ in spans) / spec.sfreq, 6)
    row.trial_tmax = round(max(stop for _, stop in spans) / spec.sfreq, 6)
    reasons = {why: number for why, number in sorted(missing.items()) if why}
    if reasons:
        row.notes.append(
            f"{sum(reasons.values())} of {len(spans)} trials are stored without their whole part before or after the "
            f"window: {', '.join(f'{number} {why}' for why, number in reasons.items())}"
        )


def _find_flaw(
    window: np.ndarray, good: np.ndarray, start_s: float, spans: np.ndarray, spec: PreprocessSpec
) -> str | None:
    """Return the reason why a window is left out; None if the window can be used."""
    if ((spans[:, 0] < start_s + window.shape[1] / spec.sfreq) & (spans[:, 1] > start_s)).any():
        return "over a span marked as bad"
    if max(-float(window.min()), float(window.max())) > FLOAT16_MAX_UV:
        return "beyond float16 microvolts"
    largest = float(np.ptp(window[good], axis=1).max())
    if not largest:
        return "flat in every good channel"
    if spec.reject_uv and largest > spec.reject_uv:
        return f"peak to peak beyond {spec.reject_uv:g} microvolts"
    return None
