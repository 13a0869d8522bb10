"""Generate images from the EEG trials of a split, and store them together with the images that the person saw.

The command is ``dreamscale generate MODEL DATASET -o DIR`` or ``accelerate launch -m finetune.generate ...``.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_sharding.common.config import command, to_dict
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.storage import as_path
from data_sharding.dataset.dataset import EEGDataset
from finetune.diffusion import Sampling
from finetune.eeg import choose_evenly, group_repeats, read_means
from finetune.generation.config import GenerateConfig
from finetune.generation.exchange import exchange_all, exchange_within, read_noise
from finetune.generation.images import MakeImages, generate_images
from finetune.generation.partial import PartialFolder, name_sample
from finetune.generation.predictors import PREDICTORS, predict
from finetune.generation.trials import NotApplicableError, Trial, list_trials, sample_seed
from finetune.generators import Generator, Source, digest_model, load_generator
from finetune.images import ImageTable, open_paired
from finetune.training.accelerate import get_world, quiet_libraries, start_processes
from pretrain.evidence.openings import record_opening
from pretrain.runs.distributed import World

T = TypeVar("T")
TEXTS = ("model_digest", "seed", "steps", "guidance_scale", "sampler", "precision", "control")
"""Entries of generated.json that are also stored in each generated image."""


def _compute_on_first(world: World, compute: Callable[[], T]) -> T:
    """Call a function on rank 0 only. Every process then returns the function's result or raises its error."""
    result, fault = None, None
    if world.first:
        try:
            result = compute()
        except (RequestError, NotApplicableError) as error:
            fault = error
    result, fault = world.broadcast((result, fault))
    if fault is not None:
        raise fault
    return result


def _choose_trials(dataset: EEGDataset, config: GenerateConfig) -> list[Trial]:
    """List the trials; each trial has the numbers of the presentations from whose EEG its image is generated."""
    found = group_repeats(dataset, config.average_repeats)
    groups = [found[number] for number in choose_evenly(len(found), config.limit or len(found))]
    if config.control == "shuffle":
        sources = exchange_all(groups, config.seed)
    elif config.control == "shuffle_within":
        sources = exchange_within(dataset, groups, config.seed)
    elif config.control in ("no_eeg", "class", "time"):
        sources = [[] for _ in groups]
    else:
        sources = groups
    return list_trials(dataset, groups, sources)


def _choose_source(config: GenerateConfig) -> Source:
    return config.control if config.control in ("no_eeg", "class") else "eeg"


def _use_model(generator: Generator, dataset: EEGDataset, config: GenerateConfig, sampling: Sampling) -> MakeImages:
    """Return a function that generates the images of a batch with a model."""
    source = _choose_source(config)

    def make(batch: Sequence[Trial], number: int) -> NDArray[np.uint8]:
        if config.control == "noise":
            eeg_B128T = read_noise(dataset, batch, config.seed)
        else:
            eeg_B128T = read_means(dataset, [trial.source or trial.numbers for trial in batch])
        return generator.generate(
            eeg_B128T,
            seeds=[sample_seed(config.seed, trial.key, number) for trial in batch],
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            source=source,
            metas=[_describe_eeg(dataset, trial) for trial in batch],
        )

    return make


def _describe_eeg(dataset: EEGDataset, trial: Trial) -> dict[str, Any]:
    """Return the metadata of a trial; if another trial's EEG is used, take person and channels from that trial."""
    if not trial.source or trial.source[0] in trial.numbers:
        return trial.meta
    other = dataset.meta(trial.source[0])
    return trial.meta | {
        name: other[name] for name in ("n", "ch_names", "positions", "corpus", "subject") if name in other
    }


def _open_train(dataset: EEGDataset, config: GenerateConfig) -> EEGDataset:
    """Open the train split for a predictor, in the dataset version from which `dataset` was read."""
    if config.split == "train":
        raise RequestError(
            f"--split train cannot be used with --control {config.control}, which learns from the train split; give "
            "another split"
        )
    try:
        version = dataset.manifest.dataset_id
        found = EEGDataset(config.dataset, "train", version=version, tmin=dataset.tmin, tmax=dataset.tmax)
        return found.require_images()
    except RequestError as error:
        raise NotApplicableError(f"the train split cannot be read ({error})") from None


def _show_pictures(table: ImageTable, trials: list[Trial], rows_B: NDArray[np.int64], size: int) -> MakeImages:
    """Return a function that returns, for a batch of trials, the training pictures that a predictor chose."""
    row_of = {trial.key: int(row) for trial, row in zip(trials, rows_B, strict=True)}
    return lambda batch, number: table.pixels([row_of[trial.key] for trial in batch], size)


def _describe(config: GenerateConfig, generator: Generator, dataset: EEGDataset, sampling: Sampling) -> dict[str, Any]:
    """Return the entries of generated.json, except for the trials and the digest of the model."""
    place = as_path(config.dataset)
    return {
        "model": config.model,
        "dataset": str(place.resolve() if isinstance(place, Path) else place),
        "labels": dataset.labels,
        "kind": generator.kind,
        "dataset_id": dataset.manifest.dataset_id,
        "dataset_version": dataset.manifest.version,
        "split": config.split,
        "control": config.control,
        **dataclasses.asdict(sampling),
        "precision": config.precision,
        "average_repeats": config.average_repeats,
        "eeg": generator.part,
        "seed": config.seed,
        "versions": {"torch": torch.__version__},
    }


@dataclass(kw_only=True)
class _Plan:
    """Trials of a control, and the function that makes their images."""

    trials: list[Trial]
    make: MakeImages
    extra: list[dict[str, Any]]
    """For each trial, the entries of generated.json that only this control has."""
    samples: int = 1
    """Number of images for each trial."""
    seed: int | None = None
    """Seed from which the seeds of the noise are computed; None if the images are not made from noise."""

    def describe(self) -> list[dict[str, Any]]:
        numbers = range(1, self.samples)
        entries = []
        for trial, extra in zip(self.trials, self.extra, strict=True):
            files = [name_sample(trial.key, number) for number in numbers]
            entries.append(trial.describe() | extra | ({"sample_files": files} if files else {}))
        return entries

    def describe_image(self, trial: Trial, number: int) -> dict[str, object]:
        """Return what the file of an image says in addition to the entries `TEXTS`."""
        if self.seed is None:
            return {}
        return {"sample": number, "noise_seed": sample_seed(self.seed, trial.key, number)}


def _make_plan(
    config: GenerateConfig, generator: Generator, dataset: EEGDataset, sampling: Sampling, world: World
) -> _Plan:
    """Choose the trials of a control, and how the images of these trials are made: by the model, or by a predictor.

    Raises
    ------
    NotApplicableError
        If the control cannot be made from the data. Every process raises this error.
    """
    trials, control = _choose_trials(dataset, config), config.control
    source = _choose_source(config)
    if obstacle := generator.find_obstacle(source, [trial.meta for trial in trials]):
        raise NotApplicableError(obstacle)
    if control not in PREDICTORS:
        extra = [{"noise": True} if control == "noise" else {} for _ in trials]
        make = _use_model(generator, dataset, config, sampling)
        return _Plan(trials=trials, make=make, extra=extra, samples=config.samples, seed=config.seed)
    table = ImageTable(_open_train(dataset, config))
    found = _compute_on_first(
        world,
        lambda: predict(control, table, dataset, trials, seed=config.seed, average_repeats=config.average_repeats),
    )
    extra = [
        {"predicted_label": int(label), "shown_image_id": table.ids[row]}
        for label, row in zip(found.labels_B, found.rows_B, strict=True)
    ]
    return _Plan(trials=trials, make=_show_pictures(table, trials, found.rows_B, generator.image_size), extra=extra)


def _make_images(config: GenerateConfig, plan: _Plan, dataset: EEGDataset, about: dict[str, Any], world: World) -> None:
    """Make the images and write the complete result to the output folder, unless the folder has this result already."""
    output = Path(config.output)
    settings = {name: value for name, value in about.items() if name not in ("model", "dataset")}
    folder = PartialFolder(output, {**settings, "limit": config.limit, "samples": plan.samples})
    about = {**about, "samples": plan.samples, "trials": plan.describe()}
    if _compute_on_first(world, lambda: folder.is_complete(about)):
        if world.first:
            print(f"{output}: these {len(plan.trials)} images exist already; next: {_say_next(config)}")
        return
    if world.first:
        output.parent.mkdir(parents=True, exist_ok=True)
        record_opening(
            config.dataset,
            config.split,
            command="generate",
            dataset_id=about["dataset_id"],
            model_digest=about["model_digest"],
            config=to_dict(config),
            fallback=output.parent,
        )
    finished = _compute_on_first(world, folder.open)
    if finished and world.first:
        print(f"{folder.path}: {len(finished)} of {len(plan.trials)} images are finished already")
    try:
        generate_images(
            plan.make,
            dataset,
            plan.trials,
            folder,
            texts={name: about[name] for name in TEXTS},
            batch_size=config.batch_size,
            samples=plan.samples,
            describe=plan.describe_image,
            finished=finished,
            world=world,
        )
        if world.first:
            folder.complete(about)
            print(f"{len(plan.trials)} images -> {output / 'images'}; next: {_say_next(config)}")
    finally:
        if world.first:
            # After an error, other processes may still write images, so the folder is deleted only if there is no other
            # process.
            folder.close(discard=world.size == 1)


def _generate_control(
    config: GenerateConfig, generator: Generator, dataset: EEGDataset, sampling: Sampling, digest: str, world: World
) -> None:
    """Generate the images of a control, or write into generated.json why the control cannot be made from the data."""
    about = _describe(config, generator, dataset, sampling) | {"model_digest": digest}
    try:
        plan = _make_plan(config, generator, dataset, sampling, world)
    except NotApplicableError as reason:
        if world.first:
            with atomic_directory(config.output) as root:
                write_json(root / "generated.json", {**about, "not_applicable": str(reason), "trials": []})
            print(f"not applicable: {reason} -> {Path(config.output) / 'generated.json'}")
    else:
        _make_images(config, plan, dataset, about, world)
    # The next control must not begin while another process still works on this control.
    world.barrier()


def _divide(config: GenerateConfig) -> list[GenerateConfig]:
    """Return one config for the key `control`, and one config for each entry of the key `controls`."""
    first = dataclasses.replace(config, controls=[])
    others = [dataclasses.replace(first, control=name, output=f"{config.output}-{name}") for name in config.controls]
    parts = [first, *others]
    for part in parts:
        output = Path(part.output)
        filled = output.is_file() or (output.is_dir() and any(output.iterdir()))
        if filled and not (output / "generated.json").is_file():
            raise RequestError(f"{output}: exists but does not hold generated images; choose another output")
    return parts


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
    parts = _divide(config)
    with start_processes(config) as accelerator:
        _generate_parts(config, parts, get_world(accelerator))
    return EXIT_DONE


def _generate_parts(config: GenerateConfig, parts: list[GenerateConfig], world: World) -> None:
    """Load the model once, and generate the images of each control."""
    # Check the dataset before the model, because loading a model takes longer. All processes read the same version of
    # the dataset.
    version = _compute_on_first(world, lambda: open_paired(config.dataset, config.split).manifest.dataset_id)
    generator = load_generator(config.model, str(world.device))
    if config.precision == "bf16":
        generator.use_bf16()
    part = generator.part
    # On rank 0, `open_paired` prints how many trials are left out.
    open_split = open_paired if world.first else EEGDataset
    dataset = open_split(config.dataset, config.split, tmin=part.get("tmin"), tmax=part.get("tmax"), version=version)
    dataset.require_preprocess(generator.spec, f"model {config.model}")
    sampling = generator.choose_sampling(
        sampler=config.sampler, steps=config.steps, guidance_scale=config.guidance_scale
    )
    digest = _compute_on_first(world, lambda: digest_model(config.model))
    for of_control in parts:
        _generate_control(of_control, generator, dataset, sampling, digest, world)


def _say_next(config: GenerateConfig) -> str:
    """Return the command that the user should run next."""
    if config.control == "none":
        return f"dreamscale evaluate {config.output}"
    return (
        f"dreamscale evaluate OWN, where OWN is the folder of the images without --control; unless this control's "
        f"folder is named OWN-{config.control}, add --controls '[{config.output}]'"
    )


main = command(
    GenerateConfig,
    generate,
    prog="dreamscale generate",
    positionals=("model", "dataset"),
    aliases={"-o": "output"},
)

if __name__ == "__main__":
    sys.exit(main())
