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

from data_sharding.common.errors import RequestError, show
from data_sharding.common.stop import check_stop
from data_sharding.common.storage import AnyPath, fresh, is_storage_error
from data_sharding.common.untrusted import parse_json
from data_sharding.job.cluster import say
from data_sharding.job.task import PartResult

EVERY_S = 10.0
"""Seconds between two objects that the journal writes to an object store. Each time, the journal writes a new object,
because a stored object cannot be extended."""
BEAT_S = 15.0
"""Seconds between two renewals of a job's lock on an object store."""
DEAD_S = 90.0
"""If a lock on an object store does not change for this number of seconds, the job that wrote the lock is treated as
dead."""
LOOK_S = 1.0
"""Seconds between two looks at the lock of another job."""


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


def _read(lock: UPath) -> tuple[str, dict[str, Any]] | None:
    """Return the text of a lock, and its values; None if there is no lock."""
    try:
        text = fresh(lock).read_text()
    except FileNotFoundError:
        return None
    try:
        values = parse_json(text)
    except ValueError:
        values = {}
    return text, values if isinstance(values, dict) else {}


def _find_process_table() -> str:
    """Return a name of the table in which this process has its process id; an empty text if there is no name.

    Two processes with equal names are on the same machine since the same start of it, and in the same container.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _find_start(pid: object) -> str | None:
    """Return the time at which a process of this machine started, in ticks since the start of the machine."""
    try:
        return Path(f"/proc/{int(str(pid))}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None


def _is_alive(lock: UPath) -> bool:
    """Find out whether the job that wrote a lock is alive.

    If the job is in the process table of this process, its process is looked up. Otherwise this function waits until
    the lock changes, or until it has not changed for `DEAD_S` seconds. Only the clock of this process is used, because
    the clocks of two machines can differ by hours.
    """
    found = _read(lock)
    if found is None:
        return False
    text, owner = found
    if owner.get("table") and owner.get("table") == _find_process_table():
        return owner.get("start") is not None and owner.get("start") == _find_start(owner.get("pid"))
    say(
        f"output '{lock.parent.parent}': there is the lock of another job ({_describe(owner)}); waiting at most "
        f"{DEAD_S:g} s to see whether this job is alive"
    )
    end = time.monotonic() + DEAD_S
    while time.monotonic() < end:
        check_stop()
        time.sleep(LOOK_S)
        now = _read(lock)
        if now is None:
            return False
        if now[0] != text:
            return True
    return False


def _describe(owner: dict[str, Any]) -> str:
    return f"host {show(str(owner.get('host')))}, process {show(str(owner.get('pid')))}"


@contextlib.contextmanager
def _lease(work: UPath) -> Iterator[None]:
    """Lock an output on an object store.

    Object stores have no locks, so the job writes an object that stands for the lock, and renews the object regularly.
    Each renewal changes the object.
    """
    lock = work / "lock.json"
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    mine |= {"table": _find_process_table(), "start": _find_start(os.getpid())}
    stop = threading.Event()
    beats = 0

    def renew() -> None:
        nonlocal beats
        beats += 1
        lock.write_text(json.dumps({**mine, "beat": beats}))

    def is_mine() -> bool:
        found = _read(lock)
        return found is not None and found[1].get("id") == mine["id"]

    def beat() -> None:
        while not stop.wait(BEAT_S):
            # Ignore an error while the lock is renewed: one failed renewal is harmless, and if the store cannot be
            # reached for a long time, the job itself fails.
            with contextlib.suppress(Exception):
                renew()

    try:
        if _is_alive(lock):
            owner = (_read(lock) or ("", {}))[1]
            raise RequestError(
                f"output '{work.parent}': another job is writing there ({_describe(owner)}); wait until it ends, or "
                "choose another output"
            )
        renew()
        time.sleep(0.5)  # If two jobs start at the same moment, the job that was the last to write the lock continues.
        if not is_mine():
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
            if is_mine():
                lock.unlink()
