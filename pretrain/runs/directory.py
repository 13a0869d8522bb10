"""The run directory of every training stage: config, metrics, status and the folder of checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.config import to_dict, to_yaml
from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.files import atomic_write_text, open_to_append, read_json, write_json
from data_sharding.common.untrusted import check_group, check_text, parse_json, read_limited
from pretrain.runs.checkpoint import newest_checkpoint
from pretrain.runs.lock import hold_lock
from pretrain.runs.metrics import MAX_METRICS, read_metrics
from pretrain.runs.stored_config import changed_keys, plain, read_stored_config, show
from pretrain.runs.tracking import TrackerConfig, open_tracker

FREE = ("output", "tracker", "num_processes", "device")
"""Keys that may change when a run of any stage is resumed, because the trained weights do not depend on these keys."""

# For some config keys, the reason why the key must not change when a run is resumed. For a nested key such as
# optimizer.lr, the name after the last dot is looked up here.
_REASONS = {
    "steps": "the learning rate of every step depends on the number of steps",
    "epochs": "the learning rate of every step depends on the number of epochs",
    "batch_size": "the order of samples and the meaning of a step depend on this key",
    "seed": "initial weights, noise and the order of samples depend on this key",
}


class RunDirectory:
    """The directory of a training run on disk.

    Parameters
    ----------
    path : str or Path
        Path of the directory; it is created if it is missing.
    config : dataclass instance
        Config of the run, with all defaults filled in.
    rank : int
        Rank of this process. Only rank 0 writes to the directory, but every rank can record a failure in status.json.
    tracker : TrackerConfig, optional
        Settings of the tracker to which metrics are sent. Metrics are always written to metrics.jsonl too; by default,
        only there.
    free : tuple of str
        Config keys that may change when the run is resumed; a key of a nested config is written with dots. The name of
        a nested config stands for all its keys.
    upgrade : callable, optional
        Function that converts a stored config that an older version of Dreamscale wrote, so that it can be compared
        with `config`. Keys in the table ``RENAMED`` of a config class are renamed even without this function.

    Attributes
    ----------
    finished : bool
        True if the run was already complete when this object was made. Nothing is written to the directory of a
        complete run.

    Raises
    ------
    RequestError
        If the directory cannot be written, or if it holds a run whose config differs in a key that is not in `free`.
    """

    def __init__(
        self,
        path: str | Path,
        config: Any,
        *,
        rank: int = 0,
        tracker: TrackerConfig | None = None,
        free: tuple[str, ...] = FREE,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.rank = Path(path), rank
        self.checkpoints = self.path / "checkpoints"
        self._log: Callable[..., None] = lambda step, metrics: None
        self._close: Callable[[], None] = lambda: None
        self._stream = self._lock = None
        self._config = plain(to_dict(config))
        status = self.path / "status.json"
        # Read status.json only once: if rank 0 writes the file between two reads, the values would not belong together.
        old = check_group(read_json(status), str(status)) if status.is_file() else None
        if old is not None:
            check_text(old.get("state"), str(status), "state")
            self._refuse_other_config(old, config, free, upgrade)
        self.finished = old is not None and old["state"] == "done"
        if rank or self.finished:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
            atomic_write_text(self.path / "config.yaml", to_yaml(config))
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be written ({error.strerror}); choose another output") from None
        self._lock = hold_lock(self.path / "lock")
        self.status("running")
        self._stream = os.fdopen(open_to_append(self.path / "metrics.jsonl"), "a")
        self._log, self._close = open_tracker(tracker or TrackerConfig(kind="none"), self.path, to_dict(config))

    def _refuse_other_config(
        self,
        old: dict[str, Any],
        config: Any,
        free: tuple[str, ...],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        stored = old.get("config")
        if not isinstance(stored, dict):
            # In runs of older versions of Dreamscale, status.json holds only a checksum of the config, so read the
            # config itself from config.yaml.
            stored = read_stored_config(self.path / "config.yaml", type(config), upgrade)
        for key, before, now in changed_keys(stored, config):
            if any(key == name or key.startswith(f"{name}.") for name in free):
                continue
            reason = _REASONS.get(key.rpartition(".")[2])
            raise RequestError(
                f"{self.path}: holds a run with another config: {key} was {show(before)}, is {show(now)}"
                + (f" ({reason})" if reason else "")
                + f"; set {key} back to resume this run, or choose another output"
            )

    def status(
        self, state: Literal["running", "done", "stopped", "failed"], *, any_rank: bool = False, **extra: Any
    ) -> None:
        """Record the state of the run in status.json.

        Parameters
        ----------
        state : str
            One of running, done, stopped (a stop was requested and a checkpoint was written) and failed.
        any_rank : bool
            If True, this process writes the file, whatever its rank; if False, it writes the file only if it is rank 0.
        **extra
            Further entries for status.json, e.g. the step.
        """
        if any_rank or not self.rank:
            write_json(self.path / "status.json", {"state": state, "config": self._config, **extra})

    def failed(self, reason: str) -> None:
        """Record a failure in status.json, unless another process has already recorded an earlier failure.

        Parameters
        ----------
        reason : str
            Description of the failure.
        """
        status = self.path / "status.json"
        if status.is_file() and read_json(status).get("state") == "failed":
            return
        try:
            self.status("failed", any_rank=True, reason=reason)
        except OSError:
            # On a full disk, there may be no room for a new file, so write into the old file.
            values = json.dumps({"state": "failed", "config": self._config, "reason": reason})
            with contextlib.suppress(OSError), status.open("r+") as stream:
                stream.write(values)
                stream.truncate()

    def log(self, step: int, **metrics: Any) -> None:
        """Append a line to metrics.jsonl and send the metrics to the tracker.

        Parameters
        ----------
        step : int
            Number of optimiser steps done.
        **metrics
            Values of the metrics by name; NaN and infinities are written as null.
        """
        if self.rank or self._stream is None:
            return
        clean = {k: (None if isinstance(v, float) and not abs(v) < float("inf") else v) for k, v in metrics.items()}
        try:
            self._stream.write(json.dumps({"step": step, "time": time.time(), **clean}) + "\n")
            self._stream.flush()
        except OSError as error:
            # A metrics line that cannot be written, e.g. because the disk is full, must not end a training, so only
            # print a message.
            print(f"dreamscale: metrics of step {step} could not be written ({error})", file=sys.stderr)
        try:
            self._log(step, clean)
        except Exception as error:
            # The tracker's library may raise any kind of error, but an error in the tracker must not end a training.
            self._log = lambda step, metrics: None
            print(
                f"dreamscale: the tracker failed at step {step} ({one_line(error)}); from now on metrics go to "
                f"{self.path / 'metrics.jsonl'} alone",
                file=sys.stderr,
            )

    def rewind_metrics(self, step: int, *, evaluated: bool = True) -> None:
        """Delete the metrics of all steps after `step`, because the resumed run repeats these steps.

        Parameters
        ----------
        step : int
            The step from which the run is resumed; -1 deletes all lines.
        evaluated : bool
            If False, the line with the evaluation at step `step` is deleted too.
        """
        if self.rank or self._stream is None:
            return
        with contextlib.suppress(OSError):
            self._stream.close()
        path = self.path / "metrics.jsonl"

        def stays(line: str) -> bool:
            at = _step_of(line)
            return at < step or (at == step and (evaluated or '"val_loss"' not in line))

        lines = read_limited(path, MAX_METRICS).decode(errors="replace").splitlines()
        kept = [line for line in lines if line and stays(line)]
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))
        self._stream = os.fdopen(open_to_append(path), "a")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl written so far."""
        return read_metrics(self.path / "metrics.jsonl")

    def latest(self, left_out: Sequence[dict[str, Any]] = ()) -> Path | None:
        """Return the newest undamaged checkpoint; see `pretrain.runs.checkpoint.newest_checkpoint`."""
        return newest_checkpoint(self.checkpoints, left_out)

    def close(self) -> None:
        """Close the metrics file and the tracker, and release the lock."""
        if self._stream is not None:
            # If the disk is full, lines that could not be written are written again here. `log` has named their steps.
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None
        close, self._close = self._close, lambda: None
        try:
            close()
        except Exception as error:
            print(f"dreamscale: the tracker could not be closed ({one_line(error)})", file=sys.stderr)
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _step_of(line: str) -> int:
    """Return the step of a line of metrics; for a partly written line, a very large number, so that it is deleted."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return sys.maxsize
