"""Tests of mixtures of datasets: weights, order, resuming, and invalid requests."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.order import DatasetInterleaver
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=20.0, window=16, stride=16)


def make_dataset(path: Path, count: int, spec: PreprocessSpec = SPEC) -> Path:
    rng = np.random.default_rng(count)
    samples = [
        Sample(key=f"{path.name}-{i:03d}", eeg=rng.normal(0, 20, (3 + count % 4, 16)), meta={"n": 3 + count % 4})
        for i in range(count)
    ]
    write_dataset(path, {"train": samples, "val": samples[:5]}, spec, samples_per_shard=20)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return paths and weights of three datasets, which have 90, 31 and 7 samples."""
    root = tmp_path_factory.mktemp("mix")
    shares = (("large", 90, 3.0), ("middle", 31, 2.0), ("small", 7, 1.0))
    return {str(make_dataset(root / name, count)): weight for name, count, weight in shares}


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_positions_are_shared_by_weight_without_gaps(weights: list[float], seed: int) -> None:
    turns = DatasetInterleaver(weights, seed)
    which, place = turns.at(np.arange(5 * 4096))
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        mine = place[which == number]
        assert abs(len(mine) - share * len(which)) < 2
        # The positions within each dataset have no gaps and do not repeat.
        assert sorted(mine) == list(range(len(mine)))
    # Positions far from the start can be computed directly.
    far = 10**12 + np.arange(8192)
    assert abs(np.bincount(turns.at(far)[0], minlength=len(weights)) / 8192 - shares).max() < 1e-3


def test_each_sample_is_read_once_in_each_epoch_of_its_dataset(weights: dict[str, float]) -> None:
    mixture = Mixture(weights)
    loader = Loader(mixture, 64, 5)
    numbers, epochs = (np.concatenate(x) for x in zip(*(loader.positions(t) for t in range(192)), strict=True))
    names = np.searchsorted(mixture.first, numbers, side="right") - 1
    share = {part.path.name: float((names == number).mean()) for number, part in enumerate(mixture.parts)}
    assert share == pytest.approx({"large": 1 / 2, "middle": 1 / 3, "small": 1 / 6}, abs=1e-3)
    for part, dataset in enumerate(mixture.parts):
        seen = Counter(zip(epochs[names == part].tolist(), numbers[names == part].tolist(), strict=True))
        assert set(seen.values()) == {1}
        # After whole blocks (here 3 of 4096 places), each dataset has given its first positions without gaps. So its
        # first two epochs are complete.
        for epoch in range(2):
            assert sum(e == epoch for e, _ in seen) == len(dataset)


def test_mixture_resumes_in_mid_epoch_with_another_world_size(weights: dict[str, float]) -> None:
    whole = Loader(Mixture(weights), 12, 3)
    seen = [b.keys for b, _ in zip(whole, range(12), strict=False)]
    state = Loader(Mixture(weights), 12, 3).state_dict() | {"step": 7}
    ranks = [Loader(Mixture(weights), 12, 3, rank=r, world_size=2, num_workers=r) for r in (0, 1)]
    for loader in ranks:
        loader.load_state_dict(state)
    for step, left, right in zip(range(7, 12), *ranks, strict=False):
        assert [k for pair in zip(left.keys, right.keys, strict=True) for k in pair] == seen[step]
    others = dict(weights) | {next(iter(weights)): 5.0}
    with pytest.raises(RequestError, match="dataset_id"):
        Loader(Mixture(others), 12, 3).load_state_dict(state)


def test_mixture_reads_the_same_samples_as_its_datasets(weights: dict[str, float]) -> None:
    mixture = Mixture(weights)
    assert len(mixture) == 128 and mixture.manifest.samples("train") == 128
    numbers = [127, 0, *mixture.first[1:3].tolist(), int(mixture.first[1]) - 1]
    batch = collate(mixture, numbers)
    parts = [EEGDataset(part.path) for part in mixture.parts]
    own = [(parts[2], len(parts[2]) - 1), (parts[0], 0), (parts[1], 0), (parts[2], 0), (parts[0], len(parts[0]) - 1)]
    assert batch.keys == [part.key(n) for part, n in own] == [mixture.key(n) for n in numbers]
    for row, (part, n), number in zip(batch.padded(), own, numbers, strict=True):
        assert torch.equal(row, collate(part, [n]).eeg[0]) and mixture.meta(number) == part.meta(n)
        assert (mixture[number].eeg == part[n].eeg).all()
    assert [Path(shard).parents[1] for shard in batch.shards] == [part.path for part, _ in own]


def test_order_paths_and_scale_of_the_weights_do_not_matter(tmp_path: Path, weights: dict[str, float]) -> None:
    state = Loader(Mixture(weights), 12, 3).state_dict() | {"step": 2}
    moved = {str(shutil.copytree(path, tmp_path / str(9 - n))): w for n, (path, w) in enumerate(weights.items())}
    for other in (dict(reversed(weights.items())), moved, {path: 10 * w for path, w in weights.items()}):
        loader = Loader(Mixture(other), 12, 3)
        loader.load_state_dict(state)
        assert loader.positions(2) == Loader(Mixture(weights), 12, 3).positions(2)
        assert next(iter(loader)).keys == collate(Mixture(weights), loader.positions(2)[0]).keys


def test_dataset_id_does_not_depend_on_the_order_of_the_weights(weights: dict[str, float]) -> None:
    tenths = dict(zip(weights, (0.1, 0.2, 0.3), strict=True))
    assert sum(tenths.values()) != sum(reversed(tenths.values()))
    one, other = Mixture(tenths), Mixture(dict(reversed(tenths.items())))
    assert one.manifest.dataset_id == other.manifest.dataset_id


def test_invalid_mixtures_are_refused(tmp_path: Path, weights: dict[str, float]) -> None:
    first = next(iter(weights))
    other = make_dataset(tmp_path / "other", 8, dataclasses.replace(SPEC, lowpass=25.0, stride=8))
    # The error lists the two datasets in the order of their ids, so the value of either dataset can come first.
    differences = r"lowpass 2[05]\.0 against 2[05]\.0, preprocess\.stride (16|8) against (16|8)"
    with pytest.raises(RequestError, match=differences):
        Mixture({first: 1.0, str(other): 1.0})
    with pytest.raises(RequestError, match="same dataset"):
        Mixture({first: 1.0, f"{first}/": 1.0})
    for bad in ({first: 0.0}, {first: -1.0}, {first: 1.0, str(other): float("nan")}, {first: 1e-9, str(other): 1.0}):
        with pytest.raises(RequestError, match="weight"):
            Mixture(bad)
    with pytest.raises(RequestError, match="at least one"):
        Mixture({})
    with pytest.raises(RequestError, match="no samples in split 'test'"):
        Mixture({first: 1.0}, "test")


def test_pretraining_runs_on_a_mixture(tmp_path: Path, unpaired_dataset: Path, paired_dataset: Path) -> None:
    tiny = {"dim": 16, "depth": 1, "heads": 2, "mlp_ratio": 1.0}
    weights = {str(unpaired_dataset): 2.0, str(paired_dataset): 1.0}
    config = {
        "datasets": weights,
        "order": "shards",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"encoder": {"samples": 128, "patch": 8, **tiny}, "decoder": tiny},
        "steps": 3,
        "batch_size": 12,
        "num_workers": 1,
        "log_every": 1,
        "tracker": {"kind": "none"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pretrain.train", str(tmp_path / "config.yaml")]
    root = Path(__file__).parents[3]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = "".join(path.read_text() for path in (tmp_path / "run" / "checkpoints").rglob("*.json"))
    assert Mixture(weights).manifest.dataset_id in saved and '"shards 16"' in saved
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 3
