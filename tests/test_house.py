"""The house as a whole: every module imports, imports run one way, every config loads, help stays light."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["data_sharding", "pretrain", "finetune", "launch"]


def _modules() -> list[str]:
    names = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        names += [package, *(m.name for m in pkgutil.walk_packages(root.__path__, f"{package}."))]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", _modules())
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    above = set(PACKAGES[PACKAGES.index(package) + 1 :])
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in above]
    assert not wrong


def test_no_file_is_beyond_700_lines() -> None:
    long = {p: n for d in PACKAGES for p in (ROOT / d).rglob("*.py") if (n := len(p.read_text().splitlines())) > 700}
    assert not long


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from launch.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'mne', 'ray', 'diffusers', 'jsonargparse', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in (
        "demo",
        "shard",
        "pretrain",
        "export",
        "encode",
        "align",
        "finetune",
        "ddpm",
        "generate",
        "evaluate",
    ):
        assert command in done.stdout
