"""Tests of faults during training: failures of processes, launchers and hosts, signals, hangs, and bad data.

After each fault, the loss curve must equal the curve of a run without the fault.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zstandard

from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.samples import Sample, pad_channels
from data_sharding.dataset.shard_reader import HEADER, locate
from pretrain.runs.checkpoint import complete_checkpoints

from ..conftest import ROOT, environment, losses, metrics, run_jobs, saved_weights, write_config

STEPS, BEGUN = 120, 20
# PET_SHUTDOWN_TIMEOUT is the number of seconds that torchrun waits for a process after asking the process to end.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_SHUTDOWN_TIMEOUT": "10"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def encode_unchecked(eeg: np.ndarray) -> bytes:
    """Encode a window for a shard without checking the window's values."""
    buffer = io.BytesIO()
    np.save(buffer, pad_channels(eeg.astype(np.float16)))
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


@pytest.fixture(scope="module")
def runs(unpaired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs on two processes: one without interruption, one that stops at step 20, and some with a bad window."""
    folder = tmp_path_factory.mktemp("drills")
    train = EEGDataset(unpaired_dataset)
    samples = [train[number] for number in range(24)]
    bad = samples[5]
    samples[5] = Sample(key=bad.key, eeg=np.full_like(bad.eeg, np.nan), meta=bad.meta, image=None, image_ext="png")
    with pytest.MonkeyPatch.context() as patch:
        # Dreamscale refuses to write a window that contains NaN, but other software may write such a window.
        patch.setattr("data_sharding.dataset.samples.encode_eeg", encode_unchecked)
        write_dataset(folder / "bad", {"train": samples, "val": samples[8:16]}, train.spec)
    config = write_config(
        folder / "config.yaml",
        dataset=str(unpaired_dataset),
        output="unused",
        num_processes=2,
        steps=STEPS,
        zero_stage=2,
        checkpoint={"every": 10, "keep": 3},
    )
    words = [str(config), "--output"]
    jobs: list[dict[str, Any]] = [
        {"words": [*words, str(folder / "whole")]},
        {"words": [*words, str(folder / "begun")], "stop_after": BEGUN},
    ]
    for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]:
        more = ["--dataset", str(folder / "bad"), "--steps", "6", "--batch_size", "8", "--zero_stage", str(stage)]
        jobs.append({"words": [*words, str(folder / f"bad_{stage}_{precision}"), *more, "--precision", precision]})
    run_jobs(folder, 2, jobs)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """Copy the run that was stopped at step 20."""
    shutil.copytree(runs / "begun", tmp_path / "run")
    return tmp_path / "run"


class Training:
    """A training command that runs in its own process and writes its output to a file."""

    def __init__(self, words: Sequence[str], run: Path, **extra: str) -> None:
        self.run, self.log = run, run.with_name("log.txt")
        self.start = run.with_name("start")
        self.start.mkdir(exist_ok=True)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                words,
                stdout=stream,
                stderr=stream,
                cwd=ROOT,
                env=environment() | ENVIRONMENT | {"TMPDIR": str(self.start)} | extra,
                start_new_session=True,
            )

    def steps(self) -> int:
        """Return the number of steps in the run's metrics."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait_for(self, steps: int, text: str = "") -> None:
        until = time.monotonic() + 120
        while self.steps() < steps or text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def wait(self) -> int:
        return self.process.wait(timeout=150)

    def processes(self) -> dict[int, str]:
        """Return the command lines that contain the path of this run, by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(self.run) in words:
                found[int(folder.name)] = words
        return found

    def ranks(self) -> dict[int, int]:
        """Return the rank of each training process and each reading process, by process id."""
        found = {}
        for pid in self.processes():
            try:
                values = dict(
                    word.split("=", 1) for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in word
                )
            except OSError:
                continue
            if "RANK" in values:
                found[pid] = int(values["RANK"])
        return found

    def workers(self) -> list[int]:
        """Return the process ids of the training processes in the order of their ranks."""
        ranks = self.ranks()
        return sorted((pid for pid in ranks if parent(pid) not in ranks), key=lambda pid: ranks[pid])

    def readers(self) -> list[int]:
        """Return the process ids of the reading processes in the order of their ranks."""
        ranks = self.ranks()
        return sorted((pid for pid in ranks if parent(pid) in ranks), key=lambda pid: ranks[pid])


def words(runs: Path, run: Path, *more: str) -> list[str]:
    return [str(runs / "config.yaml"), "--output", str(run), *more]


def dreamscale(runs: Path, run: Path, *more: str) -> Training:
    return Training([sys.executable, "-m", "launch", "pretrain", *words(runs, run, *more)], run)


def check_undisturbed(run: Path, runs: Path) -> None:
    """Check that losses and epochs are equal to those of a run without a fault. For a complete run, also check the
    weights."""
    whole = losses(runs / "whole")
    found = losses(run)
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, len(found) + 1))
    assert found == whole[: len(found)]
    epochs, expected = ([line["epoch"] for line in metrics(p) if "loss" in line] for p in (run, runs / "whole"))
    assert epochs == expected[: len(found)]
    if len(found) == STEPS:
        assert json.loads((run / "status.json").read_text())["state"] == "done"
        ours, theirs = (saved_weights(p, STEPS) for p in (run, runs / "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_after_a_killed_process_some_steps_are_repeated(runs: Path, run: Path) -> None:
    training = dreamscale(runs, run, "--restarts", "1")
    training.wait_for(BEGUN + 15)
    os.kill(training.workers()[1], signal.SIGKILL)
    assert training.wait() == 0, training.log.read_text()[-3000:]
    said = training.log.read_text()
    assert "a training process died; restarting" in said
    assert said.count("resuming from step") == 2
    check_undisturbed(run, runs)


def test_a_killed_reading_process_restarts_the_run(runs: Path, run: Path) -> None:
    """Kill a reading process, as the operating system does when memory is short."""
    training = dreamscale(runs, run, "--restarts", "1", "--num_workers", "1")
    training.wait_for(BEGUN + 15)
    os.kill(training.readers()[1], signal.SIGKILL)
    assert training.wait() == 0, training.log.read_text()[-3000:]
    assert "a training process died; restarting" in training.log.read_text()
    check_undisturbed(run, runs)


def test_a_run_of_one_process_is_restarted_too(runs: Path, run: Path) -> None:
    training = dreamscale(runs, run, "--restarts", "1", "--num_processes", "1")
    training.wait_for(BEGUN + 15)
    os.kill(training.workers()[0], signal.SIGKILL)
    assert training.wait() == 0, training.log.read_text()[-3000:]
    assert training.log.read_text().count("resuming from step") == 2
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, STEPS + 1))


def test_a_fault_found_by_one_process_alone_is_reported(runs: Path, run: Path, tmp_path: Path) -> None:
    data = EEGDataset(yaml.safe_load((runs / "config.yaml").read_text())["dataset"])
    # Choose a window that only the second process reads, in a batch after the step at which the run resumes.
    number = Loader(data, 16, 3, rank=1, world_size=2).positions(BEGUN + 1)[0][0]
    (place,) = locate(data.index, data.first, [number])
    shutil.copytree(data.path, tmp_path / "data")
    name = data.shards[place.shard].path
    with (tmp_path / "data" / name).open("r+b") as stream:
        stream.seek(place.start + HEADER)
        stream.write(b"\0" * 64)
    training = dreamscale(runs, run, "--dataset", str(tmp_path / "data"))
    assert training.wait() == 2
    said = re.search(rf"dreamscale: process 1: .*{re.escape(Path(name).name)}.*", training.log.read_text())
    assert said, training.log.read_text()[-3000:]
    assert Path(name).name in json.loads((run / "status.json").read_text())["reason"]


def test_usr1_writes_a_checkpoint_and_exits_with_75(runs: Path, run: Path) -> None:
    training = dreamscale(runs, run)
    training.wait_for(BEGUN + 3)
    training.process.send_signal(signal.SIGUSR1)
    assert training.wait() == 75, training.log.read_text()[-3000:]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert BEGUN + 3 <= status["step"] < STEPS
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{status['step']:08d}"
    check_undisturbed(run, runs)


def test_after_a_killed_launcher_a_checkpoint_and_no_process_is_left(runs: Path, run: Path) -> None:
    training = dreamscale(runs, run)
    training.wait_for(BEGUN + 3)
    (agent,) = [pid for pid, line in training.processes().items() if "launch.agent" in line]
    os.kill(agent, signal.SIGKILL)
    assert training.wait() == 1
    assert "run the same command again" in training.log.read_text()
    assert not training.processes()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert complete_checkpoints(run / "checkpoints")[-1].name != f"step_{BEGUN:08d}"
    check_undisturbed(run, runs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_signals_on_and_waits(number: int, runs: Path, run: Path) -> None:
    listed = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    # torchrun also sends signals to the reading processes.
    line = words(runs, run, "--num_workers", "2")
    training = Training([*TORCHRUN, *listed, "-m", "pretrain.train", *line], run)
    training.wait_for(BEGUN + 3)
    training.process.send_signal(number)
    assert training.wait() != 0
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{status['step']:08d}"
    check_undisturbed(run, runs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_is_one_request(number: int, runs: Path, run: Path) -> None:
    """Send a signal to every process, as batch systems do.

    The test uses the wandb tracker because wandb's library starts threads in the reading processes.
    """
    training = dreamscale(runs, run, "--num_workers", "2", "--tracker.kind", "wandb")
    training.wait_for(BEGUN + 3)
    assert len(training.readers()) == 4
    for pid in training.processes():
        os.kill(pid, number)
    assert training.wait() == 75, training.log.read_text()[-3000:]
    assert not training.processes()
    assert "Traceback" not in training.log.read_text()
    check_undisturbed(run, runs)


def test_a_run_continues_under_other_launchers_after_a_kill_and_damage(runs: Path, run: Path) -> None:
    """Start a run with torchrun, continue and kill it under Accelerate, and finish it with DeepSpeed's launcher."""
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    training = Training([*accelerate, "-m", "pretrain.train", *words(runs, run)], run)
    training.wait_for(BEGUN + 25)
    for pid in training.processes():
        os.kill(pid, signal.SIGKILL)
    training.wait()
    newest = complete_checkpoints(run / "checkpoints")[-1]
    assert int(newest.name[-4:]) >= BEGUN + 20
    (newest / "state_00001.safetensors").write_bytes(b"")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29611"]
    training = Training([*deepspeed, "--module", "pretrain.train", *words(runs, run)], run, DS_ACCELERATOR="cpu")
    assert training.wait() == 0, training.log.read_text()[-3000:]
    said = training.log.read_text()
    assert f"checkpoint {newest} is damaged (state_00001.safetensors" in said
    check_undisturbed(run, runs)


def test_a_hanging_process_is_named(runs: Path, run: Path) -> None:
    training = dreamscale(runs, run, "--timeout_s", "4")
    training.wait_for(BEGUN + 3)
    stopped = training.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    assert training.wait() == 1, training.log.read_text()[-3000:]
    said = training.log.read_text()
    assert f"no progress for 4 s: rank 1 (host {os.uname().nodename}, process {stopped}) in step " in said
    assert not training.processes()
    assert "rank 1" in json.loads((run / "status.json").read_text())["reason"]


def test_a_slow_process_is_named(runs: Path, tmp_path: Path) -> None:
    """Freeze the second process for most of the time, so that it is much slower than the first process."""
    training = dreamscale(runs, tmp_path / "slow", "--steps", "5000", "--log_every", "10", "--checkpoint.every", "5000")
    training.wait_for(10)
    (_, slow) = training.workers()
    said = f"rank 1 (host {os.uname().nodename}) is slow"
    until = time.monotonic() + 200
    try:
        while said not in training.log.read_text():
            assert training.process.poll() is None and time.monotonic() < until, training.log.read_text()[-3000:]
            for number, seconds in ((signal.SIGSTOP, 0.1), (signal.SIGCONT, 0.02)):
                os.kill(slow, number)
                time.sleep(seconds)
        lines = [line for line in metrics(tmp_path / "slow") if line.get("slowest_rank") == 1]
        assert max(line["slowest_rank_ratio"] for line in lines) > 1.5
    finally:
        os.kill(slow, signal.SIGCONT)
        training.process.kill()  # The training processes end with their launcher.
        training.wait()


SLOW_CHECKPOINTS = """
import os, sys, time
import pretrain.model.weights as weights
from pretrain.train import main

def save_slowly(tensors, path, save=weights.save_weights):
    save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    open(os.environ["WRITING"] + os.environ["RANK"], "w").close()
    time.sleep(2)
    path.write_bytes(content)

weights.save_weights = save_slowly
sys.exit(main())
"""


def test_a_run_is_stopped_and_killed_in_the_middle_of_a_checkpoint(runs: Path, run: Path) -> None:
    script = run.with_name("slow_checkpoints.py")
    script.write_text(SLOW_CHECKPOINTS)
    writing = run.with_name("writing")
    for number, asynchronous in ((signal.SIGKILL, "false"), (signal.SIGTERM, "true")):
        line = words(runs, run, "--checkpoint.asynchronous", asynchronous)
        training = Training([*TORCHRUN, str(script), *line], run, WRITING=str(writing))
        marks = [writing.with_name(f"writing{rank}") for rank in range(2)]
        until = time.monotonic() + 120
        while not all(mark.exists() for mark in marks):
            assert training.process.poll() is None and time.monotonic() < until, training.log.read_text()[-3000:]
            time.sleep(0.01)
        for pid in training.workers()[number == signal.SIGKILL :]:
            os.kill(pid, number)
        assert training.wait() != 0
        for mark in marks:
            mark.unlink()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{status['step']:08d}"
    training = dreamscale(runs, run)
    assert training.wait() == 0, training.log.read_text()[-3000:]
    check_undisturbed(run, runs)


def test_bad_data_on_one_process_skips_the_step_on_all(runs: Path) -> None:
    """Check the losses of runs with two epochs of three steps. In each epoch, one step uses a window of NaN."""
    for name in ("0_fp32", "1_fp32", "2_fp32", "3_fp32", "1_bf16", "2_bf16", "3_bf16"):
        found = losses(runs / f"bad_{name}")
        lines = [line for line in metrics(runs / f"bad_{name}") if "loss" in line]
        assert sum(loss is None for loss in found) == 2, name
        assert lines[-1]["skipped_steps"] == 2, name
        weights = saved_weights(runs / f"bad_{name}", 6)
        assert all(torch.isfinite(value).all() for value in weights.values()), name
        saved = json.loads((runs / f"bad_{name}" / "checkpoints" / "step_00000006" / "complete.json").read_text())
        # Adam does not count the two skipped steps.
        assert saved["adam_steps"] == 4, name
        for ours, theirs in zip(found, losses(runs / "bad_0_fp32"), strict=True):
            assert ours is theirs is None or abs(ours - theirs) < (1e-4 if "fp32" in name else 2e-2), name


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Create two network namespaces, each with its own address, and connect them with a virtual cable."""
    hosts = [f"dreamscale{os.getpid()}{side}" for side in "ab"]
    commands = [f"ip netns add {host}" for host in hosts]
    commands += [
        f"ip link add veth{side}{os.getpid() % 10000} netns {host} type veth peer name vethb netns {hosts[1]}"
        for side, host in zip("a", hosts[:1], strict=True)
    ]
    for number, (host, device) in enumerate(zip(hosts, (f"vetha{os.getpid() % 10000}", "vethb"), strict=True)):
        commands += [f"ip netns exec {host} ip link set {device} name wire"]
        commands += [f"ip netns exec {host} ip addr add 10.77.0.{number + 1}/24 dev wire"]
        commands += [f"ip netns exec {host} ip link set {link} up" for link in ("wire", "lo")]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"hosts cannot be made here: {command}: {done.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def test_two_hosts_survive_the_loss_of_one(two_hosts: list[str], runs: Path, run: Path) -> None:
    def host(number: int) -> Training:
        address = f"10.77.0.{number + 1}"
        line = ["ip", "netns", "exec", two_hosts[number], sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        line += ["--rdzv-endpoint", "10.77.0.1:29577", "--rdzv-id", "drill", "--local-addr", address]
        line += ["--rdzv-conf", f"is_host={1 - number},keep_alive_interval=1,keep_alive_max_attempt=3"]
        return Training([*line, "-m", "pretrain.train", *words(runs, run)], run, GLOO_SOCKET_IFNAME="wire")

    first, second = host(0), host(1)
    first.wait_for(BEGUN + 15)
    # Simulate a power cut on the second host: kill its torchrun and its training process. The processes of the second
    # host are those in its session, and the children of its torchrun.
    mine = [
        pid for pid in first.processes() if os.getsid(pid) == second.process.pid or parent(pid) == second.process.pid
    ]
    for pid in mine:
        os.kill(pid, signal.SIGKILL)
    second.process.wait(timeout=30)
    # Start the second host again.
    second = host(1)
    assert first.wait() == 0, first.log.read_text()[-3000:]
    assert second.wait() == 0
    assert first.log.read_text().count("resuming from step") == 2
    check_undisturbed(run, runs)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_ray_trains_and_stops_on_request(runs: Path, run: Path) -> None:
    # Unix limits the length of socket paths, and the path of the test's folder is too long for Ray's sockets.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    try:
        line = [sys.executable, "-m", "launch.ray_train", "pretrain", *words(runs, run)]
        extra = {"RAY_TMPDIR": temporary, "RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'}
        training = Training(line, run, **extra)
        training.wait_for(BEGUN + 3)
        training.process.send_signal(signal.SIGTERM)
        assert training.wait() == 75, training.log.read_text()[-3000:]
        assert json.loads((run / "status.json").read_text())["state"] == "stopped"
        check_undisturbed(run, runs)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
