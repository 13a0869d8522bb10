"""Tests of calls in child processes: a crash, a hang or too much memory in one call affects no other call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_sharding.job.isolation import KEEP, GivenUp, call_isolated, close_children, owned_folder

MODULE = """
import os, signal, time
from pathlib import Path

def work(task):
    what, path = task
    if what == "pid":
        return os.getpid()
    if what == "scratch":
        import tempfile
        Path(tempfile.mkdtemp()).joinpath("x").write_text("x")
        return os.environ["DREAMSCALE_SCRATCH"]
    tries = Path(path)
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if what == "abort":
        os.abort()
    if what == "abort once" and tries.read_text() == "x":
        os.abort()
    if what == "killed twice" and len(tries.read_text()) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(60)
    if what == "grow":
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1 << 20) * 16))
            time.sleep(0.01)
    if what == "huge":
        import numpy as np
        return np.ones(1 << 40).sum()
    if what == "full":
        raise OSError(28, "No space left on device", "/x/y")
    return len(tries.read_text())
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "isolated_work.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("DREAMSCALE_SCRATCH", str(tmp_path / "scratch"))
    yield
    close_children()
    assert not list((tmp_path / "scratch").iterdir())


def call(what: str, path: Path, timeout_s: float = 30.0) -> object:
    return call_isolated("isolated_work:work", (what, str(path / "tries")), timeout_s=timeout_s, memory_gb=0.4)


def test_one_child_serves_many_calls(tmp_path: Path) -> None:
    first = call("pid", tmp_path)
    assert first == call("pid", tmp_path) != os.getpid()


def test_a_crash_is_named_and_tried_twice(tmp_path: Path) -> None:
    with pytest.raises(GivenUp, match=r"crashed its reader 2 times \(SIGABRT\)"):
        call("abort", tmp_path)
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_second_try_may_succeed(tmp_path: Path) -> None:
    assert call("abort once", tmp_path) == 2


def test_kills_from_outside_do_not_count_as_crashes(tmp_path: Path) -> None:
    assert call("killed twice", tmp_path) == 3


def test_time_out(tmp_path: Path) -> None:
    with pytest.raises(GivenUp, match=r"time-out: not finished after 0\.5 s"):
        call("sleep", tmp_path, timeout_s=0.5)
    assert call("pid", tmp_path)


@pytest.mark.parametrize("how", ["grow", "huge"])
def test_memory(tmp_path: Path, how: str) -> None:
    with pytest.raises(GivenUp, match=r"needs more than 0\.4 GB"):
        call(how, tmp_path)


def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        call("full", tmp_path)
    assert caught.value.errno == 28 and caught.value.filename == "/x/y"


def test_a_killed_parent_leaves_no_child_process(tmp_path: Path) -> None:
    """If the parent process is killed during a call, the child process ends too.

    The next isolated call removes the scratch folder of the killed call.
    """
    code = (
        "from data_sharding.job.isolation import call_isolated as c\n"
        "c('isolated_work:work', ('sleep', %r), timeout_s=9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code % str(tmp_path / "tries")], env=env)
    until = time.monotonic() + 60
    while not (tmp_path / "tries").exists() and time.monotonic() < until:
        time.sleep(0.02)
    import psutil

    (child,) = psutil.Process(parent.pid).children()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    left = list((tmp_path / "scratch").glob("dreamscale-child-*"))
    assert left and Path(str(call("scratch", tmp_path))) not in left and not left[0].exists()


def test_folders_of_dead_processes_are_removed_and_others_are_kept(tmp_path: Path) -> None:
    base = tmp_path / "temporary"
    for name in ("ds-ray-dead", "ds-ray-half-removed", "ds-ray-kept", "ds-ray-odd", "other-dead"):
        (base / name / "ray").mkdir(parents=True)
        (base / name / "ray" / "log").write_text("x")
        if name not in ("ds-ray-half-removed", "ds-ray-odd"):
            (base / name / "lock").touch()
    (base / "ds-ray-kept" / KEEP).touch()
    # A lock that is a link or a pipe is not opened.
    (base / "ds-ray-odd" / "lock").symlink_to(base / "other-dead" / "lock")
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / "lock").touch()
    (base / "ds-ray-link").symlink_to(base / "elsewhere")
    with owned_folder(base, "ds-ray") as alive, owned_folder(base, "ds-ray") as logs:
        assert alive.is_dir() and alive.stat().st_mode & 0o77 == 0
        (logs / "log").write_text("x")
        (logs / KEEP).touch()
        with owned_folder(base, "ds-ray"):
            assert alive.is_dir(), "a folder whose process lives is not removed"
    assert not alive.exists() and (logs / "log").is_file()
    found = {path.name for path in base.iterdir()}
    assert found == {"ds-ray-kept", "ds-ray-odd", "other-dead", "elsewhere", "ds-ray-link", logs.name}
    assert (base / "elsewhere" / "lock").is_file()


def test_a_folder_of_another_user_is_not_touched(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make a folder of another user")
    other = tmp_path / "ds-ray-other"
    other.mkdir()
    (other / "lock").touch()
    os.mkfifo(other / "pipe")
    os.chown(other, 12345, 12345)
    with owned_folder(tmp_path, "ds-ray"):
        pass
    assert (other / "lock").is_file()


def test_a_job_removes_the_ray_folder_of_a_killed_job(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from data_sharding.job.cluster import RayConfig, ray_session\n"
        "with ray_session(RayConfig(num_cpus=1)):\n"
        "    {}\n"
    )
    base = tmp_path if len(str(tmp_path)) <= 20 else Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    environment = {**os.environ, "TMPDIR": str(base), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        words = [sys.executable, "-c", code.format("os.kill(os.getpid(), signal.SIGKILL)")]
        assert subprocess.run(words, env=environment, check=False).returncode == -signal.SIGKILL
        (left,) = base.glob("ds-ray-*")
        words = [sys.executable, "-c", code.format("pass")]
        subprocess.run(words, env=environment, check=True)
        assert not left.exists() and not list(base.glob("ds-ray-*"))
    finally:
        shutil.rmtree(base, ignore_errors=True)
