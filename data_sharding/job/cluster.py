"""Starts Ray and runs tasks on it. A task that crashes its worker does not affect other tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.cores import count_cores
from data_sharding.common.errors import EXIT_FAILED, FULL, RequestError, one_line, printable
from data_sharding.common.reason import Reason
from data_sharding.common.stop import (
    adopt_orphans,
    check_stop,
    find_child_processes,
    kill_processes,
    raise_on_stop_signals,
)
from data_sharding.common.storage import is_storage_error
from data_sharding.job.isolation import KEEP, ChildFailed, owned_folder

INFRASTRUCTURE_RETRIES = 5
"""Number of times that a task is tried again after its worker or its machine failed. An error that the task itself
raises does not count."""
NODE_S = 60.0
"""Time limit in seconds for each machine to report which folders it can access."""
JOIN_S = 300.0
"""Time limit in seconds for the machines of a cluster to join it, if the key `min_nodes` asks for them."""
HEAD_S = 15.0
"""If the head of a cluster does not answer for this number of seconds, it is lost: the command that uses the cluster
ends, and machines of a job leave the cluster."""
END_S = 15.0
"""After the loss of the head, Ray has this number of seconds to disconnect; then the process is ended."""
OBJECT_STORE = 128 * 2**20
"""Bytes of Ray's object store on each machine. The results of tasks are small, so a small object store is enough."""
STORAGE_TRIES = 3
"""Number of attempts for a task if a disk or an object store fails. If the disk is full, the task is tried only
once."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The Ray cluster that runs the job, and limits for each recording."""

    address: str = ""
    """Address of the Ray cluster, for example auto or ray://head:10001. If the key is empty, the environment variable
    RAY_ADDRESS is used. If the key is empty and RAY_ADDRESS is not set, a new cluster is started on this machine."""
    num_cpus: int = 0
    """Number of workers in a new cluster on this machine; 0 means one worker for each core that
    the job may use."""
    max_in_flight: int = 0
    """Largest number of tasks that run or wait in Ray at the same time. The value 0 means twice the number of tasks
    that can run at the same time."""
    min_nodes: int = 0
    """Wait until the Ray cluster has at least this many machines, before recordings are read."""
    timeout_s: float = 3600.0
    """Time limit in seconds for reading a recording. A recording that needs more time than this limit is
    quarantined."""
    memory_gb: float = 2.0
    """Memory limit in GB (1e9 bytes) for reading a recording. A recording that needs more memory than this limit is
    quarantined. Ray reserves `memory_gb` for each recording."""
    auth_mode: Literal["", "disabled", "token"] = ""
    """Authentication mode of Ray. If the key is empty, the environment variable RAY_AUTH_MODE is used. If the key is
    empty and RAY_AUTH_MODE is not set, a new cluster on this machine gets a random token, so that other users of the
    machine cannot use the cluster."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.max_in_flight < 0 or self.min_nodes < 0:
            raise ValueError("ray: num_cpus, max_in_flight and min_nodes must not be negative; 0 chooses automatically")
        if not self.timeout_s > 0:
            raise ValueError(f"ray.timeout_s must be positive, got {self.timeout_s}")
        if not self.memory_gb >= 0.5:
            raise ValueError(f"ray.memory_gb must be at least 0.5, got {self.memory_gb}")


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[int]:
    """Connect to a Ray cluster, or start one. The connection ends with the ``with`` block, also after an error.

    If this function started the cluster, the processes of the cluster end with the ``with`` block, too. If a stop
    signal arrives while Ray starts, Ray may not yet have registered all processes that it started, so this function
    itself searches for all new child processes, and ends them.

    Parameters
    ----------
    config : RayConfig
        Settings of the Ray cluster.

    Yields
    ------
    int
        Largest number of tasks to submit to Ray at the same time.

    Raises
    ------
    RequestError
        If the cluster cannot be reached, or has too little memory.
    ClusterFailed
        If Ray cannot be started on this machine.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if config.auth_mode:
        os.environ["RAY_AUTH_MODE"] = config.auth_mode
    if not address:
        require_token()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        options |= {"address": address}
    else:
        cpus = config.num_cpus or count_cores()
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    others = find_child_processes()
    with contextlib.ExitStack() as stack:
        folder = None
        if not address:
            # Every user of the machine can write to Ray's default folder, so put Ray's folder into a private folder.
            folder = stack.enter_context(owned_folder(Path(short_temporary_folder()), "ds-ray"))
            options["_temp_dir"] = str(folder / "ray")
        stack.callback(_end_ray, others)
        try:
            with _keep_sigterm_handler():
                ray.init(**options)
        except (Exception, SystemExit) as error:  # Ray raises many types of errors, sometimes just Exception.
            check_stop()
            fault = one_line(error)[:300]
            if address:
                raise RequestError(f"ray.address '{address}' could not be reached: {fault}") from None
            wait = "If the machine is busy, wait before you try again."
            raise ClusterFailed(f"Ray could not be started on this machine: {fault} {wait}") from None
        # If Ray did install a handler for SIGTERM, restore the former handler, which ends the job with a message.
        try:
            with raise_on_stop_signals():
                if address:
                    stack.enter_context(watch_head("All finished work is kept; run the same command to resume"))
                _wait_for_nodes(config.min_nodes)
                yield config.max_in_flight or 2 * _slots(config)
        except ClusterFailed:
            if folder:
                say(f"ray: the logs of Ray are in {folder}")
                (folder / KEEP).touch()  # A temporary folder that contains the file `KEEP` is not removed.
            raise


def head_answers(ip: str, port: int) -> bool:
    """Return whether the head of a Ray cluster accepts connections."""
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((ip, port)) == 0


class _HeadWatch(threading.Thread):
    """Notices that the head of the Ray cluster does not answer any more, and ends the process if nobody else does.

    Ray itself waits a minute for its head, and then ends the process with a long message.
    """

    def __init__(self, address: str, advice: str) -> None:
        super().__init__(daemon=True, name="head")
        self.address, self.advice = address, advice
        self.lost = False
        self.ended = threading.Event()

    def error(self) -> ClusterFailed:
        return ClusterFailed(
            f"the head of the Ray cluster at {self.address} has not answered for {HEAD_S:g} s; start a new head."
        )

    def run(self) -> None:
        ip, _, port = self.address.rpartition(":")
        seen = time.monotonic()
        while not self.ended.wait(1.0):
            if head_answers(ip, int(port)):
                seen = time.monotonic()
            silent = time.monotonic() - seen
            self.lost = silent > HEAD_S
            if silent > HEAD_S + END_S:
                say(f"dreamscale: {self.error()} {self.advice}")
                kill_processes(find_child_processes())
                os._exit(EXIT_FAILED)


_watch: _HeadWatch | None = None


@contextlib.contextmanager
def watch_head(advice: str) -> Iterator[None]:
    """Notice the loss of the head of the Ray cluster during the ``with`` block, which must call `check_head`.

    Parameters
    ----------
    advice : str
        End of the message that is printed if the ``with`` block does not end after the loss.

    Yields
    ------
    None
    """
    global _watch
    import ray

    _watch = _HeadWatch(ray.get_runtime_context().gcs_address, advice)
    _watch.start()
    try:
        yield
    finally:
        # If the head is lost, Ray may need long to disconnect, so the thread then stays until the process ends.
        if not _watch.lost:
            _watch.ended.set()
        _watch = None


def check_head() -> None:
    """Raise `ClusterFailed` if the head of the cluster is lost; see `watch_head`."""
    if _watch is not None and _watch.lost:
        raise _watch.error()


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep the handler for SIGTERM while Ray starts.

    Ray's own handler raises SystemExit wherever the signal arrives, and Python prints a traceback in some places, such
    as the end of an import. The function that installs Ray's handler is private, so a new version of Ray may lack it.
    """
    import ray

    utils: Any = ray._private.utils
    before = getattr(utils, "set_sigterm_handler", None)
    utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _end_ray(others: list[Any]) -> None:
    """Disconnect from Ray, and end all child processes except `others`, which are older than the Ray session."""
    import ray

    known = {process.pid for process in others}
    started = [process for process in find_child_processes() if process.pid not in known]
    # Ray may still start workers. Without `adopt_orphans`, nobody would find a worker whose parent has ended.
    with adopt_orphans():
        try:
            ray.shutdown()
        finally:
            kill_processes(started, kept=others)


def require_token() -> None:
    """Protect a new Ray cluster of this process by a random token.

    Without the token, nobody can connect to the cluster. The token is in the environment of this process and its child
    processes, which other users cannot read. If the user has set RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH,
    these settings are kept.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config

        # Ray read the environment variables of the token when Ray was imported, so tell Ray about the new values.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def short_temporary_folder() -> str:
    """Return the folder for temporary files; /tmp if the path would be too long for the names of Ray's sockets."""
    return folder if len(folder := tempfile.gettempdir()) <= 20 else "/tmp"


def _wait_for_nodes(count: int) -> None:
    """Wait until the cluster has enough machines; raise `ClusterFailed` if machines are still missing after a time."""
    import ray

    end = time.monotonic() + JOIN_S
    while (there := sum(node["Alive"] for node in ray.nodes())) < count:
        check_stop()
        if time.monotonic() > end:
            raise ClusterFailed(
                f"the Ray cluster has {there} of {count} machines (ray.min_nodes); check the machines that are missing."
            )
        time.sleep(0.5)


def _slots(config: RayConfig) -> int:
    """Return the number of recordings that the cluster can read at the same time."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    slots = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // (config.memory_gb * 1e9))) for node in nodes)
    if not cpus:
        raise RequestError("ray: the cluster has no free CPU, and every recording needs a CPU")
    if not slots:
        most = max(node.get("memory", 0) for node in nodes) / 1e9
        raise RequestError(
            f"ray.memory_gb {config.memory_gb:g}: no machine of the cluster has this much free memory, the largest has "
            f"{most:.1f} GB; lower the key, or free memory"
        )
    if slots < cpus:
        say(f"ray: memory for {slots} recordings at a time on {cpus} cores (ray.memory_gb {config.memory_gb:g})")
    return slots


def find_missing_on_nodes(paths: list[str]) -> dict[str, list[str]]:
    """Find paths that a machine of the cluster cannot access, for example because a network folder is not mounted.

    Parameters
    ----------
    paths : list of str
        Local paths that every worker needs.

    Returns
    -------
    dict of str to list of str
        Maps the address of a machine to the paths that the machine cannot access. Machines that can access all paths
        are not listed.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return {}
    remote = ray.remote(max_retries=0, num_cpus=0)(_missing)
    asked = {
        node["NodeManagerAddress"]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths)
        for node in nodes
    }
    found: dict[str, list[str]] = {}
    for address, reference in asked.items():
        # Ignore a machine that fails now, because other machines will run its tasks.
        with contextlib.suppress(RayError):
            if missing := ray.get(reference, timeout=NODE_S):
                found[address] = missing
    return found


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


class ClusterFailed(RuntimeError):
    """Ray could not be started, or a task has failed too often because of problems with the cluster."""


def run_tasks(
    function: Callable[[Any], Any],
    arguments: Mapping[str, Any],
    *,
    in_flight: int,
    memory_gb: float,
    done: Callable[[str, Any], None],
    give_up: Callable[[str, Exception], Reason | None] | None = None,
    look: Callable[[int], None] | None = None,
) -> dict[str, Reason]:
    """Run a function for each argument as a Ray task, in any order; the number of simultaneous tasks is limited.

    Parameters
    ----------
    function : callable
        The function to run. The workers must be able to import the function's module, and the result of the function
        must be small. If a worker, a raylet or a machine dies, the lost tasks are run again, so the function must be
        safe to run twice.
    arguments : mapping
        Argument of each task, by key.
    in_flight : int
        Largest number of tasks that are submitted to Ray at the same time.
    memory_gb : float
        Memory in GB that Ray reserves for each task.
    done : callable
        Function that is called as ``done(key, result)`` after a task has returned its result.
    give_up : callable, optional
        Function that is called as ``give_up(key, error)`` for a task that raised an error, or that used up the memory
        of its machine several times. If `give_up` returns a reason, the job continues without this task. If `give_up`
        returns None, the error is raised.
    look : callable, optional
        Function that is called at least twice a second with the number of submitted tasks.

    Returns
    -------
    dict
        Maps the key of each task that was given up to the reason.

    Raises
    ------
    ClusterFailed
        If a task failed too often, because its workers or their machines failed.
    Exception
        Any error that a task raised, unless `give_up` returned a reason. After an error of a disk or an object store,
        the task is first tried again, unless the disk is full.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

    remote = ray.remote(max_retries=0, num_cpus=1, memory=int(memory_gb * 1e9))(function)
    waiting = deque(arguments.items())
    running: dict[Any, tuple[str, Any]] = {}
    given_up: dict[str, Reason] = {}
    lost: Counter[str] = Counter()
    while waiting or running:
        while waiting and len(running) < in_flight:
            key, argument = waiting.popleft()
            running[remote.remote(argument)] = (key, argument)
        check_stop()
        check_head()
        if look:
            look(len(running))
        finished: list[Any] = ray.wait(list(running), num_returns=1, timeout=0.5)[0]
        if finished:  # Thousands of tasks may have finished, so fetch all of their results at once.
            finished = ray.wait(list(running), num_returns=len(running), timeout=0)[0]
        for reference in finished:
            key, argument = running.pop(reference)
            try:
                result = ray.get(reference)
            except RayTaskError as error:
                failure = getattr(error, "cause", None) or error
                often = 1
                if isinstance(failure, ChildFailed):
                    often = INFRASTRUCTURE_RETRIES + 1
                elif is_storage_error(failure) and getattr(failure, "errno", 0) not in FULL:
                    often = STORAGE_TRIES
            except RayError as error:
                failure, often = error, INFRASTRUCTURE_RETRIES + 1
            else:
                done(key, result)
                continue
            lost[key] += 1
            if lost[key] < often:
                waiting.append((key, argument))
                continue
            # If a worker was lost because its machine ran out of memory, the task may be the cause, so `give_up`
            # decides about this task. If a worker was lost for another reason, the cluster has a problem, so the job
            # ends.
            is_clusters_fault = isinstance(failure, (RayError, ChildFailed)) and not isinstance(failure, RayTaskError)
            if is_clusters_fault and not isinstance(failure, OutOfMemoryError):
                raise ClusterFailed(
                    f"{key}: its Ray worker ended unexpectedly {lost[key]} times ({type(failure).__name__}: "
                    f"{one_line(failure)[:200]}); check the machines of the cluster and the logs of Ray."
                )
            reason = give_up(key, failure) if give_up else None
            if reason is None:
                raise failure from None
            given_up[key] = reason
    return given_up


def say(text: str) -> None:
    """Print a line for the user on stderr; stdout is reserved for results.

    Parameters
    ----------
    text : str
        The line to print.
    """
    print(printable(text), file=sys.stderr, flush=True)
