"""The journal of finished recordings and the lock of a job, which are files in the working folder of the job."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, fresh, is_storage_error
from data_sharding.job.task import PartResult

EVERY_S = 10.0
"""Seconds between two objects that the journal writes to an object store. Each time, the journal writes a new object,
because a stored object cannot be extended."""
BEAT_S = 15.0
"""Seconds between two renewals of a job's lock on an object store."""
DEAD_S = 90.0
"""If a lock on an object store was not renewed for this number of seconds, the job that wrote the lock is treated as
dead."""


class Journal:
    """Stores the results of finished recordings, so that the next run does not open these recordings again.

    Parameters
    ----------
    folder : Path or UPath
        Folder of the journal's files. Each run of the job adds at least one file to this folder.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder
        self.rows: dict[str, tuple[str, dict[str, Any]]] = {}
        self._run, self._number = uuid.uuid4().hex[:8], 0
        self._lines: list[str] = []
        self._last = time.monotonic()
        self._stream = None
        segments = sorted(fresh(folder).glob("*.jsonl"), key=lambda p: p.name) if folder.is_dir() else []
        for segment in segments:
            for line in segment.read_text().splitlines():
                # Ignore the last line if it is incomplete: the job may have been killed while it wrote this line.
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.rows[entry["key"]] = (entry["identity"], entry["row"])
        if not isinstance(folder, UPath):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = (folder / f"{len(segments):06d}-{self._run}.jsonl").open("w")
        self._first = len(segments)

    def find(self, key: str, identity: str) -> PartResult | None:
        """Return the stored result of an earlier run for a recording, if its files and the settings have not changed.

        Parameters
        ----------
        key : str
            Key of the recording.
        identity : str
            Checksum of everything that the result of the recording depends on.

        Returns
        -------
        PartResult or None
            The stored result. None if no result is stored, or if the files or the settings have changed.
        """
        known, values = self.rows.get(key, ("", None))
        return PartResult.from_json(values) if values is not None and known == identity else None

    def add(self, key: str, identity: str, result: PartResult) -> None:
        """Add the result of a recording to the journal.

        Parameters
        ----------
        key, identity : str
            Key and checksum of the recording; see `find`.
        result : PartResult
            Result that the worker returned.
        """
        line = json.dumps({"key": key, "identity": identity, "row": result.to_json()}, separators=(",", ":")) + "\n"
        if self._stream is not None:
            self._stream.write(line)
            self._stream.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._last > EVERY_S:
            self._put()

    def _put(self) -> None:
        if self._lines:
            name = f"{self._first:06d}-{self._run}-{self._number:06d}.jsonl"
            (self.folder / name).write_text("".join(self._lines))
            self._lines, self._number = [], self._number + 1
        self._last = time.monotonic()

    def close(self) -> None:
        """Write the remaining results and close the journal."""
        if self._stream is not None:
            self._stream.close()
        else:
            self._put()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise


@contextlib.contextmanager
def lock_output(work: AnyPath) -> Iterator[None]:
    """Lock an output folder during the ``with`` block, so that no other job writes to this folder.

    Parameters
    ----------
    work : Path or UPath
        The job's working folder; it is created if necessary.

    Yields
    ------
    None

    Raises
    ------
    RequestError
        If another job has locked the folder, or if the job cannot write to the folder.
    """
    if isinstance(work, UPath):
        with _lease(work):
            yield
        return
    # The operating system releases a file lock when the process ends, also on network disks. On disks without file
    # locks, the library filelock would treat the output as locked as long as the lock file exists, and this file would
    # remain after a crash. `fallback_to_soft=False` turns this behaviour off.
    lock = FileLock(work / "lock", fallback_to_soft=False)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"output '{work.parent}': another job is writing there; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise RequestError(
            f"output '{work.parent}': cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _owner(lock: UPath) -> dict[str, Any] | None:
    try:
        return json.loads(fresh(lock).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Return whether the job that wrote a lock has ended.

    A job on this machine has ended if its process does not exist any more. A job on any machine has ended if its lock
    was not renewed for `DEAD_S` seconds.
    """
    if owner["host"] == socket.gethostname() and not Path(f"/proc/{owner['pid']}").exists():
        return True
    return time.time() - owner["time"] > DEAD_S


@contextlib.contextmanager
def _lease(work: UPath) -> Iterator[None]:
    """Lock an output on an object store.

    Object stores have no locks, so the job writes an object that stands for the lock, and renews the object regularly.
    """
    lock = work / "lock.json"
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    stop = threading.Event()

    def renew() -> None:
        lock.write_text(json.dumps({**mine, "time": time.time()}))

    def beat() -> None:
        while not stop.wait(BEAT_S):
            # Ignore an error while the lock is renewed: one failed renewal is harmless, and if the store cannot be
            # reached for a long time, the job itself fails.
            with contextlib.suppress(Exception):
                renew()

    try:
        if (owner := _owner(lock)) and not _is_gone(owner):
            raise RequestError(
                f"output '{work.parent}': another job is writing there (host {owner['host']}, process {owner['pid']}); "
                f"wait for it; if it has died, wait {DEAD_S:g} s"
            )
        renew()
        time.sleep(0.5)  # If two jobs start at the same moment, the job that was the last to write the lock continues.
        if (_owner(lock) or {}).get("id") != mine["id"]:
            raise RequestError(f"output '{work.parent}': another job started at the same moment; wait until it ends")
    except Exception as error:
        if isinstance(error, RequestError) or not is_storage_error(error):
            raise
        raise RequestError(f"output '{work.parent}': cannot be written ({error})") from None
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=BEAT_S)
        with contextlib.suppress(Exception):
            if (_owner(lock) or {}).get("id") == mine["id"]:
                lock.unlink()
