"""Tests of the loader: order of samples, batches, workers, resuming, and errors for damaged shards."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import Batch, collate, sequential
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.order import EpochOrder, epoch_order, permute
from data_sharding.dataset.samples import Sample, pad_channels
from data_sharding.dataset.shard_reader import INDEX, parse_index
from data_sharding.dataset.shared_memory import BatchInSlot, Slots
from data_sharding.processing.preprocess import PreprocessSpec

ROOT = Path(__file__).parents[3]
GOLDEN = [1, 3, 5, 6, 2, 8, 9, 7, 4, 0]
TINY = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=20.0, window=16, stride=16)


def make_samples(count: int, split: str = "train", seed: int = 0) -> list[Sample]:
    """Make windows of 1 to 5 channels."""
    rng = np.random.default_rng(seed)
    return [
        Sample(key=f"{split}-{i:04d}", eeg=rng.normal(0, 20, (1 + i % 5, 16)), meta={"n": 1 + i % 5, "start": i})
        for i in range(count)
    ]


@given(n=st.integers(1, 600), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_epoch_order_is_a_permutation_for_any_length(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    # A single position can be looked up without computing the whole order.
    assert permute(np.array([n // 2]), n, seed, 0, epoch)[0] == order[n // 2]


def test_epoch_order_is_uniform_and_the_same_in_all_releases() -> None:
    # The order in GOLDEN must not change, because runs with older checkpoints must continue in the same order.
    assert epoch_order(10, 3, 0).tolist() == GOLDEN
    counts = np.zeros((20, 20))
    follows = 0
    for epoch in range(2000):
        order = epoch_order(20, 0, epoch)
        counts[np.arange(20), order] += 1
        follows += int((np.diff(order) == 1).sum())
    # Each of `counts` should be near 100; a difference of 50 is five standard deviations of the binomial distribution.
    assert abs(counts - 100).max() < 50
    # Two neighbouring samples stay neighbours only by chance: there are 19 pairs, each with probability 1/20.
    assert follows / 2000 == pytest.approx(19 / 20, abs=0.15)


def test_order_of_100_million_samples_needs_no_permutation_in_memory() -> None:
    order = EpochOrder(np.full(50_000, 2000), 0)
    numbers, epochs = order.at(np.arange(99_999_968, 100_000_032))
    assert epochs.tolist() == [0] * 32 + [1] * 32 and len(set(numbers)) > 60
    near, _ = EpochOrder(np.full(50_000, 2000), 0, "shards", 16).at(np.arange(32_000))
    assert len(np.unique(near)) == 32_000 and len(np.unique(near // 2000)) == 16


@given(
    shards=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    window=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_shard_order_reads_each_sample_once_and_stays_within_its_window(
    shards: list[int], window: int, seed: int
) -> None:
    n = sum(shards)
    numbers, epochs = EpochOrder(np.array(shards), seed, "shards", window).at(np.arange(3 * n))
    shard_of = np.repeat(np.arange(len(shards)), shards)
    for epoch in range(3):
        mine = numbers[epochs == epoch]
        assert sorted(mine) == list(range(n))
        left = mine
        while len(left):
            # The next window (a group of shards whose samples are shuffled together) contains all samples of `window`
            # different shards.
            several = list(dict.fromkeys(shard_of[left]))
            group = several[:window]
            size = sum(shards[s] for s in group)
            assert set(shard_of[left[:size]]) == set(group)
            left = left[size:]
    if n > 40 and len(shards) > 4:
        assert numbers[:n].tolist() != numbers[n : 2 * n].tolist()


@given(
    batch=st.sampled_from([4, 8, 12, 24]),
    seed=st.integers(0, 3),
    steps=st.integers(1, 30),
    order=st.sampled_from(["global", "shards"]),
)
@settings(max_examples=25, deadline=None)
def test_each_sample_is_read_once_an_epoch_for_any_world_size(
    unpaired_dataset: Path, batch: int, seed: int, steps: int, order: str
) -> None:
    data = EEGDataset(unpaired_dataset, "train")
    whole = Loader(data, batch, seed, order=order, window=2)  # type: ignore[arg-type]
    for world in (1, 2, 4):
        ranks = [Loader(data, batch, seed, rank=r, world_size=world, order=order, window=2) for r in range(world)]  # type: ignore[arg-type]
        parts = [r.positions(steps)[0] for r in ranks]
        assert len({len(p) for p in parts}) == 1
        merged = [part[i] for i in range(batch // world) for part in parts]
        assert merged == whole.positions(steps)[0]
    line = [n for t in range(-(-2 * len(data) // batch)) for n in whole.positions(t)[0]]
    assert sorted(line[: len(data)]) == sorted(line[len(data) : 2 * len(data)]) == list(range(len(data)))
    if order == "global":
        assert line[len(data) : 2 * len(data)] == list(epoch_order(len(data), seed, 1))


@pytest.mark.parametrize(("workers", "order"), [(0, "shards"), (2, "global")])
def test_loader_resumes_in_mid_epoch_with_another_world_size(unpaired_dataset: Path, workers: int, order: str) -> None:
    data = EEGDataset(unpaired_dataset, "train")
    whole = Loader(data, 8, 3, order=order, window=2)  # type: ignore[arg-type]
    seen = [b.keys for b, _ in zip(whole, range(20), strict=False)]
    first = Loader(data, 8, 3, num_workers=workers, order=order, window=2)  # type: ignore[arg-type]
    for _, step in zip(first, range(5), strict=False):
        assert first.step == step + 1
    # `zip` reads a sixth batch before it notices the end of the range, so change `step` in the loader's state from 6 to
    # 5.
    state = json.loads(json.dumps(first.state_dict() | {"step": 5}))
    ranks = [Loader(data, 8, 3, rank=r, world_size=2, order=order, window=2) for r in (0, 1)]  # type: ignore[arg-type]
    for loader in ranks:
        loader.load_state_dict(state)
    for step, left, right in zip(range(5, 20), *ranks, strict=False):
        assert [k for pair in zip(left.keys, right.keys, strict=True) for k in pair] == seen[step]


def test_loader_refuses_the_state_of_another_run(unpaired_dataset: Path, paired_dataset: Path) -> None:
    data = EEGDataset(unpaired_dataset, "train")
    state = Loader(data, 6, 0).state_dict()
    for other, key in (
        (Loader(EEGDataset(paired_dataset), 6, 0), "dataset_id"),
        (Loader(EEGDataset(unpaired_dataset, "val"), 6, 0), "split"),
        (Loader(data, 6, 1), "seed"),
        (Loader(data, 12, 0), "global_batch"),
        (Loader(data, 6, 0, order="shards"), "order"),
    ):
        with pytest.raises(RequestError, match=key):
            other.load_state_dict(state)
    with pytest.raises(RequestError, match="multiple"):
        Loader(data, 5, 0, world_size=2)


@given(numbers=st.lists(st.integers(0, 95), min_size=1, max_size=12), cut=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_batches_and_their_slices_are_padded_by_replication(
    unpaired_dataset: Path, numbers: list[int], cut: int
) -> None:
    data = EEGDataset(unpaired_dataset, "train")
    batch = collate(data, numbers)
    x = batch.padded("cpu", torch.float32)
    assert x.shape == (len(numbers), 128, 128) and x.dtype == torch.float32 and batch.eeg.dtype == torch.float16
    for row, half, number, meta in zip(x, batch.eeg, numbers, batch.metas, strict=True):
        sample = data[number]
        assert (row.numpy() == pad_channels(sample.eeg).astype(np.float32)).all() and (half == row.half()).all()
        assert meta == sample.meta == data.meta(number)
    head, tail = batch[:cut], batch[cut:]
    assert torch.equal(torch.cat([p.padded(dtype=torch.float32) for p in (head, tail) if len(p)]), x)
    assert head.keys + tail.keys == batch.keys and head.numbers + tail.numbers == numbers
    # The packed batch contains only the recorded channels, without padding.
    assert batch.packed.shape == (sum(meta["n"] for meta in batch.metas), 128)


def test_workers_give_the_same_batches(unpaired_dataset: Path) -> None:
    data = EEGDataset(unpaired_dataset, "train")
    for here, there, _ in zip(Loader(data, 7, 0), Loader(data, 7, 0, num_workers=2), range(15), strict=False):
        assert torch.equal(here.packed, there.packed) and here.numbers == there.numbers
        assert here.metas == there.metas and here.epochs == there.epochs


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_kept_batches_are_not_overwritten(unpaired_dataset: Path) -> None:
    """Workers reuse their shared memory, but the reuse must not change batches that a trainer has kept."""
    data = EEGDataset(unpaired_dataset, "train")
    kept = []
    for batch, step in zip(Loader(data, 12, 0, num_workers=3), range(45), strict=False):
        kept.append(batch)
        if step % 10 == 0:
            # Wait until the workers have filled all their slots of shared memory.
            time.sleep(0.2)
    for here, there in zip(Loader(data, 12, 0), kept, strict=False):
        assert here.numbers == there.numbers and torch.equal(here.packed, there.packed)


def test_signals_of_a_batch_are_copied_out_of_a_slot() -> None:
    slots = Slots(2, 3, rows=10, window=7)
    views = [slots.view(place) for place in range(6)]
    for number, view in enumerate(views):
        view[:] = number
    assert all(view.shape == (10, 7) and (view == number).all() for number, view in enumerate(views))
    batch = Batch(
        packed=torch.empty(0), channels=[4], keys=["a"], json=[b"{}"], shards=["s"], numbers=[0], epochs=[0], begins=[0]
    )
    message = pickle.loads(pickle.dumps(BatchInSlot(batch=batch, slots=slots.number, slot=5, rows=4)))
    there = message.copy_out().packed
    views[5][:] = 0
    assert there.shape == (4, 7) and (there == 5).all()


def test_workers_end_when_their_parent_process_ends(tmp_path: Path) -> None:
    """The metadata of a batch are larger than the buffer of a pipe, so workers wait until the parent process reads
    them."""
    meta = {"n": 64, "ch_names": [f"E{i}" for i in range(64)], "positions": [[0.01, 0.02, 0.03]] * 64}
    samples = [
        Sample(key=f"{i:04d}", eeg=np.random.default_rng(i).normal(0, 20, (64, 16)), meta=meta | {"start": i})
        for i in range(128)
    ]
    write_dataset(tmp_path / "data", {"train": samples}, TINY)
    program = """
import os, sys, time
from multiprocessing import active_children
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader

batches = iter(Loader(EEGDataset(sys.argv[1]), 128, 0, num_workers=2))
next(batches)
print(*(child.pid for child in active_children()), flush=True)
time.sleep(1)
os._exit(4)
"""
    # `subprocess.run` returns only when the workers, which have the output open too, have ended.
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data")], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 4
    assert len(done.stdout.split()) == 2


def test_sequential_reads_each_sample_once(unpaired_dataset: Path) -> None:
    data = EEGDataset(unpaired_dataset, "val")
    keys = [k for rank in (0, 1) for b in sequential(data, 5, rank=rank, world_size=2) for k in b.keys]
    assert sorted(keys) == sorted(data.key(i) for i in range(len(data)))


def test_dataset_can_be_pickled_and_read_by_threads(paired_dataset: Path) -> None:
    data = EEGDataset(paired_dataset)
    first = [data[i] for i in range(len(data))]
    again = pickle.loads(pickle.dumps(data))
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(first, pool.map(again.__getitem__, range(len(data))), strict=True):
            assert a.key == b.key and (a.eeg == b.eeg).all() and a.image == b.image and a.image is not None
    assert data[-1].key == first[-1].key
    with pytest.raises(IndexError):
        data[len(data)]


def test_number_of_open_files_is_limited(tmp_path: Path) -> None:
    write_dataset(tmp_path / "many", {"train": make_samples(300)}, TINY, samples_per_shard=2)
    data = EEGDataset(tmp_path / "many")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [data.key(i) for i in range(300)] == [f"train-{i:04d}" for i in range(300)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 128


def test_index_takes_30_bytes_a_sample_and_is_checked(tmp_path: Path) -> None:
    assert INDEX.itemsize == 30
    write_dataset(tmp_path / "d", {"train": make_samples(9)}, TINY)
    text = (tmp_path / "d" / "train" / "000000.idx").read_bytes()
    entries = json.loads(text)
    # Older indexes do not contain `n`, the number of channels, so `n` is read from the JSON of the sample.
    old = [{k: v for k, v in entry.items() if k != "n"} for entry in entries]
    bounds = {"tar_bytes": (tmp_path / "d" / "train" / "000000.tar").stat().st_size, "window": TINY.window}
    assert parse_index(json.dumps(old).encode(), "x.idx", 9, **bounds)["n"].tolist() == [0] * 9
    entries[4]["members"]["json"][0] += 512
    for damaged, message in (
        (text[:-30], "JSON"),
        (b"{}", "0 samples, the manifest says 9"),
        (b'[{"key": "a"}]', "not the index of a shard"),
        (json.dumps(entries).encode(), "offsets for the sample train-0004"),
    ):
        with pytest.raises(RequestError, match=rf"x\.idx: .*{message}"):
            parse_index(damaged, "x.idx", 9, **bounds)


def test_dataset_without_n_in_its_index_is_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(9)}, TINY)
    new = collate(EEGDataset(tmp_path / "d"), list(range(9)))
    path = tmp_path / "d" / "train" / "000000.idx"
    entries = [{k: v for k, v in entry.items() if k != "n"} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(entries))
    old = collate(EEGDataset(tmp_path / "d"), list(range(9)))
    assert torch.equal(new.packed, old.packed) and old.channels == new.channels == [1 + i % 5 for i in range(9)]


def overwrite_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["bit", "end", "header", "json"])
def test_damaged_shard_is_refused_and_the_sample_is_named(tmp_path: Path, how: str, workers: int) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(20)}, TINY, samples_per_shard=10)
    data = EEGDataset(tmp_path / "d")
    tar, row = tmp_path / "d" / "train" / "000001.tar", data.index[13]
    if how == "bit":
        whole = tar.read_bytes()
        place = int(row["start"]) + 512 + int(row["eeg"]) // 2
        overwrite_bytes(tar, place, bytes([whole[place] ^ 16]))
    elif how == "end":
        # The file is truncated after the dataset was opened.
        tar.write_bytes(tar.read_bytes()[: int(row["start"]) + 600])
    elif how == "header":
        overwrite_bytes(tar, int(row["start"]), bytes(512))
    else:
        overwrite_bytes(tar, data.locations([13])[0].meta_at, b"!")
    said = {"bit": "damaged", "end": "bytes early", "header": "does not point at a sample", "json": "JSON is damaged"}
    with pytest.raises(RequestError, match=rf"000001\.tar: sample .*{said[how]}.*dreamscale verify") as caught:
        for batch, _ in zip(Loader(data, 4, 0, num_workers=workers), range(5), strict=False):
            _ = batch.metas
    assert "\n" not in str(caught.value)
    if how in ("bit", "json"):
        assert "sample train-0013" in str(caught.value)


def test_missing_shard_is_refused_on_opening(tmp_path: Path, unpaired_dataset: Path) -> None:
    shutil.copytree(unpaired_dataset, tmp_path / "d")
    (tmp_path / "d" / "train" / "000001.tar").unlink()
    with pytest.raises(RequestError, match=r"000001\.tar: cannot be read .*dreamscale verify"):
        EEGDataset(tmp_path / "d")


def test_images_are_read_without_their_eeg(tmp_path: Path, paired_dataset: Path) -> None:
    data = EEGDataset(shutil.copytree(paired_dataset, tmp_path / "d"))
    whole = [data[i] for i in range(len(data))]
    assert [data.image(i) for i in range(len(data))] == [sample.image for sample in whole]
    assert Mixture({str(tmp_path / "d"): 1.0}).image(3) == data.image(-len(data) + 3) == whole[3].image
    place, location = tmp_path / "d" / data.shards[0].path, data.locations([3])[0]
    overwrite_bytes(place, location.start + 512, bytes(location.eeg))
    assert data.image(3) == whole[3].image
    with pytest.raises(RequestError, match=rf"sample {whole[3].key}: damaged"):
        data[3]
    overwrite_bytes(place, location.image_at - 512, bytes(512))
    with pytest.raises(RequestError, match="does not point at a sample"):
        data.image(3)
    with pytest.raises(IndexError):
        data.image(len(data))


def test_missing_image_is_refused_and_the_sample_is_named(unpaired_dataset: Path) -> None:
    data = EEGDataset(unpaired_dataset)
    with pytest.raises(RequestError, match=f"sample {data.key(2)} has no image"):
        data.image(2)


class _Unused:
    """Object in a reference cycle, which only the garbage collector deletes."""

    def __init__(self, record: Path) -> None:
        self.record, self.cycle = record, self

    def __del__(self) -> None:
        self.record.write_text(str(os.getpid()))


def test_a_forked_process_does_not_delete_unused_objects_of_its_parent(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        _Unused(tmp_path / "deleted")
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
        assert child.exitcode == 0 and not (tmp_path / "deleted").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "deleted").read_text() == str(os.getpid())
