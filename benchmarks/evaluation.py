"""Measure time and memory of ``dreamscale evaluate`` for many images of 512 pixels, in one and in several processes.

``python benchmarks/evaluation.py --images 100 400 --processes 1 2 --out evaluation.json -- --lpips '[]'``. The words
after ``--`` are given to ``dreamscale evaluate``. The images are made by this file: coloured squares, so that the PNG
files are small. Every trial has its own seen image and its own generated image. The EEG of the trials is short noise.
Memory is measured in two ways, every 0.2 seconds: as the sum of the proportional set sizes (PSS) of all processes of
the command, and as the resident set of the largest process. The result contains the peak of each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
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

SIDE, SQUARES, LABELS, PEOPLE, TRAIN = 512, 8, 20, 10, 400
CHANNELS, SAMPLES = 4, 64


def make_png(label: int, rng: np.random.Generator) -> bytes:
    """Return an image of coloured squares. All images of a label have similar colours."""
    from PIL import Image

    pattern = np.random.default_rng(label).integers(0, 256, (SQUARES, SQUARES, 3))
    squares = (0.6 * pattern + 0.4 * rng.integers(0, 256, pattern.shape)).astype(np.uint8)
    image = Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_folder(root: Path, images: int) -> Path:
    """Write a dataset, and a folder of images as ``dreamscale generate`` writes it; return the folder of images."""
    from data_sharding.dataset.dataset import write_dataset
    from data_sharding.dataset.samples import Sample
    from data_sharding.processing.preprocess import PreprocessSpec

    rng = np.random.default_rng(0)
    folder, trials = root / "images", []
    for name in ("images", "real"):
        (folder / name).mkdir(parents=True)

    def make(split: str, count: int) -> Iterator[Sample]:
        for number in range(count):
            label, subject = int(rng.integers(LABELS)), f"sub-{number % PEOPLE + 1:02d}"
            key, real = f"{split}-{number:06d}", make_png(label, rng)
            facts = {"image_id": f"{split}-image-{number}", "label": label, "subject": subject}
            if split == "test":
                (folder / "images" / f"{key}.png").write_bytes(make_png(label, rng))
                (folder / "real" / f"{key}.png").write_bytes(real)
                files = {"file": f"images/{key}.png", "real_file": f"real/{key}.png"}
                trials.append({"key": key, "eeg_key": key, **facts, **files})
            meta = {
                "n": CHANNELS,
                "ch_names": [f"E{i + 1}" for i in range(CHANNELS)],
                "positions": [None] * CHANNELS,
                "reference": "average",
                "sfreq": 64.0,
                "start": float(number // PEOPLE),
                "recording": f"{split}-{subject}",
                "session": "",
                "corpus": "benchmark",
                "bads": [],
                "split": split,
                "label_name": f"label {label}",
                **facts,
            }
            eeg = rng.normal(0, 10, (CHANNELS, SAMPLES)).astype(np.float32)
            yield Sample(key=key, eeg=eeg, meta=meta, image=real, image_ext="png")

    spec = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=25.0, window=SAMPLES, stride=SAMPLES)
    names = [f"label {label}" for label in range(LABELS)]
    manifest = write_dataset(
        root / "dataset", {"train": make("train", TRAIN), "test": make("test", images)}, spec, labels=names
    )
    about = {"kind": "benchmark", "split": "test", "control": "none", "model_digest": "0" * 64, "seed": 0}
    about |= {"dataset": str(root / "dataset"), "dataset_id": manifest.dataset_id, "labels": names, "trials": trials}
    (folder / "generated.json").write_text(json.dumps(about))
    return folder


def _read_memory(root: int) -> tuple[int, int]:
    """Return the sum of the proportional set sizes of a process and its descendants, and their largest resident set."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    total, largest, left = 0, 0, [root]
    while left:
        process = left.pop()
        left += children.get(process, [])
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        total, largest = total + sizes.get("Pss:", 0), max(largest, sizes.get("Rss:", 0))
    return 1024 * total, 1024 * largest


def measure(folder: Path, processes: int, words: list[str]) -> dict[str, Any]:
    """Run the command, and return its time and memory."""
    command = [sys.executable, "-m", "launch", "evaluate", str(folder), "--num_processes", str(processes), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin, total, largest = time.perf_counter(), 0, 0
    running = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    while running.poll() is None:
        now = _read_memory(running.pid)
        total, largest = max(total, now[0]), max(largest, now[1])
        time.sleep(0.2)
    if running.returncode:
        raise SystemExit(f"the evaluation ended with exit code {running.returncode}")
    result = json.loads((folder / "metrics.json").read_text())
    generated = {name: value for name, value in result["generated"].items() if isinstance(value, float)}
    return {
        "processes": processes,
        "wall_s": round(time.perf_counter() - begin, 1),
        "peak_gb": round(total / 1e9, 2),
        "peak_of_one_process_gb": round(largest / 1e9, 2),
        "metrics": generated,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="*", help="arguments for 'dreamscale evaluate', after --")
    args = parser.parse_args()
    command = " ".join(["python benchmarks/evaluation.py", *sys.argv[1:]])
    found: dict[str, Any] = {"command": command, "torch": version("torch"), **describe_run(), "runs": []}
    for images in args.images:
        with tempfile.TemporaryDirectory(prefix="dreamscale-evaluation-") as root:
            folder = write_folder(Path(root), images)
            for processes in args.processes:
                found["runs"].append({"images": images, **measure(folder, processes, args.words)})
                print(json.dumps(found["runs"][-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
