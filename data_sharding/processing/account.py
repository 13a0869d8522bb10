"""Counts how much of a recording was written to windows, and how much was left out for each reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from data_sharding.processing.faults import Faults, Interval, subtract, union_length
from data_sharding.processing.preprocess import PreprocessSpec

EDGE = "filter transient at an end of a segment"
"""Reason for leaving out the first and the last part of each segment."""
REST = "remainder shorter than a window"


class Account:
    """Counts the windows and the seconds of a recording that were written or left out.

    Parameters
    ----------
    lengths : sequence of int
        Number of samples of each segment at the target rate.
    faults : Faults
        Parts of the signal that are bad.
    spec : PreprocessSpec
        Settings of the preprocessing.
    whole : bool
        True if windows are cut from the whole recording. False if only trials are stored: then no reason is given for
        the seconds outside trials.
    """

    def __init__(self, lengths: Sequence[int], faults: Faults, spec: PreprocessSpec, *, whole: bool) -> None:
        self.spec, self.lengths, self.faults, self.whole = spec, lengths, faults, whole
        self.windows: Counter[str] = Counter()
        """Number of windows or trials that were left out, by reason."""
        self.kinds: Counter[str] = Counter()
        """For each kind of fault: number of windows in which a channel has this fault, although the channel is good in
        the recording as a whole."""
        self._written: defaultdict[int, list[Interval]] = defaultdict(list)
        self._claims: defaultdict[str, defaultdict[int, list[Interval]]] = defaultdict(lambda: defaultdict(list))
        if whole:
            for segment, gaps in self.faults.gaps.items():
                for gap in gaps:
                    reason = f"{gap.kind} in every channel"
                    self._claims[reason][segment].append((gap.start, gap.stop))
                    self.windows[reason] += max(1, round((gap.stop - gap.start) / spec.stride))

    def write(self, segment: int, start: int, stop: int, kinds: dict[int, str]) -> None:
        """Count a window that was written, and the faults of the channels that are bad only in this window."""
        self._written[segment].append((start, stop))
        self.kinds.update(set(kinds.values()))

    def leave_out(self, reason: str, segment: int, start: int, stop: int) -> None:
        """Count a window that is left out."""
        self.windows[reason] += 1
        self._claims[reason][segment].append((start, stop))

    def seconds_written(self) -> float:
        """Return the seconds of signal inside written windows. Where windows overlap, the signal is counted once."""
        return round(sum(union_length(found) for found in self._written.values()) / self.spec.sfreq, 4)

    def seconds_left_out(self) -> dict[str, float]:
        """Return the seconds of signal outside windows, by reason; an empty dictionary if only trials are stored."""
        if not self.whole:
            return {}
        total: Counter[str] = Counter()
        rest = {
            number: subtract([(0, length)], self._written.get(number, [])) for number, length in enumerate(self.lengths)
        }
        edges: dict[int, list[Interval]] = {}
        if self.spec.quality.leave_out_edges:
            reach = self.faults.reach
            for number, pieces in enumerate(self.faults.pieces):
                edges[number] = [e for a, b in pieces for e in ((a, min(b, a + reach)), (max(a, b - reach), b))]
        for reason, claims in [*self._claims.items(), (EDGE, edges)]:
            for number, found in claims.items():
                left = subtract(rest[number], found)
                total[reason] += sum(b - a for a, b in rest[number]) - sum(b - a for a, b in left)
                rest[number] = left
        total[REST] += sum(b - a for left in rest.values() for a, b in left)
        return {reason: round(n / self.spec.sfreq, 4) for reason, n in sorted(total.items()) if n}
