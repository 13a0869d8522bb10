"""Write checkpoints. Each process writes its share of the tensors, optionally in a background thread."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.files import read_json, write_json
from pretrain.runs.checkpoint import commit_checkpoint, file_record, partial_folder, state_file

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.runs.distributed import World


class CheckpointWriter:
    """Writes the checkpoints of one run.

    A checkpoint is complete when every process has written its share of the tensors. A background thread that writes a
    share does not tell the other processes that it has finished. Instead, the training loop sums the numbers from
    `progress` over the processes in every step and passes the sums to `settle`. This needs no extra communication,
    because the training loop sums other numbers in every step anyway.

    Parameters
    ----------
    checkpoints : Path
        The folder ``checkpoints`` of the run directory.
    world : World
        The processes of the run.
    keep : int
        Number of newest checkpoints to keep.
    milestones : int, optional
        Checkpoints whose step is a multiple of `milestones` are kept as well.

    Attributes
    ----------
    failed : int
        Number of checkpoints that could not be written.
    """

    def __init__(self, checkpoints: Path, world: World, *, keep: int = 2, milestones: int | None = None) -> None:
        self._checkpoints, self._world, self._keep, self._milestones = checkpoints, world, keep, milestones
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        # Step of the checkpoint that is being written; None if no checkpoint is being written.
        self._step: int | None = None
        self._manifest: dict[str, Any] = {}
        self.failed = 0

    def progress(self) -> tuple[float, float]:
        """Return whether this process has written its share of the current checkpoint.

        Returns
        -------
        written, failed : float
            ``written`` is 1 if this process has finished its share, with or without success, else 0. ``failed`` is 1 if
            this process could not write its share, else 0. Both numbers are 0 if no checkpoint is being written.
        """
        if self._step is None or (self._thread is not None and self._thread.is_alive()):
            return 0.0, 0.0
        return 1.0, float(self._error is not None)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], *, asynchronous: bool = False
    ) -> None:
        """Begin to write a checkpoint; every process must call this method.

        Before the next call of `begin`, finish the previous checkpoint with `wait` or `settle`.

        Parameters
        ----------
        step : int
            Number of optimiser steps done.
        tensors : mapping of str to Tensor
            This process's share of the tensors, by name (see `divide_by_size`). If the checkpoint is written in the
            background, the tensors must be copies that the training does not change.
        manifest : mapping
            Further values that are needed to resume the run. The values must be equal on every process, and JSON must
            be able to store the values.
        asynchronous : bool
            If True, a background thread writes the checkpoint, and the method returns before the checkpoint is
            complete.
        """
        assert self._step is None
        # Make a deep copy of the manifest, because the training may change lists in the original while a thread is
        # still writing the checkpoint.
        self._step, self._error = step, None
        self._manifest = copy.deepcopy({**manifest, "world_size": self._world.size})
        folder = partial_folder(self._checkpoints, step)
        try:
            if self._world.first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        except OSError as error:
            # Without the folder, the other processes cannot write their shares either, so each process reports a
            # failure.
            self._error = error
        self._world.barrier()
        if asynchronous:
            self._thread = threading.Thread(target=self._write, args=(folder, tensors), daemon=True)
            self._thread.start()
        else:
            self._write(folder, tensors)

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import SafetensorError

        from pretrain.model.weights import save_weights

        try:
            records = {}
            if tensors:
                name = state_file(self._world.rank)
                save_weights(dict(tensors), folder / name)
                records[name] = file_record(folder / name)
            write_json(folder / self._records_file(self._world.rank), records)
        except (OSError, SafetensorError) as error:
            self._error = self._error or error

    def wait(self) -> bool:
        """Wait until every process has written its share; every process must call this method.

        Returns
        -------
        bool
            True if the checkpoint is complete, or if no checkpoint was being written; False if writing failed.
        """
        if self._step is None:
            return True
        if self._thread is not None:
            self._thread.join()
        return bool(self.settle(*self._world.all_reduce_sum(*self.progress())))

    def settle(self, written: float, failed: float) -> bool | None:
        """If every process has written its share, complete the checkpoint; if a process failed, delete the checkpoint.

        Parameters
        ----------
        written, failed : float
            The two numbers from `progress`, each summed over the processes.

        Returns
        -------
        bool or None
            True if the checkpoint is complete; False if writing failed; None if a process is still writing, or if no
            checkpoint is being written.
        """
        if self._step is None or written < self._world.size:
            return None
        step, self._step, self._thread = self._step, None, None
        if not failed and self._world.first:
            try:
                commit_checkpoint(
                    self._checkpoints,
                    step,
                    self._collect_records(step),
                    self._manifest,
                    keep=self._keep,
                    milestones=self._milestones,
                )
            except OSError as error:
                self._error, failed = error, 1.0
        if not failed:
            return True
        self.failed += 1
        if self._error is not None:
            print(
                f"dreamscale: process {self._world.rank} could not write the checkpoint of step {step} "
                f"({self._error}); free some space on that disk, or keep fewer checkpoints (checkpoint.keep). Until "
                "the next checkpoint is written, a restart resumes from an older checkpoint",
                file=sys.stderr,
            )
        if self._world.first:
            shutil.rmtree(partial_folder(self._checkpoints, step), ignore_errors=True)
        return False

    @staticmethod
    def _records_file(rank: int) -> str:
        return f"records_{rank:05d}.json"

    def _collect_records(self, step: int) -> dict[str, Any]:
        """Read size and checksum of each process's state file from its records file, and delete the records files."""
        folder = partial_folder(self._checkpoints, step)
        files: dict[str, Any] = {}
        for rank in range(self._world.size):
            path = folder / self._records_file(rank)
            files |= read_json(path)
            path.unlink()
        return files
