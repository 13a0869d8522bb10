"""Measure speed and memory of sharding, for one recording and for a whole job.

``python benchmarks/sharding.py --seconds 3600 --out sharding.json`` writes an EDF file with 64 channels at 1 kHz to the
folder ``--cache``. Then the benchmark measures programs on the EDF file. Each program runs in its own process, and with
one thread:

- ours: Dreamscale's `data_sharding.job.process_recording.process_recording` reads the file and writes its windows,
  under the same environment variables as in a child process of a real job;
- unchecked: the same with the key ``quality.check: false``, so no window is checked (only with ``--ways``);
- MNE: load the file, apply a FIR band-pass filter, resample by FFT, subtract the average, and write the windows with
  `wds.TarWriter`. Dreamscale also removes the mains frequency, checks channels and units, and computes checksums.

CPU seconds are the sum of user and system time, without imports. Memory is the largest resident set size. With
``--workers 1 2``, the benchmark also runs a whole sharding job on many shorter recordings, with one and two workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from machine import describe_run

CHANNELS, RATE = 64, 1000
SPEC = {"sfreq": 200.0, "highpass": 1.0, "lowpass": 75.0, "window": 400, "stride": 400}
LINE = 50.0


def make_edf(path: Path, seconds: int, seed: int = 0) -> Path:
    """Write an EDF file of noise with the spectrum, amplitude and correlations of EEG, plus drift and mains noise."""
    if path.is_file():
        return path
    import edfio
    import mne
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    names = [n for n in mne.channels.make_standard_montage("standard_1005").ch_names if n[-1] in "z12345678"]
    mixing = rng.normal(0, 1, (CHANNELS, 8)) / np.sqrt(8)
    n = seconds * RATE
    mains = 3 * np.sin(2 * np.pi * LINE * np.arange(n) / RATE)
    sources = [
        lfilter([1.0], [1.0, -0.98], rng.standard_normal(n, dtype=np.float32)).astype(np.float32) for _ in range(8)
    ]
    signals = []
    for channel in range(CHANNELS):
        x = 3 * rng.standard_normal(n, dtype=np.float32) + mains
        for weight, source in zip(mixing[channel], sources, strict=True):
            x += 4 * weight * source
        label = names[channel * len(names) // CHANNELS]
        signals.append(
            edfio.EdfSignal(
                np.clip(x, -3200, 3200).astype(float),
                RATE,
                label=label,
                physical_dimension="uV",
                physical_range=(-3276.8, 3276.7),
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.edf")
    edfio.Edf(signals).write(temporary)
    temporary.replace(path)
    return path


def ours(edf: Path, folder: Path, *, check: bool = True) -> int:
    """Shard a recording as a worker of the sharding job does, with or without the checks of every window."""
    from data_sharding.corpora import CorpusConfig, list_items
    from data_sharding.dataset.splits import SplitConfig
    from data_sharding.job.process_recording import process_recording
    from data_sharding.job.task import Task
    from data_sharding.processing.preprocess import PreprocessSpec
    from data_sharding.processing.quality import QualitySpec

    (item,) = [i for i in list_items(CorpusConfig(root=str(edf.parent), line_freq=LINE)) if i.path == edf.name]
    spec, split = PreprocessSpec(**SPEC, quality=QualitySpec(check=check)), SplitConfig(val_fraction=0, test_fraction=0)
    task = Task(item=item, spec=spec, split=split, labels=(), work=folder, timeout_s=3600)
    row = process_recording(task).row
    assert row.status == "sharded", row.reason
    return row.windows


def mne_default(edf: Path, folder: Path) -> int:
    """Shard a recording with the default filters and resampling of MNE."""
    import mne
    import webdataset as wds

    raw = mne.io.read_raw_edf(edf, preload=True)
    raw.filter(SPEC["highpass"], SPEC["lowpass"])
    raw.resample(SPEC["sfreq"])
    raw.set_eeg_reference("average")
    x, window, count = np.asarray(raw.get_data()), int(SPEC["window"]), 0
    with wds.TarWriter(str(folder / "train.tar")) as tar:
        for start in range(0, x.shape[1] - window + 1, int(SPEC["stride"])):
            eeg = (1e6 * x[:, start : start + window]).astype(np.float16)
            meta = {"ch_names": raw.ch_names, "sfreq": SPEC["sfreq"], "start": start / SPEC["sfreq"]}
            tar.write({"__key__": f"recording-{count:06d}", "eeg.npy": eeg, "json": meta})
            count += 1
    return count


def unchecked(edf: Path, folder: Path) -> int:
    return ours(edf, folder, check=False)


WAYS: dict[str, Callable[[Path, Path], int]] = {"ours": ours, "unchecked": unchecked, "mne": mne_default}


def warm_up(edf: Path) -> Path:
    """Return the path of the short recording that is processed first, before the measurement."""
    return edf.parent.parent / "warm-up" / edf.name


def measure(way: str, edf: Path) -> dict[str, float]:
    """Measure the CPU time, wall time and memory of one program in this process."""
    import mne

    mne.set_log_level("ERROR")
    # Process a short recording first, so that the measurement does not include the time of imports.
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way](warm_up(edf), Path(folder))
    with edf.open("rb") as stream:  # Read the file once, to fill the page cache of the operating system.
        while stream.read(2**22):
            pass
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        windows = WAYS[way](edf, Path(folder))
        after = resource.getrusage(resource.RUSAGE_SELF)
        wall = time.perf_counter() - start
    return {
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": wall,
        "peak_mb": after.ru_maxrss * 1024 / 1e6,
        "windows": windows,
    }


def job(folder: Path, workers: int) -> dict[str, float]:
    """Measure the wall time of the whole job, and the recordings/s without the start of the workers.

    Ray and the imports of each worker need several seconds, which do not matter for a large corpus. So the measurement
    of the recordings/s begins when two recordings for each worker are finished.
    """
    from data_sharding.job import run as module

    times: list[float] = []
    add = module.JobProgress.add

    def noted(self: module.JobProgress, *arguments: object, **options: object) -> None:
        times.append(time.perf_counter())
        add(self, *arguments, **options)  # type: ignore[arg-type]

    module.JobProgress.add = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as output:
        config = Path(output) / "config.json"
        config.write_text(json.dumps({"corpora": [{"root": str(folder), "line_freq": LINE}], "preprocess": SPEC}))
        start = time.perf_counter()
        code = module.main([str(config), "--output", f"{output}/dataset", "--ray.num_cpus", str(workers)])
        assert code == 0, code
        wall = time.perf_counter() - start
    warm = 2 * workers
    return {"wall_s": wall, "recordings_per_s": (len(times) - warm) / (times[-1] - times[warm - 1])}


def child(*arguments: str) -> dict[str, float]:
    """Run this script again in a separate process with one thread."""
    from data_sharding.job.isolation import KEPT_MEMORY

    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MNE_USE_NUMBA": "false"}
    if arguments[0] == "--measure" and arguments[1] != "mne":
        env = KEPT_MEMORY | env
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def paired_ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Return the median, over all pairs of runs, of the first program's CPU time divided by the second program's."""
    return statistics.median(one["cpu_s"] / other["cpu_s"] for one, other in zip(runs, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="length of the recording in seconds")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["ours", "mne"], help="programs to measure on one recording"
    )
    parser.add_argument(
        "--workers", nargs="*", type=int, default=[], help="numbers of workers with which the whole job is measured"
    )
    parser.add_argument(
        "--recordings", type=int, default=24, help="number of recordings of the whole job; together they last --seconds"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "dreamscale-benchmarks")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    if args.job:
        print(json.dumps(job(Path(args.job[0]), int(args.job[1]))))
        return
    if args.make:
        make_edf(Path(args.make[0]), int(args.make[1]), int(args.make[2]))
        print("{}")
        return
    result: dict[str, object] = {
        **describe_run(),
        "versions": {name: version(name) for name in ("mne", "numpy", "scipy", "webdataset", "zstandard")},
        "repeats": args.repeats,
        "data": f"{CHANNELS} channels x {args.seconds} s x {RATE} Hz EDF -> {SPEC['sfreq']:g} Hz",
    }
    edf = args.cache / f"{args.seconds}" / f"recording-{CHANNELS}x{RATE}.edf"
    child("--make", str(edf), str(args.seconds), "0")
    child("--make", str(warm_up(edf)), "20", "0")
    # The programs take turns, so that a change of the machine's speed affects all of them.
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    for _ in range(args.repeats):
        for way in args.ways:
            runs[way].append(child("--measure", way, str(edf)))
    ways = {way: {key: statistics.median(one[key] for one in found) for key in found[0]} for way, found in runs.items()}
    for way, values in ways.items():
        print(f"{way:6}", ", ".join(f"{key} {value:.2f}" for key, value in values.items()), flush=True)
    result["ways"] = ways
    if {"ours", "mne"} <= set(ways):
        result["cpu_ratio"] = ways["mne"]["cpu_s"] / ways["ours"]["cpu_s"]
        print(f"MNE's default path needs {result['cpu_ratio']:.2f} times as much CPU time as Dreamscale")
        result["paired_ratio"] = paired_ratio(runs["ours"], runs["mne"])
    if {"ours", "unchecked"} <= set(ways):
        result["checks_ratio"] = paired_ratio(runs["ours"], runs["unchecked"])
        print(f"with the checks, Dreamscale needs {result['checks_ratio']:.3f} times as much CPU time as without")
    if args.workers:
        each = args.seconds // args.recordings
        folder = args.cache / f"job-{args.recordings}x{each}"
        for number in range(args.recordings):
            child("--make", str(folder / f"sub-{number}" / f"sub-{number}_eeg.edf"), str(each), str(number))
        jobs = {n: child("--job", str(folder), str(n)) for n in args.workers}
        first = jobs[args.workers[0]]["recordings_per_s"]
        result["job"] = {
            "data": f"{args.recordings} recordings of {each} s",
            **{f"{n} workers": values for n, values in jobs.items()},
            "speed_up": {str(n): values["recordings_per_s"] / first for n, values in jobs.items()},
        }
        for n, values in jobs.items():
            rate = values["recordings_per_s"]
            print(f"{n} workers: whole job {values['wall_s']:.1f} s, {rate:.2f} recordings/s ({rate / first:.2f}x)")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
