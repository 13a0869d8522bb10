"""Pretrain the masked-signal autoencoder: ``dreamscale pretrain CONFIG``, or ``torchrun -m pretrain.train CONFIG``."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, StopRequested
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture
from data_sharding.dataset.samples import N_PADDED
from pretrain.runs.directory import RunDirectory
from pretrain.runs.stop import StopSignal
from pretrain.runs.versions import find_run_versions
from pretrain.training.config import PretrainConfig
from pretrain.training.data_summary import check_licenses, describe_people

if TYPE_CHECKING:
    from pretrain.runs.distributed import World

FREE = (
    "output",
    "dataset",
    "datasets",
    "tracker",
    "num_processes",
    "device",
    "num_workers",
    "log_every",
    "checkpoint",
    "evaluation",
    "micro_batch_size",
    "max_skipped",
    "guards",
    "zero_stage",
    "offload",
    "timeout_s",
    "restarts",
    "peak_tflops",
    "allowed_licenses",
    "model.compute",
)
"""Config keys that may change when a run is resumed. Most of these keys do not influence the trained weights. guards
and max_skipped can influence the weights; they may change because a failed run may need other values of these two keys
to continue. micro_batch_size may change because it does not change the loss of a batch: each window's loss is a mean
over the window's own tokens, and all windows of the batch have the same weight. dataset and datasets may change because
a dataset may be moved; the loader raises an error if the content of the dataset is different."""


def check_request(config: PretrainConfig) -> tuple[EEGDataset | Mixture, EEGDataset | Mixture]:
    """Find mistakes in the config before slow libraries are imported.

    Parameters
    ----------
    config : PretrainConfig
        Config of the run.

    Returns
    -------
    train, held_out : EEGDataset or Mixture
        The splits train and val of the dataset.

    Raises
    ------
    RequestError
        If the dataset's windows have another size than the model expects, if the training data have a licence that is
        not allowed, or if the launcher started a wrong number of processes.
    """
    versions = find_run_versions([config.output], config.datasets or [config.dataset], "pretrain")
    train, held_out = (
        Mixture(config.datasets, split, versions=versions)
        if config.datasets
        else EEGDataset(config.dataset, split, version=versions.get(config.dataset, ""))
        for split in ("train", "val")
    )
    if config.allowed_licenses:
        check_licenses(config.allowed_licenses, describe_people(train).get("license"), str(train.path))
    shape = config.model.encoder
    if shape.samples != train.spec.window:
        raise RequestError(
            f"model.encoder.samples is {shape.samples}, but the windows of {train.path} have {train.spec.window} "
            f"samples; set model.encoder.samples: {train.spec.window}, or shard with preprocess.window: {shape.samples}"
        )
    if shape.channels != N_PADDED:
        raise RequestError(
            f"model.encoder.channels is {shape.channels}; set model.encoder.channels: {N_PADDED}, the number to which "
            "datasets are padded"
        )
    from pretrain.runs.distributed import check_num_processes

    check_num_processes(config.num_processes, "torchrun --nproc_per_node {} -m pretrain.train")
    return train, held_out


def pretrain(config: PretrainConfig) -> int:
    """Start or resume a pretraining run.

    Parameters
    ----------
    config : PretrainConfig
        Config of the run.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    RequestError
        If the run cannot be started with this config.
    StopRequested
        If a stop was requested; a checkpoint is written before this error is raised.
    """
    train, held_out = check_request(config)
    from pretrain.runs.distributed import choose_device, import_deepspeed, launched_world, process_group

    rank, _ = launched_world()
    device = choose_device(config.device)
    run = RunDirectory(config.output, config, rank=rank, tracker=config.tracker, free=FREE)
    if run.finished:
        if rank == 0:
            print(f"dreamscale pretrain: {config.output} is done already; choose another output for another run")
        return EXIT_DONE
    # Hide FutureWarnings of torch.distributed, because they are about calls inside DeepSpeed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with StopSignal() as stop, _status_on_failure(run):
        deepspeed = import_deepspeed(device)
        # The watchdog ends a hanging run after `timeout_s`, and its message names the hanging process. PyTorch's
        # process group also has a timeout; it is twice `timeout_s`, so that the watchdog acts first.
        with process_group(deepspeed, device, timeout_s=2 * config.timeout_s) as world:
            step, done = train_in(world, deepspeed, config, run, train, held_out, stop)
        if not done:
            run.status("stopped", step=step)
            raise StopRequested(f"checkpoint of step {step} in {run.path}; run the same command to resume")
        run.status("done", step=step)
    return EXIT_DONE


def train_in(
    world: World,
    deepspeed: Any,
    config: PretrainConfig,
    run: RunDirectory,
    train: EEGDataset | Mixture,
    held_out: EEGDataset | Mixture,
    stop: StopSignal,
) -> tuple[int, bool]:
    """Run the training inside an existing process group.

    Parameters
    ----------
    world : World
        The processes of the run.
    deepspeed : module
        The imported module DeepSpeed.
    config : PretrainConfig
        Config of the run.
    run : RunDirectory
        The directory of the run.
    train, held_out : EEGDataset or Mixture
        The splits train and val of the dataset.
    stop : StopSignal
        Tells whether a stop was requested.

    Returns
    -------
    step : int
        Number of optimiser steps done.
    done : bool
        True if the run is complete; False if the run was stopped on request and a checkpoint was written.
    """
    from pretrain.training.deepspeed_engine import start_engine
    from pretrain.training.trainer import Trainer

    trainer = Trainer(config, run, train, held_out, start_engine(deepspeed, config, world.device), world, stop)
    with trainer.watchdog:
        trainer.resume()
        trainer.loop()
        done = trainer.global_step == trainer.total_steps and trainer.finish()
        if trainer.global_step < trainer.total_steps:
            trainer.save_last()
    return trainer.global_step, done


@contextlib.contextmanager
def _status_on_failure(run: RunDirectory) -> Iterator[None]:
    """If the ``with`` block raises an error, record it in status.json; close the run directory in any case."""
    try:
        yield
    except StopRequested:
        raise
    except BaseException as error:
        run.failed(f"{type(error).__name__}: {error}")
        raise
    finally:
        run.close()


main = command(PretrainConfig, pretrain, prog="dreamscale pretrain")


if __name__ == "__main__":
    sys.exit(main())
