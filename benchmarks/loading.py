"""Measure the speed of data loading with three programs that read the same samples.

``python benchmarks/loading.py --out loading.json``. The programs are Dreamscale's `Loader`, ``wds.WebDataset`` on the
same shards, and a memory map of the decoded data. All programs make float32 batches in a random order; the 64 channels
of a sample are repeated, so that a sample in a batch has 128 channels. (WebDataset's order is only partly random: it
shuffles the shards, and the samples within a buffer.) Each program runs in its own process, and the programs take turns
several times. The memory of a program is the largest proportional set size (PSS) of the process and its children,
without the page cache of files. ``--index-samples`` measures the time to open a dataset with the given number of
samples; the shards of this dataset are sparse files without content.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

CHANNELS, WINDOW, PADDED = 64, 512, 128
WAYS = ("ours, 0 workers", "ours, 2 workers", "webdataset, 0 workers", "webdataset, 2 workers", "memory map")


def signal(rng: np.random.Generator) -> np.ndarray:
    """Make noise with the amplitude and correlations of EEG. Like EEG, the noise compresses only a little."""
    sources = np.cumsum(rng.normal(0, 1, (16, WINDOW)), axis=1)
    sources -= sources.mean(axis=1, keepdims=True)
    return rng.normal(0, 1, (CHANNELS, 16)) @ sources + rng.normal(0, 3, (CHANNELS, WINDOW))


def write(root: Path, samples: int) -> None:
    from data_sharding.dataset.dataset import write_dataset
    from data_sharding.dataset.samples import Sample
    from data_sharding.processing.preprocess import PreprocessSpec

    rng = np.random.default_rng(0)
    plain = np.lib.format.open_memmap(root / "plain.npy", "w+", np.float16, (samples, CHANNELS, WINDOW))

    def make() -> Iterator[Sample]:
        for number in range(samples):
            eeg = signal(rng)
            plain[number] = eeg
            meta = {
                "n": CHANNELS,
                "ch_names": [f"E{i + 1}" for i in range(CHANNELS)],
                "positions": rng.normal(0, 0.05, (CHANNELS, 3)).round(4).tolist(),
                "reference": "average",
                "sfreq": 256.0,
                "start": 2.0 * number,
                "recording": f"rec-{number // 500}",
                "subject": f"sub-{number // 500}",
                "session": "",
                "corpus": "benchmark",
                "bads": [],
                "split": "train",
            }
            yield Sample(key=f"benchmark-rec-{number // 500:04d}-{number:07d}", eeg=eeg, meta=meta)

    write_dataset(root / "dataset", {"train": make()}, PreprocessSpec(), samples_per_shard=500)
    plain.flush()


def write_index(root: Path, samples: int, samples_per_shard: int = 2000) -> None:
    """Write a dataset that has a manifest and an index, but whose shards are sparse files without content."""
    from data_sharding.dataset.manifest import Manifest, Shard
    from data_sharding.processing.preprocess import PreprocessSpec

    size, meta, shards = 65654, 2105, []
    step = 1024 + sum(-(-length // 512) * 512 for length in (size, meta))
    (root / "index" / "train").mkdir(parents=True)
    for number in range(-(-samples // samples_per_shard)):
        tar = root / "index" / "train" / f"{number:06d}.tar"
        count = min(samples_per_shard, samples - number * samples_per_shard)
        entries = []
        for i in range(count):
            members = {"eeg.npy.zst": [i * step + 512, size], "json": [(i + 1) * step - 2560, meta]}
            entries.append({"key": f"lab-sub-{number:05d}-task-rest-1a2b3c4d-{i:06d}", "n": 64, "members": members})
        tar.with_suffix(".idx").write_text(json.dumps(entries, separators=(",", ":")))
        with tar.open("wb") as stream:
            stream.truncate(count * step)
        path = f"train/{tar.name}"
        shards.append(Shard(path=path, sha256="", index_sha256="", bytes=count * step, samples=count))
    Manifest(dataset_id="", preprocess=PreprocessSpec(), splits={"train": shards}).write(root / "index")


def open_index(root: Path) -> dict[str, float]:
    import psutil

    from data_sharding.dataset.dataset import EEGDataset
    from data_sharding.dataset.loader import Loader

    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    data = EEGDataset(root / "index")
    seconds, rss = time.perf_counter() - start, psutil.Process().memory_info().rss - before
    loader, start = Loader(data, 64, 0), time.perf_counter()
    for step in range(100):
        data.locations(loader.positions(step)[0])
    found = {"samples": len(data), "open_s": seconds, "bytes_per_sample": rss / len(data)}
    return {**found, "order_us_per_sample": 1e6 * (time.perf_counter() - start) / 6400}


def ours(root: Path, batch: int, workers: int) -> Iterator[int]:
    import torch

    from data_sharding.dataset.dataset import EEGDataset
    from data_sharding.dataset.loader import Loader

    for part in Loader(EEGDataset(root / "dataset"), batch, 0, num_workers=workers):
        yield len(part.padded("cpu", torch.float32))


def webdataset(root: Path, batch: int, workers: int) -> Iterator[int]:
    import torch
    import webdataset as wds

    from data_sharding.dataset.samples import wds_decoder

    urls = sorted(str(path) for path in (root / "dataset" / "train").glob("*.tar"))
    if workers > 1:
        # WebDataset ends with an error if a worker has no shard.
        assert len(urls) >= workers
    shards = wds.WebDataset(
        urls, shardshuffle=len(urls), seed=0, nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker
    )
    rows = shards.shuffle(256).decode(wds_decoder).to_tuple("__key__", "eeg.npy.zst", "json").batched(batch)
    for _, eeg, _ in wds.WebLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None):
        # `wds_decoder` has already padded the channels, so only the cast to float32 remains.
        yield len(torch.as_tensor(eeg).float())


def memory_map(root: Path, batch: int, workers: int) -> Iterator[int]:
    import torch

    plain = np.load(root / "plain.npy", mmap_mode="r")
    rows = torch.arange(PADDED) % CHANNELS
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(plain))
        for start in range(0, len(order) - batch + 1, batch):
            eeg = torch.from_numpy(plain[order[start : start + batch]]).float()
            yield len(eeg.index_select(1, rows))


def endless(make: Callable[..., Iterator[int]], *args: object) -> Iterator[int]:
    while True:
        yield from make(*args)


class Memory(threading.Thread):
    """A thread that records the largest PSS of this process and its children, without the page cache of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        """Measure the memory of this process and of its children four times a second."""
        import psutil

        me = psutil.Process()
        while not self.done.wait(0.25):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
                total += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
            self.peak = max(self.peak, total * 1024)


def cpu_seconds() -> float:
    """Return the CPU time that this process and its children have used so far."""
    import psutil

    me = psutil.Process()
    own = me.cpu_times()
    each = [own, *(process.cpu_times() for process in me.children(recursive=True))]
    # The workers of webdataset end after each epoch, so add the CPU time of child processes that have already ended.
    return sum(times.user + times.system for times in each) + own.children_user + own.children_system


def measure(way: str, root: Path, batch: int, samples: int) -> dict[str, float]:
    """Measure the speed in samples/s and the memory, after a warm-up with a tenth of the samples."""
    name, _, workers = way.partition(", ")
    make = {"ours": ours, "webdataset": webdataset, "memory map": memory_map}[name]
    stream = endless(make, root, batch, int(workers.split()[0]) if workers else 0)
    memory = Memory()
    memory.start()
    warm = seen = 0
    while warm < samples // 10:
        warm += next(stream)
    start, cpu = time.perf_counter(), cpu_seconds()
    while seen < samples:
        seen += next(stream)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    memory.done.set()
    memory.join()
    stream.close()
    return {"samples_per_s": seen / seconds, "cpu_us_per_sample": 1e6 * cpu / seen, "peak_bytes": memory.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--samples", type=int, default=4000, help="number of samples in the dataset and in each measurement"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument(
        "--index-samples",
        type=int,
        default=1_000_000,
        help="number of samples of a second dataset; the benchmark measures how long its opening takes",
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure and args.measure[0] == "index":
        print(json.dumps(open_index(Path(args.measure[1]))))
        return
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.batch, args.samples)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), args.index_samples)
        command = [sys.executable, __file__, "--measure", "index", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        index = json.loads(done.stdout.splitlines()[-1])
        print(f"index of {index['samples']} samples: {index['open_s']:.1f} s, {index['bytes_per_sample']:.0f} B each")
        write(Path(folder), args.samples)
        stored = sum(path.stat().st_size for path in (Path(folder) / "dataset" / "train").glob("*.tar"))
        for _ in range(args.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, folder]
                command += ["--samples", str(args.samples), "--batch", str(args.batch)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("numpy", "torch", "webdataset", "zstandard")},
        "data": f"{args.samples} samples, {CHANNELS} channels x {WINDOW}, batch {args.batch}",
        "stored_bytes_per_sample": stored / args.samples,
        "index": index,
        "ways": {},
    }
    ways: dict[str, dict[str, float]] = {}
    for way, found in runs.items():
        ways[way] = {key: statistics.median(one[key] for one in found) for key in found[0]}
        low, high = (pick(one["samples_per_s"] for one in found) for pick in (min, max))
        ways[way] |= {"lowest": low, "highest": high}
        print(f"{way:22} {ways[way]['samples_per_s']:9.0f} samples/s ({low:.0f} to {high:.0f})", end="")
        print(f" {ways[way]['cpu_us_per_sample']:6.0f} us CPU {ways[way]['peak_bytes'] / 1e6:5.0f} MB")
    result["ways"] = ways
    # On a shared machine, the ratio of samples to CPU time is more reliable than the ratio of samples to wall time.
    for name, rate in (
        ("samples_per_s", {way: values["samples_per_s"] for way, values in ways.items()}),
        ("samples_per_cpu_s", {way: 1e6 / values["cpu_us_per_sample"] for way, values in ways.items()}),
    ):
        ratios = {
            "webdataset, 0 workers": rate["ours, 0 workers"] / rate["webdataset, 0 workers"],
            "webdataset, 2 workers": rate["ours, 2 workers"] / rate["webdataset, 2 workers"],
            "memory map": rate["ours, 0 workers"] / rate["memory map"],
        }
        result[f"ours over others in {name}"] = ratios
        print(
            f"{name} of Dreamscale, divided by that of each other program:",
            ", ".join(f"{way} {ratio:.2f}x" for way, ratio in ratios.items()),
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
