"""In recordings with interruptions, bad-span marks or damaged headers, each window has the true signal at the right
time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

LEFT_OUT = {
    "brainvision/b01_comment_bad.vhdr": (301, [(20, 25), (36, 39)]),
    "edf/tal2_D.edf": (1171, [(20, 25)]),
    "gdf/g03_missing.gdf": (603, [(30, 30.4)]),
}
"""For each recording: seed of the true signal, and spans in seconds that no window may overlap."""


@pytest.mark.parametrize("path", LEFT_OUT)
def test_spans_that_are_marked_or_missing_are_left_out(cases: Path, shard_all, assert_true, path: str) -> None:
    seed, spans = LEFT_OUT[path]
    sharded = shard_all((cases / path).parent)[Path(path).name]
    # Four channels of the GDF file have the same name in the file, so use the unique names in the ledger.
    assert_true(sharded, seed, names=sharded.row.channels)
    assert not any(sharded.touches(*span) for span in spans)
    assert sum(b - a for a, b in sharded.spans) > 35


@pytest.mark.parametrize(
    ("path", "seed", "jump"),
    [("eeglab/s01_b99.set", 901, 0.0), ("edf/e23_biosemi_epoch.bdf", 907, 0.0), ("edf/e15_C_gap.edf", 906, 70.0)],
)
def test_no_window_crosses_a_stop(cases: Path, shard_all, assert_true, path: str, seed: int, jump: float) -> None:
    """Only the EDF+C file stores the length of the pause (70 s). So only in this file, the windows after the pause have
    the right times."""
    sharded = shard_all((cases / path).parent)[Path(path).name]

    def clock(seconds: float) -> float:
        return seconds if seconds < 30.9 else seconds - jump + 70.0

    # Do not compare the windows next to the pause: they are at the ends of segments, where the filters have a
    # transient.
    beside = {30.0, 31.0 + jump}
    inner = [(meta, x) for meta, x in sharded.samples if meta["start"] not in beside]
    assert_true(dataclasses.replace(sharded, samples=inner), seed, clock=clock)
    assert sharded.row.segments == 2
    assert all(end <= 31.0 or begin >= 31.0 + jump for begin, end in sharded.spans)
    assert sum(end <= 31.0 for _, end in sharded.spans) > 25 and sum(begin > 31.0 for begin, _ in sharded.spans) > 20


def test_file_with_zero_records_in_the_header_is_read_to_its_end(cases: Path, shard_all, assert_true) -> None:
    sharded = shard_all(cases / "edf")["e26_zero_records.edf"]
    assert_true(sharded, 223)
    assert sharded.row.windows > 50 and any("the file holds 60" in note for note in sharded.row.notes)


def test_channel_without_a_digital_range_is_left_out(cases: Path, shard_all, assert_true) -> None:
    sharded = shard_all(cases / "edf")["e14_dmineq.edf"]
    assert_true(sharded, 167, skip=["F4"])
    assert sharded.row.windows > 50
    assert any("F4" in names for names in sharded.row.channels_left_out.values())
