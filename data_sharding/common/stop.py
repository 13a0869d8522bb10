"""Stop a command at any moment by SIGTERM, SIGUSR1 or Ctrl-C.

A signal raises `StopRequested` in the main thread. If the thread is importing a module, the exception is raised after
the import, because a module that was imported in part can fail later. The exception can be lost: a library that is
starting may catch the exception, or may have replaced the signal handler, so that no exception is raised. So each stop
signal is also written to a pipe, which a thread reads. Between its steps, the command calls `check_stop`, which raises
`StopRequested` if a signal has arrived. If the command has not ended some seconds after the signal, the thread ends the
process and all its child processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from data_sharding.common.early_stop import EXIT_STOPPED, SIGNALS, stop_reason
from data_sharding.common.errors import StopRequested

GRACE_S = 8.0
"""After a signal, a command has this number of seconds to end by itself. Docker kills a process 10 s after the
signal."""
IMPORT_S = 0.1
"""Seconds between two checks whether an import has ended. A signal during an import takes effect after the import."""
SAME_REQUEST_S = 2.0
"""Signals within this number of seconds are treated as one request, because a terminal and a batch system may both send
a signal."""
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


class _Stop:
    """Notices a request to stop this process, and ends the process if it does not end by itself."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raised_at: float | None = None
        self.waits_for_import = False
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        os.set_blocking(self.write, False)

    def look(self) -> bool:
        """Read the signals that were written to the pipe; return whether a request to stop has arrived."""
        with self.lock, contextlib.suppress(BlockingIOError):
            for number in os.read(self.read, 100):
                if number in SIGNALS:
                    self.number = number
        return self.number is not None

    def error(self) -> StopRequested:
        assert self.number is not None
        return StopRequested(stop_reason(self.number))

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.raised_at is None:
            self.waits_for_import = is_import(frame)
            if self.waits_for_import:
                return  # After the import, `watch` sends the signal again.
            self.raised_at = time.monotonic()
            raise self.error()
        if time.monotonic() - self.raised_at > SAME_REQUEST_S:
            self.end_now()

    def watch(self) -> None:
        """Wait for a signal, and then for the end of the command. A thread runs this method."""
        while not self.ended.is_set():
            select.select([self.read], [], [])
            if not self.look():
                continue
            end = time.monotonic() + GRACE_S
            while not self.ended.wait(IMPORT_S):
                if time.monotonic() > end:
                    self.end_now()
                number, main = self.number, threading.main_thread().ident
                if self.waits_for_import and number and main and signal.getsignal(number) == self.handle:
                    signal.pthread_kill(main, number)
        os.close(self.read)

    def end_now(self) -> None:
        """End this process and its child processes."""
        # The live display of the progress may have hidden the terminal's cursor, so show the cursor again.
        show_cursor = "\033[?25h" if sys.stderr.isatty() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{show_cursor}dreamscale: stopped on request; {self.error()}\n".encode())
        kill_processes(find_child_processes())
        os._exit(EXIT_STOPPED)


def is_import(frame: FrameType | None) -> bool:
    """Return whether a stack frame, or one of its callers, is importing a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def ignore_stop(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a `sys.unraisablehook` that does not print `StopRequested`, because `check_stop` raises it again later."""

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, StopRequested):
            before(unraisable)

    return hook


_stop: _Stop | None = None
_was_stopped = False


@contextlib.contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Raise `StopRequested` if one of `SIGNALS` arrives during the ``with`` block.

    If such blocks are nested, each inner block installs the signal handlers of the outermost block again, because a
    library may have replaced these handlers since the outermost block began.

    Yields
    ------
    None

    Raises
    ------
    StopRequested
        When a signal arrives during the block. If a library catches this exception, it is raised again at the end of
        the block.
    """
    global _stop, _was_stopped
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = _stop is None
    stop = _stop = _stop or _Stop()
    before: dict[int, Any] = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    if not outermost:
        try:
            check_stop()
            yield
        except (Exception, SystemExit):
            # An error after a request to stop is a consequence of the request, so raise `StopRequested` instead.
            check_stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return
    # `watch` needs psutil. Import psutil now: if the main thread hangs in an import, `watch` cannot import anything.
    importlib.import_module("psutil")
    wakeup = signal.set_wakeup_fd(stop.write, warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, daemon=True, name="stop").start()
    unraisable = sys.unraisablehook
    sys.unraisablehook = ignore_stop(unraisable)
    try:
        yield
        check_stop()
    except (Exception, SystemExit):
        check_stop()
        raise
    finally:
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
        _was_stopped = stop.look()
        stop.ended.set()
        os.close(stop.write)  # The thread waits for data in the pipe, so closing the pipe ends the thread.
        _stop = None


def check_stop() -> None:
    """Raise `StopRequested` if a signal has arrived since the outermost `raise_on_stop_signals` block began.

    Raises
    ------
    StopRequested
        If one of `SIGNALS` has arrived.
    """
    if _stop is not None and _stop.look():
        raise _stop.error()


def end_command(code: int) -> int:
    """Ignore further signals, because the command has ended and a signal must not change its exit code.

    If the command was stopped by a signal, this function ends the process immediately, without Python's usual shutdown.
    During the shutdown, a library whose start was interrupted, for example Ray, could crash the interpreter.

    Parameters
    ----------
    code : int
        Exit code of the command.

    Returns
    -------
    int
        The exit code. If the command was stopped by a signal, this function does not return.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if _was_stopped:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def find_child_processes() -> list[Any]:
    """Return all child processes of this process, and their child processes, as `psutil.Process` objects."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process().children(recursive=True)
    return []


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """During the ``with`` block, take over the processes whose parent ends, so that `find_child_processes` finds them.

    Only Linux can do this, for processes that this process has started directly or indirectly.

    Yields
    ------
    None
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def kill_processes(processes: Iterable[Any], *, kept: Iterable[Any] = (), tries: int = 20) -> None:
    """Kill child processes, and all processes that they have started.

    Parameters
    ----------
    processes : iterable of psutil.Process
        The processes to kill.
    kept : iterable of psutil.Process
        Child processes that must not be killed.
    tries : int
        Number of times that this function searches for child processes that are still alive.
    """
    import psutil

    own = {process.pid for process in kept}
    left = list(processes)
    nothing_found = 0
    with adopt_orphans():
        for _ in range(tries):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=0.5)
            left = [p for p in find_child_processes() if p.pid not in own]
            # The search misses the children of a process that ends during the search, so search twice.
            nothing_found = 0 if left else nothing_found + 1
            if nothing_found == 2:
                break
