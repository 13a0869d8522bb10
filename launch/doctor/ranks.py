"""Checks of the processes of a training: whether they reach each other, how fast, and whether their clocks agree."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from data_sharding.common.errors import one_line, show
from launch.doctor.finding import Finding
from launch.doctor.machine import judge_skew
from pretrain.runs.distributed import World, choose_device

SMALL, LARGE = 2**10, 2**26
"""Bytes of the two messages whose sum over all processes is measured."""
LINK_BYTES = 2**24
"""Bytes that two neighbouring processes exchange."""
SLOW_LINK = 3.0
"""A link is slow if the median link is faster than this factor."""
SEEN_S = 30.0
"""Time limit in seconds for a file to appear on the other machines; network folders keep listings for some seconds."""


@contextlib.contextmanager
def join_processes(device: str, timeout_s: float) -> Iterator[World]:
    """Join the group of all processes that the launcher started, for the duration of a ``with`` block.

    Parameters
    ----------
    device : str
        auto, cpu or cuda.
    timeout_s : float
        Time limit in seconds for the processes to find each other, and for each exchange.

    Yields
    ------
    World
        The processes.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=chosen)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def describe_failure(error: Exception) -> Finding:
    """Return the finding for processes that do not reach each other."""
    advice = (
        "check the ports between the machines, and set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to their network "
        "interface; NCCL_DEBUG=INFO prints more"
    )
    found = f"process {os.environ.get('RANK', '0')} on {socket.gethostname()}: {show(one_line(error), 300)}"
    return Finding(what="processes", state="fails", found=found, advice=advice)


def check_processes(world: World, least_gb_s: float = 0.0) -> list[Finding]:
    """Sum numbers over all processes, and measure the time; every process must call this function.

    Parameters
    ----------
    world : World
        The processes.
    least_gb_s : float
        Bandwidth in GB/s (1e9 bytes) below which the check fails.

    Returns
    -------
    list of Finding
        The findings; they are the same on every process.
    """
    hosts = world.all_gather(socket.gethostname())
    machines = len(set(hosts))
    text = f"{world.size} on {machines} {'machine' if machines == 1 else 'machines'}, {dist.get_backend()}"
    findings = [Finding(what="processes", state="ok", found=text)]
    small, right = _time_sum(world, SMALL, 20)
    large, right_too = _time_sum(world, LARGE, 3)
    # The bandwidth of each link of a ring, as the tests of NCCL give it.
    speed = 2 * (world.size - 1) / world.size * LARGE / large / 1e9
    text = f"{SMALL >> 10} KiB in {small * 1e3:.2f} ms; {LARGE >> 20} MiB with {speed:.2f} GB/s"
    if not (right and right_too):
        advice = "a link or a device returns wrong numbers: find the machine by running on fewer machines"
        findings.append(Finding(what="all-reduce", state="fails", found="the sum is wrong", advice=advice))
    elif speed < least_gb_s:
        advice = "check that the fast network is used: NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
        found = f"{text}, below {least_gb_s:g} GB/s"
        findings.append(Finding(what="all-reduce", state="fails", found=found, advice=advice))
    else:
        findings.append(Finding(what="all-reduce", state="ok", found=text))
    if world.size > 1:
        findings.append(judge_links(_time_links(world), hosts))
    return findings


def _time_sum(world: World, size: int, repeats: int) -> tuple[float, bool]:
    """Return the seconds for a sum over all processes (the slowest process counts), and whether each sum is right."""
    times, right = [], True
    for _ in range(repeats):
        numbers = torch.full((size // 4,), float(world.rank + 1), device=world.device)
        world.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        # Wait for the GPU, too.
        right = right and bool((numbers == world.size * (world.size + 1) / 2).all().item())
        times.append(time.perf_counter() - start)
    (median,) = world.all_reduce_max(statistics.median(times))
    return median, not world.any(not right)


def _time_links(world: World) -> list[float]:
    """Return the GB/s between each process and the next one, in the order of ranks."""
    own: dict[int, float] = {}
    for first in (0, 1):
        # At any time, each process exchanges data with at most one other process.
        low = world.rank if (world.rank - first) % 2 == 0 else world.rank - 1
        there = low >= 0 and low + 1 < world.size
        other = low + 1 if world.rank == low else low
        out = torch.ones(LINK_BYTES // 4, device=world.device)
        into = torch.empty_like(out)
        for _ in range(2):  # The first exchange makes the connection.
            world.barrier()
            start = time.perf_counter()
            if there:
                pair = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
                for request in dist.batch_isend_irecv(pair):
                    request.wait()
                into.sum().item()
                own[low] = LINK_BYTES / (time.perf_counter() - start) / 1e9
    both = world.all_gather(own)
    return [min(one[low] for one in both if low in one) for low in range(world.size - 1)]


def judge_links(speeds: list[float], hosts: list[str]) -> Finding:
    """Return the finding for the links between neighbouring processes.

    Parameters
    ----------
    speeds : list of float
        GB/s between each process and the next one.
    hosts : list of str
        Name of the machine of each process.
    """
    slowest = min(range(len(speeds)), key=speeds.__getitem__)
    ends = f"process {slowest} ({show(hosts[slowest])}) and process {slowest + 1} ({show(hosts[slowest + 1])})"
    found = f"the slowest is between {ends}: {speeds[slowest]:.2f} GB/s"
    # Compare links within a machine only with each other, because they are faster than the network.
    inside = hosts[slowest] == hosts[slowest + 1]
    alike = [s for i, s in enumerate(speeds) if (hosts[i] == hosts[i + 1]) == inside]
    if len(alike) > 2 and statistics.median(alike) > SLOW_LINK * speeds[slowest]:
        advice = "check the cables and the network of both machines, or leave one of them out"
        found += f", the median {statistics.median(alike):.2f} GB/s"
        return Finding(what="links", state="note", found=found, advice=advice)
    return Finding(what="links", state="ok", found=found)


def check_clocks(world: World, now: Callable[[], float] = time.time) -> Finding:
    """Compare the clocks of all processes; every process must call this function.

    Parameters
    ----------
    world : World
        The processes.
    now : callable
        The clock of this process: a function that returns the time in seconds.
    """
    rounds = []
    for _ in range(5):
        # All processes leave the barrier at nearly the same moment.
        world.barrier()
        rounds.append(world.all_gather(now()))
    offsets = [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.size)]
    hosts = world.all_gather(socket.gethostname())
    early, late = (choose(range(world.size), key=offsets.__getitem__) for choose in (min, max))
    text = f"{show(hosts[early])} (process {early}) and {show(hosts[late])} (process {late}) differ by"
    return judge_skew("clocks", offsets[late] - offsets[early], text)


def check_folder(world: World, path: str) -> Finding:
    """Check that all processes see a file that the first process writes; every process must call this function.

    Parameters
    ----------
    world : World
        The processes.
    path : str
        A folder that all machines share.
    """
    folder = Path(path).resolve()
    name = world.broadcast(f".dreamscale-doctor-{secrets.token_hex(6)}")
    fault = ""
    if world.first:
        try:
            (folder / name).touch()
        except OSError as error:
            fault = f"{folder} is not writable ({error.strerror})"
    fault = world.broadcast(fault)
    end = time.monotonic() + SEEN_S
    while not fault and not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [] if fault else [host for host in world.all_gather(None if seen else socket.gethostname()) if host]
    if world.first:
        (folder / name).unlink(missing_ok=True)
    advice = "mount the folder at the same path on all machines, or give another --path"
    if fault or blind:
        found = fault or f"{folder} is not the same folder on {', '.join(sorted(map(show, set(blind))))}"
        return Finding(what="shared folder", state="fails", found=found, advice=advice)
    return Finding(what="shared folder", state="ok", found=f"all processes see the files in {folder}")
