"""The second pass over a recording: filter the signal in the scratch file, and cut it into windows.

In array shapes, `n` is the number of channels, and `T` the number of time samples in a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from data_sharding.processing.account import Account
from data_sharding.processing.faults import Bridge, Faults, Interval
from data_sharding.processing.preprocess import PreprocessSpec, clean_blocks, window_starts
from data_sharding.processing.streaming import Scratch

FLOAT16_MAX_UV = 65504.0


@dataclass(kw_only=True)
class Clean:
    """Settings for filtering a recording and cutting its windows, chosen by the first pass over the recording."""

    channels: Channels
    """Channels that the windows contain."""
    rows: list[int]
    """Rows of the scratch file that are read and filtered. The rows of `channels` come first; rows that only the
    reference needs come last."""
    reference: list[int]
    """Indices in `rows` of the channels whose mean is the reference."""
    bads: list[int]
    """Indices of the bad channels in `channels`."""
    factor: float
    """Factor that converts the values in the scratch file to microvolts."""
    line_freq: float | None
    """Mains frequency in Hz, which is filtered out; None if no mains noise was found."""
    begins: list[int]
    """First sample of each segment in the scratch file."""
    lengths: list[int]
    """Number of samples of each segment in the scratch file."""
    left_out: dict[str, str]
    """Name of each EEG channel that the windows do not contain, with the reason."""
    faults: Faults
    """Bad parts of the signal."""


@dataclass(frozen=True, kw_only=True)
class CleanWindow:
    """A window that can be used."""

    segment: int
    """Number of the segment that contains the window."""
    cut: Cut
    """The planned window or trial."""
    start_s: float
    """Start of the window in seconds from the start of the recording."""
    x: np.ndarray
    """Signal in microvolts as float32, shape (n, T). A bad row without a usable signal contains zeros."""
    bads: list[int]
    """Indices of the rows of `x` that are bad in the whole recording or in this window, sorted."""
    kinds: dict[int, str]
    """Kind of the fault, for each row of `x` that is bad only in this window."""
    transient_s: float
    """Number of seconds of the window in which the filters have a transient, because a gap or the end of a segment is
    near."""


class Judge:
    """Decides which rows (channels) of a window are bad and if the window can be used; subtracts the reference."""

    def __init__(self, clean: Clean, info: SignalInfo, spec: PreprocessSpec) -> None:
        self.clean, self.info, self.spec = clean, info, spec
        self.n = len(clean.channels.names)
        self.good = [i for i in range(self.n) if i not in set(clean.bads)]
        self.spans = np.array([(begin, end) for begin, end, _ in info.bad_spans], float).reshape(-1, 2)
        self.averaged = spec.reference == "average"

    def decide(self, segment: int, cut: Cut, piece: Interval, x: np.ndarray) -> CleanWindow | str:
        """Return the window as it is stored, or the reason why it is left out.

        Parameters
        ----------
        segment : int
            Number of the segment.
        cut : Cut
            The planned window.
        piece : (int, int)
            Start and stop of the piece that contains the window. Gaps divide a segment into pieces.
        x : ndarray, shape (rows, T)
            Filtered signal in microvolts, before the reference is subtracted.

        Returns
        -------
        CleanWindow or str
            The window, or a text with the reason why it is left out.
        """
        spec, quality, stop = self.spec, self.spec.quality, cut.start + cut.length
        start_s = self.info.segments[segment].onset + cut.start / spec.sfreq
        if ((self.spans[:, 0] < start_s + cut.length / spec.sfreq) & (self.spans[:, 1] > start_s)).any():
            return "overlaps a span marked as bad"
        found = self.clean.faults.judge(segment, cut.start, stop)
        bad, silent, near = found.bad, found.silent, found.near
        low, high = x.min(axis=1), x.max(axis=1)
        if quality.check:
            for row in np.flatnonzero(np.maximum(-low, high) > quality.large_uv).tolist():
                silent.add(row)
                near.discard(row)
                bad.setdefault(row, "too large")
        if not (high > low)[[i for i in self.good if i not in silent]].any():
            return "flat in every good channel" if not bad else _most(bad, self.good)
        # Rows (channels) that are bad only because of a filter transient are not counted for the limit `max_bad_share`.
        if sum(i in bad and i not in near for i in self.good) > quality.max_bad_share * len(self.good):
            return _most(bad, self.good)
        reference = self.clean.reference
        if self.averaged and bad:
            least = min(2, len(reference))
            good = [i for i in reference if i not in bad]
            reference = good if len(good) >= least else [i for i in reference if i not in bad or i in near]
            if len(reference) < least:
                return _most(bad, self.good)
        elif any(i in bad and i not in near for i in reference):
            return "reference channel without a signal"
        y = x
        if reference:
            # Compute the mean as a matrix product: NumPy's mean over a list of rows would first copy the rows.
            weights = np.zeros(len(x))
            weights[reference] = 1 / len(reference)
            y = x - weights @ x
        y = y[: self.n].astype(np.float32)
        if silent:
            y[[i for i in silent if i < self.n]] = 0.0
        if max(-float(y.min()), float(y.max())) > FLOAT16_MAX_UV:
            return "beyond float16 microvolts"
        if spec.reject_uv and np.ptp(y[[i for i in self.good if i not in bad]], axis=1).max() > spec.reject_uv:
            return f"peak to peak beyond {spec.reject_uv:g} microvolts"
        transient = self.clean.faults.transient(piece, cut.start, stop) if quality.check else 0
        return CleanWindow(
            segment=segment,
            cut=cut,
            start_s=start_s,
            x=y,
            bads=sorted({*self.clean.bads, *(i for i in bad if i < self.n)}),
            kinds={i: bad[i] for i in self.good if i in bad},
            transient_s=round(transient / spec.sfreq, 4),
        )


def _most(bad: dict[int, str], good: list[int]) -> str:
    """Return the reason why a window with too many bad channels is left out."""
    kind = Counter(kind for row, kind in bad.items() if row in good).most_common(1)
    return f"too many bad channels: {kind[0][0]}" if kind else "flat in every good channel"


def plan_windows(clean: Clean, info: SignalInfo, spec: PreprocessSpec, split: str = "") -> dict[int, list[Cut]]:
    """Plan the windows of a recording without trials.

    Parameters
    ----------
    clean : Clean
        Settings for filtering and for cutting windows, chosen by the first pass over the recording.
    info : SignalInfo
        Description of the recording.
    spec : PreprocessSpec
        Settings of the preprocessing, with the length and the stride of the windows.
    split : str
        Name of the split to which all windows of the recording belong.

    Returns
    -------
    dict
        Dictionary from the number of each segment to its windows, sorted by time. No window contains a gap. If
        `spec.quality.leave_out_edges` is set, no window is next to a gap or to an end of a segment, because the filters
        have a transient there. There are two exceptions: in an epoched recording, and in a recording so short that it
        would otherwise have no window, windows can be next to gaps and to ends of segments.
    """
    margins = [clean.faults.reach] if spec.quality.leave_out_edges and not info.epoched else []
    for margin in [*margins, 0]:
        cuts: dict[int, list[Cut]] = {}
        number = 0
        for segment, pieces in enumerate(clean.faults.pieces):
            for begin, end in pieces:
                starts = begin + margin + window_starts(end - begin - 2 * margin, spec)
                if len(starts):
                    planned = [Cut(int(s), number + i, split, {}, spec.window) for i, s in enumerate(starts)]
                    cuts.setdefault(segment, []).extend(planned)
                    number += len(starts)
        if cuts:
            break
    return cuts


def clean_windows(
    clean: Clean,
    scratch: Scratch,
    info: SignalInfo,
    spec: PreprocessSpec,
    cuts: dict[int, list[Cut]],
    account: Account,
) -> Iterator[CleanWindow]:
    """Filter the parts of a signal that contain windows, cut out the windows, and yield the windows that can be used.

    Parameters
    ----------
    clean : Clean
        Settings for filtering and for cutting windows, chosen by the first pass over the recording.
    scratch : Scratch
        The signal at the target sampling rate.
    info : SignalInfo
        Description of the recording.
    spec : PreprocessSpec
        Settings of the preprocessing.
    cuts : dict
        Dictionary from the number of each segment to its windows, sorted by time.
    account : Account
        Counter of the recording's windows. This function also counts the windows that cannot be used.

    Yields
    ------
    CleanWindow
        The next window that can be used.
    """
    judge = Judge(clean, info, spec)
    faults = clean.faults
    for number, wanted in cuts.items():
        for piece, inside in _by_piece(faults, number, wanted, spec.window, account):
            dead = faults.dead.get(number, {})
            bridge = Bridge(scratch, clean.rows, clean.factor, clean.begins[number], piece, dead)
            blocks = clean_blocks(
                bridge.read, piece[1] - piece[0], info.sfreq, spec, line_freq=clean.line_freq, reference=()
            )
            for planned, x in _windows(blocks, inside, piece[0]):

                def decide(begin: int, stop: int, cut: Cut = planned, x=x, piece=piece, number=number):
                    part = cut.shorten(begin, stop, "")
                    return judge.decide(number, part, piece, x[:, begin:stop])

                found = _keep_good_part(planned, spec.window, decide)
                if isinstance(found, str):
                    start = planned.start + planned.needed
                    account.leave_out(found, number, start, start + spec.window)
                else:
                    yield found


def _by_piece(
    faults: Faults, segment: int, cuts: list[Cut], window: int, account: Account
) -> Iterator[tuple[Interval, list[Cut]]]:
    """Yield the pieces (ranges of time samples) into which the gaps divide a segment, each with its windows.

    Windows that contain a gap are left out. If a trial is longer than the window that models read, the trial is
    shortened to the part that is inside the piece.
    """
    pieces, gaps = faults.pieces[segment], faults.gaps.get(segment, [])
    if not gaps:
        yield pieces[0], cuts
        return
    for begin, end in pieces:
        inside = []
        for cut in cuts:
            needed = cut.start + cut.needed
            if begin <= needed and needed + window <= end:
                first, last = max(0, begin - cut.start), min(cut.length, end - cut.start)
                inside.append(cut.shorten(first, last, "at a part without a signal in any channel"))
        if inside:
            yield (begin, end), inside
    for cut in cuts:
        needed = cut.start + cut.needed
        for gap in gaps:
            if gap.start < needed + window and gap.stop > needed:
                account.leave_out(f"{gap.kind} in every channel", segment, needed, needed + window)
                break


def _keep_good_part(cut: Cut, window: int, decide: Callable[[int, int], CleanWindow | str]) -> CleanWindow | str:
    """Shorten a trial if the part before or after the window that models read has a fault.

    Parameters
    ----------
    cut : Cut
        The window or the trial.
    window : int
        Number of time samples of the window that models read.
    decide : callable
        Function that checks a part of the cut. Its arguments are the first time sample of the part and the last time
        sample plus one, counted from the start of the cut. Its result is this part as a window, or the reason why the
        part cannot be used.

    Returns
    -------
    CleanWindow or str
        The trial without parts that cannot be used, or the reason why the window that models read cannot be used.
    """
    begin, stop = cut.needed, cut.needed + window
    middle = decide(begin, stop)
    if isinstance(middle, str) or cut.length == window:
        return middle
    before = decide(0, begin) if begin else ""
    after = decide(stop, cut.length) if stop < cut.length else ""
    first, why = (begin, before) if isinstance(before, str) else (0, "")
    last, why = (stop, why or after) if isinstance(after, str) else (cut.length, why)
    found = decide(first, last)
    # The whole trial can have too many bad channels, even if each part of the trial alone can be used. In this case,
    # keep only the window that models read.
    if isinstance(found, str):
        first, last, why, found = begin, stop, found, middle
    shorter = cut.shorten(first, last, why)
    return dataclasses.replace(found, cut=shorter)


def _plan_cuts(task: Task, info: SignalInfo, clean: Clean, left_out: Counter[str]) -> dict[int, list[Cut]]:
    """Plan which windows or trials to cut out of each segment of a recording, sorted by time."""
    item, spec = task.item, task.spec
    if item.trials is None:
        split = task.split.subject(item.subject) if task.split.by_subject else "train"
        return plan_windows(clean, info, spec, split)
    return plan_trials(task, info, clean.lengths, left_out)


def detect_image_type(data: bytes) -> str | None:
    """Detect the file type of an image from the first bytes of the file.

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


def _windows(blocks: Iterator[np.ndarray], cuts: list[Cut], first: int) -> Iterator[tuple[Cut, np.ndarray]]:
    """Cut windows out of blocks of a segment; the first block begins with sample `first` of the segment.

    The windows in `cuts` must be sorted by time.
    """
    held, at, following = None, first, 0
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
        The recording to process, and the settings for this recording.
    result : PartResult
        Result of the recording. This function fills in `samples`, and the columns about windows in the ledger row.
    folder : Path
        Folder for the files ``train.tar``, ``val.tar`` and ``test.tar``.
    clean : Clean
        Settings for filtering and for cutting windows, chosen by the first pass over the recording.
    scratch : Scratch
        The signal at the target sampling rate.
    info : SignalInfo
        Description of the recording.
    """
    item, spec = task.item, task.spec
    account = Account(clean.lengths, clean.faults, spec, whole=item.trials is None)
    written: Counter[str] = Counter()
    channels = clean.channels
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
    }
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        cuts = _plan_cuts(task, info, clean, account.windows)
        for found in clean_windows(clean, scratch, info, spec, cuts, account):
            cut = found.cut
            extra, image, kind = dict(cut.extra), None, "png"
            if path := extra.pop("image_path", None):
                image, fault = _read_image(path)
                if (known := detect_image_type(image)) is None or fault:
                    account.windows[fault or "image is not jpg, png or webp"] += 1
                    continue
                kind = known
            meta = {**base, "bads": [channels.names[i] for i in found.bads], "start": round(found.start_s, 6)}
            meta |= {"split": cut.split, **extra}
            if found.transient_s:
                meta["transient_s"] = found.transient_s
            if cut.onset is not None:
                meta["onset"] = cut.onset - cut.start
                spans.append((cut.start - cut.onset, cut.start - cut.onset + cut.length))
                missing[cut.missing] += 1
            if cut.split not in writers:
                writers[cut.split] = stack.enter_context(ShardWriter(folder / f"{cut.split}.tar"))
            writers[cut.split].write(
                Sample(key=f"{item.key}-{cut.number:06d}", eeg=found.x, meta=meta, image=image, image_ext=kind)
            )
            written[cut.split] += 1
            account.write(found.segment, cut.start, cut.start + cut.length, found.kinds)
    result.samples = {split: written[split] for split in SPLITS if written[split]}
    row = result.row
    row.seconds_written, row.windows = account.seconds_written(), sum(written.values())
    row.windows_left_out = dict(sorted(account.windows.items()))
    row.seconds_left_out, row.bad_in_windows = account.seconds_left_out(), dict(sorted(account.kinds.items()))
    row.split = "+".join(result.samples)
    if spans:
        _describe_trials(row, spans, missing, spec)


def _read_image(path: str) -> tuple[bytes, str]:
    """Read an image file; return its content, and the reason why the image cannot be used (empty for a good image)."""
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
"""Fault of each image that this process has decoded (empty for a good image), by the checksum of the image. So an image
of many trials is decoded only once."""


def _describe_trials(row: LedgerRow, spans: list[tuple[int, int]], missing: Counter[str], spec: PreprocessSpec) -> None:
    """Fill in the ledger columns about trials, and write a note about trials that were shortened."""
    row.trial_tmin = round(min(begin for begin, _ in spans) / spec.sfreq, 6)
    row.trial_tmax = round(max(stop for _, stop in spans) / spec.sfreq, 6)
    reasons = {why: number for why, number in sorted(missing.items()) if why}
    if reasons:
        row.notes.append(
            f"{sum(reasons.values())} of {len(spans)} trials are stored without a part before or after the window that "
            f"models read: {', '.join(f'{number} {why}' for why, number in reasons.items())}"
        )
