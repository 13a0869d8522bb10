"""Rules for the whole project: allowed imports, maximum sizes of files and folders, and fast ``--help``.

The import rules hold for every import statement: at the top of a file, under ``TYPE_CHECKING``, and inside a function.
The import rules also hold for calls of ``importlib.import_module`` with a literal module name.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["launch", "finetune", "pretrain", "data_sharding"]
"""A package may import only packages that come after it in `PACKAGES`."""
FOLDERS = {
    "launch": [
        *(
            "__main__",
            "cli",
            "commands",
            "configs",
            "doctor",
            "submit",
            "ray_train",
            "ray_nodes",
            "agent",
            "local",
            "preset",
            "ablate",
            "demo",
        ),
        *("chain", "worker", "stages", "parent"),
    ],
    "finetune": [
        *(
            "align",
            "generate",
            "frozen_decoder",
            "retrieval",
            "stable_diffusion",
            "dm_re2i",
            "evaluation",
            "generation",
            "linear",
        ),
        *("generators", "eeg", "clip_head", "objective", "diffusion", "electrodes", "targets", "people", "training"),
        *("images", "papers", "portable", "base_models", "foreign_models"),
    ],
    "pretrain": [
        *("train", "plan", "convert", "export", "encode"),
        *("scale", "training", "probe", "evidence", "runs", "encoder", "model"),
    ],
    "data_sharding": [
        *("__main__", "job", "audit", "corpora", "dataset", "processing", "formats", "common"),
    ],
}
"""Folders and files directly inside each package. An entry may import only entries that come later in the same list."""
MOST_FILES = 15
MOST_LINES = 700


def _code_files() -> dict[str, Path]:
    """Return the path of every Python file of the packages, by module name."""
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = _code_files()


def _targets(node: ast.AST, module: str, files: dict[str, Path]) -> set[str]:
    """Return the modules that one statement imports, including modules of other projects."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            keep = len(parts) - node.level + (files[module].name == "__init__.py")
            base = ".".join(filter(None, [*parts[:keep], base]))
        # If the file package/name.py exists, 'from package import name' imports the module package.name.
        return {name if (name := f"{base}.{alias.name}") in files else base for alias in node.names}
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return set()


def _import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Return, for every module, all modules that the module imports."""
    graph = {}
    for module, path in files.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        graph[module] = set().union(*(_targets(node, module, files) for node in nodes)) - {module}
    return graph


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return each group of modules that import one another (Tarjan's strongly connected components)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []
    count = itertools.count()

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = next(count)
        stack.append(module)
        for other in graph[module] & graph.keys():
            if other not in numbers:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == numbers[module]:
            group = stack[stack.index(module) :]
            del stack[-len(group) :]
            if len(group) > 1:
                circles.append(sorted(group))

    for module in graph:
        if module not in numbers:
            visit(module)
    return circles


GRAPH = _import_graph(FILES)


def test_the_import_graph_sees_every_kind_of_import(tmp_path: Path) -> None:
    texts = {
        "pkg/__init__.py": "from .a import x",
        "pkg/a.py": "import pkg.b",
        "pkg/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import c",
        "pkg/c.py": "def f():\n    from .sub.d import y",
        "pkg/sub/d.py": "import importlib\nimportlib.import_module('pkg.a')",
        "pkg/e.py": "from pkg.a import x",
    }
    files = {}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        files[name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = path
    graph = _import_graph(files)
    assert graph["pkg"] == {"pkg.a"} and graph["pkg.e"] == {"pkg.a"}
    assert _circles(graph) == [["pkg.a", "pkg.b", "pkg.c", "pkg.sub.d"]]


def test_packages_import_one_way() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if (top := other.split(".")[0]) in PACKAGES and PACKAGES.index(top) < PACKAGES.index(module.split(".")[0])
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_import_one_way(package: str) -> None:
    order = FOLDERS[package]
    present = {module.split(".")[1] for module in FILES if module.startswith(f"{package}.")}
    assert present == set(order), f"list every folder and file of {package} in FOLDERS of {Path(__file__).name}"
    wrong = []
    for module, others in GRAPH.items():
        for other in others:
            inside = module.startswith(f"{package}.") and other.startswith(f"{package}.")
            if inside and order.index(other.split(".")[1]) < order.index(module.split(".")[1]):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_file_takes_part_in_an_import_circle() -> None:
    assert not _circles(GRAPH)


def test_no_folder_holds_more_than_15_code_files() -> None:
    counts: dict[Path, int] = {}
    for folder in (*PACKAGES, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            counts[path.parent] = counts.get(path.parent, 0) + (path.stem not in ("__init__", "__main__"))
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_cores_are_counted_in_one_place() -> None:
    """A job of a cluster may use only some cores of its machine, and `os.cpu_count` counts all of them."""
    users = [name for name, path in FILES.items() if "cpu_count(" in path.read_text()]
    assert users == ["data_sharding.common.cores"], "use data_sharding.common.cores.count_cores"


def test_no_file_is_longer_than_700_lines() -> None:
    paths = itertools.chain.from_iterable(
        (ROOT / folder).rglob("*.py") for folder in (*PACKAGES, "tests", "benchmarks")
    )
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    assert not {path: length for path, length in lengths.items() if length > MOST_LINES}


def _module_names() -> list[str]:
    names = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        names += [package, *(m.name for m in pkgutil.walk_packages(root.__path__, f"{package}."))]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", _module_names())
def test_every_module_imports_and_has_a_docstring(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from launch.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'mne', 'ray', 'diffusers', 'jsonargparse', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
