"""Checkpoints on disk: one format for every training stage and for any number of processes.

A checkpoint is the folder ``RUN/checkpoints/step_N``:

- ``state_RANK.safetensors``: the tensors that the process with this rank wrote, such as ``weights/NAME``,
  ``exp_avg/NAME`` and ``exp_avg_sq/NAME``. No tensor is split, and each tensor is stored in exactly one of these files.
- ``complete.json``, the manifest: the size and SHA-256 of each of these files, and all values, except the tensors, that
  are needed to resume a run.

While a checkpoint is being written, its folder has a temporary name. The folder gets the name ``step_N`` when
everything is written, so a folder ``step_N`` is always complete. The tensors and their names do not depend on the
number of processes that wrote the checkpoint, so a run can be resumed with another number of processes.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_write_text, read_json, sha256_file, write_json
from data_sharding.common.typed_values import MAX_INTEGER, check_typed
from data_sharding.common.untrusted import (
    MAX_FILE,
    check_count,
    check_group,
    check_list,
    check_number,
    check_path,
    check_preprocess,
    check_sha256,
    open_regular,
)

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "complete.json"
"""Name of the manifest file in a checkpoint."""
FORMAT = 3
"""Version of the checkpoint format."""
# Version 2 of the format was used by pretraining only. It stored all weights together in one file, and Adam's moments
# in further files, one for each process.
_FORMAT_2 = 2
_FORMAT_2_WEIGHTS = "model.safetensors"


def state_file(rank: int) -> str:
    """Return the name of the checkpoint file that the process with this rank writes."""
    return f"state_{rank:05d}.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the path of the folder of a complete checkpoint."""
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Return the path of the folder of a checkpoint that is still being written."""
    return checkpoints / f".partial_{step:08d}"


def divide_by_size(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divide named tensors among processes so that every process writes about the same amount of data.

    Parameters
    ----------
    sizes : mapping of str to int
        Number of values of each tensor, by the tensor's name. This mapping must be the same on every process.
    parts : int
        Number of processes.

    Returns
    -------
    list of list of str
        For each rank, the names of the tensors that it writes. Every process gets the same result.
    """
    names: list[list[str]] = [[] for _ in range(parts)]
    # Go from the largest tensor to the smallest; give each tensor to the process with the smallest load so far.
    load = [(0, rank) for rank in range(parts)]
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        total, rank = heapq.heappop(load)
        names[rank].append(name)
        heapq.heappush(load, (total + size, rank))
    return names


MAX_LEFT_OUT = 100_000
"""Largest number of batches that one entry of left_out may have, i.e. that a run leaves out after one loss spike."""
_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("step", "skipped", "skipped_in_a_row", "adam_steps", "optimizer_step", "ema_updates", "zero_stage"), int
    ),
    "world_size": int,
    "epochs": float,
    "evaluation_due": bool,
}
"""Types of the values in a manifest. Numbers in a manifest must not be negative."""
_DATA_TYPES: dict[str, Any] = {
    "dataset_id": str,
    "versions": dict[str, int],
    "windows": dict[str, int],
    "hours_seen": float,
    "subjects": int | None,
}
"""Types of values in the description of the training data that a manifest of pretraining holds."""
_PEOPLE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("subjects", "recordings", "unknown", "not_confirmed"), int | None),
    **dict.fromkeys(("sex", "group", "age", "device", "device_filters", "task", "license"), dict[str, int] | None),
    "recording_year": dict[str, int] | None,
}
"""Types of the values in the description of subjects and recordings that
`pretrain.training.data_summary.describe_people` returns."""


def check_values(values: Any, where: str) -> dict[str, Any]:
    """Check the values of a checkpoint's manifest, but not the manifest's list of files.

    Parameters
    ----------
    values : Any
        Content of the manifest. It cannot be trusted, because somebody may have changed the file.
    where : str
        Path of the manifest, for the message.

    Returns
    -------
    dict
        The values. Values that only another training stage needs may be missing.

    Raises
    ------
    RequestError
        If a value has another type than Dreamscale writes for it, or is impossible.
    """

    def check(group: Any, types: dict[str, Any], what: str) -> None:
        for name, hint in types.items():
            if name in check_group(group, where, what or "the content"):
                check_typed(hint, group[name], where, f"{what}{'.' * bool(what)}{name}", least=0)

    check(values, _TYPES, "")
    for loss in check_list(values.get("recent_losses", []), where, "recent_losses"):
        check_number(loss, where, "a loss")
    check(values.get("data", {}), _DATA_TYPES, "data")
    if "preprocess" in values.get("data", {}):
        check_preprocess(values["data"]["preprocess"], where)
    check(values.get("data", {}).get("people") or {}, _PEOPLE_TYPES, "data.people")
    check_group(values.get("best") or {}, where, "best")
    check_count(values.get("best_step", 0), where, "best_step", least=-1, most=MAX_INTEGER)
    check(values.get("loader", {}), {"step": int, "dataset_id": str}, "loader")
    check(values.get("interval", {}), {"steps": int, "losses": list[float | None]}, "interval")
    check_ranges(values.get("left_out", []), where)
    return values


def check_ranges(entries: Any, where: str) -> list[dict[str, Any]]:
    """Check the list of the ranges of batches on which a run does not train; see `newest_checkpoint`."""
    for entry in check_list(entries, where, "left_out"):
        batches = check_list(check_group(entry, where, "an entry of left_out").get("batches"), where, "batches")
        if len(batches) != 2:
            raise RequestError(f"{where}: a range of batches has {len(batches)} numbers in place of 2")
        first = check_count(batches[0], where, "the first batch", most=MAX_INTEGER)
        check_count(batches[1], where, "the end of a range of batches", least=first, most=first + MAX_LEFT_OUT)
    return entries


def file_record(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256 for the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def find_damage(checkpoint: Path, *, read_bytes: bool) -> str | None:
    """Check that the files of a checkpoint agree with its manifest.

    Parameters
    ----------
    checkpoint : Path
        Path of the checkpoint's folder.
    read_bytes : bool
        If True, every byte is read and checksums are compared; if False, only the sizes of files are compared.

    Returns
    -------
    str or None
        Description of the damage; None if there is no damage.
    """
    try:
        for name, record in read_manifest(checkpoint)["files"].items():
            descriptor = open_regular(checkpoint / name)
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            if size != record["bytes"]:
                return f"{name} has {size} bytes in place of {record['bytes']}"
            if read_bytes and sha256_file(checkpoint / name) != record["sha256"]:
                return f"{name} has another checksum than when it was written"
    except (RequestError, OSError) as error:
        return str(error)
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint.

    Parameters
    ----------
    checkpoint : Path
        Path of the checkpoint's folder.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    RequestError
        If the manifest is missing or damaged, if it lists a file outside the checkpoint's folder, or if
        `check_values` refuses a value.
    """
    where = str(checkpoint / MANIFEST)
    values = check_values(read_json(checkpoint / MANIFEST), where)
    for name, record in check_group(values.get("files"), where, "files").items():
        check_path(name, where)
        check_count(check_group(record, where, name).get("bytes"), where, f"bytes of {name}", most=MAX_FILE)
        check_sha256(record.get("sha256"), where)
    return values


def _find_steps(checkpoints: Path) -> list[Path]:
    """Return the folders ``step_NUMBER`` in the order of their steps."""
    return sorted(folder for folder in checkpoints.glob("step_*") if re.fullmatch(r"step_[0-9]{8,12}", folder.name))


def read_values(checkpoints: Path) -> dict[str, Any]:
    """Return the newest readable manifest; an empty dictionary without a manifest. The tensor files are not checked."""
    for folder in reversed(_find_steps(checkpoints)):
        if (folder / MANIFEST).is_file():
            with contextlib.suppress(RequestError):
                return check_values(read_json(folder / MANIFEST), str(folder / MANIFEST))
    return {}


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Find the checkpoints whose files all have the right size.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.

    Returns
    -------
    list of Path
        Folders of the checkpoints in the order of their steps. A damaged checkpoint is not returned, and a warning is
        printed.
    """
    found = []
    for folder in _find_steps(checkpoints):
        damage = find_damage(folder, read_bytes=False)
        if damage:
            print(f"dreamscale: checkpoint {folder} is damaged ({damage}) and is not used", file=sys.stderr)
        else:
            found.append(folder)
    return found


def newest_checkpoint(checkpoints: Path, left_out: Sequence[dict[str, Any]] = ()) -> Path | None:
    """Find the newest checkpoint whose files all have the right checksum.

    Damaged checkpoints that are newer than the returned checkpoint are not deleted, so that somebody can inspect them.
    They are renamed, so that the run can write checkpoints of the same steps again.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    left_out : sequence of dict
        Ranges of batches on which the run must not train any more. In each entry, ``batches`` holds two numbers: the
        number of the first batch in the range, and the number of the first batch after the range. A checkpoint that was
        trained on such batches is deleted, and an older checkpoint is used. If every undamaged checkpoint was trained
        on such batches, no checkpoint is deleted, and the newest undamaged checkpoint is used.

    Returns
    -------
    Path or None
        Folder of the checkpoint; None if the run has no checkpoint yet.

    Raises
    ------
    RequestError
        If the run has checkpoints and all of its checkpoints are damaged.
    """
    for partial in checkpoints.glob(".partial_*"):
        shutil.rmtree(partial, ignore_errors=True)
    damaged, spoiled, chosen = [], [], None
    for folder in reversed(_find_steps(checkpoints)):
        damage = find_damage(folder, read_bytes=True)
        if damage is not None:
            print(
                f"dreamscale: checkpoint {folder} is damaged ({damage}); looking for an older checkpoint",
                file=sys.stderr,
            )
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
            f"{checkpoints}: every checkpoint is damaged; restore one from a backup, or delete the folder to start "
            "again"
        )
    for folder in damaged:
        folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))
    for folder in spoiled:
        shutil.rmtree(folder)
    return chosen


def _trained_on(checkpoint: Path, left_out: Sequence[dict[str, Any]]) -> bool:
    """Return whether a checkpoint was trained on batches in `left_out` before the run began to skip these batches."""
    if not left_out:
        return False
    saved = read_manifest(checkpoint)
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
    """Complete a checkpoint, delete old checkpoints; rank 0 calls this after all processes have written their files.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    step : int
        Number of optimiser steps done, which is the checkpoint's number.
    files : mapping
        Result of `file_record` for every file, by the file's name.
    manifest : mapping
        Values to store in the checkpoint's manifest, in addition to the list of files.
    keep : int
        Number of newest checkpoints to keep.
    milestones : int, optional
        Checkpoints whose step is a multiple of `milestones` are kept as well.
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
    """Reads the tensors and the manifest of a complete checkpoint. Use this class in a ``with`` block.

    Parameters
    ----------
    folder : Path
        Path of the checkpoint's folder.

    Attributes
    ----------
    manifest : dict
        Content of the checkpoint's manifest.

    Raises
    ------
    RequestError
        If this version of Dreamscale cannot read the checkpoint, or if one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._version = self.manifest.get("format")
        if self._version not in (FORMAT, _FORMAT_2):
            raise RequestError(
                f"{folder}: this checkpoint was written by another version of Dreamscale; continue with that version, "
                "or run the same command with another 'output' to train again"
            )
        self._stack = contextlib.ExitStack()
        # Maps each tensor's name to the opened file that holds the tensor, and to the tensor's name in this file.
        self._places: dict[str, tuple[Any, str]] = {}

    def __enter__(self) -> CheckpointReader:
        from safetensors import SafetensorError, safe_open

        try:
            for file_name in sorted(self.manifest["files"]):
                os.close(open_regular(self.folder / file_name))
                file = self._stack.enter_context(safe_open(self.folder / file_name, framework="pt", device="cpu"))
                for stored in file.keys():  # noqa: SIM118, not a dictionary
                    name = self._current_name(file_name, stored)
                    if name in self._places:
                        raise RequestError(
                            f"{self.folder}: damaged (tensor {name} is stored twice); delete this checkpoint"
                        )
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

    def check_manifest(self, *names: str) -> dict[str, Any]:
        """Return the manifest; raise an error if it does not have all the named values.

        Parameters
        ----------
        *names : str
            Names of the values that the manifest must have; ``data.windows`` is the value ``windows`` in the group
            ``data``.

        Returns
        -------
        dict
            The manifest.

        Raises
        ------
        RequestError
            If a value is missing.
        """
        for name in names:
            group, _, last = name.rpartition(".")
            if last not in (self.manifest.get(group, {}) if group else self.manifest):
                raise RequestError(
                    f"{self.folder / MANIFEST}: the value {name} is missing, so the checkpoint is damaged or "
                    "belongs to another kind of run; copy the run again"
                )
        return self.manifest

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the checkpoint."""
        return set(self._places)

    def check_names(self, expected: Iterable[str]) -> None:
        """Check that the checkpoint holds exactly the expected tensors.

        Parameters
        ----------
        expected : iterable of str
            Names of the expected tensors.

        Raises
        ------
        RequestError
            If a tensor is missing, or if the checkpoint holds an unknown tensor.
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
        """Return all tensors whose names begin with a prefix such as ``weights/``.

        The prefix is removed from the names.
        """
        return {name.removeprefix(prefix): self[name] for name in sorted(self._places) if name.startswith(prefix)}
