"""Write classes and functions of this project as one Python file that runs without this project.

The file is made from the project's own source text, so it cannot differ from the code that the project runs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

OWN = ("data_sharding", "pretrain", "finetune", "launch")
"""Packages of this project."""


@dataclass
class _Module:
    """Source text of a module of this project, and the definitions and imports at its top level."""

    lines: list[str]
    statements: dict[str, ast.stmt] = field(default_factory=dict)
    """Maps the name of a function, class or constant to the statement that defines it."""
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Maps an imported name to the module that it comes from and its original name in this module. The original name is
    None if the whole module is imported."""


def _read_module(name: str) -> _Module:
    text = Path(inspect.getfile(importlib.import_module(name))).read_text(encoding="utf-8")
    module = _Module(text.splitlines())
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module.imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            module.imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.statements[node.name] = node
        elif isinstance(node, ast.Assign):
            module.statements |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            module.statements[node.target.id] = node
    return module


def _drop_methods(node: ast.stmt, methods: Collection[str]) -> list[ast.stmt]:
    """Remove methods from a class, and return the removed statements."""
    if not isinstance(node, ast.ClassDef):
        return []
    dropped: list[ast.stmt] = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name in methods]
    node.body = [statement for statement in node.body if statement not in dropped]
    return dropped


def _names(node: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that a statement uses when it runs and, as a second set, the names in its annotations."""
    annotations: list[ast.AST] = []
    for part in ast.walk(node):
        found = (getattr(part, "annotation", None), getattr(part, "returns", None))
        annotations += [annotation for annotation in found if annotation is not None]
    inside = {id(part) for annotation in annotations for part in ast.walk(annotation)}
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    return {n.id for n in names if id(n) not in inside}, {n.id for n in names if id(n) in inside}


class _Collector:
    """Collect the statements that some names need, in an order in which these statements can run."""

    def __init__(self, without: dict[str, Collection[str]]) -> None:
        self.without = without
        self.modules: dict[str, _Module] = {}
        self.origin: dict[str, str] = {}
        self.imports: set[str] = set()
        self.parts: list[str] = []

    def add(self, module_name: str, name: str) -> None:
        """Add the definition of a name to the file, after everything that the definition needs."""
        module = self.modules.setdefault(module_name, _read_module(module_name))
        if name in module.imports:
            source, original = module.imports[name]
            if source.split(".")[0] in OWN and original is not None:
                self.add(source, original)
            else:
                self._add_import(name, source, original)
            return
        if name not in module.statements:
            # Nothing is to be added: the name is built in, or it is an argument or a local variable of a function.
            return
        if name in self.origin:
            if self.origin[name] != module_name:
                raise ValueError(f"{self.origin[name]} and {module_name} both define {name}; rename one of them")
            return
        self.origin[name] = module_name
        node = module.statements[name]
        dropped = _drop_methods(node, self.without.get(name, ()))
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom) and str(part.module).split(".")[0] in OWN:
                raise ValueError(f"{module_name}: {name} imports {part.module}, so it cannot run without this project")
        used, annotated = _names(node)
        for other in sorted(used - {name}):
            self.add(module_name, other)
        for other in sorted(annotated - used):
            source, original = module.imports.get(other, (OWN[0], None))
            if source.split(".")[0] not in OWN:
                self._add_import(other, source, original)
        self.parts.append(self._text(module, node, dropped))

    def _add_import(self, name: str, source: str, original: str | None) -> None:
        if original is None:
            self.imports.add(f"import {source}" + (f" as {name}" if name != source else ""))
        else:
            self.imports.add(f"from {source} import {original}" + (f" as {name}" if name != original else ""))

    def _text(self, module: _Module, node: ast.stmt, dropped: list[ast.stmt]) -> str:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        lines = dict(enumerate(module.lines[first - 1 : node.end_lineno], first))
        for statement in dropped:
            assert isinstance(statement, ast.FunctionDef)
            start = min([statement.lineno, *(decorator.lineno for decorator in statement.decorator_list)])
            for number in range(start, (statement.end_lineno or start) + 1):
                lines.pop(number)
        return "\n".join(lines.values()).rstrip()


def write_standalone(
    roots: Iterable[tuple[str, str]],
    head: str,
    *,
    without: dict[str, Collection[str]] | None = None,
    foot: str = "",
) -> str:
    """Return the text of a Python file with some classes and functions of this project and all code that they need.

    Parameters
    ----------
    roots : iterable of (str, str)
        Module and name of each class or function, e.g. ``("finetune.diffusion", "sample")``.
    head : str
        Docstring of the file.
    without : dict, optional
        Maps the name of a class to the names of its methods that are left out, e.g. because they need the rest of the
        project.
    foot : str
        Python code that is written at the end of the file.

    Returns
    -------
    str
        Source text of a Python file that imports nothing from this project.

    Raises
    ------
    ValueError
        If two modules define the same name, or code imports a module of this project inside a function.
    """
    collector = _Collector(without or {})
    for module_name, name in roots:
        collector.add(module_name, name)
    imports = "\n".join(sorted(collector.imports, key=lambda line: (line.startswith("from"), line)))
    parts = [f'"""{head}"""', "from __future__ import annotations", imports, *collector.parts, foot]
    return "\n\n\n".join(part for part in parts if part) + "\n"
