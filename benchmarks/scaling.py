"""Compare the formulas of `pretrain.scale` with measurements on the processes of one machine.

``python benchmarks/scaling.py [--processes 2 4] [--preset tiny] [--out FILE.json]``

1. All-reduces of several sizes, for each number of processes. Two numbers, the bandwidth and the latency of a ring, are
   fitted to these times. The error of the formula is measured by leaving out one size or one number of processes:
   the formula is fitted to the others and predicts the times that were left out.
2. Steps of pretraining in one process and in several processes, each with the same number of windows. The formula
   predicts the step of several processes from the step of one process and from the fitted ring.
3. The plan of the preset ``paper`` for 1 to 512 GPUs (computed, not measured).

With more processes than processor cores, the processes share the cores, so the computation of a step takes longer by
the ratio of the two numbers; the prediction includes this ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_run
from scipy.optimize import nnls

from data_sharding.common.files import write_json
from pretrain.plan import PlanConfig, make_plan
from pretrain.runs.distributed import choose_device, import_deepspeed, process_group
from pretrain.scale import Network, Work, step_exchange, step_seconds

SIZES = (2**12, 2**15, 2**18, 2**20, 2**22, 2**24)
"""Numbers of float32 values in the measured all-reduces."""
ONE = "pretraining.py"


def time_all_reduces(out: Path, repeats: int) -> None:
    """Time all-reduces in the processes that torchrun has started; the first process writes the medians."""
    device = choose_device("auto")
    found = {}
    with process_group(import_deepspeed(device), device) as world:
        for size in SIZES:
            values, times = torch.ones(size, device=device), []
            for _ in range(repeats + 2):
                torch.distributed.barrier()
                started = time.perf_counter()
                torch.distributed.all_reduce(values)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            found[str(size)] = statistics.median(times[2:])
        if world.rank == 0:
            write_json(out, found)


def launch(processes: int, *words: str) -> Any:
    """Run a benchmark in several processes by torchrun, and return what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        here = Path(__file__).parent
        done = subprocess.run([*command, str(here / words[0]), *words[1:], "--out", str(out)], env=env, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} with {processes} processes ended with exit code {done.returncode}")
        return json.loads(out.read_text())


def terms(size: float, processes: int) -> tuple[float, float]:
    """Return the bytes that one process sends in an all-reduce, and the number of latencies."""
    return 2 * 4 * size * (processes - 1) / processes, 2 * (processes - 1)


def fit(points: list[tuple[int, int, float]]) -> tuple[float, float]:
    """Fit seconds per byte and latency to times (size, processes, seconds); all relative errors count alike."""
    rows = np.array([[value / seconds for value in terms(size, n)] for size, n, seconds in points])
    scale = rows.max(axis=0)
    solution, _ = nnls(rows / scale, np.ones(len(points)))
    return float(solution[0] / scale[0]), float(solution[1] / scale[1])


def relative_error(ring: tuple[float, float], size: int, processes: int, seconds: float) -> float:
    return abs(float(np.dot(ring, terms(size, processes))) / seconds - 1)


def left_out_errors(points: list[tuple[int, int, float]], column: int) -> list[float]:
    """Return the relative errors of the predictions for each left-out value of a column: 0 size, 1 processes."""
    errors = []
    for value in sorted({point[column] for point in points}):
        ring = fit([point for point in points if point[column] != value])
        errors += [relative_error(ring, *point) for point in points if point[column] == value]
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4], help="numbers of processes")
    parser.add_argument("--preset", default="tiny", help="preset of the model that is trained")
    parser.add_argument("--batch", type=int, default=8, help="number of windows of each process in one step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--all-reduce", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.all_reduce:
        time_all_reduces(options.out, options.repeats)
        return
    result: dict[str, Any] = {**describe_run(), "torch": torch.__version__, "processes": options.processes}
    points = []
    for processes in options.processes:
        times = launch(processes, "scaling.py", "--all-reduce", "--repeats", str(options.repeats))
        points += [(int(size), processes, seconds) for size, seconds in times.items()]
    ring = fit(points)
    result["all_reduce"] = {
        "points": points,
        "gb_s": 1e-9 / ring[0] if ring[0] else None,
        "latency_us": ring[1] * 1e6,
        "error": statistics.median(relative_error(ring, *point) for point in points),
        "left_out_size": statistics.median(left_out_errors(points, 0)),
        "left_out_processes": statistics.median(left_out_errors(points, 1)) if len(options.processes) > 1 else None,
    }
    network = Network(gpus_per_machine=2**20, link=1 / ring[0], network=1 / ring[0], latency_s=ring[1])
    words = (ONE, "--presets", options.preset, "--precisions", "fp32", "--batch", str(options.batch), "--steps", "11")
    words = (*words, "--peak-tflops", "1")  # Utilisation is not needed here.
    alone = launch(1, *words)["results"][0]
    rows = []
    for processes in options.processes:
        measured = launch(processes, *words)["results"][0]
        shared = max(1.0, processes / len(os.sched_getaffinity(0))) if not torch.cuda.is_available() else 1.0
        work = Work(
            windows=options.batch,
            micro_batches=1,
            arithmetic_s=alone["step_s"] * shared,
            parameters=alone["parameters"],
            zero_stage=1,
            precision="fp32",
            window_bytes=0.0,
            loader_windows_per_s=1.0,
            loaders_per_machine=1,
            storage=None,
        )
        predicted = step_seconds(work.arithmetic_s, step_exchange(work, processes, network))
        rows.append(
            {
                "processes": processes,
                "alone_s": alone["step_s"],
                "measured_s": measured["step_s"],
                "predicted_s": predicted,
                "error": predicted / measured["step_s"] - 1,
            }
        )
    result["steps"] = {"preset": options.preset, "batch": options.batch, "rows": rows}
    gpus = [2**power for power in range(10)]
    plan = make_plan(PlanConfig(preset="paper", gpus=8, scale=gpus))
    result["plan"] = {"request": plan["request"], "scale": plan["scale"]}
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
