"""Start of a fine-tuning stage: quiet libraries, Accelerate set up and checked, the run directory, the data loader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.config import TrainingConfig, upgrade_config
from pretrain.runs.directory import FREE, RunDirectory
from pretrain.runs.distributed import World, check_num_processes, choose_device, launched_world
from pretrain.runs.tracking import TrackerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def quiet_libraries() -> None:
    """Switch off the model libraries' progress bars, warnings and advice; their errors still arrive as exceptions."""
    import logging

    from transformers.utils import logging as transformers_logging

    # This must come before the import of diffusers, because that import makes transformers print warnings.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def make_accelerator(*, num_processes: int, device: str = "auto", precision: str = "fp32") -> Accelerator:
    """Set Accelerate up, and check that it started the processes that the config asks for.

    Parameters
    ----------
    num_processes : int
        Number of processes in the config.
    device : str
        auto, cpu or cuda.
    precision : str
        fp32 or bf16.

    Returns
    -------
    Accelerator
        Ready to use.

    Raises
    ------
    RequestError
        If the launcher started another number of processes, or a kind of distribution that is not supported here.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DistributedType

    cpu = choose_device(device).type == "cpu"
    check_num_processes(num_processes, "accelerate launch --multi_gpu --num_processes {} -m ...")
    _, launched = launched_world()
    # The backend is named because, without a name, each process on a CPU would start a world of its own. A single
    # process gets no such argument: Accelerate would reject it.
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl")] if launched > 1 else []
    accelerator = Accelerator(
        cpu=cpu, mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers
    )
    expected = (
        DistributedType.NO if launched == 1 else (DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU)
    )
    if accelerator.distributed_type != expected:
        raise RequestError(
            f"Accelerate started as {accelerator.distributed_type.value}, not as {expected.value}; this stage does "
            f"not support DeepSpeed and FSDP: use one of configs/accelerate"
        )
    if accelerator.num_processes != num_processes:
        raise RequestError(
            f"num_processes is {num_processes}, but Accelerate started {accelerator.num_processes} processes"
        )
    return accelerator


def get_world(accelerator: Accelerator) -> World:
    """Return Accelerate's processes as a `World`."""
    return World(rank=accelerator.process_index, size=accelerator.num_processes, device=accelerator.device)


def open_run(
    config: Any, accelerator: Accelerator, *, free: tuple[str, ...] = FREE, output: str | Path | None = None
) -> RunDirectory:
    """Open the run directory of a stage on every process.

    Parameters
    ----------
    config : dataclass instance
        The stage's config, with ``output`` and possibly ``tracker``.
    accelerator : Accelerator
        From `make_accelerator`.
    free : tuple of str
        Config keys that may change when the run is resumed, from `free_keys`.
    output : str or Path, optional
        Directory in place of the config's ``output``, for a stage with several runs.

    Returns
    -------
    RunDirectory
        The run. Its `finished` is True if nothing is left to do.
    """
    tracker: TrackerConfig | None = getattr(config, "tracker", None)
    run = RunDirectory(
        output or config.output,
        config,
        rank=accelerator.process_index,
        tracker=tracker,
        free=free,
        upgrade=upgrade_config,
    )
    accelerator.wait_for_everyone()
    return run


def make_loader(dataset: EEGDataset, config: TrainingConfig, seed: int, accelerator: Accelerator) -> Loader:
    """Make the endless loader of this process's batches.

    Parameters
    ----------
    dataset : EEGDataset
        The train split.
    config : TrainingConfig
        Batch size and workers.
    seed : int
        Seed for the order of samples.
    accelerator : Accelerator
        From `make_accelerator`.

    Returns
    -------
    Loader
        Each batch holds this process's share of the global batch.
    """
    world = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return Loader(dataset, config.batch_size, seed, **world, num_workers=config.num_workers)


def report_finished(run: RunDirectory) -> bool:
    """Return whether a run is complete, and print so; its result is the package ``model/`` in the run directory.

    Raises
    ------
    RequestError
        If the run is complete, but its package was deleted.
    """
    if not run.finished:
        return False
    if not (run.path / "model" / "dreamscale.json").is_file():
        raise RequestError(
            f"{run.path}: this run is complete, but its 'model' folder is missing; choose another output, or delete "
            f"{run.path} to train again"
        )
    print(f"{run.path}: this run is complete; nothing to do")
    return True
