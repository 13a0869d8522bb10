"""The command ``make test-oldest``: run smoke tests with the oldest versions that ``pyproject.toml`` allows.

The tool uv finds the oldest versions that fit each other, and installs them in an environment below ``build``. Only
torch has the version of ``constraints.txt``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "oldest"
VERSIONS = ENVIRONMENT / "versions.txt"
EXTRAS = ("s3", "neo", "mef")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "jsonschema", "moto[s3]", "flask", "flask-cors", "mne-bids")
TESTS = (
    "tests/data_sharding/common/test_config.py",
    "tests/data_sharding/formats/test_readers.py",
    "tests/pretrain/training/test_training.py",
    "tests/finetune/base_models",
    "tests/finetune/test_align.py",
    "tests/finetune/stable_diffusion/test_portable.py",
    "tests/finetune/dm_re2i/test_portable.py",
)
"""Tests that together use every dependency of the code."""


def write_versions(uv: str, torch: str) -> None:
    """Write the oldest versions of all dependencies to `VERSIONS`."""
    fixed = ENVIRONMENT / "torch.txt"
    fixed.write_text(f"{torch}\n")
    command = [uv, "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--no-header", "--no-annotate"]
    options = [word for extra in EXTRAS for word in ("--extra", extra)]
    options += ["--python", str(ENVIRONMENT / "bin" / "python"), "--constraints", str(fixed), "-o", str(VERSIONS)]
    subprocess.run([*command, *options, str(ROOT / "pyproject.toml")], check=True)


def main() -> int:
    """Make the environment, and run the tests, or those that are named on the command line."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    quiet = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    found = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    subprocess.run([*quiet, found[0], "uv", "setuptools<81", "wheel"], check=True)
    uv = str(ENVIRONMENT / "bin" / "uv")
    write_versions(uv, found[0])
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    # DeepSpeed has no wheel, and imports torch while it is built.
    built = ["--no-build-isolation-package", "deepspeed"]
    subprocess.run([*install, *built, "-r", str(VERSIONS), *TOOLS], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    environment = {**os.environ, "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    tests = sys.argv[1:] or TESTS
    return subprocess.run([str(python), "-m", "pytest", "-q", *tests], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
