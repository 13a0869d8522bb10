"""Tests of cluster jobs: job files are valid, every value is quoted, and wrong requests are refused."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.stages import STAGES
from launch.submit.run import main as submit
from launch.submit.slurm import SlurmOptions, follow

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo"
ABLATION = DEMO.with_name("finetune") / "ablations" / "dm_re2i"
ARGUMENTS: dict[str, list[str]] = {
    "demo": [],
    "shard": [str(DEMO / "shard_unpaired.yaml")],
    "verify": ["/data/set"],
    "pretrain": [str(DEMO / "pretrain.yaml")],
    "export": ["runs/a", "--", "encoder"],
    "convert": ["old.pth", "--", "encoder"],
    "encode": ["encoder", "--", "a.edf", "-o", "a.npz"],
    "probe": ["encoder", "--", "/data/set"],
    "miniature": ["/data/set", "--", "-o", "base"],
    "align": [str(DEMO / "align.yaml")],
    "finetune": [str(DEMO / "stable_diffusion.yaml")],
    "ddpm": [str(DEMO / "dm_re2i.yaml")],
    "linear": [str(DEMO / "linear.yaml")],
    "decode": [str(DEMO.with_name("finetune") / "frozen_decoder.yaml")],
    "generate": ["runs/a/model", "--", "/data/set", "-o", "out"],
    "retrieve": ["runs/a", "--", "/data/set", "-o", "out"],
    "evaluate": ["out"],
    "compare": ["out", "--", "other"],
    "ablate": [str(ABLATION)],
    "doctor": [],
    "preset": ["things_eeg2_retrieval", "--", "--output", "out"],
}
"""Arguments of each stage that can be submitted. Words after -- follow the options of the job."""
CONFIGS = {stage: words[0] for stage, words in ARGUMENTS.items() if words}
GPUS = ["--gpus-per-node", "2"]


def render_job(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words[:3], "--dry-run", *words[3:]]) == 0
    return capsys.readouterr().out


def test_every_stage_that_can_be_submitted_is_covered():
    assert set(ARGUMENTS) == {name for name, stage in STAGES.items() if stage.submits}
    assert set(STAGES) - set(ARGUMENTS) == {"inspect", "plan", "submit", "configs"}


@pytest.mark.parametrize("stage", ARGUMENTS)
@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_jobs_are_well_formed(scheduler: str, stage: str, capsys: pytest.CaptureFixture[str]):
    words = ARGUMENTS[stage]
    end = words.index("--") if "--" in words else len(words)
    assert main(["submit", scheduler, stage, *words[:end], "--dry-run", *GPUS, *words[end:]]) == 0
    text = capsys.readouterr().out
    assert f"{shlex.join(words[:end] + words[end + 1 :])}" in text
    assert "{{" not in text and "{%" not in text
    if scheduler == "k8s":
        (batch,) = yaml.safe_load_all(text)
        assert batch["metadata"]["name"].startswith(f"dreamscale-{stage}-")
        (container,) = batch["spec"]["template"]["spec"]["containers"]
        assert subprocess.run(["bash", "-n", "-c", container["command"][2]]).returncode == 0
        assert container["resources"].get("limits") == (None if stage == "shard" else {"nvidia.com/gpu": 2})
    else:
        assert text.startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        assert ("gpus" in text.replace("--num-gpus", "")) is (stage != "shard")


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("stage", ["shard", "pretrain", "align", "encode"])
def test_shellcheck_finds_no_fault(stage: str, nodes: str, capsys: pytest.CaptureFixture[str]):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    for scheduler in ("slurm", "ray"):
        words = ARGUMENTS[stage]
        end = words.index("--") if "--" in words else len(words)
        more = FULL if scheduler == "slurm" else []
        several = ["--nodes", nodes if stage != "encode" else "1"]
        assert main(["submit", scheduler, stage, *words[:end], "--dry-run", *GPUS, *several, *more, *words[end:]]) == 0
        done = subprocess.run([program, "-"], input=capsys.readouterr().out, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        if scheduler == "slurm":
            more = [*more, "--container-runtime", "enroot"]
            assert main(["submit", scheduler, stage, *words[:end], "--dry-run", *several, *more, *words[end:]]) == 0
            done = subprocess.run([program, "-"], input=capsys.readouterr().out, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    sandbox = Path(__file__).parents[1] / "slurm" / "sandbox.sh"
    done = subprocess.run([program, str(sandbox)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


FULL = [
    *("--modules", "gcc/13,cuda/12.6", "--prologue", "/home/me/start it.sh", "--container", "/images/a b.sif"),
    *("--binds", "/data,/scratch:/tmp", "--restarts", "2", "--qos", "long", "--mem", "0", "--constraint", "a100|h100"),
    *(
        "--preflight",
        "--array",
        "1-3%1",
        "--dependency",
        "afterok:12:13",
        "--sbatch",
        "exclusive",
        "--sbatch=nodelist=n[1-4]",
    ),
]


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


STAND_IN = """#!/bin/bash
case "${0##*/}" in
  scontrol) echo h ;;
  srun) while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 exec "$@" ;;
  *) echo "${0##*/}" "$@" >>"$TOLD"; while [ $# -gt 1 ] && [[ "$1" != *.sif ]]; do shift; done; shift; exec "$@" ;;
esac
"""


def run_slurm_job(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm job without Slurm. Stand-ins for its programs, and for container programs, run the command."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "apptainer", "enroot"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "h", "SLURM_JOB_ID": "7",
        "TOLD": str(folder / "told"), **environment,
    }  # fmt: skip
    return subprocess.run(["bash"], input=text, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("runtime", ["apptainer", "enroot"])
def test_modules_a_prologue_and_a_container(runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program = tmp_path / "python"
    program.write_text('#!/bin/bash\necho "$LOADED $STARTED" "$@"\npwd\n')
    program.chmod(0o755)
    (tmp_path / "start it.sh").write_text("export STARTED=prologue\n")
    image = tmp_path / "an image.sif"
    words = ["--python", str(program), "--directory", str(tmp_path), "--container", str(image), "--binds", "/a,/b:/c"]
    words += ["--modules", "gcc/13,cuda", "--prologue", str(tmp_path / "start it.sh"), "--gpus-per-node", "1"]
    text = render_job(capsys, "slurm", "pretrain", CONFIGS["pretrain"], *words, "--container-runtime", runtime)
    module = {"BASH_FUNC_module%%": '() { [ $1 = load ] && export LOADED="$*"; }'}
    done = run_slurm_job(text, tmp_path, SEVERAL="a\nb", **module)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("load gcc/13 cuda prologue -m launch pretrain")
    told = (tmp_path / "told").read_text()
    if runtime == "apptainer":
        assert told.startswith(f"apptainer exec --nv --bind /a --bind /b:/c {image} {program} -m launch pretrain")
    else:
        # The folder of the job is mounted, the command starts in it, and the variables of the job are passed on.
        assert told.startswith(f"enroot start --mount {tmp_path}:{tmp_path} --mount /a:/a --mount /b:/c --env ")
        forwarded = {after for word, after in itertools.pairwise(told.split()) if word == "--env"}
        assert {"STARTED", "LOADED", "OMP_NUM_THREADS", "PET_SHUTDOWN_TIMEOUT", "SLURM_JOB_ID"} <= forwarded
        assert not {"PATH", "HOME", "PWD", "SEVERAL"} & forwarded
        assert "cannot pass on the variable SEVERAL" in done.stderr
        assert f'{image} sh -c cd -- "$0" && exec "$@" {tmp_path} {program} -m launch pretrain' in told
        assert done.stdout.splitlines()[1] == str(tmp_path)
    failing = {"BASH_FUNC_module%%": "() { false; }"}
    done = run_slurm_job(text, tmp_path, **failing)
    assert done.returncode == 2 and "modules gcc/13,cuda cannot be loaded" in done.stderr
    (tmp_path / "start it.sh").unlink()
    done = run_slurm_job(text, tmp_path, **module)
    assert done.returncode == 2 and "the prologue" in done.stderr


@pytest.mark.parametrize(("checked", "code"), [(0, 5), (2, 2)])
@pytest.mark.parametrize("scheduler", ["slurm", "slurm with enroot", "ray", "k8s"])
def test_the_check_before_a_stage(
    scheduler: str, checked: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A fake Python prints its arguments; it ends the check with one exit code, and the stage with exit code 5."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\necho "$@"\n[[ "$*" != *preflight* ]] || exit {checked}\nexit 5\n')
    fake.chmod(0o755)
    words = ["--python", str(fake), "--directory", "/data" if scheduler == "k8s" else str(tmp_path), "--preflight"]
    words += ["--container", "i.sif", "--container-runtime", "enroot"] if "enroot" in scheduler else []
    name = scheduler.split()[0]
    text = render_job(capsys, name, "pretrain", CONFIGS["pretrain"], *words, *GPUS)
    if name == "slurm":
        done = run_slurm_job(text, tmp_path)
    else:
        done = subprocess.run(
            shell_of(name, text),
            capture_output=True,
            text=True,
            env={**os.environ, "HEAD_NODE": "h", "PORT": "29500", "NODE_INDEX": "0"},
        )
    assert done.returncode == code, done.stderr
    check, *rest = [line for line in done.stdout.splitlines() if line.startswith("-m")]
    assert "--preflight true --device cuda --num_processes 2" in check and "doctor" in check
    if scheduler == "k8s":
        assert "--master-port 31500" in check
    assert len(rest) == (checked == 0) and all("pretrain" in line for line in rest)


def test_the_check_before_sharding_starts_ray(capsys: pytest.CaptureFixture[str]):
    words = ["shard", CONFIGS["shard"], "--preflight", "--nodes"]
    text = render_job(capsys, "slurm", *words, "2")
    assert text.count("-m launch.ray_nodes --nodes 2") == 2
    assert '--port "$((PORT + 2000))" -- doctor --preflight true --device cpu --start_ray true' in text
    assert "-m launch doctor --preflight true --device cpu --start_ray true --ray.address auto" in render_job(
        capsys, "ray", *words, "1"
    )


def shell_of(scheduler: str, text: str) -> list[str]:
    """Return the shell command that a job of Ray or Kubernetes runs."""
    if scheduler == "k8s":
        *_, batch = yaml.safe_load_all(text)
        shell = batch["spec"]["template"]["spec"]["containers"][0]["command"]
        return [word.replace("$$", "$") for word in shell]
    (line,) = (line for line in text.splitlines() if "bash -c" in line)
    words = shlex.split(line)
    start = words.index("bash")
    return words[start : start + 3]


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_blanks_and_quotes_reach_the_stage(scheduler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run the job's command with a fake Python program that prints its arguments."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    config = str(CONFIGS["pretrain"])
    more = ["--directory", "/data/a" if scheduler == "k8s" else str(tmp_path)]
    text = render_job(capsys, scheduler, "pretrain", config, "--python", str(fake), *more, *GPUS, "--", *WORDS)
    if scheduler == "slurm":
        done = run_slurm_job(text, tmp_path)
        assert done.stdout.splitlines()[-7:] == [config, *WORDS, "--num_processes", "2"], done.stderr
        return
    environment = {**os.environ, "HEAD_NODE": "h", "PORT": "1", "NODE_INDEX": "0"}
    shell = shell_of(scheduler, text)
    done = subprocess.run(shell, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-7:] == [config, *WORDS, "--num_processes", "2"]


def test_yaml_strings_stay_strings(capsys: pytest.CaptureFixture[str]):
    words = ["--name", "null", "--namespace", "1e3", "--directory", '/data/a: "b" #c', *GPUS]
    (batch,) = yaml.safe_load_all(render_job(capsys, "k8s", "pretrain", str(CONFIGS["pretrain"]), *words))
    assert (batch["metadata"]["name"], batch["metadata"]["namespace"]) == ("null", "1e3")
    assert batch["spec"]["template"]["spec"]["containers"][0]["workingDir"] == '/data/a: "b" #c'


def test_one_process_without_a_gpu_uses_all_cores(capsys: pytest.CaptureFixture[str]):
    words = ["--cpus-per-node", "12"]
    text = render_job(capsys, "slurm", "linear", str(CONFIGS["linear"]), *words)
    assert "OMP_NUM_THREADS=12" in text and "gpus" not in text


def test_slurm_on_several_nodes(capsys: pytest.CaptureFixture[str]):
    words = ["--nodes", "4", "--gpus-per-node", "8", "--partition", "long", "--", "--batch_size", "256"]
    assert main(["submit", "slurm", "pretrain", str(CONFIGS["pretrain"]), "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=long"} <= set(text.splitlines())
    assert '--nnodes 4 --nproc-per-node 8 --node-rank "$SLURM_NODEID"' in text
    assert "--batch_size 256 --num_processes 32" in text
    assert "#SBATCH --signal=USR1@120" in text
    assert "requeue" in text.split("-eq 75")[1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gpus-per-node", "7"], "batch_size"),
        (["slurm", "pretrain", "nowhere.yaml"], "nowhere.yaml"),
        (["slurm", "inspect", "/data/set"], "inspect"),
        (["slurm", "generate", "runs/a/model", "--", "/data/set", "--splt", "x"], "splt"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "--exclusive"], "without --"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "qos=x"], "use --qos"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "gpu:a100:4"], "contradict"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "gpu"], "(1 GPUs per machine)"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "lic:2,gpu:a100"], "(1 GPUs per machine)"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "gpu:a100:4,gpu:h100:2"], "(6 GPUs per machine)"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "gpu:a100:four"], "gpu:TYPE:COUNT"),
        (["slurm", "shard", str(CONFIGS["shard"]), "--gres", "gpu:8"], "shard uses no GPU"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "ntasks-per-node=4"], "always 1"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "open-mode=truncate"], "appends"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "no-requeue"], "requeue"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "requeue"], "requeue"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "gpus=8"], "use --gpus_per_node"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "gpus-per-task=8"], "use --gpus_per_node"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--sbatch", "chdir=/data"], "use --directory"),
        (
            [
                *("slurm", "pretrain", str(CONFIGS["pretrain"]), "--gpus-per-node", "1", "--directory", "/a b"),
                *("--container", "i.sqsh", "--container-runtime", "enroot"),
            ],
            "cannot mount",
        ),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--binds", "/data"], "--container"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--grace-s", "5"], "grace_s"),
        (["slurm", "linear", str(CONFIGS["linear"]), "--nodes", "2"], "one machine"),
        (["ray", "linear", str(CONFIGS["linear"]), "--nodes", "2"], "one machine"),
        (["k8s", "shard", str(CONFIGS["shard"]), "--nodes", "2"], "Ray"),
        (["ray", "pretrain", str(CONFIGS["pretrain"]), "--stop-s", "3"], "stop_s"),
        (["pbs", "pretrain", str(CONFIGS["pretrain"])], "scheduler"),
        (["slurm", "pretrain", str(CONFIGS["pretrain"]), "--partition", "a b"], "partition"),
    ],
)
def test_wrong_requests_end_with_exit_code_2(words: list[str], names: str, capsys: pytest.CaptureFixture[str]):
    end = words.index("--") if "--" in words else len(words)
    assert main(["submit", *words[:end], "--dry-run", *words[end:]]) == 2
    assert names in capsys.readouterr().err


def test_gpus_can_be_asked_for_with_gres(capsys: pytest.CaptureFixture[str]):
    words = ["--gres", "gpu:a100", "--container", "i.sif", "--", "a.edf", "-o", "a.npz"]
    text = render_job(capsys, "slurm", "encode", "encoder", *words)
    assert "#SBATCH --gres=gpu:a100\n" in text and "--gpus-per-node" not in text
    assert "apptainer exec --nv i.sif python -m launch encode encoder a.edf" in text
    text = render_job(capsys, "slurm", "pretrain", str(CONFIGS["pretrain"]), "--gres", "gpumem:4", *GPUS)
    assert "#SBATCH --gres=gpumem:4\n#SBATCH --gpus-per-node=2\n" in text


@pytest.mark.parametrize("words", [[], ["--", "x"]])
def test_missing_words_are_named(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert submit(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'scheduler'" in error and "'stage'" in error


@pytest.mark.parametrize(("array", "log"), [("", "a-7.log"), ("1-5%1", "a-7_1.log"), ("0-3", "a-7_0.log")])
def test_the_log_of_a_job(array: str, log: str):
    assert f"/{log} " in follow("7", "a", SlurmOptions(array=array, logs="/logs"))


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "slurm", "pretrain", str(CONFIGS["pretrain"]), *GPUS]) == 2
    assert "sbatch" in capsys.readouterr().err


def test_a_missing_folder_for_the_log_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Slurm ends a job at once, without a message, if it cannot write the log."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["submit", "slurm", "pretrain", str(CONFIGS["pretrain"]), *GPUS, "--logs"]
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "none': no such folder" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) == 1
    assert "sbatch refused the job (exit code 9)" in capsys.readouterr().err
