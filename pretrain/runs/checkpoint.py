"""Checkpoints on disk: whole or not at all, verified by their own manifest, written beside the training if wished."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json, sha256_file, write_json

if TYPE_CHECKING:
    from pretrain.runs.directory import RunDirectory
    from pretrain.runs.distributed import World

DONE = "complete.json"
"""Manifest of a checkpoint: its files with sizes and checksums, and what training needs to go on."""
FORMAT = 2
"""Of the training's checkpoints."""
_SUMS = "sums_{rank:05d}.json"


def file_record(path: Path) -> dict[str, Any]:
    """Describe a file as a checkpoint's manifest does.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        ``bytes`` and ``sha256``, as read back from the disk.
    """
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def damage(checkpoint: Path, *, thoroughly: bool) -> str | None:
    """Look for damage of a checkpoint.

    Parameters
    ----------
    checkpoint : Path
        Its directory.
    thoroughly : bool
        True reads every byte and compares checksums; False looks at sizes alone.

    Returns
    -------
    str or None
        What is wrong, or None.
    """
    try:
        for name, record in read_json(checkpoint / DONE)["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes in place of {record['bytes']}"
            if thoroughly and sha256_file(checkpoint / name) != record["sha256"]:
                return f"{name} has another checksum than when it was written"
    except (RequestError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Find checkpoints whose files are all there, without opening the run.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.

    Returns
    -------
    list of Path
        Their directories in the order of their steps; a damaged one is left out with a warning.
    """
    found = []
    for directory in sorted(checkpoints.glob("step_*")):
        wrong = damage(directory, thoroughly=False)
        if wrong:
            print(f"dreamscale: checkpoint {directory} is damaged ({wrong}); passed over", file=sys.stderr)
        else:
            found.append(directory)
    return found


def newest_whole(checkpoints: Path, left_out: Sequence[dict[str, Any]] = ()) -> Path | None:
    """Find the newest checkpoint of which every byte is as it was written.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    left_out : sequence of dict
        Batches on which the run does not train (`batches`: from, to before). Checkpoints that learned from some of them
        are passed over for an older one, and deleted: their steps will come again. If all did, the newest it is.

    Returns
    -------
    Path or None
        Its directory; None where no checkpoint was ever written. What is passed over is named on stderr.

    Raises
    ------
    RequestError
        If there are checkpoints and all of them are damaged.
    """
    damaged, spoiled, chosen = [], [], None
    for directory in sorted(checkpoints.glob("step_*"), reverse=True):
        wrong = damage(directory, thoroughly=True)
        if wrong is not None:
            print(
                f"dreamscale: checkpoint {directory} is damaged ({wrong}); going back to an older one", file=sys.stderr
            )
            damaged.append(directory)
        elif _learned_from(directory, left_out):
            spoiled.append(directory)
        else:
            chosen = directory
            break
    if chosen is None and spoiled:
        chosen, spoiled = spoiled[0], []
    if chosen is None and damaged:
        raise RequestError(
            f"{checkpoints}: every checkpoint is damaged; restore one from a backup, or delete the folder to start anew"
        )
    for other in damaged:
        # Out of the way: its step will come again. Kept, for whoever wants to know what happened to the disk.
        other.rename(other.with_name(f"damaged_{other.name}_{time.time_ns()}"))
    for other in spoiled:
        shutil.rmtree(other)
    return chosen


def _learned_from(checkpoint: Path, left_out: Sequence[dict[str, Any]]) -> bool:
    """Whether batches that are left out now were trained on then."""
    saved = read_json(checkpoint / DONE)
    known = [found["batches"] for found in saved.get("left_out", [])]
    return any(found["batches"] not in known and found["batches"][0] < saved["loader"]["step"] for found in left_out)


def prune(checkpoints: Path, *, keep: int, milestones: int | None) -> None:
    """Delete old checkpoints.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of a run directory.
    keep : int
        Newest complete ones that stay.
    milestones : int, optional
        Those of every so many steps stay too.
    """
    for old in complete_checkpoints(checkpoints)[:-keep]:
        if not milestones or int(old.name.removeprefix("step_")) % milestones:
            shutil.rmtree(old)


class CheckpointWriter:
    """Writes the checkpoints of a training, each process its share; in a thread where that is wished.

    A thread never talks to other processes: its outcome rides in a reduction of the training loop, and the checkpoint
    counts once every process has said that its share is written.

    Parameters
    ----------
    run : RunDirectory
        Where to.
    world : World
        This process among all.
    keep : int
        Newest checkpoints that stay.
    milestones : int, optional
        Those of every so many steps stay too.

    Attributes
    ----------
    failed : int
        Checkpoints that could not be written.
    """

    def __init__(self, run: RunDirectory, world: World, *, keep: int, milestones: int | None = None) -> None:
        self._run, self._world, self._keep, self._milestones = run, world, keep, milestones
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step: int | None = None
        self._manifest: dict[str, Any] = {}
        self.failed = 0

    def progress(self) -> tuple[float, float]:
        """How this process's share stands; to be summed over the processes and given to `settle`.

        Returns
        -------
        written, failed : float
            1 or 0; both 0 where nothing is under way.
        """
        if self._step is None or (self._thread is not None and self._thread.is_alive()):
            return 0.0, 0.0
        return 1.0, float(self._error is not None)

    def begin(
        self, step: int, files: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any], *, asynchronous: bool
    ) -> None:
        """Begin to write; every process must call it, and nothing may be under way.

        Parameters
        ----------
        step : int
            Optimiser steps done.
        files : mapping
            This process's files: name to tensors by name, on the processor, which nobody changes any more.
        manifest : mapping
            What the checkpoint says besides its files.
        asynchronous : bool
            True to write in a thread and return at once.
        """
        assert self._step is None
        # Deep: the training goes on to change its lists of losses before an asynchronous checkpoint counts.
        self._step, self._error, self._manifest = step, None, copy.deepcopy(dict(manifest))
        try:
            folder = self._run.begin_checkpoint(step)
        except OSError as error:
            # The others find no folder, and say so.
            folder, self._error = self._run.partial_directory(step), error
        self._world.barrier()
        if asynchronous:
            self._thread = threading.Thread(target=self._write, args=(folder, files), daemon=True)
            self._thread.start()
        else:
            self._write(folder, files)

    def _write(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        from safetensors import SafetensorError

        from pretrain.model.weights import save_weights

        try:
            records = {}
            for name, tensors in files.items():
                save_weights(dict(tensors), folder / name)
                records[name] = file_record(folder / name)
            write_json(folder / _SUMS.format(rank=self._world.rank), records)
        except (OSError, SafetensorError) as error:
            self._error = self._error or error

    def wait(self) -> bool:
        """Wait for what is under way on every process; every process must call it.

        Returns
        -------
        bool
            Whether the checkpoint counts; True where nothing was under way.
        """
        if self._step is None:
            return True
        if self._thread is not None:
            self._thread.join()
        return bool(self.settle(*self._world.total(*self.progress())))

    def settle(self, written: float, failed: float) -> bool | None:
        """Let the checkpoint count, or give it up, once every process has written its share.

        Parameters
        ----------
        written, failed : float
            Sums of `progress` over the processes.

        Returns
        -------
        bool or None
            Whether it counts; None while some are still writing.
        """
        if self._step is None or written < self._world.size:
            return None
        step, self._step, self._thread = self._step, None, None
        if not failed and self._world.first:
            try:
                self._run.commit_checkpoint(
                    step, keep=self._keep, milestones=self._milestones, files=self._collect(step), **self._manifest
                )
            except OSError as error:
                self._error, failed = error, 1.0
        if not failed:
            return True
        self.failed += 1
        if self._error is not None:
            print(
                f"dreamscale: process {self._world.rank} could not write the checkpoint of step {step} "
                f"({self._error}); free space there or keep fewer (checkpoint.keep). Until the next one, a restart "
                f"goes on from an older checkpoint",
                file=sys.stderr,
            )
        if self._world.first:
            shutil.rmtree(self._run.partial_directory(step), ignore_errors=True)
        return False

    def _collect(self, step: int) -> dict[str, Any]:
        folder = self._run.partial_directory(step)
        records: dict[str, Any] = {}
        for rank in range(self._world.size):
            sums = folder / _SUMS.format(rank=rank)
            records |= read_json(sums)
            sums.unlink()
        return records
