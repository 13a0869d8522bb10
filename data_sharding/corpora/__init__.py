"""Corpora: find the recordings, the subject of each, and the trials in it.

Each kind of corpus has an adapter in a file of its own. To add a kind, add a file with a class under `register`; all
files of this folder are imported, so nothing else has to be changed.
"""

from __future__ import annotations

import importlib
import pkgutil

from data_sharding.corpora.base import Adapter, CorpusConfig, list_items, open_item, register
from data_sharding.corpora.design import describe_design
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import expand, recording_key

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Adapter",
    "CorpusConfig",
    "Item",
    "Trial",
    "describe_design",
    "expand",
    "list_items",
    "open_item",
    "recording_key",
    "register",
]
