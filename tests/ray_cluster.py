"""A Ray cluster of several nodes on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def accepts(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


class RayNode:
    """The processes of one node of a Ray cluster."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        small = ("--object-store-memory", str(80 * 2**20), "--memory", str(2 * 10**9), "--disable-usage-stats")
        self.process = subprocess.Popen(
            [RAY, "start", "--block", *small, "--dashboard-agent-listen-port", str(free_port()), *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def raylets(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if p.name() == "raylet"]

    def kill(self) -> None:
        """Kill all processes of the node at once, as a power cut would."""
        family = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def stop(self) -> None:
        family = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()


class RayCluster:
    """A Ray cluster: a head with a job server, and further nodes, each with its own node id."""

    def __init__(self, cpus: int) -> None:
        fast = {"period_ms": "500", "failure_threshold": "3", "initial_delay_ms": "0", "timeout_ms": "1000"}
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            **{f"RAY_health_check_{name}": value for name, value in fast.items()},
        }
        self.gcs, self.dashboard = free_port(), free_port()
        self.nodes: list[RayNode] = []
        # Ray puts sockets into this folder. Unix limits the length of socket paths, so this path is short.
        self._folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        more = ["--head", "--port", str(self.gcs), "--dashboard-port", str(self.dashboard), "--num-cpus", str(cpus)]
        more += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--temp-dir", self._folder.name]
        more += ["--ray-client-server-port", str(free_port())]
        self.head = RayNode(self.environment, *more)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs}"

    @property
    def jobs(self) -> str:
        """Address of the job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    def add(self, cpus: int) -> RayNode:
        node = RayNode(self.environment, "--address", self.address, "--num-cpus", str(cpus))
        self.nodes.append(node)
        until(lambda: len(node.raylets()) == 1)
        return node

    def wait(self) -> None:
        def up() -> bool:
            assert self.head.process.poll() is None
            return accepts(self.dashboard)

        until(up)

    def job(self, *words: str, code: int = 0, **more: str) -> str:
        """Run ``ray job ...``, and return what it prints."""
        command = [RAY, "job", words[0], "--address", self.jobs, *words[1:]]
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in (*self.nodes, self.head):
            node.stop()
        self._folder.cleanup()


@contextlib.contextmanager
def ray_cluster(cpus: int = 1) -> Iterator[RayCluster]:
    """Start the head of a cluster, and end the whole cluster after the ``with`` block."""
    with RayCluster(cpus) as cluster:
        cluster.wait()
        yield cluster
