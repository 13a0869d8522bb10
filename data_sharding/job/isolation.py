"""Runs a function in a child process. If the function crashes, hangs or uses too much memory, only its call fails.

Readers of file formats may crash on damaged files. If a reader crashes in a child process, the Ray worker does not end.
The child process runs the command ``python -m data_sharding.job.isolation``. The child process is a new process, not a
fork. The child process does not import Ray, and ends when its parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import importlib
import os
import pickle
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_sharding.common.reason import Reason

CRASHES = 2
"""A call is given up after the child process has crashed this many times."""
KILLS = 4
"""A call is given up after the child process was killed this many times with SIGKILL or SIGTERM. SIGKILL and SIGTERM
come from another process or from the kernel (if memory is short), so more retries are allowed than after a crash."""
START_S = 300.0
"""Time limit in seconds for the start of a child process. The limit is long, because imports can be slow."""
LOOK_S = 0.1
"""Seconds between two checks of the child process's memory."""
PR_SET_PDEATHSIG = 1
KEEP = "keep"
"""Name of a file that protects a temporary folder: a folder with this file is not removed, because a user needs the
logs in the folder."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Each child process uses one thread, because it is faster to read several recordings at once than to use several
threads for one recording."""
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20)}
"""Settings of the C library's memory allocation (glibc), in bytes. A child process keeps up to 128 MB of freed memory,
and uses this memory again. Without the settings of the memory allocation, a short recording takes a tenth more CPU
time, because every large array is put into new memory from the kernel. If the user sets environment variables of the
same names, the user's values are used."""


class GivenUp(Exception):
    """A call in a child process failed because the called function crashed, hung or used too much memory.

    Parameters
    ----------
    reason : Reason
        Reason for the ledger: why the call failed.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class ChildFailed(RuntimeError):
    """A child process did not start because of a problem of the machine."""


class _Died(Exception):
    def __init__(self, status: int) -> None:
        self.killed = status in (-signal.SIGKILL, -signal.SIGTERM)
        self.how = signal.Signals(-status).name if status < 0 else f"exit code {status}"


def _private_bytes(pid: int) -> int:
    """Return the memory of a process in bytes, without shared pages such as those of memory-mapped files."""
    import psutil

    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return info.rss - getattr(info, "shared", 0)


def _remove_if_dead(folder: Path) -> None:
    """Remove a temporary folder of this user if no process holds the lock of the folder."""
    found = folder.lstat()
    # Leave alone what another user has made: a folder with a name of the same form, or a link to a folder of this user.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or (folder / KEEP).exists():
        return
    # The removal of a folder may have been interrupted after its lock was deleted, so the lock file is made again if
    # necessary.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(folder / "lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def owned_folder(base: Path, kind: str) -> Iterator[Path]:
    """Make a folder for temporary files, and remove the temporary folders of processes that have died.

    Each process locks the file ``lock`` in its own folder, and the operating system releases the lock when the process
    ends, even after a crash. So a folder whose file ``lock`` is not locked belongs to a process that has died. A folder
    with a file `KEEP` is not removed. The library filelock is not used, because the folder is renamed while its file is
    locked.

    Parameters
    ----------
    base : Path
        Folder in which the new folder is made.
    kind : str
        Beginning of the new folder's name.

    Yields
    ------
    Path
        The new folder, which is removed after the ``with`` block, unless it has a file `KEEP`.
    """
    base.mkdir(parents=True, exist_ok=True)
    for old in base.glob(f"{kind}-*"):
        with contextlib.suppress(OSError):
            _remove_if_dead(old)
    # The folder gets its final name only after its file is locked, because otherwise another process could remove the
    # folder.
    made = Path(tempfile.mkdtemp(prefix=f"new-{kind}-", dir=base))
    with (made / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        folder = made.rename(made.with_name(made.name.removeprefix("new-")))
        try:
            yield folder
        finally:
            if not (folder / KEEP).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _too_much_memory(memory_gb: float) -> Reason:
    return Reason("memory", f"the recording needs more than {memory_gb:g} GB (key 'ray.memory_gb')")


class Child:
    """A child process that calls one function repeatedly.

    Parameters
    ----------
    function : str
        Name of a function with one argument, written as ``module:name``. The argument and the result of the function
        must be picklable.
    memory_gb : float
        Memory limit for a call in GB (1e9 bytes); 0 means no limit.
    """

    def __init__(self, function: str, memory_gb: float = 0.0) -> None:
        self.function, self.memory_gb = function, memory_gb
        self._stack = contextlib.ExitStack()
        base = Path(os.environ.get("DREAMSCALE_SCRATCH") or tempfile.gettempdir())
        folder = self._stack.enter_context(owned_folder(base, "dreamscale-child"))
        ours, theirs = socket.socketpair()
        env = {
            **KEPT_MEMORY,
            **os.environ,
            **ONE_THREAD,
            "DREAMSCALE_SCRATCH": str(folder),
            "TMPDIR": str(folder),
            # The child must find the same modules as this process, so it gets the complete search path of this process.
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path)),  # noqa: PTH109
        }
        with theirs:
            command = [sys.executable, "-m", "data_sharding.job.isolation", str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                [*command, function, repr(memory_gb)], env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._pipe = Connection(ours.detach())
        try:
            if self._receive(START_S, limit=False)[0] != "ready":
                raise ChildFailed("the child process that reads recordings sent an unexpected first message")
        except (_Died, GivenUp) as error:
            self.close()
            how = error.how if isinstance(error, _Died) else f"not within {START_S:g} s"
            text = f"the child process that reads recordings did not start ({how}); see the logs of Ray's workers"
            raise ChildFailed(text) from None

    def _receive(self, timeout_s: float, *, limit: bool) -> tuple[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self._pipe.poll(LOOK_S):
                    return self._pipe.recv()
            except (EOFError, OSError):
                raise _Died(self.process.wait()) from None
            if time.monotonic() > deadline:
                raise GivenUp(Reason("time-out", f"not finished after {timeout_s:g} s (key 'ray.timeout_s')"))
            if limit and self.memory_gb and _private_bytes(self.process.pid) > self.memory_gb * 1e9:
                raise GivenUp(_too_much_memory(self.memory_gb))

    def call(self, argument: Any, timeout_s: float) -> Any:
        """Call the function in the child process.

        Parameters
        ----------
        argument : Any
            Argument of the function.
        timeout_s : float
            Time limit in seconds.

        Returns
        -------
        Any
            Result of the function.

        Raises
        ------
        GivenUp
            If the call needs more than the allowed time or memory; the child process is then killed.
        Exception
            Any error that the function raised.
        """
        try:
            self._pipe.send(argument)
            kind, value = self._receive(timeout_s, limit=True)
        except OSError:
            raise _Died(self.process.wait()) from None
        except GivenUp:
            self.close()
            raise
        if kind == "raised":
            raise value
        return value

    def close(self) -> None:
        """Kill the child process and remove its scratch folder."""
        self.process.kill()
        self.process.wait()
        self._pipe.close()
        self._stack.close()

    @property
    def worn(self) -> bool:
        """Return whether the process still uses over half of its memory limit after a call, so it must be replaced."""
        return bool(self.memory_gb) and _private_bytes(self.process.pid) > 0.5e9 * self.memory_gb


_children: dict[tuple[str, float], Child] = {}


def call_isolated(function: str, argument: Any, *, timeout_s: float, memory_gb: float = 0.0) -> Any:
    """Call a function in a child process. The child process is reused, or started if necessary.

    Parameters
    ----------
    function : str
        The function, written as ``module:name``.
    argument : Any
        Argument of the function.
    timeout_s : float
        Time limit in seconds (key ``ray.timeout_s``).
    memory_gb : float
        Memory limit in GB (key ``ray.memory_gb``); 0 means no limit.

    Returns
    -------
    Any
        Result of the function.

    Raises
    ------
    GivenUp
        If the call needed more than the allowed time or memory, or if the child process died too often.
    ChildFailed
        If no child process could be started.
    Exception
        Any error that the function raised.
    """
    crashes = kills = 0
    while True:
        child = _children.pop((function, memory_gb), None) or Child(function, memory_gb)
        try:
            value = child.call(argument, timeout_s)
        except _Died as death:
            child.close()
            crashes, kills = crashes + (not death.killed), kills + death.killed
            if crashes >= CRASHES:
                text = f"crashed its reader {crashes} times ({death.how})"
                raise GivenUp(Reason("crashed its reader", text=text)) from None
            if kills >= KILLS:
                text = f"its reader was killed {kills} times ({death.how}: short of memory?)"
                raise GivenUp(Reason("killed", text=text)) from None
            continue
        except MemoryError:
            child.close()
            raise GivenUp(_too_much_memory(memory_gb)) from None
        except BaseException:
            child.close()
            raise
        if child.worn:
            child.close()
        else:
            _children[function, memory_gb] = child
        return value


def close_children() -> None:
    """End all child processes of this process."""
    while _children:
        _children.popitem()[1].close()


def _portable(error: Exception) -> Exception:
    """Convert an error to a form that can be sent to another process."""
    traceback.print_exception(error)  # Ray writes the traceback to the log of the worker.
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _serve(pipe: Connection, parent: int, name: str, memory_gb: float) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before prctl was called, so the kernel will send no signal.
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Only the main process of the job handles Ctrl-C.
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gb:
        # A damaged header can make a reader allocate far too much memory at once, so let the kernel refuse such an
        # allocation.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(2e9 * memory_gb + 2**30)
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, wanted))
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    pipe.send(("ready", None))
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("returned", function(argument))
        except Exception as error:
            answer = ("raised", _portable(error))
        pipe.send(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
