"""Ray: a session that ends cleanly, and tasks that may crash their worker without harm to other tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from data_sharding.common.errors import RequestError, StopRequested, one_line
from data_sharding.common.reason import Reason
from data_sharding.common.storage import FULL, is_storage_error
from data_sharding.job.isolation import ChildFailed

INFRASTRUCTURE_RETRIES = 5
"""How often a task is retried if its machine or worker failed, rather than its own work."""
NODE_S = 60.0
"""Time limit (s) for a machine to answer which folders it sees."""
STORAGE_TRIES = 3
"""How often a task is tried if a disk or an object store fails, unless the disk is full."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Ray cluster on which the job runs, and limits for each recording."""

    address: str = ""
    """Address of the cluster, e.g. auto or ray://head:10001. Empty: RAY_ADDRESS if it is set, else a new cluster on
    this machine."""
    num_cpus: int = 0
    """Number of workers of a new cluster on this machine; 0: one for each core."""
    max_in_flight: int = 0
    """Largest number of tasks submitted at a time; 0: twice as many as the cluster can run at once."""
    timeout_s: float = 3600.0
    """Time limit (s) for a recording; after it the recording is quarantined."""
    memory_gb: float = 2.0
    """Memory limit (GB, 1e9 bytes) for a recording; beyond it the recording is quarantined. Ray reserves this much for
    each."""
    auth_mode: Literal["", "disabled", "token"] = ""
    """Authentication of Ray. Empty: RAY_AUTH_MODE if it is set, else disabled for a new cluster on this machine."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.max_in_flight < 0:
            raise ValueError("ray: num_cpus and max_in_flight must not be negative; 0 chooses automatically")
        if not self.timeout_s > 0:
            raise ValueError(f"ray.timeout_s must be positive, got {self.timeout_s}")
        if not self.memory_gb >= 0.5:
            raise ValueError(f"ray.memory_gb must be at least 0.5, got {self.memory_gb}")


@contextlib.contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `StopRequested` while the body runs.

    Yields
    ------
    None
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise StopRequested(
            f"{signal.Signals(number).name}: finished recordings are kept; run the same command to resume"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[int]:
    """Join or start a Ray cluster, and leave it when the body ends, also with an error.

    Parameters
    ----------
    config : RayConfig
        The cluster.

    Yields
    ------
    int
        Number of tasks to submit at a time.

    Raises
    ------
    RequestError
        If the cluster cannot be reached or started, or has too little memory.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    # Without this setting a local cluster may demand a token, depending on what ran on the machine before.
    if config.auth_mode or not address:
        os.environ["RAY_AUTH_MODE"] = config.auth_mode or os.environ.get("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        options |= {"address": address}
    else:
        cpus = config.num_cpus or os.cpu_count() or 1
        # Results are small, so Ray's object store can be small, too.
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": 128 * 2**20,
        }
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises many types, a bare Exception among them if it does not start in time
        where = f"ray.address '{address}'" if address else "a local Ray"
        raise RequestError(f"{where} could not be reached or started: {one_line(error)[:300]}") from None
    try:
        # Ray installs its own handler for SIGTERM, which would end the job without a message.
        with raise_on_stop_signals():
            yield config.max_in_flight or 2 * _slots(config)
    finally:
        ray.shutdown()


def _slots(config: RayConfig) -> int:
    """Return how many recordings the cluster can read at a time."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    slots = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // (config.memory_gb * 1e9))) for node in nodes)
    if not cpus:
        raise RequestError("ray: the cluster has no free CPU, and every recording needs one")
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
    """Find folders that a machine of the cluster does not see, such as network folders that are not mounted there.

    Parameters
    ----------
    paths : list of str
        Local paths that every worker needs.

    Returns
    -------
    dict of str to list of str
        Address of a machine to the paths that are missing on it. Machines that see all paths are not listed.
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
        # If a machine fails at this moment, the job need not stop: other machines take its tasks.
        with contextlib.suppress(RayError):
            if missing := ray.get(reference, timeout=NODE_S):
                found[address] = missing
    return found


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


class ClusterFailed(RuntimeError):
    """A task has failed too often because of the cluster, not because of its own work."""


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
    """Run a function for each argument, in any order, with a limited number of tasks at a time.

    Parameters
    ----------
    function : callable
        A function of a module that the workers can import, with a small result. It must be safe to run it twice: if
        a worker, a raylet or a machine dies, its tasks are run again, on another machine if there is one.
    arguments : mapping
        Argument of each task, by key.
    in_flight : int
        Largest number of tasks at a time.
    memory_gb : float
        Memory in GB that Ray reserves for each task.
    done : callable
        Called as ``done(key, result)`` for every task that returned.
    give_up : callable, optional
        Called as ``give_up(key, error)`` for a task that raised an error, or that used up its machine's memory several
        times. Returns the reason if the job is to continue without the task, and None if the job is to fail.
    look : callable, optional
        Called as ``look(running)`` at least twice a second.

    Returns
    -------
    dict
        Reason for each task that was given up, by key.

    Raises
    ------
    ClusterFailed
        If the same task lost its worker too often.
    Exception
        The error of a task that was not given up. Errors of disks and object stores are raised only after some
        retries, unless the disk is full.
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
        if look:
            look(len(running))
        finished: list[Any] = ray.wait(list(running), num_returns=1, timeout=0.5)[0]
        if finished:  # Also take all others that have finished by now; there may be thousands.
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
            # A machine that runs out of memory may be the fault of the task itself, all other losses are not.
            is_clusters_fault = isinstance(failure, (RayError, ChildFailed)) and not isinstance(failure, RayTaskError)
            if is_clusters_fault and not isinstance(failure, OutOfMemoryError):
                raise ClusterFailed(
                    f"{key}: its worker was lost {lost[key]} times ({type(failure).__name__}: "
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
        The line.
    """
    print(text, file=sys.stderr, flush=True)
