"""Tests of `launch.ray_nodes`: the address of the first machine, a Ray that does not start, and temporary folders."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from data_sharding.dataset.manifest import Manifest
from launch.ray_nodes import find_head, main

from ..data_sharding.conftest import build_raw, write_raw


def start(port: int, index: int, head: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    where = ["--nodes", "2", "--index", str(index), "--head", head, "--port", str(port)]
    # Tests that ran in this process may have set variables of Ray, such as a token.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.ray_nodes", *where, "--", *words],
        env={**inherited, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def accept_connections(server: socket.socket) -> None:
    """Accept and close all connections: the kernel refuses further ones if many wait for `accept`."""
    with contextlib.suppress(OSError):  # The test has closed the socket.
        while True:
            server.accept()[0].close()


def outgoing_address() -> str:
    """Return the address of the first of two machines whose own name is a loopback address."""
    try:
        return find_head("localhost", 0, 2)
    except OSError as error:
        pytest.skip(f"this machine has no network: {error}")


def test_a_loopback_address_is_not_given_to_other_machines():
    assert not ipaddress.ip_address(outgoing_address()).is_loopback
    assert ipaddress.ip_address(find_head("localhost", 0, 1)).is_loopback


def test_a_name_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert main(["--nodes", "2", "--index", "1", "--head", "none.invalid", "--port", "1", "--", "shard"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.invalid, has no address" in error


@pytest.mark.timeout(600)
def test_a_failed_start_is_shown(tmp_path: Path):
    """Something answers at the port of the head, but Ray cannot start, because the file of its token is missing."""
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        threading.Thread(target=accept_connections, args=(head,), daemon=True).start()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
        process = start(head.getsockname()[1], 1, "127.0.0.1", "shard", **token)
        _, error = process.communicate(timeout=500)
        head.shutdown(socket.SHUT_RDWR)  # Ends the thread's `accept`.
    assert process.returncode == 1
    assert error.count("RAY_AUTH_TOKEN_PATH is set but file cannot be opened") == 1
    assert error.splitlines()[-1] == "dreamscale: Ray did not start on 127.0.0.1 in 3 tries"


@pytest.mark.timeout(300)
def test_no_temporary_folder_stays_on_a_machine(tmp_path: Path):
    for i in range(2):
        write_raw(build_raw(16, 250, 6, seed=i), tmp_path / "corpus" / f"sub-{i}" / f"sub-{i}_raw.fif")
    values = {
        "corpora": [{"root": str(tmp_path / "corpus"), "name": "lab"}],
        "preprocess": {"sfreq": 100, "highpass": 1.0, "lowpass": 40.0, "window": 100, "stride": 100},
        "split": {"val_fraction": 0.0, "test_fraction": 0.0},
        "ray": {"memory_gb": 0.5},
    }
    (tmp_path / "shard.yaml").write_text(yaml.safe_dump(values))
    words = ["shard", str(tmp_path / "shard.yaml"), "--output", str(tmp_path / "set")]
    ip = outgoing_address()
    with socket.socket() as free:
        free.bind((ip, 0))
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    # Ray puts sockets into these folders, and Unix limits the length of their paths.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="a") as one,
        tempfile.TemporaryDirectory(dir="/tmp", prefix="b") as two,
        start(port, 1, ip, *words, TMPDIR=two, **token) as joins,
        start(port, 0, ip, *words, TMPDIR=one, **token) as leads,
    ):
        try:
            own = False
            while leads.poll() is None:
                own = own or any(Path(two).glob("ds-ray-*/ray/session_*"))
                time.sleep(0.1)
            assert leads.returncode == 0, leads.communicate()[1]
            assert joins.wait(60) == 0, joins.communicate()[1]
            assert own, "Ray on the second machine has a folder that this machine does not remove"
            assert not list(Path(one).glob("ds-ray*")) and not list(Path(two).glob("ds-ray*"))
        finally:
            leads.terminate()  # Without its head, the other machine ends by itself.
    assert Manifest.read(tmp_path / "set")
