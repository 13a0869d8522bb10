"""The request of a probe."""

from __future__ import annotations

import dataclasses
from typing import Literal

Method = Literal["random weights", "band power", "covariance", "time courses", "EEGNet", "fine-tuning"]
DEFAULT_METHODS: tuple[Method, ...] = ("random weights", "band power", "covariance", "time courses", "EEGNet")
Standardize = Literal["subject", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe of an encoder on a labelled dataset, with baselines and controls."""

    encoder: str
    """Encoder package: a directory, or a name on the Hugging Face hub."""
    dataset: str
    """Labelled (EEG-image) dataset with the preprocessing that the encoder expects."""
    output: str | None = None
    """JSON file for the result. Without it the result is only printed."""
    figure: str | None = None
    """PNG, PDF or SVG file for a chart of the accuracies."""
    folds: Literal["split", "subjects"] = "split"
    """split: fit on the dataset's train split and score another split. subjects: leave out each subject of the dataset
    once, fit on the other subjects and score the one left out."""
    split: Literal["test", "val"] = "test"
    """Split to score, with folds: split."""
    methods: list[Method] = dataclasses.field(default_factory=lambda: list(DEFAULT_METHODS))
    """Methods to compare the encoder with. fine-tuning takes longest: it trains the whole encoder and a head on the
    mean token, once from the encoder's weights and once from random weights."""
    time_bins: int = 16
    """Number of equal parts of the window. Tokens and time courses are averaged within each part. With 1, everything
    that depends on the time within the window is lost."""
    standardize: Standardize = "subject"
    """subject: bring the features to mean 0 and variance 1 over each subject's own trials, without labels. none: over
    the training trials."""
    image_groups: int = 3
    """Number of groups of images, with folds: subjects, if the subjects saw the same images. A fit scores one group of
    one subject, and trains on the other groups of the other subjects."""
    random_seeds: int = 5
    """Number of encoders with random weights."""
    shuffles: int = 10
    """Number of sets of shuffled training labels for the control; 0 for no control."""
    seed: int = 0
    """Seed for random weights, EEGNet, shuffles, bootstrap and permutations."""
    resamples: int = 10_000
    """Number of bootstrap resamples of an interval, and of random sign flips of a test."""
    eegnet_epochs: int = 100
    """Largest number of epochs of EEGNet; training ends earlier when the validation loss stops falling."""
    eegnet_patience: int = 15
    """Number of epochs without a lower validation loss after which EEGNet's training ends."""
    finetune_epochs: int = 10
    """Number of epochs of fine-tuning."""
    finetune_rates: list[float] = dataclasses.field(default_factory=lambda: [3e-4, 1e-3])
    """Learning rates to try in fine-tuning. The best one on the val split is taken, or on the first inner fold if there
    is no val split."""
    batch_size: int = 64
    """Number of trials that the encoder sees at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one, otherwise the CPU."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 100")
        for name in (
            "batch_size",
            "time_bins",
            "image_groups",
            "random_seeds",
            "eegnet_epochs",
            "eegnet_patience",
            "finetune_epochs",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.finetune_rates or min(self.finetune_rates) <= 0:
            raise ValueError(f"finetune_rates is {self.finetune_rates}; give one or more rates above 0")
        if self.shuffles < 0:
            raise ValueError(f"shuffles is {self.shuffles}; it must not be negative")
