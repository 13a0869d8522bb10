"""The table of marks: for each format, which marks divide a recording, and which marks declare a time span as bad.

Only `TABLE` defines the effect of each kind of mark. A reader finds the marks of a recording; `Found.name` is the name
of the mark's row in `TABLE`. The function `divide` computes segments, bad spans and notes from the marks.
``docs/formats.md`` shows `TABLE` to users.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from data_sharding.formats.channels import canonical_name
from data_sharding.formats.signal import Segment


class Effect(enum.Enum):
    """Effect of a mark."""

    CUT = "a new segment begins there"
    GAP = "the span is cut out, and a new segment begins after it"
    BAD = "windows that overlap the span are left out"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One row of the table of marks."""

    name: str
    """Unique name of the row."""
    formats: tuple[str, ...] = ()
    """Names of the formats that have this mark; empty for every format with annotations."""
    sign: str
    """Description of the mark in the file, for the user."""
    effect: Effect
    """Effect of the mark. The function `divide` explains what happens if a gap or a bad span has no length."""
    words: re.Pattern[str] | None = None
    """Pattern that the whole text of the annotation must match. None if the mark is not an annotation."""
    removed: bool = False
    """True if the duration of the mark is the length of signal that was removed before the file was written. Then the
    mark covers no samples of the file."""


class Annotation(NamedTuple):
    """An annotation of a recording."""

    onset: float
    """Seconds from the recording's beginning."""
    duration: float
    """Length in seconds."""
    text: str
    """Text of the annotation."""
    channels: tuple[str, ...] = ()
    """Names of the channels to which the annotation belongs; empty for all channels."""


@dataclass(frozen=True)
class Found:
    """A mark (an interruption or a bad span) that was found in a recording."""

    name: str
    """Name of the mark's row in `TABLE`."""
    begin: float
    """Time of the mark, in seconds from the recording's beginning."""
    length: float = 0.0
    """Length of the mark in seconds."""
    text: str = ""
    """Text of the mark."""
    channels: tuple[str, ...] = ()
    """Names of the channels to which the mark belongs; empty for all channels. The names are used only for marks of bad
    spans."""


PREFIX = r"(?:[^/,:;|\\]*[/,:;|\\])*\s*"
"""Text that may precede the name of the mark, for example the type of a BrainVision marker: ``Comment/`` or
``Comment,``."""
BAD_WORD = re.compile(
    PREFIX + r"(?:[Bb][Aa][Dd](?![A-Za-z])|[Bb]ad(?=[A-Z])"
    r"|[Bb][Aa][Dd](?i:s|seg|segments?|intervals?|epochs?|trials?|spans?|blocks?|data|channels?)(?![A-Za-z])).*",
    re.DOTALL,
)
"""Pattern for the annotation of a bad span: the word ``bad`` at the beginning of the text or after a prefix. The word
``badge`` does not match."""
SKIP_WORDS = re.compile(PREFIX + r"bad[_ ]acq[_ ]skip.*", re.IGNORECASE | re.DOTALL)
JOIN_WORDS = re.compile(PREFIX + r"(bad|edge)[_ ]boundary", re.IGNORECASE)
BOUNDARY_WORD = re.compile(PREFIX + r"boundary", re.IGNORECASE)
STOP_WORDS = re.compile(
    PREFIX + r"(?:(?:rec|eeg|acq|recording|acquisition|amplifier)\.?[ _-]+(?:is |was )?"
    r"(?:paused?|resumed?|re-?start(?:ed)?|start(?:ed)?|stop(?:ped)?|interrupt(?:ed|ion)|continued?)"
    r"|(?:lost|missing|dropped)[ _]?(?:samples?|packets?|data)|buffer[ _]?overflow)(?:\s*[:/(=].*)?",
    re.IGNORECASE | re.DOTALL,
)
"""Pattern for an annotation that reports a stop of the recording or a loss of samples. The word ``pause`` alone does
not match, because the annotation can mean a pause of the task."""
NEW_SEGMENT_WORDS = re.compile(PREFIX + r"new segment(/.*)?", re.IGNORECASE | re.DOTALL)


PAIR_WORDS = re.compile(r"(.*?)[\s_/:.-]+(?:(start|begin|onset|on)|(?:end|stop|offset|off))", re.IGNORECASE | re.DOTALL)
"""Pattern for the texts of two marks without duration, of which the first starts a span and the second ends the span.
Group 2 matches only in the text of the first mark."""


def _codes(numbers: Iterable[int]) -> re.Pattern[str]:
    """Return a pattern for annotations whose text is one of the given numbers."""
    return re.compile("|".join(str(number) for number in numbers))


GDF_ARTEFACTS = (*range(0x0101, 0x0110), 0x03FF)
"""Event codes of GDF for artefacts of eye, heart, muscle and movement, and for a rejected trial."""

TABLE: tuple[Mark, ...] = (
    Mark(
        name="acquisition skip",
        sign="annotation `BAD_ACQ_SKIP`",
        effect=Effect.GAP,
        words=SKIP_WORDS,
    ),
    Mark(
        name="join",
        sign="annotation `BAD boundary` or `EDGE boundary`",
        effect=Effect.GAP,
        words=JOIN_WORDS,
    ),
    Mark(
        name="boundary",
        sign="annotation `boundary`; its duration is the length of the removed signal",
        effect=Effect.CUT,
        words=BOUNDARY_WORD,
        removed=True,
    ),
    Mark(
        name="new segment",
        sign="annotation or marker `New Segment`",
        effect=Effect.CUT,
        words=NEW_SEGMENT_WORDS,
    ),
    Mark(
        name="recording stopped",
        sign="annotation such as `Recording paused`, `Rec. resumed`, `Acquisition restarted`, `Amplifier stopped`, "
        "`LostSamples: 20` or `Buffer overflow`",
        effect=Effect.CUT,
        words=STOP_WORDS,
    ),
    Mark(
        name="bad span",
        sign="annotation that begins with the word `BAD`, also after a prefix: `BAD_move`, `Comment/bad blink`, "
        "`Bad Interval`",
        effect=Effect.BAD,
        words=BAD_WORD,
    ),
    Mark(
        name="bad span with two marks",
        sign="two bad-span marks without duration, for the start and the end of a span: `BAD_move start`, "
        "`BAD_move end`; also with `begin`, `onset` or `on`, and with `stop`, `offset` or `off`",
        effect=Effect.BAD,
    ),
    Mark(
        name="numeric boundary",
        formats=("eeglab",),
        sign="boundary event with the numeric type -99; its duration is the length of the removed signal",
        effect=Effect.CUT,
        words=re.compile(r"-99(\.0*)?"),
        removed=True,
    ),
    Mark(
        name="rejected epoch",
        formats=("eeglab",),
        sign="epoch marked in `EEG.reject` (`rejmanual`, `rejthresh`, `icarejkurt` ...). If only a table of channels "
        "(`rejmanualE` ...) marks the epoch, only these channels are bad in this epoch",
        effect=Effect.BAD,
    ),
    Mark(
        name="record times",
        formats=("edf", "bdf"),
        sign="jump in the onsets of the records (EDF+D and EDF+C); the new segment gets the recorded onset",
        effect=Effect.CUT,
    ),
    Mark(
        name="new epoch",
        formats=("bdf",),
        sign="Status channel of a BioSemi amplifier: bit 16 (new epoch) rises",
        effect=Effect.CUT,
    ),
    Mark(
        name="CMS out of range",
        formats=("bdf",),
        sign="Status channel of a BioSemi amplifier: bit 20 (CMS in range) is low",
        effect=Effect.GAP,
    ),
    Mark(
        name="GDF new segment",
        formats=("gdf",),
        sign="event 0x7ffe",
        effect=Effect.CUT,
        words=_codes([0x7FFE]),
    ),
    Mark(
        name="GDF artefact",
        formats=("gdf",),
        sign="event 0x0101 to 0x010f (artefact) or 0x03ff (rejected trial); the span ends after the duration of the "
        "event, or at its end event",
        effect=Effect.BAD,
        words=_codes(GDF_ARTEFACTS),
    ),
    Mark(
        name="GDF missing samples",
        formats=("gdf",),
        sign="missing values in all channels at the same time: values outside the digital range, or at a limit of this "
        "range",
        effect=Effect.GAP,
    ),
    Mark(
        name="MFF pause",
        formats=("mff",),
        sign="pause between two epochs of `epochs.xml`",
        effect=Effect.GAP,
    ),
    Mark(
        name="ANT restart",
        formats=("ant",),
        sign="trigger `__` (discontinuity) or `Rs` (reset of the amplifier), or a measurement of the impedances",
        effect=Effect.CUT,
        words=re.compile(r"(__|Rs|impedance)(/.*)?", re.IGNORECASE | re.DOTALL),
    ),
    Mark(
        name="ANT disconnection",
        formats=("ant",),
        sign="span from the trigger `Amplifier disconnected` to the trigger `Amplifier reconnected`",
        effect=Effect.GAP,
        words=re.compile(r"BAD_disconnection|amplifier (dis|re)connected", re.IGNORECASE),
    ),
    Mark(
        name="ANT segment table",
        formats=("ant",),
        sign="table of segments (`.seg`) next to the file; the new segment gets the recorded onset",
        effect=Effect.CUT,
    ),
    Mark(
        name="Neuroscan stop",
        formats=("neuroscan",),
        sign="event of a discontinuity or of a DC offset correction; the sample at which the event occurs is left out",
        effect=Effect.GAP,
    ),
    Mark(
        name="Neuroscan rejection",
        formats=("neuroscan",),
        sign="span from an event that starts a rejection to the event that ends the rejection",
        effect=Effect.BAD,
    ),
    Mark(
        name="Persyst sample times",
        formats=("persyst",),
        sign="jump in the table of sample times",
        effect=Effect.CUT,
    ),
    Mark(
        name="Nihon Kohden block",
        formats=("nihon",),
        sign="beginning of a data block",
        effect=Effect.CUT,
    ),
    Mark(
        name="XDF time stamps",
        formats=("xdf",),
        sign="jump in the time stamps, because samples are missing or because the clock was set back",
        effect=Effect.CUT,
    ),
    Mark(
        name="parts with times",
        formats=("blackrock", "mefd", "micromed", "neuralynx", "nicolet"),
        sign="pause between two parts of the recording; the new segment gets the recorded onset",
        effect=Effect.CUT,
    ),
    Mark(
        name="NWB time stamps",
        formats=("nwb",),
        sign="jump in the time stamps; the new segment gets the recorded onset",
        effect=Effect.CUT,
    ),
    Mark(
        name="NWB invalid times",
        formats=("nwb",),
        sign="table `invalid_times`",
        effect=Effect.BAD,
    ),
    Mark(
        name="epochs",
        formats=("brainvision", "eeglab", "curry", "fif"),
        sign="epochs: each epoch is a segment",
        effect=Effect.CUT,
    ),
)
"""All kinds of marks. For an annotation, the first row whose pattern matches the text is used. Rows for one format are
tried before the rows for all formats."""
ROWS = {mark.name: mark for mark in TABLE}


def find_row(format_: str, text: str) -> Mark | None:
    """Find the row of `TABLE` for an annotation.

    Parameters
    ----------
    format_ : str
        Name of the format; an empty string for a recording in memory.
    text : str
        Text of the annotation.

    Returns
    -------
    Mark or None
        The row; None if the annotation is not a mark of this format.
    """
    text = text.strip()
    rows = [mark for mark in TABLE if format_ in mark.formats] + [mark for mark in TABLE if not mark.formats]
    return next((mark for mark in rows if mark.words is not None and mark.words.fullmatch(text)), None)


def find_marks(format_: str, annotations: Iterable[Annotation]) -> list[Found]:
    """Find the marks among the annotations of a recording.

    Parameters
    ----------
    format_ : str
        Name of the format; an empty string for a recording in memory.
    annotations : iterable of Annotation
        Annotations of the recording.

    Returns
    -------
    list of Found
        The marks.
    """
    rows: dict[str, Mark | None] = {}
    found = []
    for onset, duration, text, channels in annotations:
        if text not in rows:
            rows[text] = find_row(format_, text)
        if (row := rows[text]) is not None and math.isfinite(onset):
            length = duration if math.isfinite(duration) and duration > 0 and not row.removed else 0.0
            found.append(Found(row.name, onset, length, text.strip(), tuple(channels)))
    return _join_pairs(found)


def _join_pairs(found: list[Found]) -> list[Found]:
    """Join a mark for the start of a bad span and the mark for its end to one mark.

    Two marks are joined if both have no length, the same channels, and the same text before the word `start` or `end`.
    A start mark without an end mark, or an end mark without a start mark, is not changed.
    """
    pairs: dict[int, tuple[int, Found]] = {}
    begun: dict[tuple[str, tuple[str, ...]], int] = {}
    for i in sorted(range(len(found)), key=lambda i: found[i].begin):
        mark = found[i]
        match = PAIR_WORDS.fullmatch(mark.text) if mark.name == "bad span" and not mark.length else None
        if match is None:
            continue
        key = (match[1].casefold(), mark.channels)
        if match[2]:
            begun[key] = i
        elif (first := begun.pop(key, None)) is not None and found[first].begin < mark.begin:
            start = found[first]
            span = Found("bad span with two marks", start.begin, mark.begin - start.begin, match[1], mark.channels)
            pairs[first] = (i, span)
    ends = {end for end, _ in pairs.values()}
    return [pairs[i][1] if i in pairs else mark for i, mark in enumerate(found) if i not in ends]


def match_channels(
    found: Iterable[Found], names: Sequence[str], left_out: Collection[str]
) -> tuple[list[Found], list[str]]:
    """Replace the channel names in bad-span marks by the names that the channels have in the recording.

    Parameters
    ----------
    found : iterable of Found
        Marks of the recording.
    names : sequence of str
        Names of the channels that can be read.
    left_out : collection of str
        Names of the channels in the file that are not read. A mark that names only channels in `left_out` is dropped.

    Returns
    -------
    marks : list of Found
        Marks. If a mark names a channel that the file does not have, the mark is used for all channels.
    notes : list of str
        Notes for the ledger about channel names that are in marks, but that no channel of the file has.
    """
    known = {canonical_name(name): name for name in reversed(names)} | {name: name for name in names}
    marks, unknown = [], Counter()
    for mark in found:
        if mark.channels and ROWS[mark.name].effect is Effect.BAD:
            own = [known.get(name) or known.get(canonical_name(name)) for name in mark.channels]
            lost = [n for n, name in zip(mark.channels, own, strict=True) if name is None and n not in left_out]
            if not lost and not any(own):
                continue
            unknown.update((mark.text, name) for name in lost)
            mark = replace(mark, channels=() if lost else tuple(name for name in own if name))
        marks.append(mark)
    notes = [
        f"the mark '{text}' names the channel '{name}', which is not in the recording; it is used for all channels"
        for text, name in sorted(unknown)
    ]
    return marks, notes[:5]


@dataclass(frozen=True, kw_only=True)
class Division:
    """Result of `divide`."""

    segments: list[Segment]
    """Segments of the recording in the order of time."""
    bad_spans: list[tuple[float, float, str]]
    """Bad spans: start and end in seconds from the recording's beginning, and text."""
    bad_channel_spans: list[tuple[float, float, str]]
    """Bad spans of single channels: start and end in seconds, and name of the channel."""
    notes: list[str]
    """Notes for the ledger."""


def divide(whole: Sequence[Segment], sfreq: float, found: Iterable[Found]) -> Division:
    """Divide segments at the marks of the recording.

    Parameters
    ----------
    whole : sequence of Segment
        Segments that the file itself describes; one segment for a file without gaps.
    sfreq : float
        Sampling rate in Hz.
    found : iterable of Found
        Marks of the recording.

    Returns
    -------
    Division
        Segments, bad spans and notes. A gap mark without a length divides the segment, but removes no samples. A
        bad-span mark without a length does not say which samples are bad, so only a note is written.
    """
    edges: set[int] = set()
    gaps: list[tuple[int, int]] = []
    bad: list[tuple[float, float, str]] = []
    single: list[tuple[float, float, str]] = []
    empty: Counter[str] = Counter()
    for mark in found:
        effect = ROWS[mark.name].effect
        if effect is Effect.BAD and mark.length > 0 and mark.channels:
            single += [(mark.begin, mark.begin + mark.length, name) for name in mark.channels]
        elif effect is Effect.BAD and mark.length > 0:
            bad.append((mark.begin, mark.begin + mark.length, mark.text))
        elif effect is Effect.BAD:
            empty[mark.text] += 1
        else:
            begin, end = (_sample_at(whole, sfreq, t) for t in (mark.begin, mark.begin + mark.length))
            edges |= {begin, end} if effect is Effect.GAP else {begin}
            if effect is Effect.GAP and end > begin:
                gaps.append((begin, end))
    cuts, gaps = sorted(edges), _merge(gaps)
    ends = [end for _, end in gaps]
    segments = []
    for segment in whole:
        inner = cuts[bisect.bisect_right(cuts, segment.start) : bisect.bisect_left(cuts, segment.stop)]
        for a, b in itertools.pairwise([segment.start, *inner, segment.stop]):
            after = bisect.bisect_right(ends, a)  # `after` is the index of the first gap that ends after sample `a`.
            if after == len(gaps) or gaps[after][0] > a:
                segments.append(Segment(start=a, stop=b, onset=segment.onset + (a - segment.start) / sfreq))
    return Division(
        segments=segments,
        bad_spans=sorted(bad),
        bad_channel_spans=sorted(single),
        notes=[_empty_note(*item) for item in sorted(empty.items())],
    )


def _empty_note(text: str, count: int) -> str:
    if count == 1:
        return f"the mark '{text}' has no duration, so no span is left out"
    return f"{count} marks '{text}' have no duration, so no span is left out"


def _merge(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort gaps, and merge gaps that touch or overlap."""
    out: list[tuple[int, int]] = []
    for begin, end in sorted(gaps):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((begin, end))
    return out


def _sample_at(segments: Sequence[Segment], sfreq: float, seconds: float) -> int:
    """Return the first sample at or after a time.

    For a time between two segments, return the start of the later segment.
    """
    onsets = [segment.onset for segment in segments]
    at = max(bisect.bisect_right(onsets, seconds + 1e-3 / sfreq) - 1, 0)
    # Subtract a thousandth of a sample, so that a rounding error of the time cannot select the next sample.
    sample = segments[at].start + math.ceil((seconds - segments[at].onset) * sfreq - 1e-3)
    return min(sample, segments[at].stop)


def time_of_sample(segments: Sequence[Segment], sfreq: float, sample: float) -> float:
    """Return the time of a sample, in seconds from the recording's beginning."""
    starts = [segment.start for segment in segments]
    segment = segments[max(bisect.bisect_right(starts, sample + 1e-3) - 1, 0)]
    return segment.onset + (sample - segment.start) / sfreq
