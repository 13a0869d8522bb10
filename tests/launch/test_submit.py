"""Tests of cluster jobs: job files are valid, every value is quoted, and wrong requests are refused."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.stages import STAGES

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
CONFIGS = {
    "shard": DEMO / "shard_unpaired.yaml",
    "pretrain": DEMO / "pretrain.yaml",
    "align": DEMO / "align.yaml",
    "finetune": DEMO / "stable_diffusion.yaml",
    "ddpm": DEMO / "dm_re2i.yaml",
    "linear": DEMO / "linear.yaml",
}
GPUS = ["--gpus-per-node", "2"]


def render_job(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words[:3], "--dry-run", *words[3:]]) == 0
    return capsys.readouterr().out


def test_every_stage_with_a_config_is_covered():
    assert set(CONFIGS) == {name for name, stage in STAGES.items() if stage.config}


@pytest.mark.parametrize("stage", CONFIGS)
@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_jobs_are_well_formed(scheduler: str, stage: str, capsys: pytest.CaptureFixture[str]):
    text = render_job(capsys, scheduler, stage, str(CONFIGS[stage]), *GPUS)
    assert str(CONFIGS[stage]) in text
    assert "{{" not in text and "{%" not in text
    if scheduler == "k8s":
        service, batch = yaml.safe_load_all(text)
        assert service["metadata"]["name"] == batch["metadata"]["name"] == f"dreamscale-{stage}"
        (container,) = batch["spec"]["template"]["spec"]["containers"]
        assert subprocess.run(["bash", "-n", "-c", container["command"][2]]).returncode == 0
        wanted = {} if STAGES[stage].launcher is None else {"nvidia.com/gpu": 2}
        assert container["resources"]["limits"] == wanted
    else:
        assert text.startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_ray_runs_in_the_chosen_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "a lab's"
    folder.mkdir()
    text = render_job(capsys, "ray", "pretrain", str(CONFIGS["pretrain"]), "--directory", str(folder), *GPUS)
    entrypoint = shlex.split(text.partition(" -- ")[2].replace("\\\n", ""))
    where, _, launch = entrypoint.pop().partition(" && exec ")
    assert launch == f"python -m launch pretrain {CONFIGS['pretrain']} --num_processes 2"
    working_folder = subprocess.run([*entrypoint, f"{where} && pwd"], capture_output=True, text=True, cwd="/").stdout
    assert working_folder.strip() == str(folder)


WORDS = ["--evaluation.every", "3", "--output", 'runs/it\'s $(HEAD_NODE) "quoted"']


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_blanks_and_quotes_reach_the_stage(scheduler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the job's command with a fake Python program that prints its arguments."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    config = str(CONFIGS["pretrain"])
    text = render_job(capsys, scheduler, "pretrain", config, "--python", str(fake), *GPUS, "--", *WORDS)
    if scheduler == "k8s":
        *_, batch = yaml.safe_load_all(text)
        shell = batch["spec"]["template"]["spec"]["containers"][0]["command"]
        shell = [word.replace("$$", "$") for word in shell]
    else:
        (line,) = (line for line in text.splitlines() if "bash -c" in line)
        words = shlex.split(line)
        start = words.index("bash")
        shell = words[start : start + 3]
    environment = {**os.environ, "HEAD_NODE": "h", "PORT": "1", "SLURM_NODEID": "0", "NODE_INDEX": "0"}
    done = subprocess.run(shell, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-7:] == [config, *WORDS, "--num_processes", "2"]


def test_yaml_strings_stay_strings(capsys: pytest.CaptureFixture[str]):
    words = ["--name", "123", "--namespace", "1e3", "--directory", 'a: "b" #c', *GPUS]
    service, batch = yaml.safe_load_all(render_job(capsys, "k8s", "pretrain", str(CONFIGS["pretrain"]), *words))
    assert service["metadata"] == {"name": "123", "namespace": "1e3"}
    assert batch["spec"]["template"]["spec"]["containers"][0]["workingDir"] == 'a: "b" #c'


def test_one_process_without_a_gpu_uses_all_cores(capsys: pytest.CaptureFixture[str]):
    words = ["--cpus-per-node", "12"]
    text = render_job(capsys, "slurm", "linear", str(CONFIGS["linear"]), *words)
    assert "OMP_NUM_THREADS=12" in text and "gpus" not in text.replace("--gpus-per-node 0", "")


def test_slurm_on_several_nodes(capsys: pytest.CaptureFixture[str]):
    words = ["--nodes", "4", "--gpus-per-node", "8", "--partition", "long", "--", "--batch_size", "256"]
    assert main(["submit", "slurm", "pretrain", str(CONFIGS["pretrain"]), "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=long"} <= set(text.splitlines())
    assert "--nnodes 4 --nproc-per-node 8 --node-rank $SLURM_NODEID" in text
    assert "--batch_size 256 --num_processes 32" in text
    assert "#SBATCH --signal=USR1@120" in text
    assert "requeue" in text.split("-eq 75")[1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gpus-per-node", "7"], "batch_size"),
        (["slurm", "pretrain", "nowhere.yaml"], "nowhere.yaml"),
        (["slurm", "verify", str(CONFIGS["pretrain"])], "verify"),
        (["slurm", "linear", str(CONFIGS["linear"]), "--nodes", "2"], "one machine"),
        (["ray", "linear", str(CONFIGS["linear"]), "--nodes", "2"], "one machine"),
        (["slurm", "shard", str(CONFIGS["shard"]), "--nodes", "2"], "Ray"),
        (["ray", "pretrain", str(CONFIGS["pretrain"]), "--nodes", "2"], "slurm or k8s"),
        (["pbs", "pretrain", str(CONFIGS["pretrain"])], "scheduler"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--partition", "a b"], "partition"),
    ],
)
def test_wrong_requests_end_with_exit_code_2(words: list[str], names: str, capsys: pytest.CaptureFixture[str]):
    assert main(["submit", *words, "--dry-run"]) == 2
    assert names in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="would submit a job")
def test_a_missing_tool_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "slurm", "pretrain", str(CONFIGS["pretrain"]), *GPUS]) == 2
    assert "sbatch" in capsys.readouterr().err
