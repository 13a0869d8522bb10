"""Lists the recordings of a corpus, with the subject and the trials of each recording.

Each kind of corpus has an adapter class in a separate file. To add a kind of corpus, add a file with an adapter class
that has the decorator `register`. All files of this folder are imported automatically, so no other file needs a change.
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
