"""Generate images from the EEG trials of a split, and store them together with the images that the person saw.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, StopRequested
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from finetune.diffusion import Sampling
from finetune.eeg import choose_evenly, group_repeats, read_means
from finetune.generators import Generator, Source, load_generator
from finetune.images import decode_image, open_paired
from finetune.training.accelerate import quiet_libraries
from pretrain.runs.distributed import choose_device
from pretrain.runs.stop import StopSignal


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate images from the EEG trials of one split of an EEG-image dataset."""

    RENAMED: ClassVar[dict[str, str]] = {"batch": "batch_size"}

    model: str
    """Run directory of a fine-tuned model, or the folder `model` in this run directory."""
    dataset: str
    """Path of the EEG-image dataset, which must have the same preprocessing as the model's training data."""
    output: str
    """Output directory for images/, real/ and generated.json. An earlier result in this directory is replaced when the
    new result is complete."""
    split: str = "test"
    """Name of the split from which the trials are taken."""
    control: Literal["none", "shuffle", "no_eeg", "class"] = "none"
    """none: use the EEG of each trial. shuffle: use the EEG of another trial of any category. The images of shuffle are
    a control, which shows how well a model scores without the right EEG. no_eeg: use no EEG, as a lower limit (floor).
    class: use the true category in place of the EEG, as an upper limit (ceiling). For class, EG-DDPM gets the mean
    feature of the category's train trials, and Stable Diffusion gets the caption of the image."""
    sampler: Literal["ddpm", "ddim", "dpmsolver++"] | None = None
    """Sampler. ddpm: the ancestral sampler, which adds noise at every step. ddim: a deterministic sampler that needs
    few steps. dpmsolver++: a deterministic solver of second order. Empty: the default sampler of the model."""
    steps: int | None = None
    """Number of denoising steps for each image. Empty: all steps of the training for the sampler ddpm, and 25 for the
    other samplers."""
    guidance_scale: float | None = None
    """Scale of the classifier-free guidance; 1 switches guidance off. Empty: 2, or 1 for a model that was trained
    without dropped conditions (drop 0)."""
    average_repeats: int = 0
    """Number of presentations of the same image to the same subject that are averaged to one trial. 0: average all
    presentations, as papers do with test images. 1: average nothing."""
    limit: int = 0
    """Largest number of trials; the trials are spread evenly over the split. 0 uses all trials."""
    batch_size: int = 32
    """Number of trials in one forward pass. The batch size does not change the noise from which an image starts."""
    seed: int = 0
    """Seed for the noise, and for shuffling the trials' EEG."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.average_repeats < 0:
            raise ValueError(f"average_repeats must be 0 (all) or more, got {self.average_repeats}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all trials) or more, got {self.limit}")


def trial_seed(seed: int, key: str) -> int:
    """Return the seed of a trial's noise: 63 bits of a hash of the config's seed and the trial's key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def derange(n: int, seed: int) -> np.ndarray:
    """Draw a random permutation that moves every number; all such permutations are equally likely.

    Parameters
    ----------
    n : int
        Length of the permutation, at least 2.
    seed : int
        Seed for drawing the permutation.

    Returns
    -------
    ndarray of int, shape (n,)
        A permutation of 0 to n - 1.
    """
    assert n > 1
    rng = np.random.default_rng([seed, n])
    # About one permutation in three moves every number, so this loop ends after a few rounds.
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order


def _save_png(path: Path, pixels_HW3: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels_HW3).save(path)


def generate_images(
    generator: Generator,
    dataset: EEGDataset,
    groups: list[list[int]],
    sources: list[list[int]],
    config: GenerateConfig,
    sampling: Sampling,
    root: Path,
) -> list[dict[str, Any]]:
    """Generate an image for each of the given trials, and save the images.

    Parameters
    ----------
    generator : Generator
        Fine-tuned model that generates images.
    dataset : EEGDataset
        Trials of the split.
    groups : list of list of int
        Trials for which images are generated. Each trial is a group of presentations of one image to one subject, from
        `group_repeats`. The key of the group's first presentation is the key of the trial.
    sources : list of list of int
        For each group in `groups`, the group whose mean EEG is used.
    config : GenerateConfig
        Config of the command, with control, batch size and seed.
    sampling : Sampling
        Sampler, steps and guidance scale.
    root : Path
        Directory in which the folders ``images`` and ``real`` exist.

    Returns
    -------
    list of dict
        Entries of generated.json, one for each trial.

    Raises
    ------
    StopRequested
        If a stop of the command was requested.
    """
    trials: list[dict[str, Any]] = []
    done: set[str] = set()
    source: Source = "eeg" if config.control in ("none", "shuffle") else config.control
    with StopSignal() as stop, progress(f"images ({config.control} control)", len(groups)) as advance:
        for start in range(0, len(groups), config.batch_size):
            part = [group[0] for group in groups[start : start + config.batch_size]]
            eeg = sources[start : start + config.batch_size]
            keys = [dataset.key(number) for number in part]
            images = generator.generate(
                read_means(dataset, eeg),
                seeds=[trial_seed(config.seed, key) for key in keys],
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                sampler=sampling.sampler,
                source=source,
                metas=[dataset.meta(number) for number in part],
            )
            for number, key, giver, image in zip(part, keys, eeg, images, strict=True):
                meta = dataset.meta(number)
                if key in done or not {"image_id", "label", "subject"} <= meta.keys():
                    fault = "is in the dataset twice" if key in done else "has no image_id, label or subject"
                    raise RequestError(f"{dataset.path}: sample {key} {fault}; make the dataset again")
                done.add(key)
                real = decode_image(dataset.image(number), image.shape[0], name=f"{dataset.path}: sample {key}")
                _save_png(root / "images" / f"{key}.png", image)
                _save_png(root / "real" / f"{key}.png", real)
                trials.append(
                    {
                        "key": key,
                        "eeg_key": dataset.key(giver[0]),
                        "repeats": len(giver),
                        "image_id": meta["image_id"],
                        "label": meta["label"],
                        "subject": meta["subject"],
                        "file": f"images/{key}.png",
                        "real_file": f"real/{key}.png",
                    }
                )
            advance(len(part))
            if stop.requested:
                raise StopRequested("no image was kept; run the same command again")
    return trials


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
    # Check the dataset before the model, because loading a model takes longer.
    open_paired(config.dataset, config.split)
    generator = load_generator(config.model, str(choose_device(config.device)))
    part = generator.part
    dataset = open_paired(config.dataset, config.split, tmin=part.get("tmin"), tmax=part.get("tmax"))
    dataset.require_preprocess(generator.spec, f"model {config.model}")
    found = group_repeats(dataset, config.average_repeats)
    groups = [found[number] for number in choose_evenly(len(found), config.limit or len(found))]
    sources = groups
    if config.control == "shuffle":
        if len(groups) < 2:
            raise RequestError(f"{config.dataset} ({config.split}): --control shuffle needs at least two trials")
        sources = [groups[number] for number in derange(len(groups), config.seed)]
    sampling = generator.choose_sampling(
        sampler=config.sampler, steps=config.steps, guidance_scale=config.guidance_scale
    )
    with atomic_directory(output) as root:
        for name in ("images", "real"):
            (root / name).mkdir()
        trials = generate_images(generator, dataset, groups, sources, config, sampling, root)
        write_json(
            root / "generated.json",
            {
                "kind": generator.kind,
                "model": config.model,
                "dataset_id": dataset.manifest.dataset_id,
                "dataset_version": dataset.manifest.version,
                "dataset": str(Path(config.dataset).resolve()),
                "split": config.split,
                "control": config.control,
                **dataclasses.asdict(sampling),
                "average_repeats": config.average_repeats,
                "eeg": generator.part,
                "seed": config.seed,
                "labels": dataset.labels,
                "versions": {"torch": torch.__version__},
                "trials": trials,
            },
        )
    following = f"dreamscale evaluate {output}"
    if config.control != "none":
        following = f"look at the images in {output}; 'dreamscale evaluate {output}' computes their metrics"
    if config.control == "shuffle":
        following = f"dreamscale evaluate OWN --control_dir {output} (OWN: the images without --control shuffle)"
    print(f"{len(trials)} images -> {output / 'images'}; next: {following}")
    return EXIT_DONE


main = command(
    GenerateConfig,
    generate,
    prog="dreamscale generate",
    positionals=("model", "dataset"),
    aliases={"-o": "output"},
)

if __name__ == "__main__":
    sys.exit(main())
