"""Events tables whose texts have quotation marks, or whose first line has spaces, keep all rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_sharding.corpora.events import read_trials
from data_sharding.corpora.paths import read_marks

HEAD = "onset\tduration\ttrial_type\timage"
TABLES = {
    "plain": [HEAD, "5\t1\tgo\ta.png", "10\t1\tstop\tb.png", "20\t2\tBAD_x\tn/a", "30\t1\tgo\tc.png"],
    "a quotation mark that is not closed": [
        *(HEAD, '5\t1\t"go\ta.png', "10\t1\tgo\tb.png", "20\t2\tBAD_x\tn/a", "30\t1\tgo\tc.png"),
    ],
    "quotation marks in two rows": [
        *(HEAD, '5\t1\t"he said\ta.png', "10\t1\tgo\tb.png", "20\t2\tBAD_x\tn/a", '30\t1\tgo" x\tc.png'),
    ],
    "quoted cells": [
        '"onset"\t"duration"\t"trial_type"\t"image"',
        *('"5"\t1\t"say ""go"""\t"a.png"', "10\t1\tgo\tb.png", '20\t2\t"BAD_x"\tn/a', "30\t1\tgo\tc.png"),
    ],
    "a quoted cell with a tab and a line break": [
        *(HEAD, '5\t1\t"go\nand\tstop"\ta.png', "10\t1\tgo\tb.png", "20\t2\tBAD_x\tn/a", "30\t1\tgo\tc.png"),
    ],
    "spaces in the first line": [
        *(HEAD.replace("\t", " \t "), "5\t1\tgo\ta.png", "10\t1\tgo\tb.png", "20\t2\tBAD_x\tn/a", "30\t1\tgo\tc.png"),
    ],
    "a short row and a quotation mark": [
        *(HEAD, '5\t1\t"go\ta.png', "10\t1\tgo\tb.png", "15\t1", "20\t2\tBAD_x\tn/a", "30\t1\tgo\tc.png"),
    ],
}


@pytest.mark.parametrize("lines", TABLES.values(), ids=TABLES.keys())
def test_no_row_is_lost(tmp_path: Path, lines: list[str]) -> None:
    table = tmp_path / "a_events.tsv"
    for end in ("\n", "\r\n"):
        table.write_bytes((end.join(lines) + end).encode())
        trials = read_trials(table, tmp_path)
        assert [(trial.onset, trial.image_id) for trial in trials] == [(5.0, "a"), (10.0, "b"), (30.0, "c")]
        assert read_marks(table) == ([(20.0, 2.0, "BAD_x", [])], [])
