"""Estimate how pretraining scales with the number of GPUs: computation, communication, loading and checkpoints.

`dreamscale plan --scale` uses these estimates. ``python benchmarks/scaling.py`` compares their formulas with
measurements.
"""

from __future__ import annotations

import dataclasses
import math

from pretrain.training.estimates import collective_operations, exchanged_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Speeds of the links between GPUs."""

    gpus_per_machine: int
    """Number of GPUs in one machine."""
    link: float
    """Bytes/s between one GPU and the other GPUs of its machine."""
    network: float
    """Bytes/s between one GPU and other machines. The GPUs of a machine use their network links at the same time."""
    latency_s: float
    """Seconds from the start of a message until its first byte arrives."""


def exchange_seconds(sent: float, messages: int, gpus: int, network: Network) -> float:
    """Estimate how long the GPUs exchange data in one step.

    Parameters
    ----------
    sent : float
        Bytes that one GPU sends; see `pretrain.training.estimates.exchanged_bytes`.
    messages : int
        Number of collective operations (reductions and gathers).
    gpus : int
        Number of GPUs over all machines.
    network : Network
        Speeds of the links.

    Returns
    -------
    float
        Seconds. In a ring of n GPUs, a collective operation has n - 1 steps, and each step costs one latency. All data
        of the ring cross the link between two machines. They are divided among the network links of a machine's GPUs,
        because a library such as NCCL builds one ring for each network link.

    References
    ----------
    .. [1] Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005.
    """
    if gpus == 1:
        return 0.0
    inside = sent / network.link
    across = sent / (network.network * network.gpus_per_machine) if gpus > network.gpus_per_machine else 0.0
    return max(inside, across) + messages * (gpus - 1) * network.latency_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """Estimates for one number of GPUs. The number of windows for each GPU is the same in every row."""

    gpus: int
    """Number of GPUs over all machines."""
    batch_size: int
    """Number of windows in one optimiser step."""
    exchange_s: float
    """Seconds of communication in one step."""
    step_s: float
    """Seconds of one step."""
    windows_per_s: float
    """Windows of all GPUs in one second."""
    efficiency: float
    """Speed of each GPU, divided by the speed of one GPU that works alone."""
    loaders: int
    """Number of loading processes that each machine needs."""
    read_gb_s: float
    """GB/s that all machines read from the dataset."""
    checkpoint_s: float
    """Seconds in which the processes gather weights and moments for a checkpoint, without writing them."""
    limits: tuple[str, ...]
    """Texts that say what does not scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one GPU does in one optimiser step, and what it needs for this."""

    windows: int
    """Number of windows of one GPU in one step."""
    micro_batches: int
    """Number of forward passes of one GPU in one step."""
    arithmetic_s: float
    """Seconds of computation in one step."""
    parameters: int
    """Number of trainable parameters of the model."""
    zero_stage: int
    """Stage of ZeRO."""
    precision: str
    """Number format of the computation: fp32 or bf16."""
    window_bytes: float
    """Stored bytes of one window."""
    loader_windows_per_s: float
    """Windows that one loading process prepares in one second."""
    loaders_per_machine: int
    """Number of processor cores of a machine that load windows."""
    storage: float | None
    """Bytes/s that the storage delivers to all machines together; None if the storage is fast enough."""

    def sent(self, gpus: int) -> float:
        """Return the bytes that one GPU sends in one step; see `exchanged_bytes`."""
        return exchanged_bytes(
            self.parameters,
            zero_stage=self.zero_stage,
            gpus=gpus,
            precision=self.precision,
            micro_batches=self.micro_batches,
        )


def step_exchange(work: Work, gpus: int, network: Network) -> float:
    """Estimate how many seconds the GPUs exchange data in one step of `work`; see `exchange_seconds`."""
    messages = collective_operations(work.parameters, zero_stage=work.zero_stage, micro_batches=work.micro_batches)
    return exchange_seconds(work.sent(gpus), messages, gpus, network)


def step_seconds(arithmetic_s: float, exchange_s: float) -> float:
    """Return the seconds of one step. Communication overlaps with the backward pass, two thirds of the computation."""
    return arithmetic_s + max(0.0, exchange_s - arithmetic_s * 2 / 3)


def scale_row(gpus: int, work: Work, network: Network) -> ScaleRow:
    """Estimate the speed of one number of GPUs.

    Parameters
    ----------
    gpus : int
        Number of GPUs over all machines.
    work : Work
        Work of one GPU.
    network : Network
        Speeds of the links.

    Returns
    -------
    ScaleRow
        The estimates.
    """
    machines = math.ceil(gpus / network.gpus_per_machine)
    exchange_s = step_exchange(work, gpus, network)
    alone_s = step_seconds(work.arithmetic_s, exchange_s)
    on_machine = min(gpus, network.gpus_per_machine)
    load_s = work.windows * on_machine / (work.loader_windows_per_s * work.loaders_per_machine)
    read_s = work.windows * gpus * work.window_bytes / work.storage if work.storage else 0.0
    step_s = max(alone_s, load_s, read_s)
    speed = work.windows * gpus / step_s
    limits = []
    if alone_s > 1.1 * work.arithmetic_s:
        limits.append("communication")
    if load_s > alone_s:
        limits.append("loading processes")
    if read_s > alone_s:
        limits.append("storage")
    # Every process gathers the float32 weights and Adam's two moments, and keeps and writes its own share of them.
    state = 12 * work.parameters * (gpus - 1) / gpus
    return ScaleRow(
        gpus=gpus,
        batch_size=work.windows * gpus,
        exchange_s=exchange_s,
        step_s=step_s,
        windows_per_s=speed,
        efficiency=work.arithmetic_s / step_s,
        loaders=math.ceil(speed / machines / work.loader_windows_per_s),
        read_gb_s=speed * work.window_bytes / 1e9,
        checkpoint_s=exchange_seconds(state, 1, gpus, network),
        limits=tuple(limits),
    )
