"""Run commands in forked processes, and disturb them: ``python drill_jobs.py JOBS.json RESULTS.json``.

The libraries are imported once; the processes of every job are then forked, so that a job starts quickly and may be
killed. The processes of a job form a process group of PyTorch, as if a launcher had started them.

Each job in JOBS.json has a ``name``, ``module`` and ``words`` (the command), ``processes`` (default 2), and possibly a
disturbance:

- ``at``: when the disturbance comes. ``["log", STEP]``: after the metrics of a step are written; ``["save", STEP]``:
  while the checkpoint of a step is being written; ``["open"]``: after a run directory was opened; ``["image"]``: after
  an image was stored; ``["batch"]``: whenever a batch was read.
- ``rank``: the process that is disturbed (default 1).
- ``signal``: the number of the signal that this process sends to itself; or ``fill``: a file that fills its disk; or
  ``sleep_s``: a number of seconds for which it does nothing.

RESULTS.json has, for each job by its name, the exit codes of its processes (negative: number of the signal) and their
output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import finetune.align
import pretrain.model.weights
from data_sharding.common.errors import run_main
from finetune.generation.partial import PartialFolder
from finetune.training.accelerate import quiet_libraries
from pretrain.runs.directory import RunDirectory


def fill_disk(path: str) -> None:
    """Write a file until its disk has no space left."""
    with Path(path).open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass


def disturb(job: dict[str, Any]) -> None:
    """Disturb this process at the time that the job says."""
    kind, *step = job["at"]

    def act() -> None:
        if "fill" in job:
            fill_disk(job["fill"])
        elif "sleep_s" in job:
            time.sleep(job["sleep_s"])
        else:
            os.kill(os.getpid(), job["signal"])

    def follow(function: Callable[..., Any], is_time: Callable[..., bool]) -> Callable[..., Any]:
        def both(*args: Any, **words: Any) -> Any:
            result = function(*args, **words)
            if is_time(*args, **words):
                act()
            return result

        return both

    if kind == "log":
        RunDirectory.log = follow(RunDirectory.log, lambda _, at, **metrics: [at] == step and "lr" in metrics)
    elif kind == "open":
        RunDirectory.__init__ = follow(RunDirectory.__init__, lambda *_, **words: True)
    elif kind == "batch":
        finetune.align.prepare_eeg = follow(finetune.align.prepare_eeg, lambda *_: True)
    elif kind == "image":
        PartialFolder.add = follow(PartialFolder.add, lambda *_: True)
    else:
        save = pretrain.model.weights.save_weights

        def save_half(tensors: dict[str, Any], path: Path) -> None:
            save(tensors, path)
            if f"{step[0]:08d}" in str(path):
                os.truncate(path, path.stat().st_size // 2)
                act()
                save(tensors, path)

        pretrain.model.weights.save_weights = save_half


def connect(store: Path, rank: int, size: int) -> None:
    """Form a process group. Rank 0 writes the port of the key-value store to a file, and the others read this file."""
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.with_suffix(".tmp").write_text(str(server.port))
        store.with_suffix(".tmp").rename(store)
    else:
        until = time.monotonic() + 120
        while not store.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        server = dist.TCPStore("127.0.0.1", int(store.read_text()), is_master=False)
    dist.init_process_group("gloo", store=server, rank=rank, world_size=size)


def run(job: dict[str, Any], rank: int, size: int, name: Path) -> int:
    """Run a command in this process, and return its exit code."""
    output = os.open(name.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    # Accelerate asks for an address, although the process group exists already.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    connect(name.with_suffix(".port"), rank, size)
    if "at" in job and job.get("rank", 1) == rank:
        disturb(job)
    words = [*job["words"], "--num_processes", str(size), "--device", "cpu"]
    return run_main(importlib.import_module(job["module"]).main, words)


def start(job: dict[str, Any], rank: int, size: int, name: Path) -> int:
    """Fork a process that runs a command; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = run(job, rank, size, name)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """Wait for the processes of a job, and return their exit codes. Processes that hang are killed in the end."""
    codes: dict[int, int] = {}
    frozen: set[int] = set()
    until = time.monotonic() + 120
    while left := set(pids) - codes.keys():
        for pid in left:
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                frozen.add(pid)
            elif found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif left <= frozen or time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    quiet_libraries()
    for module in {job["module"] for job in jobs}:
        importlib.import_module(module)
    found = {}
    for number, job in enumerate(jobs):
        size, name = job.get("processes", 2), results.with_name(f"job_{number}")
        codes = wait([start(job, rank, size, name) for rank in range(size)])
        if "fill" in job:
            Path(job["fill"]).unlink(missing_ok=True)
        said = [name.with_suffix(f".{rank}.txt").read_text() for rank in range(size)]
        found[job["name"]] = {"codes": codes, "said": said}
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
