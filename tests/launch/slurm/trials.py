"""Stop jobs of a real Slurm at random moments, and compare their results with the result of an undisturbed job.

``dreamscale demo --profile smoke --out DEMO`` makes the data and the models that the jobs need. Then, as root:

``python -m tests.launch.slurm.trials --demo DEMO --out OUT --stage pretrain --nodes 2 --times 10``

Each trial disturbs one job in one of these ways, in turn: the signal that Slurm sends before the time limit (stop),
another job that preempts the job (preempt), preemption while a checkpoint is written (checkpoint, only for trainings),
and the death of a process (kill). The script prints one line for each trial and a summary, and adds the lines to
OUT/trials.jsonl. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from data_sharding.common.errors import EXIT_STOPPED
from data_sharding.dataset.manifest import Manifest

from .cluster import Cluster, render_job, start_cluster, until

TRAINS = ("pretrain", "align", "finetune", "ddpm")
"""Stages that write checkpoints."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


def checkpoints(steps: int) -> list[str]:
    return ["--training.steps", str(steps), "--training.checkpoint.every", "5", "--training.warmup", "2"]


def words_of(stage: str, demo: Path, out: Path) -> list[str]:
    """Return the arguments of a stage that reads the demo's folders and writes to `out`."""
    configs = demo / "configs"
    pair = [str(demo / "paired"), "-o", str(out)]
    return {
        "shard": [str(configs / "shard_paired.yaml"), "--output", str(out)],
        "verify": [str(demo / "paired"), "--against", str(demo / "unpaired")],
        "pretrain": [
            *(str(configs / "pretrain.yaml"), "--output", str(out), "--steps", "60", "--checkpoint.every", "5"),
            *("--log_every", "1"),
        ],
        "export": [str(demo / "pretrain"), str(out)],
        "encode": [str(demo / "encoder"), str(next((demo / "corpus").rglob("*.edf"))), "-o", str(out / "encoded.npz")],
        "probe": [str(demo / "encoder"), str(demo / "paired"), "--output", str(out / "probe.json")],
        "miniature": [*pair, "--config", str(configs / "miniature.yaml"), "--clip_steps", "40"],
        "align": [str(configs / "align.yaml"), "--output", str(out), *checkpoints(80)],
        "finetune": [str(configs / "stable_diffusion.yaml"), "--output", str(out), *checkpoints(40)],
        "ddpm": [
            *(str(configs / "dm_re2i.yaml"), "--output", str(out)),
            *("--evrnet.training.steps", "40", "--evrnet.training.checkpoint.every", "5"),
            *("--ddpm.training.steps", "30", "--ddpm.training.checkpoint.every", "5"),
        ],
        "linear": [str(configs / "linear.yaml"), "--output", str(out)],
        "generate": [str(demo / "stable_diffusion" / "model"), *pair, "--split", "test", "--steps", "8"],
        "retrieve": [str(demo / "align"), *pair],
        "evaluate": [str(out), "--training.steps", "10"],
    }[stage]


def prepare(stage: str, demo: Path, out: Path) -> None:
    """Make what a stage needs in its output folder."""
    if stage == "evaluate":
        shutil.copytree(demo / "generated" / "stable_diffusion", out)
        for name in ("metrics.json", "classifier.safetensors", "report.html"):
            (out / name).unlink()
    if stage in ("encode", "probe"):
        out.mkdir(parents=True)


def digest(stage: str, out: Path) -> dict[str, str]:
    """Return what must be equal after every disturbance: losses, weights, images, shards and scores."""
    if stage == "verify":
        return {}
    if stage == "shard":
        manifest = Manifest.read(out)
        shards = {shard.path: shard.sha256 for shards in manifest.splits.values() for shard in shards}
        return shards | {"id": manifest.dataset_id}
    found = {}
    for path in sorted(out.rglob("*")):
        inside = path.relative_to(out)
        if inside.parts[0] in ("cache", "wandb", "plots") or "checkpoints" in inside.parts:
            continue
        if path.suffix in (".safetensors", ".png", ".npz"):
            found[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            # Only losses: times and memory differ between any two runs.
            losses = [(line.get("step"), line["loss"]) for line in lines if "loss" in line]
            found[str(inside)] = hashlib.sha256(json.dumps(losses).encode()).hexdigest()
    assert found, f"{out}: nothing to compare"
    return found


def find_workers(out: Path) -> list[psutil.Process]:
    """Return the processes of a job that do its work, and that have started to do it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        works = "launch.worker" in words and "launch.agent" not in words
        alone = "launch" in words and "launch.agent" not in words and "launch.ray_nodes" not in words
        if str(out) in " ".join(words) and words[0].endswith("python") and (works or alone):
            found.append(process)
    return found


class Trial:
    """One job, and what is done to it."""

    def __init__(self, cluster: Cluster, options: argparse.Namespace, name: str) -> None:
        self.cluster, self.stage = cluster, options.stage
        self.folder = options.out / f"{options.stage}-{options.nodes}" / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.out = self.folder / "out"
        prepare(self.stage, options.demo, self.out)
        where = ["--nodes", str(options.nodes), "--directory", str(self.folder), "--logs", str(self.folder)]
        text = render_job(self.stage, *where, "--restarts", "1", "--", *words_of(self.stage, options.demo, self.out))
        self.job = cluster.submit(text)
        self.begun = time.monotonic()

    def state(self) -> str:
        return self.cluster.show(self.job)["JobState"]

    def wait(self, true: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition is true; return whether it became true before the job ended and the time was over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.state() not in ENDED:
            if true():
                return True
            time.sleep(0.02)
        return False

    def writes_checkpoint(self) -> bool:
        """Return whether a checkpoint is being written: its folder then has a temporary name."""
        folders = (self.out / "checkpoints", self.out / "evrnet" / "checkpoints")
        return any(list(folder.glob(".partial_*")) for folder in folders)

    def disturb(self, kind: str, moment: float) -> bool:
        """Disturb the job; return whether the job was still running then."""
        if kind == "checkpoint":
            self.wait(lambda: time.monotonic() - self.begun > moment, 600)
            self.wait(self.writes_checkpoint, 60)
        else:
            self.wait(lambda: time.monotonic() - self.begun > moment, 600)
        if self.state() != "RUNNING":
            return False
        if kind == "kill":
            workers = find_workers(self.out)
            for worker in workers[-1:]:
                worker.send_signal(signal.SIGKILL)
            return bool(workers)
        if kind == "stop":
            self.cluster.signal(self.job, signal.SIGUSR1)
            return True
        urgent = self.cluster.preempt()
        self.cluster.wait(urgent)
        return True

    def end(self) -> dict[str, str]:
        until(lambda: self.state() in ENDED, 900)
        return self.cluster.show(self.job)


def run_trials(cluster: Cluster, options: argparse.Namespace) -> int:
    """Run all trials of a stage, and return the number of trials that did not end as the undisturbed job."""
    folder = options.out / f"{options.stage}-{options.nodes}"
    known = folder / "undisturbed.json"
    if not known.is_file():
        undisturbed = Trial(cluster, options, "undisturbed")
        shown = undisturbed.end()
        assert shown["JobState"] == "COMPLETED", f"the undisturbed job ended as {shown['JobState']}: {folder}"
        known.write_text(json.dumps([time.monotonic() - undisturbed.begun, digest(options.stage, undisturbed.out)]))
    duration, expected = json.loads(known.read_text())
    good = 0
    kinds = [kind for kind in options.kinds if kind != "checkpoint" or options.stage in TRAINS]
    for number in range(options.first, options.first + options.times):
        kind = kinds[number % len(kinds)]
        moment = random.Random(f"{options.seed} {number}").uniform(0.15, 0.95) * duration
        trial = Trial(cluster, options, str(number))
        reached = trial.disturb(kind, moment)
        shown = trial.end()
        same = shown["JobState"] == "COMPLETED" and digest(options.stage, trial.out) == expected
        good += same
        row = {
            "stage": options.stage, "nodes": options.nodes, "trial": number, "kind": kind, "moment_s": round(moment, 1),
            "undisturbed_s": round(duration, 1), "disturbed": reached, "requeued": int(shown["Restarts"]),
            "state": shown["JobState"], "exit": shown["ExitCode"], "same": same,
        }  # fmt: skip
        with (options.out / "trials.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if same:
            shutil.rmtree(trial.folder)
    print(f"{options.stage} on {options.nodes} machines: {good} of {options.times} as the undisturbed job", flush=True)
    return options.times - good


def main() -> int:
    """Run the trials of a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, required=True, help="folder for the outputs of the jobs")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to continue earlier trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["stop", "preempt", "checkpoint", "kill"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # End the sandbox and its jobs also after SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    with start_cluster(options.out / "slurm") as cluster:
        return int(run_trials(cluster, options) > 0)


if __name__ == "__main__":
    sys.exit(main())
