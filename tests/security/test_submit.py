"""No argument of ``dreamscale submit`` runs as a command, adds a line to a job file, or becomes an option."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "demo" / "pretrain.yaml")
GPUS = ["--gpus-per-node", "2"]
CODE = [
    "h;touch HACKED",
    "$(touch HACKED)",
    "`touch HACKED`",
    "a\ntouch HACKED\n",
    "x'; touch HACKED; '",
    "a|touch HACKED",
]
CODE += ['"; touch HACKED; "', "a && touch HACKED", "a\r\nb", "a #b", "-rf", "{{ 7 * 7 }}", "a: b\n- c", "\x1b[31m"]
KEYS = ["stop_s", "time", "partition", "account", "logs", "address", "image", "namespace", "claim", "mount", "name"]
KEYS += ["preflight"]
KUBERNETES_KEYS = [
    *("pull_secret", "memory", "shared_memory", "gpu_resource", "service_account", "user", "secret", "toleration"),
    *("node_selector", "label", "kind", "pod_cpus"),
]
SLURM_KEYS = ["qos", "mem", "gres", "constraint", "dependency", "array", "modules"]


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [(scheduler, key) for scheduler in ("slurm", "ray", "k8s") for key in KEYS]
    + [("slurm", key) for key in SLURM_KEYS]
    + [("k8s", key) for key in KUBERNETES_KEYS],
)
def test_values_with_code_are_refused(scheduler: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in CODE:
        assert main(["submit", scheduler, "pretrain", CONFIG, "--dry-run", *GPUS, f"--{key}={value}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize("value", CODE)
def test_variables_of_a_pod_with_code_are_only_values(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "k8s", "pretrain", CONFIG, "--dry-run", *GPUS, "--env"]
    assert main([*words, f"{value}=x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    code = main([*words, f"A={value}"])
    output = capsys.readouterr()
    if not value.isprintable():
        assert code == 2 and output.err.count("\n") == 1
        return
    (job,) = yaml.safe_load_all(output.out)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "A", "value": value.replace("$", "$$")} in container["env"]


@pytest.mark.parametrize("value", [*CODE, "comment=", "x", ""])
def test_further_options_of_slurm_with_code_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = value in ("comment=", "x")
    for option in (value, f"comment={value}"):
        code = main(["submit", "slurm", "pretrain", CONFIG, "--dry-run", *GPUS, "--sbatch", option])
        output = capsys.readouterr()
        if harmless or option == "comment=":
            assert code == 0 and f"#SBATCH --{option}\n" in output.out
        else:
            assert code == 2 and output.err.count("\n") == 1 and "\x1b" not in output.err


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
@pytest.mark.parametrize("key", ["directory", "python", "prologue", "container"])
def test_paths_with_code_are_only_paths(
    scheduler: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ray", "srun", "scontrol", "python", "apptainer"):
        # Each cluster tool is replaced by a program that runs the command after its options, as the tool would.
        (tools / name).write_text(RUN)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "1",
        "HEAD_NODE": "h", "PORT": "1", "NODE_INDEX": "0",
    }  # fmt: skip
    for value in CODE:
        # With Kubernetes, the folder must be inside the mounted volume.
        value = f"/data/{value}" if (scheduler, key) == ("k8s", "directory") else value
        code = main(["submit", scheduler, "pretrain", CONFIG, "--dry-run", *GPUS, f"--{key}={value}"])
        output = capsys.readouterr()
        if not value.isprintable() or (value.startswith("-") and key in ("prologue", "container")):
            assert code == 2 and output.err.count("\n") == 1
            continue
        assert code == 0
        script = output.out
        if scheduler == "k8s":
            (job,) = yaml.safe_load_all(script)
            (container,) = job["spec"]["template"]["spec"]["containers"]
            assert set(container) == {"name", "image", "workingDir", "command", "env", "resources", "volumeMounts"}
            if key == "directory":
                assert container["workingDir"] == value
            script = shlex.join(word.replace("$$", "$") for word in container["command"])
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert not list(tmp_path.rglob("HACKED")), value


RUN = """#!/bin/bash
while [ $# -gt 0 ] && [ "$1" != "bash" ]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_arguments_of_the_stage_with_line_breaks_are_refused(
    scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", "runs/a\n#SBATCH --wrap=id"]
    assert main(["submit", scheduler, "pretrain", CONFIG, "--dry-run", *GPUS, "--", *words]) == 2
    assert "line breaks" in capsys.readouterr().err


def test_kubernetes_keeps_dollars(capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes replaces $(NAME) and $$ in a command. The dollar signs of the user must not be changed."""
    words = ["--output", "runs/$$x$(NODE_INDEX)\N{BRAIN}"]
    assert main(["submit", "k8s", "pretrain", CONFIG, "--dry-run", *GPUS, "--", *words]) == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    # Apply the rules of Kubernetes: $$ becomes a dollar sign, and $(NAME) becomes the value of a variable.
    expanded = re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[1] is None else "VARIABLE", container["command"][2])
    assert words[1] in shlex.split(expanded)
