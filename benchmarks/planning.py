"""Measure how the planning time of a sharding job grows with the number of recordings.

``python benchmarks/planning.py --sizes 1000 10000 100000 --out planning.json``

Each number of recordings is measured in a separate process. Four steps are measured: (1) find the recordings, recognise
their formats by the headers, and make the plan; (2) compute the identities, by which a restarted job recognises
finished recordings; (3) find duplicates by their signatures; (4) distribute the samples over shards. The recordings are
EDF files of one second. Most of the EDF files are hard links, so that the measurement depends little on the speed of
the disk. The signatures and the rows of the ledger are not computed from the files but simulated; one recording in a
hundred is a duplicate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BASES = 10
"""Number of real EDF files; all other EDF files are hard links to real files. One real file is not enough, because file
systems limit the number of links to a file."""
SUBJECT = 20
"""Number of recordings of each subject."""


def make_corpus(root: Path, n: int) -> None:
    """Write a corpus of many recordings.

    Parameters
    ----------
    root : Path
        Folder of the corpus.
    n : int
        Number of recordings.
    """
    import mne

    rng = np.random.default_rng(0)
    info = mne.create_info(["Fp1", "Fp2", "C3", "C4"], 100.0, "eeg")
    bases = []
    for i in range(BASES):
        base = root.with_name(f"{root.name}-base-{i}.edf")
        raw = mne.io.RawArray(rng.normal(0, 1e-5, (4, 100)), info, verbose="ERROR")
        mne.export.export_raw(base, raw, physical_range=(-400.0, 400.0), overwrite=True, verbose="ERROR")  # type: ignore[arg-type]
        bases.append(base)
    for i in range(n):
        folder = root / f"sub-{i // SUBJECT:05d}"
        if not i % SUBJECT:
            folder.mkdir(parents=True)
        os.link(bases[i % BASES], folder / f"sub-{i // SUBJECT:05d}_run-{i % SUBJECT:02d}_eeg.edf")


def measure(n: int) -> dict[str, Any]:
    """Measure the time and memory for planning a job of many recordings.

    Parameters
    ----------
    n : int
        Number of recordings.

    Returns
    -------
    dict
        Seconds of each planning step, the sum of these seconds, and the process's peak memory in GB.
    """
    from data_sharding.audit.duplicates import RecordingFingerprint, find_duplicates, signature
    from data_sharding.job.pack_shards import plan_shards
    from data_sharding.job.request import CorpusConfig, ShardConfig, make_plan
    from data_sharding.job.task import PartResult, new_row

    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name] = round(now - began, 3)
        began = now

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "corpus"
        make_corpus(root, n)
        config = ShardConfig(corpora=[CorpusConfig(root=str(root), name="lab")], output=str(Path(folder) / "out"))
        began = time.perf_counter()
        plan = make_plan(config)
        lap("find, sniff and plan")
        identities = {key: plan.identity(key, "settings") for key in plan.items}
        lap("identities")
    assert len(identities) == n

    # Give each simulated fingerprint eight channels: with one channel, the search for duplicates would be
    # unrealistically fast.
    def points(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(8, 64)).astype(np.float32)

    keys = sorted(plan.items)
    seeds = {key: i - 1 if i % 100 == 99 else i for i, key in enumerate(keys)}
    prints = [
        RecordingFingerprint(key=key, sha256=f"{i:064x}", seconds=600.0, signature=signature(points(seeds[key])))
        for i, key in enumerate(keys)
    ]
    began = time.perf_counter()
    duplicates = find_duplicates(prints, lambda key: points(seeds[key]))
    lap("duplicates")
    assert len(duplicates) == n // 100
    samples = {"train": 150, "val": 3}
    results = [PartResult(row=new_row(plan.items[key]), part=key, samples=samples) for key in keys]
    began = time.perf_counter()
    shards = plan_shards(results, 4096)
    lap("shards")
    return {
        "recordings": n,
        "shards": len(shards),
        "seconds": seconds,
        "total_s": round(sum(seconds.values()), 3),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Parameters
    ----------
    argv : list of str, optional
        Arguments of the command line.

    Returns
    -------
    int
        Exit code of the command.
    """
    parser = argparse.ArgumentParser(description="Measure planning time and memory for several numbers of recordings.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    results = []
    for n in args.sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(n)], stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{n:>8} recordings: {results[-1]['total_s']:8.2f} s, {results[-1]['peak_gb']:.2f} GB",
            results[-1]["seconds"],
        )
    sizes, times = (np.log([r[k] for r in results]) for k in ("recordings", "total_s"))
    exponent = float(np.polyfit(sizes, times, 1)[0]) if len(results) > 1 else None
    if exponent is not None:
        print(f"the time grows with the number of recordings to the power {exponent:.2f}")
    if args.out:
        report = {
            "benchmark": "planning",
            "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "python": platform.python_version(),
            "command": " ".join(["python", *sys.argv]),
            "results": results,
            "exponent": exponent,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
