"""Requests to stop a training, by a signal or by a stop file."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "DREAMSCALE_STOP_FILE"
"""Name of an environment variable that holds the path of a stop file. The training stops when the stop file appears. A
launcher sets this variable if the launcher's signals do not reach the training processes."""

# If a second signal arrives within this number of seconds after the first one, both count as one request.
_SAME_REQUEST_S = 3.0


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the training loop reads.

    A SIGINT that arrives more than three seconds after the first signal interrupts the process at once. A second SIGINT
    within these three seconds is ignored, because a single request can arrive as two signals: one from the terminal or
    the batch system, and one from torchrun, which forwards signals to its workers. If the environment variable
    `STOP_FILE` is set, the flag is also set when the stop file appears. The class checks at most once a second whether
    the stop file exists.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._first = math.inf
        self._previous: dict[int, Any] = {}
        self._file = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
        self._checked_file = time.monotonic()

    @property
    def requested(self) -> bool:
        """True after the first request to stop the training."""
        if self._file is not None and not self._signalled and time.monotonic() - self._checked_file > 1.0:
            self._checked_file = time.monotonic()
            self._signalled = self._file.exists()
        return self._signalled

    def __enter__(self) -> StopSignal:
        # Python allows only the main thread to set signal handlers. In another thread, only the stop file works.
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
