"""Processes of a training run: who takes part, on what device, and what they agree on."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_sharding.common.errors import RankError, RequestError


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among all."""

    rank: int
    """Number of this process."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where it computes."""

    @property
    def first(self) -> bool:
        """True on the process that writes and talks."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum numbers over the processes.

        Parameters
        ----------
        *values : float
            The same number of them on every process.

        Returns
        -------
        list of float
            Sums, identical on every process.
        """
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()

    def largest(self, *values: float) -> list[float]:
        """Take the largest of each number over the processes.

        Parameters
        ----------
        *values : float
            The same number of them on every process.

        Returns
        -------
        list of float
            Maxima, identical on every process.
        """
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return together.tolist()

    def from_first(self, value: Any) -> Any:
        """Give every process what the first one has.

        Parameters
        ----------
        value : Any
            Anything picklable; looked at on the first process only.

        Returns
        -------
        Any
            The first process's value.
        """
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """Give every process what each one has.

        Parameters
        ----------
        value : Any
            Anything picklable and small.

        Returns
        -------
        list
            Values by rank.
        """
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier()


def launched_world() -> tuple[int, int]:
    """Rank and number of processes that the launcher gave.

    Returns
    -------
    rank, size : int
        0 and 1 without a launcher.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_world(num_processes: int, command: str) -> None:
    """Compare the launcher's processes with those asked for, before anything is started.

    Parameters
    ----------
    num_processes : int
        What the config says.
    command : str
        Module to launch, for the message.

    Raises
    ------
    RequestError
        If they differ.
    """
    _, size = launched_world()
    if size != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but {size} {'was' if size == 1 else 'were'} started; "
            f"use 'torchrun --nproc_per_node {num_processes} -m {command} ...' or set num_processes: {size}"
        )


def choose_device(device: str) -> torch.device:
    """Device of this process.

    Parameters
    ----------
    device : str
        auto, cpu or cuda.

    Returns
    -------
    torch.device
        The processor, or this process's GPU.

    Raises
    ------
    RequestError
        If a GPU is asked for and there is none for this process.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("device is cuda, but PyTorch finds no GPU here; set device: cpu or auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise RankError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
            "start as many processes as GPUs"
        )
    return torch.device("cuda", local)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed so that it neither compiles for minutes nor talks.

    Parameters
    ----------
    device : torch.device
        Where training will run.

    Returns
    -------
    module
        DeepSpeed.
    """
    import logging

    # DeepSpeed picks its accelerator when it is imported, and would take a GPU that we were told not to use.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Compiled at start for a minute, and fatal without a compiler; plain gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def process_group(deepspeed: Any, device: torch.device, *, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the other processes, and leave together.

    Parameters
    ----------
    deepspeed : module
        What `import_deepspeed` gave.
    device : torch.device
        Where this process computes.
    timeout_s : float
        Seconds that a collective may take; 0 for a week.

    Yields
    ------
    World
        This process among all.
    """
    if "RANK" not in os.environ:
        # Not under a launcher: a world of one, on a port that the system says is free.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ours = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    else:
        ours = []
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=datetime.timedelta(seconds=timeout_s or 7 * 86400),
        )
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
        # Only after a clean end: a process that failed must not wait for the others.
        dist.barrier()
    finally:
        if dist.is_initialized():
            # DeepSpeed's own, which lets go of the groups it remembers; and then it must forget that it was started,
            # or a second run in this process would talk through dead groups.
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
        for name in ours:
            os.environ.pop(name, None)
