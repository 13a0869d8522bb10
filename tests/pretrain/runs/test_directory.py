"""Tests of the run directory: only one command may write at a time, and a signal that arrives twice is one request."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_sharding.common.errors import RequestError
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.runs.directory import RunDirectory
from pretrain.runs.stop import StopSignal

from ..conftest import ROOT, environment, losses


def test_a_signal_that_arrives_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr("pretrain.runs.stop._SAME_REQUEST_S", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class TestRunDirectory:
    def test_a_second_command_cannot_write_the_same_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pretrain.runs.lock._SAME_HOST_S", 1)
        hold = "import sys, time; from pretrain.runs.directory import RunDirectory; "
        hold += "from data_sharding.processing.preprocess import PreprocessSpec; "
        hold += "run = RunDirectory(sys.argv[1], PreprocessSpec()); print('here', flush=True); time.sleep(600)"
        path = tmp_path / "run"
        other = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "here\n"
            with pytest.raises(RequestError, match=rf"process {other.pid} on .* is using this run"):
                RunDirectory(path, PreprocessSpec())
        finally:
            other.kill()
            other.wait()
        RunDirectory(path, PreprocessSpec()).close()

    def test_a_tracker_that_fails_does_not_end_the_training(self, tmp_path: Path) -> None:
        program = """
import os, signal, subprocess, sys, time
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.runs.directory import RunDirectory
from pretrain.runs.tracking import TrackerConfig

run = RunDirectory(sys.argv[1], PreprocessSpec(), tracker=TrackerConfig(kind="wandb"))
run.log(1, loss=2.0)
helpers = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb"], capture_output=True, text=True).stdout.split()
assert helpers
for pid in helpers:
    os.kill(int(pid), signal.SIGKILL)
for step in range(2, 100):
    run.log(step, loss=1.0)
    time.sleep(0.05)
run.close()
"""
        words = [sys.executable, "-c", program, str(tmp_path / "run")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("the tracker failed at step") == 1
        assert losses(tmp_path / "run") == [2.0] + 98 * [1.0]
