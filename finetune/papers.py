"""Find the papers that this project reproduces. Each paper has its own folder in ``finetune``.

``dreamscale --help`` uses this module to list the commands of the papers. The help must appear quickly, so this module
imports no heavy library.

The folder of a paper has three parts, and `finetune.linear` is the smallest example.

- The file ``__init__.py`` of the folder defines ``PAPER``.
- A training command writes the model to the folder ``RUN/model``, in which ``dreamscale.json`` contains the model's
  ``kind``. The training command uses `start_processes` and `use_run` of `finetune.training.accelerate`, and its last
  step is ``run.status("done")``. A command that always runs as one process, such as `finetune.linear`, needs only
  `use_run`.
- A generator class has the methods of `finetune.generators.Generator`. ``dreamscale generate`` creates the generator
  with ``Class(folder, values, device)``; the values are the content of ``dreamscale.json``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Description of a paper that this project reproduces. Each paper's folder defines the description ``PAPER``."""

    command: str
    """Name of the ``dreamscale`` command that trains the model."""
    help: str
    """Description of the command in one line."""
    module: str
    """Module with the command's function ``main``."""
    kind: str
    """Kind of the trained model, which is stored in the model's file ``dreamscale.json``."""
    generator: str
    """``module:class`` of the model's generator, with the methods of `finetune.generators.Generator`."""
    launcher: Literal["accelerate"] | None = "accelerate"
    """Launcher of the training processes; None for a training that always runs as one process on a CPU."""


@functools.cache
def find_papers() -> tuple[Paper, ...]:
    """Return the papers of all folders of ``finetune``, sorted by folder name."""
    package = importlib.import_module("finetune")
    folders = [module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg]
    found = (getattr(importlib.import_module(f"finetune.{name}"), "PAPER", None) for name in sorted(folders))
    return tuple(paper for paper in found if isinstance(paper, Paper))
