"""Tests of faults during a job: a killed process, a lost machine, a full disk, an unreachable object store.

Each test checks that the job writes exactly the same bytes as a job without the fault. The tests run the real command
`python -m data_sharding` with real Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from data_sharding.audit.verify import main as verify
from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS
from launch.submit.ray import stop_environment

from ...ray_cluster import RayCluster, accepts, free_port, ray_cluster, until

N = 14
"""Number of recordings in the corpus."""
pytestmark = pytest.mark.timeout(300)


def bytes_of(dataset: str | Path) -> dict[str, str]:
    manifest = Manifest.read(dataset)
    shards = {s.path: s.sha256 for shards in manifest.splits.values() for s in shards}
    return shards | {"ledger": manifest.extra["ledger_sha256"], "id": manifest.dataset_id}


def rows_done(output: Path) -> int:
    return sum(len(p.read_text().splitlines()) for p in (output / ".work" / "rows").glob("*.jsonl"))


class Drill:
    """A corpus, a config for this corpus, and the command that shards the corpus."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.root = folder, Path(root)
        self.config = folder / "job.yaml"
        values = {
            "corpora": [{"root": root, "name": "lab"}],
            "preprocess": {
                "sfreq": 100,
                "highpass": 1.0,
                "lowpass": 40.0,
                "window": 100,
                "stride": 100,
                "quality": {"leave_out_edges": False},
            },
            "samples_per_shard": 64,
            "split": {"val_fraction": 0.2, "test_fraction": 0.2},
            "ray": {"num_cpus": 2, "memory_gb": 0.5},
        }
        self.config.write_text(yaml.safe_dump(values))

    def start(self, output: str | Path, *args: str, **more) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "data_sharding", str(self.config), "--output", str(output), *args]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)

    def run(self, output: str | Path, *args: str, code: int = 0, **more) -> str:
        process = self.start(output, *args, **more)
        _, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return err


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory, make_raw, write_raw) -> Drill:
    root = tmp_path_factory.mktemp("recordings")
    for i in range(N):
        write_raw(make_raw(16, 250, 40, seed=100 + i), root / f"sub-{i:02d}" / f"sub-{i:02d}_task-rest_raw.fif")
    return Drill(tmp_path_factory.mktemp("drills"), str(root))


@pytest.fixture(scope="module")
def undisturbed(drill: Drill) -> dict[str, str]:
    drill.run(drill.folder / "undisturbed")
    manifest = Manifest.read(drill.folder / "undisturbed")
    assert manifest.counts["sharded"] == N and all(manifest.samples(split) for split in ("train", "val", "test"))
    return bytes_of(drill.folder / "undisturbed")


def in_the_middle(drill: Drill, output: Path, *args: str, **more) -> subprocess.Popen[str]:
    """Start a job, and wait until the job has read some recordings but not all of them."""
    process = drill.start(output, "--ray.num_cpus", "1", *args, **more)
    until(lambda: rows_done(output) >= 2 or process.poll() is not None)
    assert process.poll() is None and rows_done(output) < N
    return process


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    _, err = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in err, err
    return err


def test_four_workers_write_the_same_bytes(drill: Drill, undisturbed: dict[str, str]) -> None:
    drill.run(drill.folder / "four", "--ray.num_cpus", "4")
    assert bytes_of(drill.folder / "four") == undisturbed


def test_a_worker_and_a_reader_are_killed(drill: Drill, undisturbed: dict[str, str]) -> None:
    output = drill.folder / "worker"
    process = in_the_middle(drill, output)

    def readers() -> list[psutil.Process]:
        found = []
        for p in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "data_sharding.job.isolation" in p.cmdline():
                    found.append(p)
        return found

    reader = readers()[0]
    worker = reader.parent()
    assert worker is not None and worker.pid != process.pid
    worker.kill()
    until(lambda: not reader.is_running() or reader.status() == psutil.STATUS_ZOMBIE, 10)
    until(lambda: bool(readers()) or process.poll() is not None)
    assert process.poll() is None
    readers()[0].kill()
    finish(process)
    assert bytes_of(output) == undisturbed


def test_the_driver_is_killed(drill: Drill, undisturbed: dict[str, str]) -> None:
    """Check that a resumed job does not read finished recordings again.

    The test changes the content of one finished recording, but not the file's size and time, so a job that does not
    read this file does not notice the change.
    """
    output = drill.folder / "driver"
    process = in_the_middle(drill, output)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    lines = [line for p in (output / ".work" / "rows").glob("*.jsonl") for line in p.read_text().splitlines()]
    (read,) = drill.root.glob(json.loads(lines[0])["row"]["row"]["path"])
    before, content = read.stat(), read.read_bytes()
    middle = len(content) // 2
    try:
        read.write_bytes(content[:middle] + bytes(4000) + content[middle + 4000 :])
        os.utime(read, ns=(before.st_atime_ns, before.st_mtime_ns))
        # Ray's processes end a little later than the driver, and must not disturb the next run in the meantime.
        err = drill.run(output)
    finally:
        read.write_bytes(content)
    assert f"({len(lines)} from an earlier run)" in err
    assert bytes_of(output) == undisturbed
    _, alive = psutil.wait_procs(others, timeout=1)
    # Two agent processes of Ray may still run: they need a minute to notice that the cluster has ended, and they change
    # nothing.
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and "Agent" not in p.name()]
    assert not left


MOMENTS = {
    "at the start": ("", "", 0.0, signal.SIGTERM),
    "while files are listed": ("listing recordings", "", 0.0, signal.SIGINT),
    "before Ray starts": ("starting Ray", "", 0.0, signal.SIGINT),
    "while Ray starts": ("starting Ray", "", 1.0, signal.SIGTERM),
    "a little later": ("starting Ray", "", 2.0, signal.SIGUSR1),
    "when Ray has started": ("reading recordings", "", 0.0, signal.SIGTERM),
    "while recordings are read": ("", "rows/*.jsonl", 0.2, signal.SIGUSR1),
    "while shards are written": ("", "shards/*/*.json", 0.0, signal.SIGTERM),
}
"""Moments of a job at which a signal is sent, as tuples: the line on stderr to wait for, the file in the working folder
to wait for, the seconds to wait after both, and the signal."""


def stop_at(drill: Drill, output: Path, moment: str, words: list[str]) -> None:
    """Start a job, send a signal at a moment of `MOMENTS`, and check the exit code, the message and the processes.

    SIGINT and SIGUSR1 are sent to all processes of the job, as by Ctrl-C in a terminal and by Slurm. SIGTERM is sent
    only to its main process.
    """
    line, file, seconds, number = MOMENTS[moment]
    log = drill.folder / "stopped.log"
    with log.open("w") as stream:
        command = [sys.executable, *words, str(drill.config), "--output", str(output)]
        process = subprocess.Popen(command, stderr=stream, start_new_session=True)

    def reached() -> bool:
        there = handles_signals(process.pid) and line in log.read_text()
        return process.poll() is not None or (there and (not file or any((output / ".work").glob(file))))

    until(reached)
    time.sleep(seconds)
    assert process.poll() is None
    others = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    elif number == signal.SIGUSR1:
        for one in (psutil.Process(process.pid), *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
    else:
        process.send_signal(number)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            others += psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    text = log.read_text()
    said = [entry for entry in text.splitlines() if entry.startswith("dreamscale:")]
    assert process.returncode == 75 and "Traceback" not in text, text
    assert len(said) == 1 and number.name in said[0] and "run the same command" in said[0], text
    for other in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert other.status() == psutil.STATUS_ZOMBIE


def test_the_job_can_be_stopped_at_any_moment(drill: Drill, undisturbed: dict[str, str]) -> None:
    output = drill.folder / "stopped"
    programs = itertools.cycle([["-m", "data_sharding"], ["-m", "launch", "shard"]])
    for moment, words in zip(MOMENTS, programs, strict=False):
        stop_at(drill, output, moment, words)
    drill.run(output)
    assert bytes_of(output) == undisturbed


def handles_signals(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    return False


def test_a_full_disk_stops_the_job_until_there_is_space(drill: Drill, undisturbed: dict[str, str]) -> None:
    """Run a job on a disk that is too small, enlarge the disk, and run the same command again."""
    disk = drill.folder / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        err = drill.run(disk / "out", code=1)
        (line,) = [text for text in err.splitlines() if text.startswith("dreamscale:")]
        assert "No space left on device" in line and str(disk) in line and "run the same command" in line
        assert not (disk / "out" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        drill.run(disk / "out")
        assert bytes_of(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class TestCluster:
    """Tests on a Ray cluster with two nodes. Some tests kill the Ray processes of a node."""

    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[RayCluster]:
        with ray_cluster() as cluster:
            yield cluster

    def test_a_submitted_job_is_stopped_and_resumed(
        self, drill: Drill, undisturbed: dict[str, str], cluster: RayCluster
    ) -> None:
        """Stop the job with ``ray job stop``, with the time that `submit` sets, and with the 3 s of Ray."""
        output = drill.folder / "submitted"
        words = ["--", sys.executable, "-m", "data_sharding", str(drill.config), "--output", str(output)]
        for name, environment in (("long", ["--runtime-env-json", stop_environment(150)]), ("short", [])):
            before = rows_done(output)
            cluster.job("submit", "--submission-id", name, "--no-wait", *environment, *words)
            until(lambda before=before: rows_done(output) > before)
            cluster.job("stop", name)
            assert name == "short" or "stopped on request" in cluster.job("logs", name)
        cluster.job("submit", *words)
        assert bytes_of(output) == undisturbed

    def test_a_machine_is_lost(self, drill: Drill, undisturbed: dict[str, str], cluster: RayCluster) -> None:
        output = drill.folder / "raylet"
        node = cluster.add(2)
        process = in_the_middle(drill, output, "--ray.address", cluster.address, env=cluster.environment)
        raylet = node.raylets()[0]
        assert [p for p in raylet.children(recursive=True) if "data_sharding.job.isolation" in " ".join(p.cmdline())]
        raylet.kill()
        finish(process)
        assert bytes_of(output) == undisturbed

    def test_the_head_is_lost(self, drill: Drill, undisturbed: dict[str, str]) -> None:
        """Kill all processes of the head during a job, and resume the job on a new head."""
        output = drill.folder / "head"
        with ray_cluster() as cluster:
            process = in_the_middle(drill, output, "--ray.address", cluster.address, env=cluster.environment)
            cluster.head.kill()
            err = finish(process, code=1)
        (said,) = [text for text in err.splitlines() if text.startswith("dreamscale:")]
        assert f":{cluster.gcs} has not answered" in said and "run the same command" in said
        before = rows_done(output)
        assert before >= 2
        with ray_cluster() as cluster:
            err = drill.run(output, "--ray.address", cluster.address, env=cluster.environment)
        assert f"({before} from an earlier run)" in err
        assert bytes_of(output) == undisturbed


class Line:
    """A network line to a server; a test can interrupt this line.

    Clients connect to a local port. This port forwards their connections to the server. If a test interrupts the line,
    open connections end, and the port refuses new connections.
    """

    def __init__(self, target: int) -> None:
        self.port, self.target = free_port(), target
        self.loop = asyncio.new_event_loop()
        self.open: set[asyncio.StreamWriter] = set()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        there = await asyncio.open_connection("127.0.0.1", self.target)
        self.open |= {writer, there[1]}
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    def connect(self) -> None:
        start = asyncio.start_server(self._pass_on, "127.0.0.1", self.port)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result(10)

    def cut(self) -> None:
        async def stop() -> None:
            self.server.close()
            for writer in self.open:
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """Start an object store in its own process. Tests can interrupt the connection to the store."""
    import s3fs

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def up() -> bool:
        assert process.poll() is None
        return accepts(port)

    try:
        until(up)
        line = Line(port)
        line.connect()
        # fsspec caches the object store of an earlier test, so clear the cache: the new store has another address.
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield line
    finally:
        process.kill()
        process.wait()


def test_the_store_goes_away(drill: Drill, undisturbed: dict[str, str], line: Line) -> None:
    """During the job, interrupt the connection to the object store that contains the recordings and the dataset."""
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    store.mkdir("bucket")
    store.put(str(drill.root), "bucket/recordings", recursive=True)
    folder = drill.folder / "store"
    folder.mkdir()
    remote, output = Drill(folder, "s3://bucket/recordings"), "s3://bucket/made/dataset"

    process = remote.start(output, "--ray.num_cpus", "1")
    until(lambda: len(store.glob("bucket/made/dataset/.work/parts/*/*/result.json")) >= 2 or process.poll() is not None)
    line.cut()
    err = finish(process, code=1)
    (said,) = [text for text in err.splitlines() if text.startswith("dreamscale:")]
    assert "run the same command" in said
    line.connect()
    assert not store.exists("bucket/made/dataset/manifest.json")

    remote.run(output)
    assert bytes_of(output) == undisturbed
    names = {name.rsplit("/", 1)[1] for name in store.ls("bucket/made/dataset")}
    assert names == {*SPLITS, "manifest.json", "ledger.parquet", "fingerprints.parquet", "report.html", "versions"}
    assert "finished already" in remote.run(output)
    # After a recording is removed, the job can write a new version of the dataset, without this recording, to the
    # store.
    store.rm("bucket/recordings/sub-03", recursive=True)
    assert "0 recordings added, 0 recordings changed, 1 recordings removed" in remote.run(output)


def test_damage_is_found(drill: Drill, undisturbed: dict[str, str], tmp_path: Path, capsys) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(drill.folder / "undisturbed", copy)
    tar = copy / next(path for path in undisturbed if re.match(r"train/.*\.tar", path))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert verify([str(copy)]) == 1
    assert f"train/{tar.name}: its sha256 differs from the manifest's" in capsys.readouterr().out
    tar.write_bytes(whole[:-1024])
    with pytest.raises(RequestError, match=f"{tar.name}: the manifest says {len(whole)} bytes"):
        collate(EEGDataset(copy, "train"), [0])
