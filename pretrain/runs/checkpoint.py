"""Checkpoints on disk: one format for every training stage, whatever number of processes writes or reads it.

A checkpoint is the folder ``RUN/checkpoints/step_N``:

- ``state_RANK.safetensors``, one file a process: that process's share of the named tensors, such as ``weights/NAME``,
  ``exp_avg/NAME`` and ``exp_avg_sq/NAME``. Each tensor is whole, and is stored in exactly one file.
- ``complete.json``, the manifest: every file with its size and SHA-256, and all other values that a resume needs.

The folder is filled under another name and renamed at the end, so a folder with a manifest is complete. The content
does not depend on the number of processes that wrote it.
"""

from __future__ import annotations

import contextlib
import heapq
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_write_text, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "complete.json"
"""Name of a checkpoint's manifest."""
FORMAT = 3
"""Version of the checkpoint format."""
# Format 2, of pretraining alone, kept the weights in one file and the moments of Adam in one file a process.
_FORMAT_2 = 2
_FORMAT_2_WEIGHTS = "model.safetensors"


def state_file(rank: int) -> str:
    """Return the name of the file that a process writes."""
    return f"state_{rank:05d}.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a complete checkpoint."""
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a checkpoint that is still being written."""
    return checkpoints / f".partial_{step:08d}"


def divide_by_size(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divide named tensors among processes so that all processes write about equally much.

    Parameters
    ----------
    sizes : mapping of str to int
        Number of values by name; the same on every process.
    parts : int
        Number of processes.

    Returns
    -------
    list of list of str
        Names by rank, the same on every process.
    """
    names: list[list[str]] = [[] for _ in range(parts)]
    # Go from the largest tensor to the smallest; give each tensor to the process with the smallest load so far.
    load = [(0, rank) for rank in range(parts)]
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        total, rank = heapq.heappop(load)
        names[rank].append(name)
        heapq.heappush(load, (total + size, rank))
    return names


def file_record(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256 for the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def find_damage(checkpoint: Path, *, read_bytes: bool) -> str | None:
    """Check the files of a checkpoint against its manifest.

    Parameters
    ----------
    checkpoint : Path
        The checkpoint's folder.
    read_bytes : bool
        True reads every byte and compares checksums; False compares sizes alone.

    Returns
    -------
    str or None
        What is wrong, or None if nothing is.
    """
    try:
        for name, record in read_json(checkpoint / MANIFEST)["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes in place of {record['bytes']}"
            if read_bytes and sha256_file(checkpoint / name) != record["sha256"]:
                return f"{name} has another checksum than when it was written"
    except (RequestError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Find the checkpoints whose files all have the right size.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.

    Returns
    -------
    list of Path
        Folders in the order of their steps. A damaged checkpoint is left out, with a warning.
    """
    found = []
    for folder in sorted(checkpoints.glob("step_*")):
        damage = find_damage(folder, read_bytes=False)
        if damage:
            print(f"dreamscale: checkpoint {folder} is damaged ({damage}) and is not used", file=sys.stderr)
        else:
            found.append(folder)
    return found


def newest_checkpoint(checkpoints: Path, left_out: Sequence[dict[str, Any]] = ()) -> Path | None:
    """Find the newest checkpoint without damage; every byte of the checkpoint is read and compared with its checksum.

    Damaged checkpoints are renamed, so that their steps can be written again; their files are kept for inspection.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    left_out : sequence of dict
        Batches on which the run must not train any more (``batches``: number of the first batch, and of the first batch
        after them). A checkpoint that has trained on some of these batches is deleted, and an older checkpoint is used.
        If every checkpoint has trained on some of them, the newest checkpoint is used.

    Returns
    -------
    Path or None
        Folder of the checkpoint; None if the run has no checkpoint yet.

    Raises
    ------
    RequestError
        If there are checkpoints and all of them are damaged.
    """
    for partial in checkpoints.glob(".partial_*"):
        shutil.rmtree(partial, ignore_errors=True)
    damaged, spoiled, chosen = [], [], None
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        damage = find_damage(folder, read_bytes=True)
        if damage is not None:
            print(f"dreamscale: checkpoint {folder} is damaged ({damage}); looking for an older one", file=sys.stderr)
            damaged.append(folder)
        elif _trained_on(folder, left_out):
            spoiled.append(folder)
        else:
            chosen = folder
            break
    if chosen is None and spoiled:
        chosen, spoiled = spoiled[0], []
    if chosen is None and damaged:
        raise RequestError(
            f"{checkpoints}: every checkpoint is damaged; restore one from a backup, or delete the folder to start anew"
        )
    for folder in damaged:
        folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))
    for folder in spoiled:
        shutil.rmtree(folder)
    return chosen


def _trained_on(checkpoint: Path, left_out: Sequence[dict[str, Any]]) -> bool:
    """Whether a checkpoint has trained on batches that were left out after it was written."""
    if not left_out:
        return False
    saved = read_json(checkpoint / MANIFEST)
    known = [entry["batches"] for entry in saved.get("left_out", [])]
    return any(entry["batches"] not in known and entry["batches"][0] < saved["loader"]["step"] for entry in left_out)


def commit_checkpoint(
    checkpoints: Path,
    step: int,
    files: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    keep: int,
    milestones: int | None,
) -> None:
    """Make a checkpoint complete and delete old ones; for the first process, after all processes have written.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    step : int
        Optimiser steps done.
    files : mapping
        `file_record` of every file by name.
    manifest : mapping
        Other values for the manifest.
    keep : int
        Number of newest checkpoints to keep.
    milestones : int, optional
        Checkpoints whose step is a multiple of this number are kept as well.
    """
    partial, final = partial_folder(checkpoints, step), step_folder(checkpoints, step)
    write_json(partial / MANIFEST, {**manifest, "format": FORMAT, "step": step, "files": dict(files)})
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    atomic_write_text(checkpoints.parent / "latest", final.name + "\n")
    for old in complete_checkpoints(checkpoints)[:-keep]:
        if not milestones or int(old.name.removeprefix("step_")) % milestones:
            shutil.rmtree(old)


class CheckpointReader:
    """The content of a complete checkpoint: tensors by name, and the manifest. Use it in a ``with`` block.

    Parameters
    ----------
    folder : Path
        The checkpoint's folder.

    Attributes
    ----------
    manifest : dict
        The manifest.

    Raises
    ------
    RequestError
        If this version cannot read the checkpoint, or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(folder / MANIFEST)
        self._version = self.manifest.get("format")
        if self._version not in (FORMAT, _FORMAT_2):
            raise RequestError(
                f"{folder}: this checkpoint was written by another version of Dreamscale; continue with that version, "
                "or run the same command with another 'output' to train anew"
            )
        self._stack = contextlib.ExitStack()
        # Tensor's name to the file that holds it, and its name there.
        self._places: dict[str, tuple[Any, str]] = {}

    def __enter__(self) -> CheckpointReader:
        from safetensors import SafetensorError, safe_open

        try:
            for file_name in sorted(self.manifest["files"]):
                file = self._stack.enter_context(safe_open(self.folder / file_name, framework="pt", device="cpu"))
                for stored in file.keys():  # noqa: SIM118, not a dictionary
                    name = self._current_name(file_name, stored)
                    if name in self._places:
                        raise RequestError(f"{self.folder}: tensor {name} is stored twice; delete this checkpoint")
                    self._places[name] = file, stored
        except BaseException as error:
            self._stack.close()
            if isinstance(error, SafetensorError | OSError):
                raise RequestError(f"{self.folder}: damaged ({error}); delete this checkpoint") from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._places.clear()
        self._stack.close()

    def _current_name(self, file_name: str, stored: str) -> str:
        in_old_weights = self._version == _FORMAT_2 and file_name == _FORMAT_2_WEIGHTS
        return f"weights/{stored}" if in_old_weights else stored

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def check_names(self, expected: Iterable[str]) -> None:
        """Check that the checkpoint holds exactly the expected tensors.

        Parameters
        ----------
        expected : iterable of str
            Names.

        Raises
        ------
        RequestError
            If a tensor is missing or unknown.
        """
        expected = set(expected)
        for what, names in (("is missing", expected - self.names), ("is unknown", self.names - expected)):
            if names:
                more = f" ({len(names) - 1} more)" if len(names) > 1 else ""
                raise RequestError(
                    f"{self.folder}: this checkpoint belongs to another model: tensor {min(names)} {what}{more}"
                )

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file.get_tensor(stored)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors under a prefix such as ``weights/``, without the prefix in their names."""
        return {name.removeprefix(prefix): self[name] for name in sorted(self._places) if name.startswith(prefix)}
