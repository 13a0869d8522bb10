"""Start a fine-tuning stage: silence libraries, set up Accelerate, open the run directory, and make the data loader."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_sharding.common.errors import FailedError, RequestError, StopRequested, describe_full_disk, one_line
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.config import TrainingConfig, upgrade_config
from finetune.training.engines import check_engine, hide_engine
from pretrain.runs.directory import FREE, RunDirectory
from pretrain.runs.distributed import World, check_num_processes, choose_device, launched_world
from pretrain.runs.tracking import TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

WAIT_S = 7 * 86_400.0
"""Longest time in seconds that a process waits for the others, for commands whose processes may work alone for
hours."""


def quiet_libraries() -> None:
    """Switch off progress bars, warnings and advice of the model libraries, but not their exceptions."""
    import logging

    from transformers.utils import logging as transformers_logging

    # Silence transformers before diffusers is imported, because the import makes transformers print warnings.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def make_accelerator(
    *, num_processes: int, device: str = "auto", precision: str = "fp32", timeout_s: float | None = None
) -> Accelerator:
    """Set up Accelerate, and check that the launcher started as many processes as the config says.

    Parameters
    ----------
    num_processes : int
        Number of processes that the config asks for.
    device : str
        Device of the computation: auto, cpu or cuda.
    precision : str
        Number format of the computation: fp32 or bf16.
    timeout_s : float, optional
        Longest time in seconds that processes wait for each other; by default, the limit of PyTorch.

    Returns
    -------
    Accelerator
        Accelerator that is ready for use.

    Raises
    ------
    RequestError
        If the launcher started another number of processes, or uses a kind of distribution that is not supported.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    cpu = choose_device(device).type == "cpu"
    check_num_processes(num_processes, "accelerate launch --multi_gpu --num_processes {} -m ...")
    _, launched = launched_world()
    several = DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU
    # Accelerate makes a process group for a single process, too, if a launcher started this process.
    expected = several if launched > 1 or "LOCAL_RANK" in os.environ else DistributedType.NO
    # With a process group, give the name of the communication backend, because otherwise CPU processes would not join
    # one process group. Without a process group, give no name, because Accelerate would reject the name.
    limit: dict[str, Any] = {} if timeout_s is None else {"timeout": datetime.timedelta(seconds=timeout_s)}
    backend = "gloo" if cpu else "nccl"
    handlers: list[Any] = [InitProcessGroupKwargs(backend=backend, **limit)] if expected == several else []
    check_engine(choose_device(device))
    with hide_engine():
        accelerator = Accelerator(
            cpu=cpu, mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers
        )
    if accelerator.distributed_type != expected:
        raise RequestError(
            f"Accelerate started as {accelerator.distributed_type.value}, not as {expected.value}, which is not "
            f"supported; use a config from configs/accelerate"
        )
    if accelerator.num_processes != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but Accelerate started {accelerator.num_processes} processes; set "
            f"num_processes: {accelerator.num_processes}, or start {num_processes} processes"
        )
    return accelerator


@contextmanager
def flush_subnormals() -> Iterator[None]:
    """Let the CPU treat numbers below 1.2e-38 (subnormal float32 numbers) as zero inside the `with` block.

    Gradients contain such numbers where an activation function is saturated. A CPU needs up to 20 times as long for a
    convolution of subnormal numbers, and the numbers are too small to change the training.
    """
    smallest = torch.tensor(1e-40)
    before = bool((smallest * 1 == 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def start_processes(config: Any, precision: str = "fp32", *, timeout_s: float = 0.0) -> Iterator[Accelerator]:
    """Set up Accelerate for a command, and shut down the process group at the end of the command.

    Parameters
    ----------
    config : dataclass instance
        Config of the command, with the keys ``num_processes`` and ``device``.
    precision : str
        Number format of the computation: fp32 or bf16.
    timeout_s : float
        The key ``timeout_s`` of the command. A process waits for the others for at most twice this time, so that the
        `Watchdog` of the training acts first. 0: a process waits for at most `WAIT_S` seconds.

    Yields
    ------
    Accelerator
        The accelerator that `make_accelerator` returns.

    Raises
    ------
    FailedError
        If the connection to another process is lost, because the other process has ended.
    """
    accelerator = make_accelerator(
        num_processes=config.num_processes,
        device=config.device,
        precision=precision,
        timeout_s=2 * timeout_s or WAIT_S,
    )
    try:
        yield accelerator
        # After an error, this line is not reached: a process with an error must not wait for the other processes,
        # because they may never call `wait_for_everyone`.
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise FailedError(
            f"another process ended, or the connection to it was lost ({one_line(error)[:200]}); the other process's "
            "own message says why. Run the same command again: it continues from what is stored"
        ) from None
    accelerator.end_training()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error was raised by a collective operation whose other process has ended."""
    if isinstance(error, torch.distributed.DistError):
        return True
    # PyTorch has no class for the errors of gloo.
    return type(error) is RuntimeError and ("gloo/" in str(error) or "Connection closed by peer" in str(error))


def get_world(accelerator: Accelerator) -> World:
    """Return a `World` object for the processes that Accelerate started."""
    return World(rank=accelerator.process_index, size=accelerator.num_processes, device=accelerator.device)


def open_run(
    config: Any, accelerator: Accelerator | None, *, free: tuple[str, ...] = FREE, output: str | Path | None = None
) -> RunDirectory:
    """Open the run directory of a stage on every process.

    Parameters
    ----------
    config : dataclass instance
        Config of the command, with the key ``output`` and possibly the key ``tracker``.
    accelerator : Accelerator or None
        The accelerator that `make_accelerator` returned; None for a command that always runs in one process.
    free : tuple of str
        Config keys that may change when the run is resumed, as returned by `free_keys`.
    output : str or Path, optional
        Directory that is used in place of the config's ``output``. A command with several run directories, such as
        ``dreamscale ddpm``, needs `output`.

    Returns
    -------
    RunDirectory
        Run directory, whose attribute `finished` says whether the run is finished.
    """
    tracker: TrackerConfig | None = getattr(config, "tracker", None)
    run = RunDirectory(
        output or config.output,
        config,
        rank=accelerator.process_index if accelerator is not None else 0,
        tracker=tracker,
        free=free,
        upgrade=upgrade_config,
    )
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return run


@contextmanager
def use_run(
    config: Any, accelerator: Accelerator | None, *, free: tuple[str, ...] = FREE, output: str | Path | None = None
) -> Iterator[RunDirectory]:
    """Open the run directory of a stage, and close it after the stage; the arguments are those of `open_run`.

    Yields
    ------
    RunDirectory
        The run directory, which is also closed after an error, so that the command can be repeated at once. After an
        error, status.json says that the run failed, and why.

    Raises
    ------
    FailedError
        If the disk is full.
    """
    run = open_run(config, accelerator, free=free, output=output)
    try:
        yield run
    except StopRequested:
        raise
    except BaseException as error:
        fault = describe_full_disk(error)
        if not run.finished:
            run.failed(one_line(fault or f"{type(error).__name__}: {error}"))
        if fault is None:
            raise
        raise FailedError(
            f"{run.path}: {fault}; free some space on this disk and run the same command again: the run continues from "
            "its newest checkpoint"
        ) from None
    finally:
        run.close()


def make_loader(dataset: EEGDataset, config: TrainingConfig, seed: int, accelerator: Accelerator) -> Loader:
    """Make a data loader that yields an endless sequence of batches for this process.

    Parameters
    ----------
    dataset : EEGDataset
        Trials of the train split.
    config : TrainingConfig
        Settings with the batch size and the number of workers.
    seed : int
        Seed for the order of samples.
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.

    Returns
    -------
    Loader
        Data loader. Each batch of the loader is this process's part of a global batch.
    """
    world = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return Loader(dataset, config.batch_size, seed, **world, num_workers=config.num_workers)


def report_finished(run: RunDirectory, result: str = "model/dreamscale.json") -> bool:
    """If a run is finished, check that its result still exists, print a message, and return True.

    Parameters
    ----------
    run : RunDirectory
        The run directory.
    result : str
        Path, relative to the run directory, of a file that a finished run has.

    Returns
    -------
    bool
        True if the run is finished, so that there is nothing to do.

    Raises
    ------
    RequestError
        If the run is finished, but its result was deleted.
    """
    if not run.finished:
        return False
    if not (run.path / result).is_file():
        raise RequestError(
            f"{run.path}: this run is complete, but its file {result} is missing; choose another output, or delete "
            f"{run.path} to train again"
        )
    print(f"{run.path}: this run is complete; nothing to do")
    return True
