"""A Ray session on one machine runs the tasks of the process that started it, and refuses all other processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SESSION = """
import json, os, sys
if sys.argv[1] == "imported":
    import ray
from data_sharding.job.cluster import RayConfig, ray_session, run_tasks
with ray_session(RayConfig(num_cpus=1)) as in_flight:
    import psutil, ray
    results = {}
    run_tasks(os.path.basename, {"a": "x/own"}, in_flight=1, memory_gb=0.1, done=results.__setitem__)
    commands = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    folder = ray._private.worker._global_node.get_session_dir_path()
    shown = any(os.environ["RAY_AUTH_TOKEN"] in command for command in commands)
    address = ray.get_runtime_context().gcs_address
    print(json.dumps([results, address, folder, shown, oct(os.stat(os.path.dirname(os.path.dirname(folder))).st_mode)]))
    sys.stdout.flush()
    sys.stdin.read(1)
print(os.path.exists(os.path.dirname(os.path.dirname(folder))))
"""
STRANGER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], logging_level=50, log_to_driver=False)
    print("task", ray.get(ray.remote(lambda: 42).remote(), timeout=30))
except Exception as error:
    print("refused", type(error).__name__)
"""


def _environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_gcs_server_request_timeout_seconds": "5", **variables}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when", ["fresh", "imported"])
def test_local_ray_runs_own_tasks_and_refuses_strangers(when: str) -> None:
    command = [sys.executable, "-c", SESSION, when]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    ) as session:
        assert session.stdin and session.stdout
        results, address, _, token_is_shown, mode = json.loads(session.stdout.readline())
        assert results == {"a": "own"} and not token_is_shown
        assert stat.S_IMODE(int(mode, 8)) == 0o700
        strangers = [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}]
        for variables in strangers[: 2 if when == "fresh" else 1]:
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, address],
                capture_output=True,
                text=True,
                env=_environment(**variables),
                timeout=300,
            )
            assert done.stdout.startswith("refused"), done.stdout
        rest, _ = session.communicate("x", timeout=120)
    assert session.returncode == 0 and rest.strip() == "False", "the session's folder is deleted"


def test_own_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; from data_sharding.job.cluster import require_token; require_token()\n"
        "print(os.environ['RAY_AUTH_MODE'], os.environ.get('RAY_AUTH_TOKEN', '-'))"
    )
    for variables, expected in (
        ({"RAY_AUTH_MODE": "disabled"}, "disabled -"),
        ({"RAY_AUTH_TOKEN": "a" * 40}, "token " + "a" * 40),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, "token -"),
    ):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, env=_environment(**variables), timeout=60)
        assert done.stdout.strip() == expected
