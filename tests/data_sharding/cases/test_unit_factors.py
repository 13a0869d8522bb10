"""If all recordings of a corpus have the same wrong unit, the job suggests a line for the config. It changes no
value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.corpora import CorpusConfig
from data_sharding.job.suggest_units import find_factor, suggest_unit_factors

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SECONDS = np.arange(24 * 250) / 250


def suggest(done: dict, root: Path, **corpus) -> list[str]:
    rows = [sharded.row for sharded in done.values()]
    config = CorpusConfig(root=str(root), name="c", **corpus)
    return suggest_unit_factors([config], {row.key: 0 for row in rows}, rows)


def write_fif(path: Path, uv: np.ndarray, wrong: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(1e-6 * wrong * uv, mne.create_info(NAMES, 250.0, "eeg"), verbose="ERROR")
    raw.save(path, fmt="double", verbose="ERROR")


def test_find_factor() -> None:
    assert [find_factor(10.0 * times) for times in (1e3, 1e6, 1e-3, 1e-6)] == [1e-3, 1e-6, 1e3, 1e6]
    assert [find_factor(amplitude) for amplitude in (0.0, 10.0, 100.0, float("inf"))] == [None] * 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(1e3, '{"*": 0.001}'), (1e6, '{"*": 1.0e-6}'), (1e-3, '{"*": 1000.0}'), (1e-6, '{"*": 1.0e+6}')],
)
def test_a_fif_corpus_with_one_wrong_unit(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, wrong: float, words: str
) -> None:
    import yaml

    for seed in (30, 31):
        write_fif(tmp_path / "eeg" / f"{seed}_raw.fif", true_uv(seed, 8, SECONDS), wrong)
    done = shard_all(tmp_path / "eeg")
    assert {sharded.row.category for sharded in done.values()} == {"unit unknown"}
    (line,) = suggest(done, tmp_path / "eeg")
    assert f"unit_factors: {words}" in line and "all 2 recordings" in line and "Nothing was changed" in line
    factors = yaml.safe_load(words)
    assert isinstance(factors["*"], float) and suggest(done, tmp_path / "eeg", unit_factors=factors) == []
    mended = shard_all(tmp_path / "eeg", unit_factors=factors)
    assert_true(mended["30_raw.fif"], 30)


@pytest.mark.parametrize(
    ("unit", "scale", "words"), [(b"mV", 1.0, "0.001"), (b"", 1.0, "1.0e-6"), (b"nV", 1.0, "1000.0")]
)
def test_an_edf_corpus_with_one_wrong_unit(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable,
    unit: bytes, scale: float, words: str,
) -> None:  # fmt: skip
    for seed in (32, 33, 34):
        write_edf(tmp_path / "eeg" / f"{seed}.edf", true_uv(seed, 8, SECONDS), units=[unit] * 8, scale=[scale] * 8)
    done = shard_all(tmp_path / "eeg")
    (line,) = suggest(done, tmp_path / "eeg")
    assert f'{{"*": {words}}}' in line and "all 3 recordings" in line
    mended = shard_all(tmp_path / "eeg", unit_factors={"*": float(words)})
    assert_true(mended["33.edf"], 33)


def test_a_corpus_with_an_unknown_unit_or_a_mixed_one(
    tmp_path: Path, shard_all: Callable, true_uv: Callable, write_edf: Callable
) -> None:
    for seed, unit in ((35, b"foo"), (36, b"foo")):
        write_edf(tmp_path / "foo" / f"{seed}.edf", true_uv(seed, 8, SECONDS), units=[unit] * 8)
    (line,) = suggest(shard_all(tmp_path / "foo"), tmp_path / "foo")
    assert '{"*": 1.0e-6}' in line
    for seed, unit in ((37, b"uV"), (38, b"mV"), (39, b"mV")):
        write_edf(tmp_path / "mixed" / f"{seed}.edf", true_uv(seed, 8, SECONDS), units=[unit] * 8)
    assert suggest(shard_all(tmp_path / "mixed"), tmp_path / "mixed") == []
    for seed, unit in ((37, b"V"), (38, b"mV")):
        write_edf(tmp_path / "two" / f"{seed}.edf", true_uv(seed, 8, SECONDS), units=[unit] * 8)
    assert suggest(shard_all(tmp_path / "two"), tmp_path / "two") == []


def test_arrays_with_a_wrong_unit(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    (tmp_path / "eeg").mkdir()
    for seed, dtype in ((40, np.float64), (41, np.float32)):
        np.save(tmp_path / "eeg" / f"{seed}.npy", (1e-6 * true_uv(seed, 8, SECONDS)).astype(dtype))
        about = {"sfreq": 250, "ch_names": NAMES, "unit": "uV"}
        (tmp_path / "eeg" / f"{seed}.json").write_text(json.dumps(about))
    done = shard_all(tmp_path / "eeg", kind="arrays")
    for sharded in done.values():
        assert sharded.row.category == "unit unknown" and "e-05 microvolts" in sharded.row.reason
    (line,) = suggest(done, tmp_path / "eeg", kind="arrays")
    assert '{"*": 1.0e+6}' in line
    assert_true(shard_all(tmp_path / "eeg", kind="arrays", unit_factors={"*": 1e6})["40.npy"], 40)


def test_the_job_ends_with_the_line(
    tmp_path: Path, true_uv: Callable, write_edf: Callable, capfd: pytest.CaptureFixture
) -> None:
    from data_sharding.job.run import main

    for seed in (42, 43):
        uv = true_uv(seed, 8, SECONDS)
        write_edf(tmp_path / "eeg" / f"sub-{seed}" / f"sub-{seed}_eeg.edf", uv, units=[b"mV"] * 8)
    values = {
        "corpora": [{"root": str(tmp_path / "eeg")}],
        "output": str(tmp_path / "out"),
        "preprocess": {"window": 256, "stride": 256},
        "ray": {"num_cpus": 1, "memory_gb": 1},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main([str(tmp_path / "job.yaml")]))
    assert stopped.value.code == 2
    told = capfd.readouterr().err
    assert 'unit_factors: {"*": 0.001}' in told and "all 2 recordings" in told
