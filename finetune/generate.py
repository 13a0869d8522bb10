"""Generates images from the EEG of a split's trials, and stores them beside the images that were seen.

Shapes: B trials, H, W pixels.
"""

from __future__ import annotations

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
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.eeg import choose_evenly
from finetune.generators import Generator, load_generator
from finetune.images import decode_image, open_paired
from finetune.training.accelerate import quiet_libraries
from pretrain.runs.distributed import choose_device
from pretrain.runs.stop import StopSignal


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Images for the trials of one split of an EEG-image dataset."""

    RENAMED: ClassVar[dict[str, str]] = {"batch": "batch_size"}

    model: str
    """Run directory of a fine-tuned model, or its `model` folder."""
    dataset: str
    """EEG-image dataset with the preprocessing of the model's training data."""
    output: str
    """Directory for images/, real/ and generated.json. An earlier result there is replaced when the new one is
    complete."""
    split: str = "test"
    """Split whose trials are used."""
    control: Literal["none", "shuffle"] = "none"
    """shuffle gives each trial the EEG of another trial, of any category. The result shows how good a model seems
    without the right EEG."""
    steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Strength of classifier-free guidance; 1 switches guidance off."""
    limit: int = 0
    """Largest number of trials, evenly spread over the split; 0 for all trials."""
    batch_size: int = 32
    """Number of trials in one forward pass. It does not change the noise of an image."""
    seed: int = 0
    """Seed for the noise and for the shuffling."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all trials) or more, got {self.limit}")


def trial_seed(seed: int, key: str) -> int:
    """Return the seed of a trial's noise: 63 bits of a hash of the config's seed and the trial's key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def derange(n: int, seed: int) -> np.ndarray:
    """Draw a permutation that leaves no number in its place; all such permutations are equally likely.

    Parameters
    ----------
    n : int
        Length of the permutation, at least 2.
    seed : int
        Seed for the draw.

    Returns
    -------
    ndarray of int, shape (n,)
        The permutation.
    """
    assert n > 1
    rng = np.random.default_rng([seed, n])
    # About one permutation in three leaves no number in its place, so this loop is short.
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
    numbers: list[int],
    sources: list[int],
    config: GenerateConfig,
    root: Path,
) -> list[dict[str, Any]]:
    """Generate the images of some trials and save them.

    Parameters
    ----------
    generator : Generator
        The model.
    dataset : EEGDataset
        The split.
    numbers : list of int
        Trials to generate images for.
    sources : list of int
        For each of these trials, the trial whose EEG is used.
    config : GenerateConfig
        Steps, guidance, seed.
    root : Path
        Directory with the folders ``images`` and ``real``.

    Returns
    -------
    list of dict
        Entries of generated.json, one a trial.

    Raises
    ------
    StopRequested
        If a stop was requested.
    """
    trials: list[dict[str, Any]] = []
    with StopSignal() as stop, progress(f"images ({config.control} control)", len(numbers)) as advance:
        for start in range(0, len(numbers), config.batch_size):
            part, eeg = numbers[start : start + config.batch_size], sources[start : start + config.batch_size]
            batch = collate(dataset, eeg)
            keys = [dataset.key(number) for number in part]
            images = generator.generate(
                batch.padded(dtype=torch.float32),
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                seeds=[trial_seed(config.seed, key) for key in keys],
            )
            for number, key, eeg_key, image in zip(part, keys, batch.keys, images, strict=True):
                meta = dataset.meta(number)
                real = decode_image(dataset.image(number), image.shape[0], name=f"{dataset.path}: sample {key}")
                _save_png(root / "images" / f"{key}.png", image)
                _save_png(root / "real" / f"{key}.png", real)
                trials.append(
                    {
                        "key": key,
                        "eeg_key": eeg_key,
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
    """Generate images for the trials of a split.

    Parameters
    ----------
    config : GenerateConfig
        The request.

    Returns
    -------
    int
        Exit code.
    """
    quiet_libraries()
    output = Path(config.output)
    if output.exists() and not (output / "generated.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise RequestError(f"{output}: exists and holds something else; choose another output")
    dataset = open_paired(config.dataset, config.split)
    generator = load_generator(config.model, str(choose_device(config.device)))
    dataset.require_preprocess(generator.spec, f"model {config.model}")
    numbers = choose_evenly(len(dataset), config.limit or len(dataset))
    sources = numbers
    if config.control == "shuffle":
        if len(numbers) < 2:
            raise RequestError(f"{config.dataset} ({config.split}): --control shuffle needs at least two trials")
        sources = np.asarray(numbers)[derange(len(numbers), config.seed)].tolist()
    with atomic_directory(output) as root:
        for name in ("images", "real"):
            (root / name).mkdir()
        trials = generate_images(generator, dataset, numbers, sources, config, root)
        write_json(
            root / "generated.json",
            {
                "kind": generator.kind,
                "model": config.model,
                "dataset_id": dataset.manifest.dataset_id,
                "dataset": str(Path(config.dataset).resolve()),
                "split": config.split,
                "control": config.control,
                "steps": config.steps,
                "guidance_scale": config.guidance_scale,
                "seed": config.seed,
                "labels": dataset.labels,
                "versions": {"torch": torch.__version__},
                "trials": trials,
            },
        )
    following = f"dreamscale evaluate {output}"
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
