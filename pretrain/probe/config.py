"""Config of a probe."""

from __future__ import annotations

import dataclasses
from typing import Literal

Method = Literal["random weights", "band power", "covariance", "time courses", "EEGNet", "fine-tuning"]
DEFAULT_METHODS: tuple[Method, ...] = ("random weights", "band power", "covariance", "time courses", "EEGNet")
Standardize = Literal["subject", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure an encoder's features with a linear classifier on a labelled dataset.

    The features are compared with baselines and controls.
    """

    encoder: str
    """Directory of the encoder package, or the package's name on the Hugging Face hub."""
    dataset: str
    """Labelled (EEG-image) dataset with the preprocessing that the encoder expects."""
    output: str | None = None
    """JSON file to which the result is written. By default the result is only printed."""
    figure: str | None = None
    """PNG, PDF or SVG file to which a chart of the accuracies is written."""
    folds: Literal["split", "subjects"] = "split"
    """How trials are divided into training and test trials. split: train on the dataset's train split and test on
    another split. subjects: use each subject of the dataset once for the test, and train on the other subjects."""
    split: Literal["test", "val"] = "test"
    """Split on which the methods are tested, for 'folds: split'."""
    methods: list[Method] = dataclasses.field(default_factory=lambda: list(DEFAULT_METHODS))
    """Methods with which the encoder is compared. Fine-tuning takes longest: it trains the whole encoder and a
    classification head, once from the encoder's weights and random_seeds times from random weights."""
    time_bins: int = 16
    """Number of time bins: equal parts of the window within which tokens and time courses are averaged. With one time
    bin, the features contain no information about the time within the window."""
    standardize: Standardize = "subject"
    """How features are scaled to mean 0 and variance 1. subject: over all trials of each subject, without using labels.
    none: over all training trials."""
    image_groups: int = 3
    """Number of groups into which the images are divided, for 'folds: subjects' if the subjects saw the same images.
    Each fold tests on one subject's trials of one group of images, and trains on the other subjects' trials of the
    other groups."""
    random_seeds: int = 5
    """Number of encoders with random weights; the result is their mean accuracy."""
    shuffles: int = 10
    """Number of times that the labels are shuffled for the control with shuffled labels; 0 leaves out this control."""
    seed: int = 0
    """Seed of the random numbers for random weights, EEGNet, shuffled labels, bootstrap and permutation tests."""
    resamples: int = 10_000
    """Number of bootstrap resamples for each interval, and number of random sign flips for each permutation test."""
    eegnet_epochs: int = 100
    """Largest number of epochs for EEGNet. EEGNet's training ends earlier if the validation loss stops falling."""
    eegnet_patience: int = 15
    """EEGNet's training ends after this number of epochs without a lower validation loss."""
    finetune_epochs: int = 10
    """Number of epochs of fine-tuning."""
    finetune_rates: list[float] = dataclasses.field(default_factory=lambda: [3e-4, 1e-3])
    """Learning rates to try in fine-tuning. The learning rate with the best accuracy on the val split is used. If there
    are no val trials, some training trials are held out to find the best learning rate."""
    design_evidence: str = ""
    """Published evidence that the categories were shown in random order, for files that have lost the order of the
    trials, such as the preprocessed THINGS-EEG2. This published evidence is printed with the verdict."""
    require: Literal["", "signal"] = ""
    """Verdict that is required for exit code 0. signal: the exit code is 1 if the verdict on the encoder is not
    "signal". If require is empty, the exit code does not depend on the verdict."""
    batch_size: int = 64
    """Number of trials that are encoded in one forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the computation. auto: a GPU if there is a GPU, otherwise the CPU."""

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
