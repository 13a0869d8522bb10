"""Tests of the container images: their files follow the rules, and both images run the same steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
STEPS = ["system", "torch", "packages", "dreamscale", "check"]


def find_program(name: str) -> str:
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def test_hadolint_finds_no_fault() -> None:
    done = subprocess.run([find_program("hadolint"), str(IMAGES / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_shellcheck_finds_no_fault(tmp_path: Path) -> None:
    # The shell lines of the Apptainer definition are a script, too.
    post = re.search(r"^%post\n(.*?)^%", (IMAGES / "dreamscale.def").read_text(), re.DOTALL | re.MULTILINE)
    assert post
    (tmp_path / "post.sh").write_text("#!/bin/sh\n" + post[1].replace("{{ TORCH_INDEX }}", "index"))
    scripts = [*map(str, sorted(IMAGES.glob("*.sh"))), str(tmp_path / "post.sh")]
    assert len(scripts) == 3
    done = subprocess.run([find_program("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_images_run_the_same_steps_on_the_same_files() -> None:
    docker, apptainer = ((IMAGES / name).read_text() for name in ("Dockerfile", "dreamscale.def"))
    assert re.findall(r"/source/install\.sh (\w+)", docker) == STEPS
    assert re.findall(r"/source/install\.sh (\w+)", apptainer) == STEPS
    copied = {word for line in re.findall(r"^COPY (.+) /source\S*$", docker, re.MULTILINE) for word in line.split()}
    files = re.search(r"^%files\n(.*?)\n\n", apptainer, re.DOTALL | re.MULTILINE)
    assert files and {line.split()[0] for line in files[1].splitlines()} == copied
    ignored = (IMAGES / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    bases = re.findall(r"BASE=(\S+)", docker)[:1], re.findall(r"BASE=(\S+)", apptainer)
    assert bases[0] == bases[1] == ["python:3.11-slim-bookworm"]


def test_the_steps_install_dreamscale_from_the_copied_files(tmp_path: Path) -> None:
    """Run the step that installs Dreamscale itself; the other packages are those of this Python."""
    source, prefix = tmp_path / "source", tmp_path / "python"
    copied = re.findall(r"^COPY (.+) /source\S*$", (IMAGES / "Dockerfile").read_text(), re.MULTILINE)
    for name in (word for line in copied for word in line.split()):
        target = source / Path(name).name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=300)
    (site,) = prefix.glob("lib/python*/site-packages")
    (own,) = [path for path in map(Path, sys.path) if path.name == "site-packages" and (path / "torch").is_dir()]
    (site / "others.pth").write_text(f"{own}\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PREFIX": str(prefix), "SOURCE": str(source), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "1"}
    install = ["sh", str(source / "install.sh")]
    done = subprocess.run([*install, "dreamscale"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    code = "import launch.cli, data_sharding.common.shipped as s; print(launch.cli.__file__, s.shipped_configs())"
    done = subprocess.run(
        [str(prefix / "bin" / "python"), "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.stdout.split() == [str(site / "launch" / "cli.py"), str(site / "dreamscale_configs")], done.stderr


def test_wrong_steps_are_refused() -> None:
    done = subprocess.run(["sh", str(IMAGES / "install.sh"), "all"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
