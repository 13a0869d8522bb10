"""The processes of a training run: their number, their devices, and the communication between them."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from data_sharding.common.errors import RankError, RequestError


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a training run, as one of these processes sees them.

    If the run has only one process, a `World` works without a PyTorch process group.
    """

    rank: int = 0
    """Number of this process, counted from 0."""
    size: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device on which this process computes."""

    @property
    def first(self) -> bool:
        """True on rank 0, the process that writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each number over the processes; every process must call this method with equally many numbers."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Return each number's maximum over the processes; every process must pass equally many numbers."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, op=operation)
        return reduced.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one process; every process must call this method."""
        return self.all_reduce_sum(float(flag))[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Return, on every process, the value that rank 0 passed; the value must be picklable."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return a list of the processes' values, in the order of ranks; the values must be picklable and small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            dist.barrier()


def launched_world() -> tuple[int, int]:
    """Return the rank and the number of processes that the launcher set; 0 and 1 if there is no launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_num_processes(num_processes: int, launcher: str) -> None:
    """Check that the launcher started as many processes as the config says.

    Parameters
    ----------
    num_processes : int
        Number of processes according to the config.
    launcher : str
        Command that starts the right number of processes, for the error message. `num_processes` is put in place of
        ``{}``.

    Raises
    ------
    RequestError
        If the launcher started another number of processes.
    """
    _, size = launched_world()
    if size != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but {size} {'process was' if size == 1 else 'processes were'} started; "
            f"start the stage with 'dreamscale' or '{launcher.format(num_processes)}', or set num_processes: {size}"
        )


def choose_device(device: str) -> torch.device:
    """Return the device of this process.

    Parameters
    ----------
    device : str
        auto, cpu or cuda; auto means a GPU if there is a GPU, else the CPU.

    Returns
    -------
    torch.device
        The CPU, or the GPU whose number is the process's number on its machine.

    Raises
    ------
    RequestError
        If `device` is another word, if it is cuda but there is no GPU, or if there are fewer GPUs than processes on
        this machine.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device is {device}; use auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("device is cuda, but PyTorch finds no GPU here; set device: cpu or auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise RankError(
            f"process {local} of this machine has no GPU: the machine has {torch.cuda.device_count()} GPUs; start as "
            "many processes as there are GPUs"
        )
    return torch.device("cuda", local)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, without printing its messages and without compiling any of its extensions.

    Parameters
    ----------
    device : torch.device
        Device on which the training will run.

    Returns
    -------
    module
        DeepSpeed.
    """
    import logging

    # DeepSpeed chooses its accelerator during the import. Without DS_ACCELERATOR, DeepSpeed would choose a GPU even if
    # the config says cpu.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Switch off DeepSpeed's extension for communication in shared memory. DeepSpeed would compile this extension,
        # and the compilation takes a minute and fails if there is no compiler. The communication backend gloo works
        # without DeepSpeed's shared-memory extension.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def process_group(deepspeed: Any, device: torch.device, *, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the process group for the duration of a ``with`` block.

    Parameters
    ----------
    deepspeed : module
        DeepSpeed, from `import_deepspeed`.
    device : torch.device
        Device of this process.
    timeout_s : float
        Longest time in seconds that a collective operation may take; 0 means one week.

    Yields
    ------
    World
        The processes of the run.
    """
    if "RANK" not in os.environ:
        # No launcher started this process, so make a process group of one process, on a free port.
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
        # Wait here for the other processes. If the ``with`` block raises an error, this line is not reached, so a
        # process that fails ends without waiting.
        dist.barrier()
    finally:
        if dist.is_initialized():
            # DeepSpeed also remembers the process group in `cdb`. Set `cdb` to None, because a second run in this
            # process would otherwise use the destroyed group.
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
        for name in ours:
            os.environ.pop(name, None)
