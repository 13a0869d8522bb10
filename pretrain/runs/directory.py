"""The run directory of every training stage: config, metrics, checkpoints, status, and the wish to stop."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from data_sharding.common.config import to_dict, to_yaml
from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.files import atomic_write_text, digest_of, read_json, write_json
from pretrain.runs.checkpoint import DONE, file_record, newest_whole, prune
from pretrain.runs.tracking import TrackerConfig, open_tracker

_SAME_HOST_S, _OTHER_HOST_S = 10, 120
_SAME_REQUEST_S = 3.0
STOP_FILE = "DREAMSCALE_STOP_FILE"
"""Environment variable: a file whose appearance asks to stop, where signals do not reach the training's process."""


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the training loop looks at.

    A second SIGINT interrupts at once, unless it is the first one over again: torchrun passes on what the terminal or a
    batch system has sent to its processes, too. The file that `STOP_FILE` names, where it does, is looked for once a
    second.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._first = math.inf
        self._previous: dict[int, Any] = {}
        self._file = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
        self._looked = time.monotonic()

    @property
    def requested(self) -> bool:
        """True once somebody asked."""
        if self._file is not None and not self._signalled and time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            self._signalled = self._file.exists()
        return self._signalled

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT and time.monotonic() - self._first > _SAME_REQUEST_S:
            raise KeyboardInterrupt
        self._first = min(self._first, time.monotonic())
        self._signalled = True


class RunDirectory:
    """A training run on disk.

    Parameters
    ----------
    path : str or Path
        The directory; made if it is not there.
    config : dataclass instance
        The resolved config. A directory that holds a run of another config is refused.
    rank : int
        Only rank 0 writes.
    tracker : TrackerConfig, optional
        Where metrics go besides metrics.jsonl; none by default.
    ignore : tuple of str
        Dotted config keys that may differ when a run goes on: they do not change what is learned.

    Raises
    ------
    RequestError
        If the directory holds a run of another config, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: Any,
        *,
        rank: int = 0,
        tracker: TrackerConfig | None = None,
        ignore: tuple[str, ...] = ("output", "tracker", "num_processes", "device"),
    ) -> None:
        self.path, self.rank = Path(path), rank
        self.checkpoints = self.path / "checkpoints"
        self._log: Callable[..., None] = lambda step, metrics: None
        self._close: Callable[[], None] = lambda: None
        self._stream = self._lock = None
        values = to_dict(config)
        digest = digest_of(_without(values, ignore))
        known = self.path / "status.json"
        # Looked at once: the first process may be writing it right now.
        old = read_json(known) if known.is_file() else None
        if old is not None and old.get("config") != digest:
            raise RequestError(
                f"{self.path}: holds a run of another config (see {self.path / 'config.yaml'}); "
                f"choose another output, or delete it"
            )
        self._digest = digest
        self.finished = old is not None and old["state"] == "done"
        if rank or self.finished:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
            atomic_write_text(self.path / "config.yaml", to_yaml(config))
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._lock = _locked(self.path / "lock")
        self.status("running")
        self._stream = (self.path / "metrics.jsonl").open("a")
        self._log, self._close = open_tracker(tracker or TrackerConfig(kind="none"), self.path, values)

    def status(
        self, state: Literal["running", "done", "stopped", "failed"], *, any_rank: bool = False, **extra: Any
    ) -> None:
        """Record the state of the run in status.json.

        Parameters
        ----------
        state : str
            running, done, stopped (on request, with a checkpoint) or failed.
        any_rank : bool
            True where this process speaks for all, although it may not be the first.
        **extra
            Anything else, e.g. the step.
        """
        if any_rank or not self.rank:
            write_json(self.path / "status.json", {"state": state, "config": self._digest, **extra})

    def failed(self, reason: str) -> None:
        """Record a failure, unless another process has: what the others see then follows from it.

        Parameters
        ----------
        reason : str
            What happened.
        """
        known = self.path / "status.json"
        if not known.is_file() or read_json(known)["state"] != "failed":
            self.status("failed", any_rank=True, reason=reason)

    def log(self, step: int, **metrics: Any) -> None:
        """Append a line to metrics.jsonl and tell the tracker.

        Parameters
        ----------
        step : int
            Optimiser steps done.
        **metrics
            Numbers; NaN and infinities are written as null.
        """
        if self.rank or self._stream is None:
            return
        clean = {k: (None if isinstance(v, float) and not abs(v) < float("inf") else v) for k, v in metrics.items()}
        try:
            self._stream.write(json.dumps({"step": step, "time": time.time(), **clean}) + "\n")
            self._stream.flush()
        except OSError as error:
            # A full disk must not end a training; the next checkpoint says so aloud anyway.
            print(f"dreamscale: metrics of step {step} could not be written ({error})", file=sys.stderr)
        try:
            self._log(step, clean)
        except Exception as error:
            # Whatever its library raises, a tracker must not end a training either.
            self._log = lambda step, metrics: None
            print(
                f"dreamscale: the tracker failed at step {step} ({one_line(error)}); metrics go on in "
                f"{self.path / 'metrics.jsonl'} alone",
                file=sys.stderr,
            )

    def rewind_metrics(self, step: int, *, evaluated: bool = True) -> None:
        """Drop lines beyond a step: a resumed run writes them again.

        Parameters
        ----------
        step : int
            The step of the checkpoint from which the run goes on; -1 drops all.
        evaluated : bool
            False to drop the evaluation of that very step as well.
        """
        if self.rank or self._stream is None:
            return
        with contextlib.suppress(OSError):
            self._stream.close()
        path = self.path / "metrics.jsonl"

        def stays(line: str) -> bool:
            at = _step_of(line)
            return at < step or (at == step and (evaluated or '"val_loss"' not in line))

        kept = [line for line in path.read_text().splitlines() if line and stays(line)]
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))
        self._stream = path.open("a")

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl so far.

        Returns
        -------
        list of dict
            One dictionary a line.
        """
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def step_directory(self, step: int) -> Path:
        """Where the checkpoint of a step stands once it is complete.

        Parameters
        ----------
        step : int
            Optimiser steps done.

        Returns
        -------
        Path
            The directory.
        """
        return self.checkpoints / f"step_{step:08d}"

    def partial_directory(self, step: int) -> Path:
        """Where a checkpoint is written before it counts.

        Parameters
        ----------
        step : int
            Optimiser steps done.

        Returns
        -------
        Path
            The directory.
        """
        return self.checkpoints / f".partial_{step:08d}"

    def begin_checkpoint(self, step: int) -> Path:
        """Directory to write a checkpoint into; call on every rank, between barriers.

        Parameters
        ----------
        step : int
            Optimiser steps done.

        Returns
        -------
        Path
            A directory that does not count until `commit_checkpoint`; emptied by rank 0.
        """
        partial = self.partial_directory(step)
        if not self.rank:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return partial

    def commit_checkpoint(
        self,
        step: int,
        *,
        keep: int = 2,
        milestones: int | None = None,
        files: dict[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        """Declare a checkpoint complete and delete old ones; rank 0, after all ranks wrote theirs.

        Parameters
        ----------
        step : int
            Optimiser steps done.
        keep : int
            Newest checkpoints kept.
        milestones : int, optional
            Checkpoints of every so many steps are kept too.
        files : dict, optional
            What `pretrain.runs.checkpoint.file_record` says of each file; looked up by default.
        **extra
            Written into the checkpoint's own manifest.
        """
        if self.rank:
            return
        partial, final = self.partial_directory(step), self.step_directory(step)
        if files is None:
            files = {
                p.relative_to(partial).as_posix(): file_record(p) for p in sorted(partial.rglob("*")) if p.is_file()
            }
        write_json(partial / DONE, {"step": step, "files": files, **extra})
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        atomic_write_text(self.path / "latest", final.name + "\n")
        prune(self.checkpoints, keep=keep, milestones=milestones)

    def latest(self, left_out: Sequence[dict[str, Any]] = ()) -> Path | None:
        """Newest checkpoint that is whole to the byte; what a crash left half-written is deleted.

        Parameters
        ----------
        left_out : sequence of dict
            As for `pretrain.runs.checkpoint.newest_whole`.

        Returns
        -------
        Path or None
            Its directory, or None where there never was one.

        Raises
        ------
        RequestError
            If all are damaged.
        """
        for partial in self.checkpoints.glob(".partial_*"):
            shutil.rmtree(partial, ignore_errors=True)
        return newest_whole(self.checkpoints, left_out)

    def close(self) -> None:
        """Close the metrics file and the tracker."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        try:
            self._close()
        except Exception as error:
            print(f"dreamscale: the tracker could not be closed ({one_line(error)})", file=sys.stderr)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _locked(path: Path) -> IO[str]:
    """Hold a file as long as this process is there, so that two commands cannot write one run.

    The lock is a POSIX one: it ends with its process, and processes forked off it do not have it. File systems that
    know no locks are taken as they are.
    """
    stream = path.open("a+")
    waited = 0
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break
        stream.seek(0)
        owner = stream.read().strip()
        if not waited:
            print(f"dreamscale: {path.parent} is in use by {owner}; waiting for its end", file=sys.stderr)
        # One that was killed is gone in a moment; what another host held, its file server lets go of later.
        if waited >= (_SAME_HOST_S if owner.endswith(f" {socket.gethostname()}") else _OTHER_HOST_S):
            raise RequestError(
                f"{path.parent}: {owner} is at work on this run; stop it first, or choose another output (if it is "
                f"gone, delete {path})"
            )
        time.sleep(1)
        waited += 1
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def _step_of(line: str) -> int:
    """Step of a metrics line; a half-written last line counts as beyond everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def _without(values: dict[str, Any], ignore: tuple[str, ...]) -> dict[str, Any]:
    """Copy of a nested dictionary without some dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in ignore:
            continue
        inner = tuple(name[len(key) + 1 :] for name in ignore if name.startswith(f"{key}."))
        out[key] = _without(value, inner) if inner and isinstance(value, dict) else value
    return out
