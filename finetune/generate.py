"""Images for the trials of a split, beside the ones that were seen.

Shapes: B trials, H, W pixels.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, StopRequested, run_main
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.progress import progress
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.generators import Generator, load_generator
from finetune.images import decode_image, open_paired
from finetune.training.accelerate import pick_device, quiet_libraries
from pretrain.runs.stop import StopSignal


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Images for the trials of a split of an EEG-image dataset."""

    model: str
    """A fine-tuned run, or its `model` directory."""
    dataset: str
    """EEG-image dataset, preprocessed as the model's training data."""
    output: str
    """Directory for images/, real/ and generated.json; an earlier result is replaced once the new one is whole."""
    split: str = "test"
    """Which split's trials."""
    control: Literal["none", "shuffle"] = "none"
    """shuffle: every trial gets another trial's EEG, whatever their labels: what a model does without the right EEG."""
    steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 for none."""
    limit: int = 0
    """At most so many trials, evenly spread over the split; 0 for all."""
    batch: int = 32
    """Trials at a time; does not change the images' noise."""
    seed: int = 0
    """Of the noise and of the shuffling."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all) or more, got {self.limit}")


def trial_seed(seed: int, key: str) -> int:
    """Seed of a trial's noise.

    Parameters
    ----------
    seed : int
        The run's.
    key : str
        The trial's.

    Returns
    -------
    int
        63 bits of a hash of both.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def derangement(n: int, seed: int) -> np.ndarray:
    """Permutation that leaves nothing in its place, each one equally likely.

    Parameters
    ----------
    n : int
        How many, at least 2.
    seed : int
        What it depends on.

    Returns
    -------
    ndarray of int, shape (n,)
        The permutation.
    """
    assert n > 1
    rng = np.random.default_rng([seed, n])
    while True:  # a third of all permutations will do
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order


def _save_png(path: Path, pixels_HW3: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels_HW3).save(path)


def generate(
    generator: Generator,
    dataset: EEGDataset,
    numbers: list[int],
    sources: list[int],
    config: GenerateConfig,
    root: Path,
) -> list[dict[str, Any]]:
    """Make and save the images of some trials.

    Parameters
    ----------
    generator : Generator
        The model.
    dataset : EEGDataset
        The split.
    numbers : list of int
        Trials to make images for.
    sources : list of int
        The trial whose EEG each of them gets.
    config : GenerateConfig
        Steps, guidance, seed.
    root : Path
        Where ``images/`` and ``real/`` are.

    Returns
    -------
    list of dict
        What generated.json says of each trial.

    Raises
    ------
    StopRequested
        If a signal came.
    """
    trials: list[dict[str, Any]] = []
    with StopSignal() as stop, progress(f"images ({config.control} control)", len(numbers)) as advance:
        for start in range(0, len(numbers), config.batch):
            part, eeg = numbers[start : start + config.batch], sources[start : start + config.batch]
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
                raise StopRequested("nothing was written; run the same command again")
    return trials


def main(argv: list[str] | None = None) -> int:
    """Make images for the trials of a split.

    Parameters
    ----------
    argv : list of str, optional
        ``MODEL DATASET -o DIR`` and any key of `GenerateConfig`.

    Returns
    -------
    int
        Exit code.
    """
    config = parse_config(
        GenerateConfig, argv, prog="dreamscale generate", positionals=("model", "dataset"), aliases={"-o": "output"}
    )
    quiet_libraries()
    output = Path(config.output)
    if output.exists() and not (output / "generated.json").is_file() and (output.is_file() or any(output.iterdir())):
        raise RequestError(f"{output}: exists and holds something else; choose another output")
    dataset = open_paired(config.dataset, config.split)
    generator = load_generator(config.model, pick_device(config.device))
    dataset.require_preprocess(generator.spec, f"model {config.model}")
    n = len(dataset)
    count = min(config.limit or n, n)
    numbers = np.unique(np.linspace(0, n - 1, count).round().astype(int)).tolist()
    sources = numbers
    if config.control == "shuffle":
        if count < 2:
            raise RequestError(f"{config.dataset} ({config.split}): shuffling needs at least two trials")
        sources = np.asarray(numbers)[derangement(len(numbers), config.seed)].tolist()
    with atomic_directory(output) as root:
        for name in ("images", "real"):
            (root / name).mkdir()
        trials = generate(generator, dataset, numbers, sources, config, root)
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
    print(f"{len(trials)} images -> {output / 'images'}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
