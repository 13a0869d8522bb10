"""Compute features once, by all processes and all runs together, and keep them beside the dataset.

The features of M images (or texts) are a table with M rows. The rows are divided into blocks. Each process computes
blocks, beginning with its own share, and writes each block to a file of its own. A process holds a lock on a block
while it computes it, so no other process and no other run computes the same block at the same time. After a killed
run, the finished blocks are kept. When all blocks exist, one process joins them to the final file, which all processes
read by memory map.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sharding.common.errors import RankError, RequestError
from data_sharding.common.files import digest_of, open_to_append
from data_sharding.common.progress import progress
from data_sharding.common.storage import AnyPath, describe
from data_sharding.common.untrusted import private_folder
from data_sharding.dataset.cache import cache_folder
from finetune.targets.store import check_features, read_features, write_features
from pretrain.runs.distributed import World

FOLDER = Path(".cache", "targets")
"""Folder of the features, inside the folder of the dataset."""
BLOCK = 64
"""Number of rows of a block."""
_WAIT_S, _SAY_S = 0.2, 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """The features that are needed, and how they are computed."""

    what: str
    """Name of the features for messages, such as "embeddings of images (openai/clip-vit-large-patch14)"."""
    key: dict[str, Any]
    """Everything on which the features depend: weights, layer, image processing, and the images or texts."""
    rows: int
    """Number M of rows."""
    compute: Callable[[list[int]], Tensor]
    """Function that computes the features of some rows, [B, ...]."""
    name_row: Callable[[int], str]
    """Function that names a row in messages."""
    batch_size: int = BLOCK
    """Largest number of rows in one call of `compute`."""


def load_features(job: Job, dataset: AnyPath, world: World | None = None) -> Tensor:
    """Return features from the cache; features that are missing there are computed and stored.

    Parameters
    ----------
    job : Job
        The features.
    dataset : Path or UPath
        Folder of the dataset. The features are stored in its subfolder `FOLDER`. If the dataset is on an object store,
        or its folder cannot be written, the features are stored in the folder ``targets`` of `cache_folder`.
    world : World, optional
        The processes of the run; all of them must call this function. By default, this process alone.

    Returns
    -------
    Tensor of float32, shape (M, ...)
        Features on the CPU, read by memory map. Do not change them in place.

    Raises
    ------
    RequestError
        If features have NaN or infinite values, or if no cache folder can be written.
    """
    world = world or World()
    digest = digest_of({"format": 1, "rows": job.rows, "block": BLOCK, **job.key})
    folder = _find_folder(dataset, f"{digest[:32]}.safetensors", world)
    try:
        return _Table(job, digest, folder, world).load()
    except OSError as error:
        # The error may occur in this process alone, so a process other than rank 0 must print it itself.
        raise (RequestError if world.first else RankError)(
            f"{folder}: cannot be written ({describe(error)}); free some disk space, or let the environment variable "
            "DREAMSCALE_CACHE name a folder on another disk"
        ) from None


def _find_folder(dataset: AnyPath, name: str, world: World) -> Path:
    """Return the folder beside the dataset if it holds the file or can be written, else the folder in the cache."""
    if isinstance(dataset, Path):
        folder = dataset / FOLDER
        for part in (folder.parent, folder):
            # The dataset may come from another person. A link would lead to a folder outside the dataset.
            if part.is_symlink():
                raise RequestError(f"{part}: a link, not a folder, so no features are stored there; remove the link")
        if world.broadcast((folder / name).is_file() or _can_write(folder) if world.first else None):
            return folder
    folder = cache_folder() / "targets"
    try:
        return private_folder(folder)
    except OSError as error:
        raise RequestError(
            f"{folder}: cannot be used ({describe(error)}); set DREAMSCALE_CACHE to a folder elsewhere"
        ) from None


def _can_write(folder: Path) -> bool:
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError:
        return False
    return True


class _Table:
    """The table of a job in a folder, as one of the processes sees it."""

    def __init__(self, job: Job, digest: str, folder: Path, world: World) -> None:
        self.job, self.digest, self.folder, self.world = job, digest, folder, world
        self.path = folder / f"{digest[:32]}.safetensors"
        self.parts = folder / f"{digest[:32]}.parts"
        self.blocks = -(-job.rows // BLOCK)
        self.place, self.members = self._find_members()

    def _find_members(self) -> tuple[int, int]:
        """Return the number of this process among the processes that share the folder, and the number of all of these.

        If the folder is on the disk of each machine, the processes of each machine fill their own folder.
        """
        world = self.world
        if world.size == 1:
            return 0, 1
        probe = self.folder / f".probe-{world.broadcast(uuid.uuid4().hex)}"
        if world.first:
            with contextlib.suppress(OSError):  # The folder may be read-only, if the features are already there.
                probe.touch()
        world.barrier()
        shared = not world.any(not probe.exists())
        if world.first:
            probe.unlink(missing_ok=True)
        if shared:
            return world.rank, world.size
        return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def load(self) -> Tensor:
        """Return the whole table."""
        world, computed = self.world, 0
        if self.place == 0 and not self._is_complete():
            self._discard()
        world.barrier()
        if world.any(not self.path.exists()):
            computed = int(world.all_reduce_sum(self._compute_missing())[0])
            if self.place == 0:
                self._join()
            world.barrier()
        found = read_features(self.path, self.job.rows, self.digest, verify=False)
        if isinstance(found, str):
            raise RequestError(f"{self.path}: {found or 'the file is missing'}; run the same command again")
        if world.first:
            print(f"{self.job.what}: {computed} of {self.job.rows} computed, stored in {self.path}")
        return found

    def _is_complete(self) -> bool:
        return not isinstance(read_features(self.path, self.job.rows, self.digest, verify=True), str)

    def _discard(self) -> None:
        """Delete a final file that is damaged, with a message."""
        with _Locks(self.parts) as locks, locks.hold(0, wait=True):
            found = read_features(self.path, self.job.rows, self.digest, verify=True)
            if isinstance(found, str) and found:
                print(f"{self.path}: {found}; the features are computed again")
                self.path.unlink()

    def _block_path(self, block: int) -> Path:
        return self.parts / f"{block:08d}.safetensors"

    def _read_block(self, block: int, *, verify: bool) -> Tensor | str:
        return read_features(self._block_path(block), self._count(block), f"{self.digest}/{block}", verify=verify)

    def _count(self, block: int) -> int:
        return min(BLOCK, self.job.rows - block * BLOCK)

    def _compute_missing(self) -> int:
        """Compute blocks until all blocks exist, and return the number of rows that this process has computed."""
        first = range(self.place, self.blocks, self.members)
        todo = [*first, *(block for block in range(self.blocks) if block % self.members != self.place)]
        computed, waited = 0, 0.0
        with (
            _Locks(self.parts) as locks,
            progress(self.job.what, self.job.rows, enabled=self.world.first) as advance,
        ):
            while todo and not self.path.exists():
                left = []
                for block in todo:
                    if not self._is_done(block):
                        with locks.hold(1 + block) as held:
                            if not held:
                                left.append(block)
                                continue
                            # Another process may have computed the block just before this process got the lock.
                            if not self._is_done(block):
                                self._compute_block(block)
                                computed += self._count(block)
                    advance(self._count(block))
                if len(left) == len(todo):
                    time.sleep(_WAIT_S)
                    waited += _WAIT_S
                    if self.place == 0 and waited - _WAIT_S < _SAY_S <= waited:
                        print(f"{self.job.what}: waiting for another process or run that computes the rest")
                todo = left
        return computed

    def _is_done(self, block: int) -> bool:
        return self.path.exists() or not isinstance(self._read_block(block, verify=False), str)

    def _compute_block(self, block: int) -> None:
        rows, size = list(range(block * BLOCK, block * BLOCK + self._count(block))), self.job.batch_size
        parts = [self.job.compute(rows[start : start + size]) for start in range(0, len(rows), size)]
        features = torch.cat([part.detach().float().cpu() for part in parts])
        if (bad := check_features(features)) is not None:
            raise RequestError(
                f"{self.job.what}: the features of {self.job.name_row(rows[bad])} are NaN or infinite, so the weights "
                "may be damaged; get the model again from its source"
            )
        write_features(self._block_path(block), [features], f"{self.digest}/{block}")

    def _join(self) -> None:
        """Join the blocks to the final file, and delete the blocks."""
        with _Locks(self.parts) as locks, locks.hold(0, wait=True):
            if not self._is_complete():
                write_features(self.path, self._read_blocks(), self.digest)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _read_blocks(self) -> Iterator[Tensor]:
        for block in range(self.blocks):
            found = self._read_block(block, verify=True)
            if isinstance(found, str):
                if found:
                    print(f"{self._block_path(block)}: {found}; the block is computed again")
                self._compute_block(block)
                found = self._read_block(block, verify=True)
                assert isinstance(found, Tensor)
            yield found


class _Locks:
    """Locks on the parts of a table: one byte of a lock file for each block, and byte 0 for joining the blocks.

    POSIX locks work between machines that share a network disk, and end with their process. If the file system has no
    locks, two processes may compute the same block, and both write the same values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> _Locks:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = open_to_append(self.folder / "lock")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @contextlib.contextmanager
    def hold(self, number: int, *, wait: bool = False) -> Iterator[bool]:
        """Hold a lock in a ``with`` block; the value is False if another process holds it and `wait` is False."""
        held = True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            held = False
        except OSError:
            pass
        try:
            yield held
        finally:
            if held:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
