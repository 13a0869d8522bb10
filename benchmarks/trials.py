"""Measure the time and memory to open a large split and group its trials, and to compute features of trials.

``python benchmarks/trials.py --out trials.json``. The default dataset has the size of THINGS-EEG2: 661,600 trials of 10
people and 63 channels. The windows are shorter than in THINGS-EEG2 (8 samples), so that the dataset fits on a small
disk; the JSON of a trial has the size that it has in a real dataset. Each program runs in a process of its own. "one
JSON a trial" is a plain loop that parses the JSON of every trial, without a table of the trials. "first process" makes
the table of trials and stores it in a file. "next process" uses this file. After these programs, two processes open the
split at the same time, without a finished table of trials. A small feature (the mean over time) is computed for trials
of 128 channels x 440 samples, as in EEG-ImageNet (11,466 trials): for all trials at once, and part by part. "cpu_s" are
seconds of CPU time, which hardly depend on other programs on the machine. Memory is the largest resident set of the
process minus its resident set after the imports; it includes those pages of the table's memory-mapped file that are in
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_run

CHANNELS, PEOPLE, IMAGES = 63, 10, 16_540
PROGRAMS = ("one JSON a trial", "first process", "next process")


def write(root: Path, trials: int) -> None:
    """Write a paired dataset with `trials` trials; every trial is one presentation of an image to a person."""
    from data_sharding.dataset.dataset import write_dataset
    from data_sharding.dataset.samples import Sample
    from data_sharding.processing.preprocess import PreprocessSpec

    rng = np.random.default_rng(0)
    names = [f"E{i + 1}" for i in range(CHANNELS)]
    positions = rng.normal(0, 0.05, (CHANNELS, 3)).round(6).tolist()
    windows = rng.normal(0, 10, (64, CHANNELS, 8)).astype(np.float16)

    def make() -> Iterator[Sample]:
        for number in range(trials):
            subject, image = f"sub-{number * PEOPLE // trials + 1:02d}", number % IMAGES
            meta = {
                "n": CHANNELS,
                "ch_names": names,
                "positions": positions,
                "reference": "average",
                "sfreq": 250.0,
                "start": 0.2 * number,
                "onset": 0,
                "recording": f"{subject}/ses-{number % 4 + 1:02d}",
                "subject": subject,
                "session": f"ses-{number % 4 + 1:02d}",
                "corpus": "benchmark",
                "bads": [],
                "split": "train",
                "image_id": f"concept-{image // 10:04d}/image-{image:05d}",
                "label": image // 10,
                "label_name": f"concept {image // 10}",
                "caption": f"a photo of concept {image // 10}",
            }
            yield Sample(key=f"t{number:07d}", eeg=windows[number % 64], meta=meta, image=b"image", image_ext="jpg")

    spec = PreprocessSpec(sfreq=250.0, highpass=0.1, lowpass=100.0, window=8, stride=8)
    labels = [f"concept {i}" for i in range(-(-IMAGES // 10))]
    write_dataset(root / "dataset", {"train": make()}, spec, labels=labels, samples_per_shard=2000)


def plain(root: Path) -> dict[str, int]:
    """Group the trials and list the images with a loop that parses the JSON of every trial."""
    from data_sharding.dataset.dataset import EEGDataset

    data = EEGDataset(root / "dataset")
    metas = [data.meta(number) for number in range(len(data))]
    images = {image: row for row, image in enumerate(sorted({meta["image_id"] for meta in metas}))}
    rows = np.array([images[meta["image_id"]] for meta in metas])
    found: dict[tuple[Any, ...], list[int]] = {}
    for number in range(len(data)):
        meta = data.meta(number)
        key = (meta["corpus"], meta["subject"], meta["image_id"], tuple(meta["ch_names"]))
        found.setdefault(key, []).append(number)
    return {"images": int(rows.max()) + 1, "groups": len(found)}


def tables(root: Path) -> dict[str, int]:
    """Group the trials and list the images with functions of fine-tuning that use the table of trials."""
    from finetune.eeg import group_repeats
    from finetune.images import ImageTable, open_paired

    data = open_paired(root / "dataset", "train")
    return {"images": len(ImageTable(data)), "groups": len(group_repeats(data, 0))}


def features(root: Path, how: str) -> dict[str, Any]:
    """Compute a small feature of each trial: of all trials in one call, or of a few trials in each of many calls."""
    from finetune.eeg import compute_for_trials, group_repeats, read_trials
    from finetune.images import open_paired
    from finetune.training.accelerate import make_accelerator

    data = open_paired(root / "dataset", "train")
    if how == "at once":
        found = read_trials(data, group_repeats(data, 1), data.spec).mean(dim=2)
    else:
        accelerator = make_accelerator(num_processes=1, device="cpu")
        found = compute_for_trials(data, data.spec, lambda x_BCT: x_BCT.mean(dim=2), accelerator)
    return {"checksum": float(found.double().sum())}


def write_windows(root: Path, trials: int) -> None:
    """Write trials of 128 channels and 440 samples."""
    from data_sharding.dataset.dataset import write_dataset
    from data_sharding.dataset.samples import Sample
    from data_sharding.processing.preprocess import PreprocessSpec

    rng = np.random.default_rng(0)
    windows = rng.normal(0, 10, (16, 128, 440)).astype(np.float16)
    meta = {"n": 128, "ch_names": [f"E{i}" for i in range(128)], "sfreq": 1000.0, "label": 0, "subject": "a"}
    samples = (
        Sample(key=f"t{i:06d}", eeg=windows[i % 16], meta={**meta, "image_id": f"{i}"}, image=b"image", image_ext="jpg")
        for i in range(trials)
    )
    spec = PreprocessSpec(sfreq=1000.0, highpass=5.0, lowpass=95.0, window=440, stride=440)
    write_dataset(root / "dataset", {"train": samples}, spec, labels=["one"], samples_per_shard=500)


def run_one(program: str, root: Path) -> None:
    """Run one program in this process and print its result, seconds and memory as JSON."""
    import torch  # noqa: F401 - loaded before the measurement, as every stage loads it

    import finetune.eeg
    import finetune.images  # noqa: F401

    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if program.startswith("features"):
        found = features(root, program.removeprefix("features "))
    else:
        found = plain(root) if program == PROGRAMS[0] else tables(root)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = (after.ru_maxrss - before.ru_maxrss) * 1024 / 1e6
    print("RESULT", json.dumps({**found, "seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "peak_mb": round(peak)}))


def start(program: str, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--program", program, "--root", str(root)]
    environment = {**os.environ, "DREAMSCALE_CACHE": str(root / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    text = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"a program ended with exit code {process.returncode}")
    return json.loads(next(line for line in text.splitlines() if line.startswith("RESULT"))[7:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=661_600)
    parser.add_argument(
        "--windows",
        type=int,
        default=11_466,
        help="number of trials (128 channels, 440 samples each) from which features are computed",
    )
    parser.add_argument("--folder", help="folder for the datasets; about 7 GB are needed")
    parser.add_argument("--out", default="trials.json")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        run_one(args.program, Path(args.root))
        return 0
    found: dict[str, Any] = {"trials": args.trials, "windows": args.windows, **describe_run()}
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        begin = time.perf_counter()
        write(root, args.trials)
        found["write_s"] = round(time.perf_counter() - begin, 1)
        for program in PROGRAMS:
            found[program] = result(start(program, root))
            print(program, found[program], flush=True)
        (file,) = (root / "cache" / "trials").glob("*.arrow")
        found["table_mb"] = round(file.stat().st_size / 1e6, 1)
        file.unlink()
        both = [start("next process", root) for _ in range(2)]
        found["two processes, no table"] = [result(process) for process in both]
        print("two processes, no table", found["two processes, no table"], flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_windows(Path(folder), args.windows)
        for program in ("features at once", "features part by part"):
            found[program] = result(start(program, Path(folder)))
            print(program, found[program], flush=True)
    found |= {"versions": {name: version(name) for name in ("numpy", "pyarrow", "torch")}}
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
