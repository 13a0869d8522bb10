"""Recordings of two people are not duplicates, even if both begin with the same calibration signal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sharding.audit.duplicates import RecordingFingerprint, find_duplicates
from data_sharding.common.files import read_json


def load_prints(work: Path) -> list[RecordingFingerprint]:
    """Load the fingerprints that the job wrote to the folders of the recordings."""
    out = []
    for file in work.rglob("result.json"):
        row = read_json(file)["row"]
        points = np.load(file.with_name("fingerprint.npy"))
        out.append(RecordingFingerprint(key=row["key"], sha256=row["sha256"], seconds=row["seconds"], points=points))
    return out


def test_case_of_the_same_calibration(cases: Path, tmp_path: Path, shard_all, assert_true) -> None:
    (tmp_path / "e").mkdir()
    for name in "ab":
        (tmp_path / "e" / f"e18_calib_{name}.edf").symlink_to(cases / "edf" / f"e18_calib_{name}.edf")
    sharded = shard_all(tmp_path / "e")
    prints = load_prints(tmp_path / "work")
    assert len(prints) == 2 and find_duplicates(prints) == {}
    for name, seed in (("a", 180), ("b", 181)):
        one = sharded[f"e18_calib_{name}.edf"]
        one.samples = [sample for sample in one.samples if sample[0]["start"] >= 11]
        assert_true(one, seed)
