"""Settings of the training loop. The config of every fine-tuning stage has these settings under ``training``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pretrain.runs.config import CheckpointConfig, check_at_least, samples_per_process
from pretrain.runs.directory import FREE
from pretrain.runs.schedule import check_schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings that say when the model is evaluated on held-out trials."""

    every: int = 100
    """Number of steps between two evaluations. There is also an evaluation after the last step."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", prefix="training.evaluation.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training: steps, batch size, learning rate, evaluations and checkpoints."""

    RENAMED: ClassVar[dict[str, str]] = {
        "batch": "batch_size",
        "accumulate": "use 'training.micro_batch_size', the number of samples of one process in one forward pass "
        "(batch / num_processes / accumulate)",
        "min_lr_ratio": "use 'training.min_lr', the learning rate at the end (min_lr_ratio x lr)",
        "clip_norm": "grad_clip",
        "workers": "num_workers",
        "validate_every": "evaluation.every",
        "checkpoint_every": "checkpoint.every",
    }

    steps: int = 1000
    """Number of optimiser steps."""
    batch_size: int = 64
    """Number of samples in one optimiser step, over all processes; a multiple of num_processes."""
    micro_batch_size: int | None = None
    """Number of samples that a process uses in one forward pass; a divisor of the process's part of the batch. A
    smaller `micro_batch_size` needs less memory. None: a process computes its whole part of the batch in one forward
    pass."""
    lr: float = 1e-4
    """Highest learning rate during the training."""
    min_lr: float = 0.0
    """Learning rate at the end. After the peak, the learning rate falls to `min_lr` along half a cosine."""
    warmup: float = 50
    """Number of steps in which the learning rate rises from 0 to its peak. A value below 1 is a fraction of `steps`."""
    weight_decay: float = 0.01
    """Weight decay of AdamW. Weight decay is applied only to matrices, not to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moments."""
    grad_clip: float = 1.0
    """Largest norm of the gradient: a gradient with a larger norm is scaled down to this norm. 0: no limit of the
    norm."""
    ema: float = 0.0
    """Decay of the exponential moving average (EMA) of the weights; the decay is smaller in the first steps. The
    averaged weights are evaluated and saved. 0 switches the average off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation. With bf16 (autocast), the weights are still stored in fp32."""
    num_workers: int = 0
    """Number of worker processes that read data, for each training process. With 0 workers, the training process itself
    reads the data."""
    log_every: int = 10
    """Number of steps between two lines in the file of metrics."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Settings that say when the model is evaluated on held-out trials."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Settings that say when a checkpoint is written."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "batch_size", "micro_batch_size", "log_every", prefix="training.")
        check_at_least(self, 0, "grad_clip", "num_workers", "weight_decay", prefix="training.")
        check_schedule("training.", lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)
        if not 0 <= self.ema < 1:
            raise ValueError(f"training.ema is {self.ema}; it must be at least 0 and below 1")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the optimiser step that follows `step` completed steps."""
        return learning_rate(step, self.steps, lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)

    def micro_batches(self, num_processes: int) -> int:
        """Return the number of forward passes of each process in one optimiser step.

        Parameters
        ----------
        num_processes : int
            Total number of processes.

        Returns
        -------
        int
            Number of forward passes.

        Raises
        ------
        ValueError
            If the batch size cannot be divided by the number of processes or by the micro-batch size.
        """
        share = samples_per_process(self.batch_size, num_processes, self.micro_batch_size, prefix="training.")
        return share // (self.micro_batch_size or share)


def free_keys(*prefixes: str, independent_samples: bool) -> tuple[str, ...]:
    """Return the config keys that may change when a run is resumed, because they do not affect the training result.

    Parameters
    ----------
    *prefixes : str
        Keys of the command's config whose value is a `TrainingConfig`, e.g. ``training`` or ``ddpm.training``.
    independent_samples : bool
        True if the loss is a mean over samples and the output for a sample does not depend on other samples; then
        ``micro_batch_size`` may change, too. False, for example, for a contrastive loss or for a network with batch
        norm.

    Returns
    -------
    tuple of str
        Dotted config keys.
    """
    common = (*FREE, "restarts", "timeout_s")
    names = ["log_every", "num_workers", "evaluation", "checkpoint", *(["micro_batch_size"] * independent_samples)]
    return (*common, *(f"{prefix}.{name}" for prefix in prefixes for name in names))


def upgrade_config(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a stored config of an older version to the settings of this version.

    Parameters
    ----------
    values : dict
        Stored config of a stage.

    Returns
    -------
    dict
        Config with ``min_lr`` in place of ``min_lr_ratio``, ``micro_batch_size`` in place of ``accumulate``, and
        ``precision: fp32`` in place of ``no``. Other renamed keys of `TrainingConfig.RENAMED` are not changed.
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
