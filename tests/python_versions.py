"""The commands ``make resolve`` and ``make test-python``, which check other Python versions than ``make test``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
CONSTRAINTS = ROOT / "constraints.txt"
NEED_TORCH = {"torch", "accelerate", "deepspeed", "diffusers", "transformers", "braindecode"}
TOOLS = {"basedpyright", "codespell", "pre-commit", "ruff", "tensorboard"}
TESTS = ["tests/data_sharding", "tests/launch/test_configs.py"]


def requirements(without: set[str]) -> list[str]:
    """Return the dependencies of the project and of its extras, except the packages in ``without``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [*project["dependencies"], *extras["s3"], *extras["dev"]]
    return [text for text in found if re.split(r"[^\w-]", text)[0] not in {*without, project["name"]}]


def write_stand_in(name: str, folder: Path) -> None:
    """Write an empty wheel with the requirements of an installed package, except its requirements for CUDA.

    pip reads the requirements of a package from the package's wheel. The real wheels of torch are gigabytes large, and
    DeepSpeed has no wheel because it is built from source.
    """
    # If two versions are otherwise equal, pip prefers the version with a local label such as +standin.
    version = metadata.version(name).split("+")[0] + "+standin"
    needed = [text for text in metadata.requires(name) or [] if not re.search(r"extra ==|nvidia|cuda|triton", text)]
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needed)]
    stem = f"{name}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def resolve() -> int:
    """Ask pip, for each Python version, whether wheels exist for the exact versions in constraints.txt."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    torch = metadata.version("torch").split("+")[0]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("torch", "deepspeed"):
            write_stand_in(name, Path(folder))
        for version in VERSIONS:
            wheels = ["--python-version", version, "--only-binary=:all:"]
            index = subprocess.run([*pip, "index", "versions", "torch", *wheels], capture_output=True, text=True)
            options = ["--dry-run", "--ignore-installed", "--quiet", "--target", folder, "--find-links", folder]
            done = subprocess.run([*pip, "install", *options, *wheels, "-c", str(CONSTRAINTS), *requirements(set())])
            good = done.returncode == 0 and re.search(rf"\b{re.escape(torch)}\b", index.stdout) is not None
            print(f"Python {version}: {'every dependency resolves' if good else 'does NOT resolve'}", flush=True)
            failed += [] if good else [version]
    return 1 if failed else 0


def test() -> int:
    """With the current Python, run the tests that do not need torch, in a virtual environment below ``build``."""
    environment = ROOT / "build" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    subprocess.run([*install, *requirements(NEED_TORCH | TOOLS)], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    return subprocess.run([str(python), "-m", "pytest", "-n", "2", "--dist", "loadfile", *TESTS], cwd=ROOT).returncode


if __name__ == "__main__":
    commands = {"resolve": resolve, "test": test}
    if sys.argv[1:] not in ([name] for name in commands):
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(commands)}")
    sys.exit(commands[sys.argv[1]]())
