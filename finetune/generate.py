"""Generate images from the EEG trials of a split, and store them together with the images that the person saw.

The command is ``dreamscale generate MODEL DATASET -o DIR`` or ``accelerate launch -m finetune.generate ...``.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.diffusion import Sampling
from finetune.eeg import choose_evenly, group_repeats, read_means
from finetune.generation.config import GenerateConfig
from finetune.generation.images import MakeImages, generate_images
from finetune.generation.partial import PartialFolder
from finetune.generation.trials import Trial, derange, list_trials, trial_seed
from finetune.generators import Generator, Source, digest_model, load_generator
from finetune.images import open_paired
from finetune.training.accelerate import get_world, make_accelerator, quiet_libraries
from pretrain.runs.distributed import World

T = TypeVar("T")
WAIT_S = 7 * 86_400.0
"""Longest time in seconds that a process waits for the other processes. A batch may take hours on a slow machine."""


def _compute_on_first(world: World, compute: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result or raise its `RequestError` on every process."""
    result, fault = None, None
    if world.first:
        try:
            result = compute()
        except RequestError as error:
            fault = str(error)
    result, fault = world.broadcast((result, fault))
    if fault is not None:
        raise RequestError(fault)
    return result


def _use_model(generator: Generator, dataset: EEGDataset, config: GenerateConfig, sampling: Sampling) -> MakeImages:
    """Return a function that generates the images of a batch with a model."""
    source: Source = "eeg" if config.control in ("none", "shuffle") else config.control

    def make(batch: Sequence[Trial]) -> NDArray[np.uint8]:
        return generator.generate(
            read_means(dataset, [trial.source for trial in batch]),
            seeds=[trial_seed(config.seed, trial.key) for trial in batch],
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            source=source,
            metas=[trial.meta for trial in batch],
        )

    return make


def _choose_trials(dataset: EEGDataset, config: GenerateConfig) -> list[Trial]:
    found = group_repeats(dataset, config.average_repeats)
    groups = [found[number] for number in choose_evenly(len(found), config.limit or len(found))]
    sources = groups
    if config.control == "shuffle":
        if len(groups) < 2:
            raise RequestError(f"{config.dataset} ({config.split}): --control shuffle needs at least two trials")
        sources = [groups[number] for number in derange(len(groups), config.seed)]
    return list_trials(dataset, groups, sources)


def _describe(config: GenerateConfig, generator: Generator, dataset: EEGDataset, sampling: Sampling) -> dict[str, Any]:
    """Return the entries of generated.json on which the images depend, except for the trials and the digest."""
    return {
        "kind": generator.kind,
        "dataset_id": dataset.manifest.dataset_id,
        "dataset_version": dataset.manifest.version,
        "split": config.split,
        "control": config.control,
        **dataclasses.asdict(sampling),
        "average_repeats": config.average_repeats,
        "eeg": generator.part,
        "seed": config.seed,
        "versions": {"torch": torch.__version__},
    }


def generate(config: GenerateConfig) -> int:
    """Generate images from the EEG trials of a split.

    Parameters
    ----------
    config : GenerateConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    output = Path(config.output)
    if output.exists() and not (output / "generated.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise RequestError(f"{output}: exists but does not hold generated images; choose another output")
    accelerator = make_accelerator(num_processes=config.num_processes, device=config.device, timeout_s=WAIT_S)
    world = get_world(accelerator)
    # Check the dataset before the model, because loading a model takes longer.
    open_paired(config.dataset, config.split)
    generator = load_generator(config.model, str(world.device))
    part = generator.part
    dataset = open_paired(
        config.dataset, config.split, tmin=part.get("tmin"), tmax=part.get("tmax"), verbose=world.first
    )
    dataset.require_preprocess(generator.spec, f"model {config.model}")
    trials = _choose_trials(dataset, config)
    sampling = generator.choose_sampling(
        sampler=config.sampler, steps=config.steps, guidance_scale=config.guidance_scale
    )
    about = _describe(config, generator, dataset, sampling)
    about["model_digest"] = _compute_on_first(world, lambda: digest_model(config.model))
    folder = PartialFolder(output, {**about, "limit": config.limit})
    finished = _compute_on_first(world, folder.open)
    if finished and world.first:
        print(f"{folder.path}: {len(finished)} of {len(trials)} images are finished already")
    names = ("model_digest", "seed", "steps", "guidance_scale", "sampler", "control")
    try:
        generate_images(
            _use_model(generator, dataset, config, sampling),
            dataset,
            trials,
            folder,
            texts={name: about[name] for name in names},
            batch_size=config.batch_size,
            finished=finished,
            world=world,
        )
        if world.first:
            about |= {"model": config.model, "dataset": str(Path(config.dataset).resolve()), "labels": dataset.labels}
            folder.complete({**about, "trials": [trial.describe() for trial in trials]})
            print(f"{len(trials)} images -> {output / 'images'}; next: {_say_next(config)}")
    finally:
        if world.first:
            # Another process may still write images, so the folder is deleted only if this process is alone.
            folder.close(discard=world.size == 1)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return EXIT_DONE


def _say_next(config: GenerateConfig) -> str:
    """Return what the user can do with the images."""
    if config.control == "none":
        return f"dreamscale evaluate {config.output}"
    if config.control == "shuffle":
        return f"dreamscale evaluate OWN --control_dir {config.output} (OWN: the images without --control shuffle)"
    return f"look at the images in {config.output}; 'dreamscale evaluate {config.output}' computes their metrics"


main = command(
    GenerateConfig,
    generate,
    prog="dreamscale generate",
    positionals=("model", "dataset"),
    aliases={"-o": "output"},
)

if __name__ == "__main__":
    sys.exit(main())
