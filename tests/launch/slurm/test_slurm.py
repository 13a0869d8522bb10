"""Jobs of ``dreamscale submit slurm`` on a real Slurm of two hosts: stops, requeues, killed processes, refusals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from data_sharding.dataset.manifest import Manifest

from ...data_sharding.conftest import build_raw, write_raw
from ...pretrain.conftest import losses, metrics, torchrun, write_config
from .cluster import Cluster, render_job, start_cluster, until, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=REASON or "never"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    with started.cancels():
        yield started


class Job:
    """A submitted job, and its log."""

    def __init__(self, cluster: Cluster, folder: Path, stage: str, *words: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self.folder = cluster, folder
        end = words.index("--") if "--" in words else len(words)
        where = ["--directory", str(folder), "--logs", str(folder)]
        text = render_job(stage, *words[:end], *where, *words[end:])
        self.number = cluster.submit(text, *options)
        self.log = folder / f"dreamscale-{stage}-{self.number}.log"

    def state(self) -> str:
        return self.cluster.show(self.number)["JobState"]

    def until(self, true) -> None:
        """Wait until a condition is true; fail if the job ends before."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        def alive() -> bool:
            assert self.state() not in ended, self.text()
            return True

        until(true, alive=alive)

    def end(self) -> dict[str, str]:
        return self.cluster.wait(self.number)

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def restarts(self) -> int:
        return int(self.cluster.show(self.number)["Restarts"])


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return max((line["step"] for line in metrics(run)), default=0) if file.is_file() else 0


def test_pretraining_on_two_hosts(cluster: Cluster, unpaired_dataset: Path, tmp_path: Path) -> None:
    """Another job preempts the job, and later a process is killed. The losses stay the same."""
    values = {"dataset": str(unpaired_dataset), "steps": 120, "checkpoint": {"every": 10, "keep": 3}}
    config = write_config(tmp_path / "config.yaml", output=str(tmp_path / "run"), **values)
    run = tmp_path / "run"
    job = Job(cluster, tmp_path, "pretrain", str(config), "--nodes", "2", "--restarts", "1")
    job.until(lambda: steps(run) >= 3)
    cluster.preempt()
    job.until(lambda: job.restarts() == 1)
    stopped = steps(run)
    job.until(lambda: steps(run) >= max(stopped, 10) + 3)
    workers = [p for p in psutil.process_iter(["cmdline"]) if is_worker(p, config)]
    assert len(workers) == 2
    workers[0].kill()
    assert job.end()["JobState"] == "COMPLETED", job.text()
    assert job.restarts() == 1
    assert "restarts left: 0" in job.text() and job.text().count("stopped on request; checkpoint of step") == 1
    done = torchrun(["-m", "pretrain.train", str(config), "--num_processes", "2", "--output", str(tmp_path / "whole")])
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(tmp_path / "whole")


def is_worker(process: psutil.Process, config: Path) -> bool:
    words = process.info["cmdline"] or []
    return "launch.worker" in words and "launch.agent" not in words and str(config) in words


def test_stopped_jobs_end_as_undisturbed_jobs(cluster: Cluster, unpaired_dataset: Path, tmp_path: Path) -> None:
    """Three jobs run at the same time, and each is stopped: sharding on one host and on two, and training on one."""
    for i in range(14):
        write_raw(build_raw(16, 250, 60, seed=i), tmp_path / "corpus" / f"sub-{i:02d}" / f"sub-{i:02d}_raw.fif")
    shard = tmp_path / "shard.yaml"
    preprocess = {"sfreq": 100, "highpass": 1.0, "lowpass": 40.0, "window": 100, "stride": 100}
    values = {"corpora": [{"root": str(tmp_path / "corpus"), "name": "lab"}], "preprocess": preprocess}
    values |= {"split": {"val_fraction": 0.2, "test_fraction": 0.2}, "ray": {"num_cpus": 1, "memory_gb": 0.5}}
    shard.write_text(yaml.safe_dump(values))
    values = {"dataset": str(unpaired_dataset), "steps": 600, "num_workers": 1, "checkpoint": {"every": 100}}
    pretrain = write_config(tmp_path / "config.yaml", output=str(tmp_path / "run"), **values)
    one, two = tmp_path / "one", tmp_path / "two"
    sharded = [
        Job(cluster, tmp_path, "shard", str(shard), "--", "--output", str(one)),
        Job(cluster, tmp_path, "shard", str(shard), "--nodes", "2", "--", "--output", str(two)),
    ]
    trained = Job(cluster, tmp_path, "pretrain", str(pretrain))

    def has_read(output: Path) -> bool:
        return any(path.read_text() for path in (output / ".work" / "rows").glob("*.jsonl"))

    waiting = {
        trained: lambda: steps(tmp_path / "run") >= 3,
        sharded[0]: lambda: has_read(one),
        sharded[1]: lambda: has_read(two),
    }
    while waiting:
        for job, begun in list(waiting.items()):
            if begun():
                cluster.signal(job.number, signal.SIGUSR1)
                waiting.pop(job)
            else:
                assert job.state() in ("PENDING", "RUNNING"), job.text()
    for job in (*sharded, trained):
        assert job.end()["JobState"] == "COMPLETED", job.text()
        assert job.restarts() == 1 and job.text().count("stopped on request") == 1, job.text()
    assert "resuming from step" in trained.text()
    assert Manifest.read(one).dataset_id == Manifest.read(two).dataset_id
    assert len(losses(tmp_path / "run")) == 600


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """Return the path of a program that takes the place of Python and does what the file ``behaviour`` says."""
    program = tmp_path / "program"
    program.write_text('#!/bin/bash\nsource "$PWD/behaviour"\n')
    program.chmod(0o755)
    return program


NODES = ["--nodes", "2"]
FIRST = 'restarts=${SLURM_RESTART_COUNT:-0}; node=$SLURM_NODEID; touch "begun-$node-$restarts"\n'
FIRST += "until [ -e begun-0-0 ] && [ -e begun-1-0 ]; do sleep 0.1; done\n"
CASES = {
    "one host stops later than the other": (
        'if [ "$restarts" = 0 ]; then sleep "$node"; touch "stopped-$node"; exit 75; fi',
        ["--gpus-per-node", "2"],
        ("COMPLETED", "0:0", 1),
    ),
    "a wrong request on one host ends the job": (
        'if [ "$node" = 1 ]; then exit 2; fi; sleep 200',
        ["--restarts", "3"],
        ("FAILED", "2:0", 0),
    ),
    "a failure on one host ends the job": ('if [ "$node" = 1 ]; then exit 1; fi; sleep 200', [], ("FAILED", "1:0", 0)),
    "a killed process is started again": (
        'if [ "$node" = 1 ] && mkdir killed; then kill -9 $$; fi; sleep 1',
        ["--restarts", "1"],
        ("COMPLETED", "0:0", 0),
    ),
    "a process that is killed too often": ("kill -9 $$", ["--restarts", "1"], ("FAILED", "137:0", 0)),
    "a refused requeue is a failure": (
        'scontrol update "JobId=$SLURM_JOB_ID" Requeue=0; exit 75',
        [],
        ("FAILED", "75:0", 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_exit_codes(case: str, cluster: Cluster, fake: Path, tmp_path: Path) -> None:
    behaviour, words, expected = CASES[case]
    (tmp_path / "behaviour").write_text(FIRST + behaviour + "\n")
    job = Job(cluster, tmp_path, "pretrain", str(config_of(tmp_path)), *NODES, *words, "--python", str(fake))
    shown = job.end()
    assert (shown["JobState"], shown["ExitCode"], int(shown["Restarts"])) == expected, job.text()
    assert {path.name for path in tmp_path.glob("begun-*-0")} == {"begun-0-0", "begun-1-0"}
    assert ("refused" in job.text()) is ("refused" in case)
    if "later" in case:
        assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()
    assert not list(tmp_path.glob(".dreamscale-job-*"))


def config_of(folder: Path) -> Path:
    return write_config(folder / "config.yaml", dataset="unused", output="unused", batch_size=16)


def test_a_command_without_a_handler_is_run_again_but_not_after_scancel(
    cluster: Cluster, fake: Path, tmp_path: Path
) -> None:
    (tmp_path / "behaviour").write_text(FIRST + 'if [ "$restarts" = 0 ]; then exec sleep 200; fi\n')
    words = [str(config_of(tmp_path)), *NODES, "--python", str(fake)]
    again = Job(cluster, tmp_path, "pretrain", *words)
    again.until(lambda: (tmp_path / "begun-0-0").exists() and (tmp_path / "begun-1-0").exists())
    cluster.signal(again.number, signal.SIGUSR1)
    assert again.end()["JobState"] == "COMPLETED" and again.restarts() == 1, again.text()
    (tmp_path / "behaviour").write_text('touch trapped-$SLURM_NODEID\ntrap "exit 75" TERM\nsleep 200 & wait\n')
    cancelled = Job(cluster, tmp_path, "pretrain", *words)
    cancelled.until(lambda: (tmp_path / "trapped-0").exists())
    cluster.call("scancel", cancelled.number)
    until(lambda: not cluster.call("squeue", "--noheader"))
    assert cancelled.state() == "CANCELLED" and cancelled.restarts() == 0, cancelled.text()


def test_a_missing_folder_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    text = render_job("pretrain", str(config_of(tmp_path)), "--directory", "/no/such", "--logs", str(tmp_path))
    shown = cluster.wait(cluster.submit(text))
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    (log,) = tmp_path.glob("*.log")
    assert "dreamscale: the folder /no/such cannot be used" in log.read_text()


def test_options_arrays_and_dependencies(cluster: Cluster, fake: Path, tmp_path: Path) -> None:
    """A job array runs its jobs one after the other, and a second job waits for the array."""
    (tmp_path / "behaviour").write_text(
        'echo "$PROLOGUE cores $(nproc) threads $OMP_NUM_THREADS port $PORT ${SLURM_ARRAY_TASK_ID:-last} '
        '$(date +%s%N)" >>lines; sleep 0.5\n'
    )
    (tmp_path / "prologue").write_text("export PROLOGUE=prologue\n")
    words = [str(config_of(tmp_path)), "--python", str(fake), "--prologue", str(tmp_path / "prologue")]
    more = ["--constraint", "fast|slow", "--gres", "gpu:1", "--gpus-per-node", "1", "--mem", "100M"]
    first = Job(cluster, tmp_path, "pretrain", *words, *more, "--array", "1-2%1", "--sbatch", "comment=mine")
    shown = cluster.show(first.number)
    assert shown["Features"] == "fast|slow" and shown["Comment"] == "mine" and shown["MinMemoryNode"] == "100M"
    assert shown["TresPerNode"].endswith("gpu:1")
    second = Job(cluster, tmp_path, "pretrain", *words, "--dependency", f"afterok:{first.number}")
    assert second.end()["JobState"] == "COMPLETED", second.text()
    lines = (tmp_path / "lines").read_text().splitlines()
    assert [line.split()[-2] for line in lines] == ["1", "2", "last"]
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for line in lines:
        assert line.startswith("prologue cores 1 threads 1 port 2") and int(line.split()[6]) < lowest
    assert {path.name.rpartition("-")[2] for path in tmp_path.glob("*.log")} == {
        f"{first.number}_1.log", f"{first.number}_2.log", f"{second.number}.log",
    }  # fmt: skip


def test_submit_prints_how_to_follow_the_job(cluster: Cluster, fake: Path, tmp_path: Path) -> None:
    """The real command submits the job, prints its number on stdout, and the other lines on stderr."""
    (tmp_path / "behaviour").write_text("true\n")
    command = ["python", "-m", "launch", "submit", "slurm", "pretrain", str(config_of(tmp_path)), "--logs", "."]
    command += ["--python", str(fake), "--gpus-per-node", "0", "--cpus-per-node", "1"]
    line = f"cd {tmp_path} && {' '.join(command)} 2>said"
    number = cluster.call("bash", "-c", line)
    said = (tmp_path / "said").read_text()
    assert number.isdigit() and f"squeue --job {number}" in said and f"scancel {number}" in said
    log = tmp_path / f"dreamscale-pretrain-{number}.log"
    assert f"tail -F {log}" in said
    assert cluster.wait(number)["JobState"] == "COMPLETED"
    assert log.is_file()
