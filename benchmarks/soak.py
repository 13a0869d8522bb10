"""Run the demo again and again while its processes are killed and stopped at random, and compare the results.

``python benchmarks/soak.py --folder DIR --minutes 60 --seed 0 --out soak.json``

First, the demo (with very short trainings, ``--profile smoke``) runs once without a fault. Then it runs with faults: at
random moments, the demo, its running step or a random process of this step gets a signal, or is frozen for some
seconds. Whenever the demo ends early, the same command starts again, until the demo is complete. The weights, the
shards and the images of every round must then be equal to those of the demo without a fault. The last round that has
begun in the given time is finished without further faults. If the folder already has complete rounds, they are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from machine import describe_run

ROOT = Path(__file__).resolve().parents[1]
FIRST_S = 4.0
"""Seconds after a start before the first fault."""
WITHOUT_PROGRESS = 12
"""If the demo ends this number of times in a row before it was disturbed, the soak test fails."""
COMPARED = ("*.safetensors", "*.tar", "*.png", "ledger.parquet", "index.parquet")
FAULTS = {
    "SIGTERM to the demo": ("demo", signal.SIGTERM),
    "SIGINT to the demo": ("demo", signal.SIGINT),
    "SIGKILL to the demo": ("demo", signal.SIGKILL),
    "SIGTERM to the step": ("step", signal.SIGTERM),
    "SIGUSR1 to the step": ("step", signal.SIGUSR1),
    "SIGKILL to the step": ("step", signal.SIGKILL),
    "SIGKILL to a process of the step": ("process", signal.SIGKILL),
    "SIGSTOP to a process of the step": ("process", signal.SIGSTOP),
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the demo in a folder; the folder of every demo has the same relative path, because files contain paths."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "demo", "--out", "demo", "--profile", "smoke"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def find_step(demo: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the process of the running step, and all processes that it has started; an empty list between steps."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(demo.pid).children():
            return [child, *child.children(recursive=True)]
    return []


def disturb(demo: subprocess.Popen[bytes], kind: str, rng: random.Random) -> bool:
    """Send one fault; return False if there was no process for it."""
    who, number = FAULTS[kind]
    step = find_step(demo)
    if who == "demo":
        target = psutil.Process(demo.pid)
    elif not step:
        return False
    else:
        target = step[0] if who == "step" else rng.choice(step)
    with contextlib.suppress(psutil.Error):
        target.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(1, 5))
            target.send_signal(signal.SIGCONT)
        return True
    return False


def run_round(folder: Path, rng: random.Random, mean_s: float, end: float) -> dict[str, Any]:
    """Run the demo with faults until it is complete; describe the faults and the exit codes."""
    faults: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    in_vain = 0
    while True:
        demo, disturbed = start(folder), False
        due = time.monotonic() + FIRST_S + rng.expovariate(1 / mean_s)
        while demo.poll() is None:
            if due < time.monotonic() < end:
                kind = rng.choice(list(FAULTS))
                if disturb(demo, kind, rng):
                    faults[kind] += 1
                    disturbed = True
                due = time.monotonic() + rng.expovariate(1 / mean_s)
            time.sleep(0.1)
        codes[demo.returncode] += 1
        print(
            f"soak: {folder.name}: the demo ended with {demo.returncode} after {sum(faults.values())} faults",
            flush=True,
        )
        if demo.returncode == 0:
            return {"faults": dict(faults), "exit_codes": {str(code): n for code, n in sorted(codes.items())}}
        in_vain = 0 if disturbed else in_vain + 1
        if in_vain == WITHOUT_PROGRESS:
            sys.exit(f"soak: the demo in {folder} does not become complete; see output.log and demo/logs there")


def list_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every compared file of a demo."""

    def files() -> Iterator[Path]:
        for pattern in COMPARED:
            yield from (folder / "demo").rglob(pattern)

    # Which checkpoints are kept depends on the moments of the stops, and figures show times.
    kept = [p for p in files() if not {"checkpoints", "plots", ".work"} & {*p.parts} and p.name != "overview.png"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)}


def main() -> int:
    """Run the soak test; return 1 if a round differs from the demo without a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the demos")
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which no more faults are sent")
    parser.add_argument("--mean-s", type=float, default=20.0, help="mean number of seconds between two faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    given = parser.parse_args()
    begun = time.monotonic()
    end = begun + 60 * given.minutes
    whole = given.folder / "whole"
    if start(whole).wait():
        sys.exit(f"soak: the demo failed without a fault; see {whole / 'output.log'}")
    expected = list_digests(whole)
    result: dict[str, Any] = {**describe_run(), "seed": given.seed, "mean_s": given.mean_s}
    result |= {"files": len(expected), "rounds": []}
    while not result["rounds"] or time.monotonic() < end:
        number = len(result["rounds"])
        folder, record = given.folder / f"round-{number}", given.folder / f"round-{number}.json"
        if not record.is_file():
            found = run_round(folder, random.Random(1000 * given.seed + number), given.mean_s, end)
            digests = list_digests(folder)
            found["different"] = sorted(k for k in {*expected, *digests} if expected.get(k) != digests.get(k))
            record.write_text(json.dumps(found))
            if not found["different"]:
                shutil.rmtree(folder)
        result["rounds"].append(json.loads(record.read_text()))
        result["minutes"] = round((time.monotonic() - begun) / 60, 1)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    different = [name for found in result["rounds"] for name in found["different"]]
    faults = sum(sum(found["faults"].values()) for found in result["rounds"])
    print(f"soak: {len(result['rounds'])} rounds, {faults} faults, {len(different)} of {len(expected)} files differ")
    for name in different:
        print(f"  {name}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
