"""Ray: a session that ends cleanly, and tasks of which one may kill its worker without harm to the others."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from data_sharding.errors import RequestError, StopRequested, one_line

INFRASTRUCTURE_RETRIES = 5
"""How often a task is begun again when a node, rather than its own work, was at fault."""


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
    auth_mode: Literal["", "disabled", "token"] = ""
    """Ray's authentication. Empty: RAY_AUTH_MODE if it is set, else disabled for this machine's cluster."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.max_in_flight < 0:
            raise ValueError("ray: num_cpus and max_in_flight must not be negative; 0 chooses them")
        if not self.timeout_s > 0:
            raise ValueError(f"ray.timeout_s must be positive, got {self.timeout_s}")


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
    # Of the machine's two uses of many cores, many recordings at once is the better one.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        options |= {"address": address, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
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
            yield config.max_in_flight or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


def run_tasks(
    function: Callable[[Any], Any],
    arguments: Mapping[str, Any],
    *,
    in_flight: int,
    done: Callable[[str, Any], None],
    died: Callable[[str, str], str | None] | None = None,
) -> dict[str, str]:
    """Run a function once for each argument, in any order, with a bounded number of tasks at a time.

    Parameters
    ----------
    function : callable
        A function of a module that the workers can import; what it returns should be small.
    arguments : mapping
        Key to argument.
    in_flight : int
        Most tasks at a time.
    done : callable
        ``done(key, result)`` for every task that returned.
    died : callable, optional
        ``died(key, how)`` after a task's process died; returns the reason to give up, or None to try again.

    Returns
    -------
    dict
        Key to reason, for tasks that were given up.

    Raises
    ------
    Exception
        What a task raised, where `died` is None or the disk is at fault.
    """
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError

    remote = ray.remote(max_retries=0, num_cpus=1)(function)
    waiting = list(arguments.items())[::-1]
    running: dict[Any, tuple[str, Any]] = {}
    given_up: dict[str, str] = {}
    infrastructure: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < in_flight:
            key, argument = waiting.pop()
            running[remote.remote(argument)] = (key, argument)
        finished: list[Any] = ray.wait(list(running), num_returns=1, timeout=0.5)[0]
        for reference in finished:
            key, argument = running.pop(reference)
            try:
                done(key, ray.get(reference))
                continue
            except RayTaskError as error:
                cause = getattr(error, "cause", None) or error
                if died is None or isinstance(cause, OSError):
                    raise cause from None
                given_up[key] = f"failed: {type(cause).__name__}: {one_line(cause)[:200]}"
                continue
            except NodeDiedError as error:
                how, ours = one_line(error)[:200], False
            except OutOfMemoryError:
                how, ours = "out of memory", True
            except RayError as error:
                how, ours = type(error).__name__, True
            reason = died(key, how) if died and ours else None
            if reason is None:
                infrastructure[key] = infrastructure.get(key, 0) + 1
                if infrastructure[key] > INFRASTRUCTURE_RETRIES:
                    raise RuntimeError(
                        f"{key}: its worker was lost {infrastructure[key]} times ({how}); is the cluster well?"
                    )
                waiting.append((key, argument))
            else:
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
