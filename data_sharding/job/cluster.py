"""Ray: a session that ends cleanly, and tasks of which one may kill its worker without harm to the others."""

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
"""How often a task is begun again when a node, rather than its own work, was at fault."""
NODE_S = 60.0
"""Seconds that a machine has to say what it sees."""
STORAGE_TRIES = 3
"""How often a task is tried that a disk or a store refuses, unless for want of room."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where the job runs."""

    address: str = ""
    """Cluster to join, e.g. auto or ray://head:10001; empty: RAY_ADDRESS if it is set, else a cluster of
    this machine."""
    num_cpus: int = 0
    """Workers of this machine's cluster; 0: one a core."""
    max_in_flight: int = 0
    """Most tasks handed out at a time; 0: twice the cluster's cores."""
    timeout_s: float = 3600.0
    """Seconds after which a recording is given up and quarantined."""
    memory_gb: float = 2.0
    """GB (1e9 bytes) of memory that a recording may take before it is quarantined; Ray keeps as much free for each."""
    auth_mode: Literal["", "disabled", "token"] = ""
    """Ray's authentication. Empty: RAY_AUTH_MODE if it is set, else disabled for this machine's cluster."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.max_in_flight < 0:
            raise ValueError("ray: num_cpus and max_in_flight must not be negative; 0 chooses them")
        if not self.timeout_s > 0:
            raise ValueError(f"ray.timeout_s must be positive, got {self.timeout_s}")
        if not self.memory_gb >= 0.5:
            raise ValueError(f"ray.memory_gb must be at least 0.5, got {self.memory_gb}")


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `StopRequested` while the body runs.

    Yields
    ------
    None
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise StopRequested(f"{signal.Signals(number).name}: what is finished is kept; run the same command to go on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[int]:
    """Join or start a Ray cluster, and leave it at the end however the body ends.

    Parameters
    ----------
    config : RayConfig
        Which.

    Yields
    ------
    int
        Tasks to hand out at a time.

    Raises
    ------
    RequestError
        If the cluster does not answer.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    # A local cluster otherwise decides by itself, depending on the machine's history, whether it wants a token.
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
        # Only metadata travels through the object store.
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": 128 * 2**20,
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"ray.address '{address}'" if address else "a local Ray"
        raise RequestError(f"{where} could not be reached or started: {one_line(error)[:300]}") from None
    try:
        # Ray puts its own handler on SIGTERM, which would leave without a word.
        with stop_signals():
            yield config.max_in_flight or 2 * _slots(config)
    finally:
        ray.shutdown()


def _slots(config: RayConfig) -> int:
    """Recordings that the cluster reads at a time."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    slots = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // (config.memory_gb * 1e9))) for node in nodes)
    if not cpus:
        raise RequestError("ray: the cluster has no CPU to give; every recording takes one")
    if not slots:
        most = max(node.get("memory", 0) for node in nodes) / 1e9
        raise RequestError(
            f"ray.memory_gb {config.memory_gb:g}: no machine of the cluster has as much free, the most is "
            f"{most:.1f} GB; lower it, or free memory"
        )
    if slots < cpus:
        say(f"ray: memory for {slots} recordings at a time on {cpus} cores (key 'ray.memory_gb', {config.memory_gb:g})")
    return slots


def missing_on_nodes(paths: list[str]) -> dict[str, list[str]]:
    """Folders that some machine of the cluster does not have: network folders that are not mounted there.

    Parameters
    ----------
    paths : list of str
        Local paths that every worker needs.

    Returns
    -------
    dict of str to list of str
        A machine's address to the paths that are missing there.
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
        # A machine that dies at this moment is no reason to stop: its tasks go elsewhere.
        with contextlib.suppress(RayError):
            if missing := ray.get(reference, timeout=NODE_S):
                found[address] = missing
    return found


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


class ClusterFailed(RuntimeError):
    """The cluster, not the work, is at fault, again and again."""


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
    """Run a function once for each argument, in any order, with a bounded number of tasks at a time.

    Parameters
    ----------
    function : callable
        A function of a module that the workers can import; what it returns should be small. It must be safe to run
        again: a task whose worker, raylet or machine dies is begun anew, elsewhere where there is an elsewhere.
    arguments : mapping
        Key to argument.
    in_flight : int
        Most tasks at a time.
    memory_gb : float
        GB that Ray keeps free for each.
    done : callable
        ``done(key, result)`` for every task that returned.
    give_up : callable, optional
        ``give_up(key, error)`` after a task raised, or took its machine's memory time and again; returns the reason
        to go on without it, or None to fail.
    look : callable, optional
        ``look(running)`` at least twice a second.

    Returns
    -------
    dict
        Key to reason, for tasks that were given up.

    Raises
    ------
    ClusterFailed
        If the same task lost its worker time and again.
    Exception
        What a task raised, where nobody gave it up; errors of disks and stores only after some tries, unless there is
        no room left.
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
        if finished:  # Whatever else is there by now: thousands may be.
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
            # Memory is the one thing of a machine that a task itself may take away.
            theirs = isinstance(failure, (RayError, ChildFailed)) and not isinstance(failure, RayTaskError)
            if theirs and not isinstance(failure, OutOfMemoryError):
                raise ClusterFailed(
                    f"{key}: its worker was lost {lost[key]} times ({type(failure).__name__}: "
                    f"{one_line(failure)[:200]}); is the cluster well?"
                )
            reason = give_up(key, failure) if give_up else None
            if reason is None:
                raise failure from None
            given_up[key] = reason
    return given_up


def say(text: str) -> None:
    """Print a line for the user, on stderr: stdout is for results.

    Parameters
    ----------
    text : str
        The line.
    """
    print(text, file=sys.stderr, flush=True)
