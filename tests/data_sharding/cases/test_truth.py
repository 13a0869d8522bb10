"""Tests of `assert_true`: the function accepts a recording without faults, and finds small faults."""

from __future__ import annotations

from pathlib import Path

import mne
import numpy as np
import pytest

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]


def test_the_comparison_finds_small_faults(tmp_path: Path, shard_all, assert_true, true_uv) -> None:
    for name, gain, rate in (("good", 1.0, 250.0), ("loud", 1.003, 250.0), ("fast", 1.0, 250.3)):
        uv = gain * true_uv(3, 8, np.arange(60 * 250) / 250)
        (tmp_path / "eeg").mkdir(exist_ok=True)
        raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES, rate, "eeg"), verbose="ERROR")
        raw.save(tmp_path / "eeg" / f"{name}_raw.fif", fmt="double", verbose="ERROR")
    sharded = shard_all(tmp_path / "eeg")
    assert_true(sharded["good_raw.fif"], 3)
    with pytest.raises(AssertionError, match=r"gain 1\.003"):
        assert_true(sharded["loud_raw.fif"], 3)
    with pytest.raises(AssertionError, match=r"fast_raw\.fif"):
        assert_true(sharded["fast_raw.fif"], 3)
    with pytest.raises(AssertionError, match="window at"):
        assert_true(sharded["good_raw.fif"], 3, clock=lambda seconds: seconds + 0.004)
