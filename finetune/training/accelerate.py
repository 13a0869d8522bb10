"""Accelerate set up and checked: libraries, device, processes, run directory, batches of a rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.config import TrainingConfig
from pretrain.runs.directory import RunDirectory
from pretrain.runs.tracking import TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def quiet_libraries() -> None:
    """Keep the model libraries' loading bars, reports and advice off the terminal; errors still come as exceptions."""
    import logging

    from transformers.utils import logging as transformers_logging

    # Before diffusers is imported: its import makes transformers speak.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def pick_device(device: str) -> str:
    """Turn auto into what the machine has.

    Parameters
    ----------
    device : str
        auto, cpu or cuda.

    Returns
    -------
    str
        cpu or cuda.

    Raises
    ------
    RequestError
        If cuda was asked for and there is none, or the name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device '{device}' is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device cuda was asked for, but torch sees no GPU here; use device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def make_accelerator(*, num_processes: int, device: str = "auto", precision: str = "no") -> Accelerator:
    """Set Accelerate up and check that it got the world that the config asks for.

    Parameters
    ----------
    num_processes : int
        Processes that the config asks for.
    device : str
        auto, cpu or cuda.
    precision : str
        no or bf16.

    Returns
    -------
    Accelerator
        With an explicit backend: without one, every process on a CPU would believe that it is alone.

    Raises
    ------
    RequestError
        If the launcher started another number of processes, or a kind of distribution that is not supported here.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    cpu = pick_device(device) == "cpu"
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but this launch has {launched}; start it with 'dreamscale', or with "
            f"'accelerate launch --multi_gpu --num_processes {num_processes} -m ...' (see configs/accelerate)"
        )
    # Accelerate passes the keyword on even to a single process, where a backend means nothing.
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl")] if launched > 1 else []
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
    expected = (
        DistributedType.NO if launched == 1 else (DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU)
    )
    if accelerator.distributed_type != expected:
        raise RequestError(
            f"Accelerate started as {accelerator.distributed_type.value}, not as {expected.value}; DeepSpeed and FSDP "
            f"are not for this stage: use one of configs/accelerate"
        )
    if accelerator.num_processes != num_processes:
        raise RequestError(f"num_processes is {num_processes}, Accelerate's world has {accelerator.num_processes}")
    return accelerator


def open_run(config: Any, accelerator: Accelerator, *, output: str | Path | None = None) -> RunDirectory:
    """Open the run directory of a stage on every rank.

    Parameters
    ----------
    config : dataclass instance
        The stage's config, with ``output`` and perhaps ``tracker``.
    accelerator : Accelerator
        The world.
    output : str or Path, optional
        Instead of the config's, for a stage of several runs.

    Returns
    -------
    RunDirectory
        The run; `finished` is True where there is nothing left to do.
    """
    tracker: TrackerConfig | None = getattr(config, "tracker", None)
    run = RunDirectory(output or config.output, config, rank=accelerator.process_index, tracker=tracker)
    accelerator.wait_for_everyone()
    return run


def rank_loader(dataset: EEGDataset, config: TrainingConfig, seed: int, accelerator: Accelerator) -> Loader:
    """Batches of this rank.

    Parameters
    ----------
    dataset : EEGDataset
        The train split.
    config : TrainingConfig
        Batch and workers.
    seed : int
        Of the order.
    accelerator : Accelerator
        The world.

    Returns
    -------
    Loader
        Endless.
    """
    world = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return Loader(dataset, config.batch, seed, **world, num_workers=config.workers)
