"""Corpora: which recordings there are, whose they are, and which trials they hold.

One adapter a kind of corpus, each in a file of its own: a new kind is a new file here with a class under `register`.
"""

from __future__ import annotations

import importlib
import pkgutil

from data_sharding.corpora.base import Adapter, CorpusConfig, list_items, open_item, register
from data_sharding.corpora.design import design_of
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import expand, recording_key

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Adapter",
    "CorpusConfig",
    "Item",
    "Trial",
    "design_of",
    "expand",
    "list_items",
    "open_item",
    "recording_key",
    "register",
]
