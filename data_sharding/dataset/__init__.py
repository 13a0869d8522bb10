"""Datasets of shards: manifest, ledger, splits, and the code that reads samples."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_sharding.dataset.dataset import EEGDataset, write_dataset
    from data_sharding.dataset.loader import Loader
    from data_sharding.dataset.mixture import Mixture
    from data_sharding.dataset.samples import wds_decoder

__all__ = ["EEGDataset", "Loader", "Mixture", "wds_decoder", "write_dataset"]

_MODULES = {"EEGDataset": "dataset", "write_dataset": "dataset", "Loader": "loader", "Mixture": "mixture"}


def __getattr__(name: str) -> Any:
    # Import modules at their first use, because the loader imports torch, and most commands do not need torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'samples')}")
    return getattr(module, name)
