"""Marks divide segments at the exact sample. The tables in docs/formats.md are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_sharding.formats import describe
from data_sharding.formats.marks.interruptions import TABLE, Effect, Found, divide, find_row
from data_sharding.formats.open_signal import READERS
from data_sharding.formats.readers import find_formats
from data_sharding.formats.signal import Segment

DOCS = Path(__file__).parents[3] / "docs" / "formats.md"
ONE = [Segment(start=0, stop=3000, onset=0.0)]


class TestDivide:
    @pytest.mark.parametrize("sfreq", [128.0, 250.0, 512.3, 999.41, 5000.0])
    def test_marks_are_found_to_the_sample_at_any_rate(self, sfreq: float) -> None:
        for sample in (1, 7, 999, 2998):
            for shift in (0.0, -0.5):
                found = [Found("boundary", (sample + shift) / sfreq)]
                divided = divide(ONE, sfreq, found)
                assert [(s.start, s.stop) for s in divided.segments] == [(0, sample), (sample, 3000)]
                assert divided.segments[1].onset == pytest.approx(sample / sfreq)

    def test_overlapping_gaps_are_one_gap(self) -> None:
        found = [Found("MFF pause", 1.0, 2.0), Found("MFF pause", 2.0, 2.0), Found("boundary", 3.0)]
        segments = divide(ONE, 100.0, found).segments
        assert [(s.start, s.stop) for s in segments] == [(0, 100), (400, 3000)]

    def test_times_in_a_gap_between_segments_touch_nothing(self) -> None:
        whole = [Segment(start=0, stop=300, onset=0.0), Segment(start=300, stop=600, onset=73.0)]
        found = [Found("MFF pause", 20.0, 10.0), Found("bad span", 40.0, 1.0, "BAD"), Found("MFF pause", 74.0, 1.0)]
        divided = divide(whole, 100.0, found)
        assert [(s.start, s.stop, s.onset) for s in divided.segments] == [
            (0, 300, 0.0),
            (300, 400, 73.0),
            (500, 600, 75.0),
        ]
        assert divided.bad_spans == [(40.0, 41.0, "BAD")]

    def test_many_marks_are_divided_quickly(self) -> None:
        whole = [Segment(start=0, stop=10**8, onset=0.0)]
        found = [Found("CMS out of range", i / 10, 0.05) for i in range(50_000)]
        assert len(divide(whole, 1000.0, found).segments) == 50_000


class TestDescription:
    def test_document_is_up_to_date(self) -> None:
        text = DOCS.read_text(encoding="utf-8")
        assert describe.update(text) == text, "run: python -m data_sharding.formats.describe docs/formats.md"

    def test_every_format_that_can_be_read_is_described_once(self) -> None:
        names = [name for about in describe.list_formats() for name in about.names]
        assert sorted(names) == sorted(READERS)
        assert all(f.title and f.recognised_by and f.compared for f in find_formats())

    def test_rows_are_unique_and_name_known_formats(self) -> None:
        assert len({mark.name for mark in TABLE}) == len(TABLE)
        assert {name for mark in TABLE for name in mark.formats} <= set(READERS)
        assert all(isinstance(mark.effect, Effect) and mark.sign for mark in TABLE)


@pytest.mark.parametrize(
    ("text", "row"),
    {
        "BAD": "bad span",
        "bad": "bad span",
        "BAD_move": "bad span",
        "bad blink": "bad span",
        "BAD-1": "bad span",
        "BAD2": "bad span",
        "BAD@@Fp1": "bad span",
        "BadInterval": "bad span",
        "Bad Interval/Gradient": "bad span",
        "badsegment": "bad span",
        "bads": "bad span",
        "Comment/BAD_move": "bad span",
        "Comment,BAD_move": "bad span",
        "Comment, bad": "bad span",
        "Artefact: bad electrode": "bad span",
        "Comment/BAD_ACQ_SKIP": "acquisition skip",
        "BAD ACQ SKIP": "acquisition skip",
        "EDGE boundary": "join",
        "Comment/BAD boundary": "join",
        "BOUNDARY": "boundary",
        "New Segment/": "new segment",
        "new segment": "new segment",
        "Recording Paused": "recording stopped",
        "Comment/acquisition re-started": "recording stopped",
        "New Segment/LostSamples: 12": "new segment",
        "Buffer Overflow": "recording stopped",
        "dropped packets (3)": "recording stopped",
        "pause": None,
        "paused": None,
        "restart": None,
        "recording paused the game": None,
        "REC": None,
        "badge": None,
        "Badminton": None,
        "BADGE/1": None,
        "Stimulus/badger": None,
        "not bad": None,
        "the boundary": None,
        "-99": None,
        "32766": None,
        "": None,
        "S  1": None,
    }.items(),
)
def test_words_of_marks(text: str, row: str | None) -> None:
    found = find_row("brainvision", text)
    assert (found.name if found else None) == row


def test_a_long_text_is_compared_quickly() -> None:
    assert find_row("edf", "a, / " * 20_000) is None
