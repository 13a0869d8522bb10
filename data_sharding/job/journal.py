"""What an unfinished job leaves in its working folder: the rows it has, and the mark that somebody is at work."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import AnyPath, fresh, is_storage_error
from data_sharding.job.task import PartResult

EVERY_S = 10.0
"""Seconds between two objects of a journal on a store, where nothing can be appended to a file."""
BEAT_S = 15.0
"""Seconds between two signs of life of a job that writes to a store."""
DEAD_S = 90.0
"""Seconds without a sign of life after which another job may take over."""


class Journal:
    """Rows of recordings that are done, so that the next run need not even open their files.

    Parameters
    ----------
    folder : Path or UPath
        Where its files lie; each run adds its own.
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
                # The last line of a run that was killed may be torn.
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.rows[entry["key"]] = (entry["identity"], entry["row"])
        if not isinstance(folder, UPath):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = (folder / f"{len(segments):06d}-{self._run}.jsonl").open("w")
        self._first = len(segments)

    def find(self, key: str, identity: str) -> PartResult | None:
        """Result of a recording, if it is of the same files and the same settings.

        Parameters
        ----------
        key : str
            The recording.
        identity : str
            Checksum of everything that the result depends on.

        Returns
        -------
        PartResult or None
            The result.
        """
        known, values = self.rows.get(key, ("", None))
        return PartResult.from_json(values) if values is not None and known == identity else None

    def add(self, key: str, identity: str, result: PartResult) -> None:
        """Keep a result.

        Parameters
        ----------
        key, identity : str
            See `find`.
        result : PartResult
            What the worker returned.
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
        """Write what is not written yet."""
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
def alone(work: AnyPath) -> Iterator[None]:
    """Keep a second job out of the same output.

    Parameters
    ----------
    work : Path or UPath
        The job's working folder; it is made.

    Yields
    ------
    None

    Raises
    ------
    RequestError
        If another job is writing there, or nothing can be written there.
    """
    if isinstance(work, UPath):
        with _lease(work):
            yield
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        stream = (work / "lock").open("w")
    except OSError as error:
        raise RequestError(f"output '{work.parent}': cannot be written ({error.strerror})") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"output '{work.parent}': another job is writing there; wait for it, or choose another folder"
            ) from None
        yield


def _owner(lock: UPath) -> dict[str, Any] | None:
    try:
        return json.loads(fresh(lock).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the job that wrote a lock has ended: known at once on its own machine, elsewhere by its silence."""
    if owner["host"] == socket.gethostname() and not Path(f"/proc/{owner['pid']}").exists():
        return True
    return time.time() - owner["time"] > DEAD_S


@contextlib.contextmanager
def _lease(work: UPath) -> Iterator[None]:
    lock = work / "lock.json"
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    stop = threading.Event()

    def sign() -> None:
        lock.write_text(json.dumps({**mine, "time": time.time()}))

    def beat() -> None:
        while not stop.wait(BEAT_S):
            # One sign lost is no harm; a store that is gone shows in the job's own writing.
            with contextlib.suppress(Exception):
                sign()

    try:
        if (owner := _owner(lock)) and not _is_gone(owner):
            raise RequestError(
                f"output '{work.parent}': another job is writing there (host {owner['host']}, process {owner['pid']}); "
                f"wait for it, or, if it is dead, for {DEAD_S:g} s"
            )
        sign()
        time.sleep(0.5)  # Of two that came at the same moment, the one that wrote last goes on.
        if (_owner(lock) or {}).get("id") != mine["id"]:
            raise RequestError(f"output '{work.parent}': another job has begun to write there at the same moment")
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
