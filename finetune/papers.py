"""Find the papers that this project reproduces. Each paper has its own folder in ``finetune``.

This module imports no heavy library, because ``dreamscale --help`` lists the commands of the papers.

A paper's folder needs three things. `finetune.dm_re2i` is the smallest example.

- ``PAPER`` in its ``__init__.py``.
- A training command. It writes the model into ``RUN/model``, with a file ``dreamscale.json`` that contains the model's
  ``kind``, and it ends with ``run.status("done")``, ``run.close()`` and ``accelerator.end_training()``.
- A generator: a class with the methods of `finetune.generators.Generator`, made with ``Class(folder, device)`` by
  ``dreamscale generate``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Description of a paper for other modules. Each paper's folder defines it as ``PAPER`` in ``__init__.py``."""

    command: str
    """Name of the ``dreamscale`` command that trains the model."""
    help: str
    """Description of the command in one line."""
    module: str
    """Module with the command's function ``main``."""
    config: str
    """``module:class`` of the command's config."""
    kind: str
    """Kind of the trained model, which is stored in the model's file ``dreamscale.json``."""
    generator: str
    """``module:class`` of the generator that loads such a model; it implements `finetune.generators.Generator`."""


@functools.cache
def find_papers() -> tuple[Paper, ...]:
    """Return the papers of all folders of ``finetune``, sorted by folder name."""
    package = importlib.import_module("finetune")
    folders = [module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg]
    found = (getattr(importlib.import_module(f"finetune.{name}"), "PAPER", None) for name in sorted(folders))
    return tuple(paper for paper in found if isinstance(paper, Paper))
