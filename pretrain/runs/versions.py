"""Find the version of a dataset with which a run began, because a dataset can grow while a run is stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_sharding.common.files import read_json
from data_sharding.common.storage import as_path
from data_sharding.dataset.dataset import read_manifest
from data_sharding.dataset.manifest import find_version
from pretrain.runs.checkpoint import read_values


def find_run_versions(runs: Sequence[str | Path], paths: Iterable[str], command: str) -> dict[str, str]:
    """Return a dictionary from the path of each dataset to the id of the dataset version with which the run began.

    If recordings were added to a dataset after the run began, the dataset has a newer version, but the run continues to
    read the old version. If a dataset does not have the version with which the run began, its id in the dictionary is
    an empty text, and the loader then refuses to resume the run. For a new run and for a complete run, the returned
    dictionary is empty.

    Parameters
    ----------
    runs : sequence of str or Path
        Run directories, one for each stage of the run, the last stage first. The versions are read from the first
        directory in this order that has a checkpoint.
    paths : iterable of str
        Paths of the datasets of the run.
    command : str
        Name of the command, for the message that the dataset has a newer version.

    Returns
    -------
    dict
        For each path, the dataset id of the version to read.

    Raises
    ------
    RequestError
        If the dataset was compacted, so that the version of the run cannot be read any more.
    """
    status = Path(runs[0]) / "status.json"
    if status.is_file() and isinstance(about := read_json(status), dict) and about.get("state") == "done":
        return {}
    manifests = (read_values(Path(run) / "checkpoints") for run in runs)
    values = next((found for found in manifests if found), {})
    data = values.get("data") or values.get("loader") or {}
    ids = data.get("versions") or ([data["dataset_id"]] if data.get("dataset_id") else [])
    versions = {}
    for path in paths if ids else []:
        current = read_manifest(as_path(path))
        found = [manifest for dataset_id in ids if (manifest := find_version(as_path(path), dataset_id))]
        versions[path] = found[0].dataset_id if found else ""
        if found and found[0].version != current.version and os.environ.get("RANK", "0") == "0":
            print(
                f"dreamscale {command}: this run began with version {found[0].version} of {path} and reads this "
                f"version to its end; start a new run to use version {current.version}",
                file=sys.stderr,
            )
    return versions
