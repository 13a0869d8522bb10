"""Tests of ``dreamscale doctor`` on one machine: versions, limits, services, the verdict and the exit code."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from data_sharding.job.cluster import RayConfig
from launch.cli import main
from launch.doctor import machine, services
from launch.doctor.finding import Finding, run_checks
from launch.doctor.run import DoctorConfig, examine, merge, print_table


def test_the_table_names_versions_and_the_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Also start a real Ray."""
    assert main(["doctor", "--path", str(tmp_path / "not" / "there" / "yet"), "--store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "ray", "deepspeed"):
        assert metadata.version(name) in text
    for what in ("a task ran on 1 machine", "DeepSpeed kernels", "open files", "clock of the disk", "model hub"):
        assert what in text
    assert "written, listed, read and deleted" in text and not list(tmp_path.iterdir())
    assert "FAILS" not in text and "verdict: everything that Dreamscale needs works here" in text


@pytest.mark.parametrize(("flag", "code"), [("false", 1), ("true", 2)])
def test_a_failed_check_decides_the_exit_code(flag: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a job, exit code 2 ends the job, because a new start would fail, too."""
    words = ["doctor", "--start_ray", "false", "--store", str(tmp_path / "file" / "folder"), "--preflight", flag]
    (tmp_path / "file").touch()
    assert main(words) == code
    text = capsys.readouterr().out
    assert "could not write an object" in text and "checks failed: store" in text


def test_a_missing_package_has_advice():
    (found, missing) = machine.check_packages(("numpy", "no-such-package"))
    assert found.state == "ok" and missing.state == "fails"
    assert missing.advice == "pip install no-such-package"


def test_every_finding_that_is_not_ok_has_advice():
    findings = examine(DoctorConfig(start_ray=False))
    assert all(one.advice for one in findings if one.state != "ok")
    assert len({one.what for one in findings}) == len(findings)


def test_an_error_in_a_check_is_a_finding():
    def broken() -> Finding:
        raise AttributeError("no such\nthing")

    good = Finding(what="b", state="ok", found="there")
    first, second = run_checks([("a", broken), ("b", lambda: good)])
    assert first.what == "a" and first.state == "fails" and "AttributeError: no such thing" in first.found
    assert second == good


def test_a_cluster_that_does_not_answer_fails():
    finding = services.check_ray(RayConfig(address="nosuch://127.0.0.1:1"))
    assert finding.state == "fails" and "could not be reached" in finding.found and "ray.address" in finding.advice


def test_clocks():
    assert machine.judge_skew("clock", 0.5, "they differ by").state == "ok"
    assert machine.judge_skew("clock", 3.0, "they differ by").state == "note"
    failed = machine.judge_skew("clock", 3600.0, "they differ by")
    assert failed.state == "fails" and failed.found == "they differ by 3600.00 s" and "chrony" in failed.advice


def test_the_clock_of_a_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert machine.check_file_clock(str(tmp_path)).state == "ok"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 7200.0)
    assert machine.check_file_clock(str(tmp_path)).state == "fails"


def test_shared_memory_is_compared_with_the_number_of_processes(tmp_path: Path):
    assert machine.check_shared_memory(1, tmp_path).state == "ok"
    few = machine.check_shared_memory(10**9, tmp_path)
    assert few.state == "note" and "--shm-size" in few.advice
    assert machine.check_shared_memory(1, tmp_path / "none").state == "note"


def test_low_limits_have_advice(tmp_path: Path):
    code = f"""
import resource
from pathlib import Path
from launch.doctor.machine import check_limits
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))
for one in check_limits(Path({str(tmp_path)!r})):
    print(one.state, one.what, one.found, one.advice, sep="|")
"""
    (tmp_path / "mlx5_0").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    rows = {line.split("|")[1]: line.split("|") for line in done.stdout.splitlines()}
    assert rows["open files"][2:] == ["200 open files", "ulimit -n 65536 (Slurm: in the prologue)"]
    assert rows["file size"][0] == "note" and rows["file size"][2] == "1024 MiB of file size"
    assert rows["locked memory"][0] == "note" and "InfiniBand" in rows["locked memory"][3]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 200


class _Hub(BaseHTTPRequestHandler):
    """A model hub that knows one token."""

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == "Bearer good" and self.path == "/api/whoami-v2"
        self.send_response(200 if good else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_log_in_at_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        monkeypatch.setenv("HF_TOKEN", "good")
        assert services.check_hub().state == "ok"
        monkeypatch.setenv("HF_TOKEN", "old")
        refused = services.check_hub()
        assert refused.state == "fails" and "401" in refused.found and "HF_TOKEN" in refused.advice
    finally:
        server.shutdown()
        server.server_close()
    assert services.check_hub().found.startswith("the hub cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert services.check_hub().found == "HF_HUB_OFFLINE is set"


def test_the_log_in_at_wandb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert services.check_wandb().state == "ok"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "wandb sync" in services.check_wandb().advice


def test_a_store_that_does_not_exist_fails():
    assert services.check_store("nosuch://bucket")[0].state == "fails"
    found, clock = services.check_store("memory://doctor")[0], services.check_store("memory://doctor")[1:]
    assert found.state == "ok" and not clock


def test_other_machines_are_listed_if_something_is_not_well():
    fine = Finding(what="disk", state="ok", found="9 GiB free")
    less = Finding(what="disk", state="ok", found="8 GiB free")
    bad = Finding(what="shared memory", state="note", found="none", advice="more")
    rows = merge(
        [("a", [fine, bad]), ("b", [less, bad]), ("c", [fine, Finding(what="x", state="fails", found="y", advice="z")])]
    )
    assert [one.what for one in rows] == ["disk", "shared memory", "x (c)"]


def test_markup_in_a_finding_is_text(capsys: pytest.CaptureFixture[str]):
    print_table([Finding(what="[red]x[/red]", state="ok", found="[/]")])
    assert "[red]x[/red]" in capsys.readouterr().out


def test_wrong_limits_are_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--timeout_s", "0"]) == 2
    assert "timeout_s" in capsys.readouterr().err
