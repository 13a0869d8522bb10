"""A description of the training data, kept in each checkpoint for the model card of the exported encoder."""

from __future__ import annotations

from typing import Any

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture

_MOST_SAMPLES = 20_000


def count_subjects(dataset: EEGDataset | Mixture) -> int | None:
    """Count the subjects in a split.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The split.

    Returns
    -------
    int or None
        Number of subjects, from the ledger beside the manifest. If the dataset has no ledger, a small split is counted
        by reading every sample, and the result for a large split is None. The datasets of a mixture are assumed to have
        no subject in common.
    """
    if isinstance(dataset, Mixture):
        counts = [count_subjects(part) for part in dataset.parts]
        return None if None in counts else sum(count or 0 for count in counts)
    ledger = dataset.path / "ledger.parquet"
    if ledger.is_file():
        import pyarrow.parquet

        with ledger.open("rb") as stream:
            table = pyarrow.parquet.read_table(stream, columns=["corpus", "subject", "split", "status"])
        rows = table.to_pylist()
        used = [r for r in rows if r["status"] == "sharded" and dataset.split in (r["split"] or "").split("+")]
        return len({(r["corpus"], r["subject"]) for r in used})
    if len(dataset) > _MOST_SAMPLES:
        return None
    metas = [dataset.meta(number) for number in range(len(dataset))]
    return len({(meta.get("corpus"), meta.get("subject")) for meta in metas})


def describe_data(dataset: EEGDataset | Mixture, subjects: int | None, windows_seen: int) -> dict[str, Any]:
    """Describe the training data.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The training split.
    subjects : int or None
        Number of subjects in the training split; None if it is not known.
    windows_seen : int
        Number of windows on which the model has trained. A window that was used twice counts twice.

    Returns
    -------
    dict
        The description of the training data that an encoder package contains.
    """
    manifest = dataset.manifest
    return {
        "dataset_id": manifest.dataset_id,
        "preprocess": manifest.preprocess.to_dict(),
        "windows": {split: manifest.samples(split) for split in sorted(manifest.splits)},
        "counts": manifest.counts,
        "hours": manifest.hours,
        "subjects": subjects,
        "hours_seen": windows_seen * manifest.preprocess.window_s / 3600,
    }
