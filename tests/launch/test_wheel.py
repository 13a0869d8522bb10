"""Tests of the wheel: build it from the files under version control, install it, and use it in another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_sharding", "pretrain", "finetune", "launch")
OUTSIDE = {"DREAMSCALE_EEG_CORPUS": "/data/eeg", "LAB_EEG": "/data/eeg", "GPUS": "1"}
"""Environment variables that the configs use in names of folders."""


def _project_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout of a git repository")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty folder, without the packages on which Dreamscale depends."""
    base = tmp_path_factory.mktemp("wheel")
    for name in _project_files():
        target = base / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(base), str(base / "source")]
    subprocess.run(build, check=True, timeout=300)
    shutil.rmtree(base / "source")
    (wheel,) = base.glob("dreamscale-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(base / "site"), str(wheel)], check=True, timeout=300)
    return base / "site"


def run_python(site: Path, cwd: Path, *words: str) -> str:
    """Run Python with the installed wheel in another folder, and return the output."""
    words = words if len(words) > 1 else ("-c", *words)
    environment = {**os.environ, **OUTSIDE, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dreamscale(site: Path, cwd: Path, *words: str) -> str:
    """Run the installed ``dreamscale`` command in another folder, and return the output."""
    return run_python(site, cwd, str(site / "bin" / "dreamscale"), *words)


def test_the_wheel_holds_every_file_of_the_packages_and_every_config(site: Path) -> None:
    project = _project_files()
    missing = [name for name in project if name.startswith(PACKAGES) and not (site / name).is_file()]
    assert not missing, "add the ending of these files to package-data in pyproject.toml"
    configs = [name for name in project if name.startswith("configs/")]
    assert all((site / f"dreamscale_{name}").read_bytes() == (ROOT / name).read_bytes() for name in configs)
    assert {path.name for path in site.iterdir()} - {"bin"} == {
        *PACKAGES,
        "dreamscale_configs",
        next(site.glob("*.dist-info")).name,
    }
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0" in metadata and "# Dreamscale" in metadata
    assert list(site.glob("*.dist-info/licenses/LICENSE"))


def test_first_contact_outside_a_checkout(site: Path, tmp_path: Path) -> None:
    where = run_python(site, tmp_path, "import launch.cli; print(launch.cli.__file__)")
    assert where.strip() == str(site / "launch" / "cli.py")
    assert "configs" in dreamscale(site, tmp_path, "--help")
    listed = dreamscale(site, tmp_path, "configs")
    assert "configs/pretrain/released.yaml" in listed and "configs/cluster/slurm.sh.j2" in listed
    dreamscale(site, tmp_path, "configs", "demo", "-o", "mine")
    assert (tmp_path / "mine" / "demo" / "smoke.yaml").is_file()


@pytest.mark.parametrize("scheduler", ["slurm", "ray", "k8s"])
def test_a_cluster_job_is_rendered(site: Path, tmp_path: Path, scheduler: str) -> None:
    nodes = "1" if scheduler == "ray" else "2"
    words = (scheduler, "pretrain", "configs/pretrain/released.yaml", "--nodes", nodes, "--dry-run")
    # The preset's batch size of 100 is not divisible by 16 processes, so set another batch size.
    text = dreamscale(site, tmp_path, "submit", *words, "--", "--batch_size", "1600")
    assert "configs/pretrain/released.yaml" in text and "--batch_size 1600" in text


def _documented() -> list[tuple[str, str]]:
    """Return the command and the path of every ``dreamscale COMMAND ... configs/...`` in the documentation."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
    pattern = r"(?:dreamscale|-m) ([\w.]+)(?: [\w/]+)?(?: --config)? (configs/[\w/]+\.yaml)"
    modules = {"pretrain.train": "pretrain", "data_sharding": "shard", "finetune.align": "align"}
    # The documentation runs the module classification.compare with 'python -m'; its config is one of the command
    # 'ddpm'.
    modules["finetune.dm_re2i.classification.compare"] = "ddpm"
    found = {
        (modules.get(command, command), path)
        for text in texts
        for command, path in re.findall(pattern, text.read_text())
    }
    return sorted((command, path) for command, path in found if command != "submit")


def test_the_documentation_names_configs() -> None:
    assert {"shard", "pretrain", "align", "finetune", "ddpm", "evaluate", "miniature", "plan"} <= {
        command for command, _ in _documented()
    }


def test_every_documented_config_is_found(site: Path, tmp_path: Path) -> None:
    # Run all commands in one process, because importing the stages takes most of the time.
    code = f"""
import contextlib, io
from launch.cli import main
for command, path in {_documented()!r}:
    printed = io.StringIO()
    # 'plan' takes the path of a config of 'pretrain', which is not its own config, so --config does not work.
    words = [path] if command == "plan" else ["--config", path, "--print_config"]
    try:
        with contextlib.redirect_stdout(printed):
            code = main([command, *words])
    except SystemExit as end:
        code = end.code
    if code or len(printed.getvalue().splitlines()) < 4:
        print(command, path)
"""
    assert run_python(site, tmp_path, code) == ""


def test_the_demo_finds_its_configs_and_begins(site: Path, tmp_path: Path) -> None:
    code = """
import pathlib
from launch.chain import Chain
from launch.demo.steps import make_steps

out = pathlib.Path("demo").absolute()
steps = make_steps(out, 0, "smoke")
Chain(out, print).run(steps[0], "[1]")
print(len(steps))
"""
    assert int(run_python(site, tmp_path, code).splitlines()[-1]) > 10
    assert list((tmp_path / "demo" / "corpus").rglob("*.vhdr"))
