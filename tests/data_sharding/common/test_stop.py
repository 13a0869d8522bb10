"""Tests of stop signals that a library or Python ignores, hides or delays. Each test sends a signal to a real
process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = """
import os, pathlib, signal, subprocess, sys, tempfile, time
from data_sharding.common import stop
from data_sharding.common.errors import run_main
stop.GRACE_S = 1.0
def wait(seconds):
    print("ready", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
def command(words):
    with stop.raise_on_stop_signals():
        {body}
    return 0
sys.exit(stop.end_command(run_main(command)))
"""
BODIES = {
    "the exception reaches the command": "wait(60)",
    "a library catches every exception": """
        try:
            wait(60)
        except BaseException:
            pass
        stop.check_stop()
        wait(60)""",
    "a finalizer loses the exception": """
        class Waits:
            def __del__(self):
                wait(60)
        waits = Waits()
        del waits
        stop.check_stop()
        wait(60)""",
    "a module is being imported": """
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "slow.py").write_text("import __main__; __main__.wait(0.5); whole = True")
            sys.path.insert(0, folder)
            try:
                import slow
                wait(60)
            finally:
                if not sys.modules["slow"].whole:
                    os.abort()""",
    "another error follows": """
        try:
            wait(60)
        finally:
            raise ValueError("not ready")""",
    "a library has replaced the handler": """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        wait(0.5)
        with stop.raise_on_stop_signals():
            wait(60)""",
    "the handler of the library exits": """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: sys.exit(number))
        wait(60)""",
    "the command hangs, and so do its child processes": """
        ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        spawn = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {ignore!r}]).wait()"
        child = subprocess.Popen([sys.executable, "-c", spawn])
        while True:
            try:
                wait(60)
            except BaseException:
                pass""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_stop_is_never_lost(body: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", COMMAND.replace("{body}", body.strip())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if "child" in body:
            while len(psutil.Process(process.pid).children(recursive=True)) < 2:
                time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == (
        f"dreamscale: stopped on request; {number.name}: all finished work is kept; run the same command to resume\n"
    )
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert child.status() == psutil.STATUS_ZOMBIE


def test_a_command_without_a_stop_keeps_its_exit_code_and_errors() -> None:
    for body, code in {"return 3": 3, "raise SystemExit(4)": 4}.items():
        done = subprocess.run([sys.executable, "-c", COMMAND.replace("{body}", body)], capture_output=True, check=False)
        assert done.returncode == code and not done.stderr


SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            print("ready", flush=True)
            time.sleep({seconds})

sys.meta_path.insert(0, Slow())
"""
STARTS = {
    "python -m launch": ["-m", "launch", "shard"],
    "dreamscale": ["-c", "import sys; from launch.cli import main; sys.exit(main())", "shard"],
    "python -m data_sharding": ["-m", "data_sharding"],
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("module", "seconds"), [("data_sharding.common.errors", 60), ("data_sharding.job.run", 1)])
@pytest.mark.parametrize("start", STARTS)
def test_a_sharding_job_can_be_stopped_during_its_first_imports(
    tmp_path: Path, start: str, module: str, seconds: int, number: signal.Signals
) -> None:
    """The command is in one of its first imports when the signal arrives."""
    (tmp_path / "sitecustomize.py").write_text(
        SLOW_IMPORT.replace("{module}", module).replace("{seconds}", str(seconds))
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    command = [sys.executable, *STARTS[start], "config.yaml", "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == (
        f"dreamscale: stopped on request; {number.name}: all finished work is kept; run the same command to resume\n"
    )


def test_a_job_that_hangs_in_an_import_ends(tmp_path: Path) -> None:
    """The hanging import holds the lock that all imports need."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT.replace("{module}", "slow").replace("{seconds}", "60"))
    command = [sys.executable, "-c", COMMAND.replace("{body}", "import slow")]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "stopped on request; SIGTERM" in err
