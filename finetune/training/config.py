"""Settings of the training loop that every fine-tuning stage has under ``training``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pretrain.runs.config import CheckpointConfig, check_at_least, samples_per_process
from pretrain.runs.directory import FREE
from pretrain.runs.schedule import check_schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When to measure the model on held-out trials."""

    every: int = 100
    """Steps between two evaluations. The last step has one too."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", prefix="training.evaluation.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch, learning rate and cadence of a training."""

    RENAMED: ClassVar[dict[str, str]] = {
        "batch": "batch_size",
        "accumulate": "use 'training.micro_batch_size', the samples of one process in one forward pass "
        "(batch / num_processes / accumulate)",
        "min_lr_ratio": "use 'training.min_lr', a learning rate (min_lr_ratio x lr)",
        "clip_norm": "grad_clip",
        "workers": "num_workers",
        "validate_every": "evaluation.every",
        "checkpoint_every": "checkpoint.every",
    }

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Samples of one optimiser step, over all processes; a multiple of num_processes."""
    micro_batch_size: int | None = None
    """Samples of one process in one forward pass; must divide the process's share of the batch. Smaller values need
    less memory. None for the whole share."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end. From the peak to the end, the rate follows half a cosine."""
    warmup: float = 50
    """Steps in which the learning rate rises from zero to the peak; a fraction of all steps if below 1."""
    weight_decay: float = 0.01
    """Weight decay of AdamW. It applies to matrices only: biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    grad_clip: float = 1.0
    """Limit of the gradient's norm; 0 for no limit."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 switches the average off. The averaged weights are
    evaluated and kept. The decay is smaller in the first steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation. With bf16, the weights themselves stay in fp32 (autocast)."""
    num_workers: int = 0
    """Worker processes that read data, for each training process; 0 reads in the training process itself."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When to measure the model on held-out trials."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to write a checkpoint."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "batch_size", "micro_batch_size", "log_every", prefix="training.")
        check_at_least(self, 0, "grad_clip", "num_workers", "weight_decay", prefix="training.")
        check_schedule("training.", lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)
        if not 0 <= self.ema < 1:
            raise ValueError(f"training.ema is {self.ema}; it must be at least 0 and below 1")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the optimiser step that follows `step` steps."""
        return learning_rate(step, self.steps, lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)

    def micro_batches(self, num_processes: int) -> int:
        """Return the number of forward passes of each process in one optimiser step.

        Parameters
        ----------
        num_processes : int
            Number of processes.

        Returns
        -------
        int
            Forward passes.

        Raises
        ------
        ValueError
            If the batch cannot be divided as the config asks.
        """
        share = samples_per_process(self.batch_size, num_processes, self.micro_batch_size, prefix="training.")
        return share // (self.micro_batch_size or share)


def free_keys(*prefixes: str, independent_samples: bool) -> tuple[str, ...]:
    """Return the config keys that may change when a run is resumed, because they do not change what is learned.

    Parameters
    ----------
    *prefixes : str
        Dotted names of the `TrainingConfig` inside the stage's config, e.g. ``training``.
    independent_samples : bool
        True if the loss is a mean over samples, and no sample's output depends on the others. Then it does not matter
        into how many forward passes a batch is divided. A contrastive loss and a batch norm do couple samples.

    Returns
    -------
    tuple of str
        Dotted keys.
    """
    names = ["log_every", "num_workers", "evaluation", "checkpoint", *(["micro_batch_size"] * independent_samples)]
    return (*FREE, *(f"{prefix}.{name}" for prefix in prefixes for name in names))


def upgrade_config(values: dict[str, Any]) -> dict[str, Any]:
    """Translate stored settings of older versions whose values changed with their names.

    Parameters
    ----------
    values : dict
        Stored config of a stage.

    Returns
    -------
    dict
        The config with ``min_lr`` in place of ``min_lr_ratio``, ``micro_batch_size`` in place of ``accumulate``, and
        ``precision: fp32`` in place of ``no``. Keys of `TrainingConfig.RENAMED` that kept their meaning are left.
    """
    processes = values.get("num_processes", 1)

    def translate(part: dict[str, Any]) -> dict[str, Any]:
        part = {key: translate(value) if isinstance(value, dict) else value for key, value in part.items()}
        if "min_lr_ratio" in part:
            part["min_lr"] = part.pop("min_lr_ratio") * part["lr"]
        if "accumulate" in part:
            pieces = part.pop("accumulate")
            part["micro_batch_size"] = part["batch"] // processes // pieces if pieces > 1 else None
        if part.get("precision") in ("no", False):
            part["precision"] = "fp32"
        return part

    return translate(values)
