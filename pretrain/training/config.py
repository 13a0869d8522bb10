"""Request of a pretraining run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from pretrain.model.config import MaskedAutoencoderConfig
from pretrain.runs.config import CheckpointConfig, check_at_least, samples_per_process
from pretrain.runs.guards import GuardConfig
from pretrain.runs.schedule import check_schedule, learning_rate
from pretrain.runs.tracking import TrackerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule: linear warm-up, then half a cosine."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "grad_clip"}

    lr: float = 2.5e-4
    """Peak learning rate, for the given batch_size, or for base_batch if that is set."""
    base_batch: int | None = None
    """Batch size for which lr and min_lr are meant. For another batch_size both are scaled. None: no scaling."""
    batch_scaling: Literal["linear", "sqrt"] = "linear"
    """How lr and min_lr are scaled: with batch_size / base_batch, or with its square root, which suits Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup: float = 0.08
    """Warm-up of the learning rate: a number of steps, or a fraction of all steps if below 1. The default is 40 of 500
    epochs, as in the released code."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Added to the denominator of Adam's update."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and the class and mask tokens have no decay."""
    grad_clip: float = 0.8
    """Largest norm of the whole gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        check_schedule("optimizer.", lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {list(self.betas)}; they must be from 0 to below 1")
        check_at_least(self, 0, "grad_clip", "weight_decay", prefix="optimizer.")
        check_at_least(self, 1, "base_batch", prefix="optimizer.")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps is {self.eps}; it must be positive")

    def _scale(self, batch_size: int) -> float:
        ratio = batch_size / (self.base_batch or batch_size)
        return ratio if self.batch_scaling == "linear" else math.sqrt(ratio)

    def peak_lr(self, batch_size: int) -> float:
        """Return the learning rate after the warm-up for a batch size."""
        return self._scale(batch_size) * self.lr

    def lr_at(self, step: int, total: int, batch_size: int | None = None) -> float:
        """Return the learning rate of a step.

        Parameters
        ----------
        step : int
            Optimiser steps done before this one.
        total : int
            Optimiser steps of the whole run.
        batch_size : int, optional
            Windows of one step, for the scaling with `base_batch`; nothing is scaled without it.

        Returns
        -------
        float
            The learning rate.
        """
        scale = self._scale(batch_size) if self.base_batch and batch_size else 1.0
        return scale * learning_rate(step, total, lr=self.lr, min_lr=self.min_lr, warmup=self.warmup)


_OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16": "precision",
    "fp16": "precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "checkpoint": "checkpoint",
}
"""Keys of DeepSpeed's own config, and our keys that replace them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss on the val split, with the same masks every time."""

    every: int = 500
    """Steps between two evaluations; there is one before the first step and one after the last anyway."""
    windows: int = 2048
    """Most windows to evaluate on, spread evenly over the split; 0 for all."""
    batch_size: int | None = None
    """Windows of one process at once; as in training by default."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "batch_size", prefix="evaluation.")
        check_at_least(self, 0, "windows", prefix="evaluation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a masked-signal autoencoder on a sharded dataset with DeepSpeed ZeRO."""

    dataset: str = ""
    """Directory written by 'dreamscale shard', here or on an object store (s3://bucket/lab); its windows must be as
    long as model.encoder.samples."""
    datasets: dict[str, float] = dataclasses.field(default_factory=dict)
    """Several of them in place of dataset: each one's share of the samples that training sees, by its directory. They
    must have been preprocessed alike."""
    order: Literal["global", "shards"] = "global"
    """How an epoch goes: at random over all samples, or over 16 shards at a time. Remote datasets larger than the cache
    (DREAMSCALE_CACHE_GB, 50 by default, in DREAMSCALE_CACHE) need shards."""
    output: str
    """Run directory. A run that was stopped goes on when it is started again."""
    num_processes: int = 1
    """Processes over all machines, one a GPU; the launcher must give exactly so many."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    seed: int = 0
    """Of the weights, the order of the samples and the masks."""
    model: MaskedAutoencoderConfig = dataclasses.field(default_factory=MaskedAutoencoderConfig)
    """Shape and objective."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """How it learns."""
    epochs: float = 500.0
    """Passes over the training split, unless steps is given."""
    steps: int | None = None
    """Optimiser steps, in place of epochs."""
    batch_size: int = 128
    """Windows of one step over all processes."""
    micro_batch_size: int | None = None
    """Windows of one process at once; gradients add up until the batch is full. The whole share by default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps float32 master weights, and reduces and accumulates gradients in float32; needs zero_stage 1 to 3."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is spread over the processes: 1 the optimiser's state, 2 and the gradients, 3 and the weights; 0 nothing."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the processor's memory: the optimiser's state (zero_stage 1 to 3), or the weights too (3)."""
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keys for DeepSpeed's own config, merged over the generated ones."""
    num_workers: int = 2
    """Reading processes a training process; 0 reads in the training process itself."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Held-out loss."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Saving."""
    max_skipped: int = 20
    """Steps in a row that may be skipped because the gradient was not finite; then the run fails."""
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """Loss spikes."""
    timeout_s: float = 1800.0
    """Seconds without progress after which the run fails and says which process hangs; 0 for never."""
    restarts: int = 0
    """How often 'dreamscale pretrain' starts its processes again after one of them was killed; the run goes on from its
    newest checkpoint. (For torchrun: --max-restarts.)"""
    peak_tflops: float | None = None
    """What the device can do at most, for the utilisation in the metrics; known for common GPUs."""
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.datasets):
            raise ValueError("name the data: either dataset, or datasets with a weight for each")
        check_at_least(self, 1, "num_processes", "batch_size", "log_every", "max_skipped", "steps")
        check_at_least(self, 0, "num_workers", "timeout_s", "restarts")
        if not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; it must be positive")
        samples_per_process(self.batch_size, self.num_processes, self.micro_batch_size)
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3: stage 0 keeps no float32 master weights")
        if self.model.compute.compile and self.zero_stage == 3:
            raise ValueError(
                "model.compute.compile needs zero_stage 0, 1 or 2: stage 3 gathers weights inside each block, "
                "which breaks its graph"
            )
        if (self.offload == "all" and self.zero_stage != 3) or (self.offload == "optimizer" and not self.zero_stage):
            raise ValueError(
                f"offload {self.offload} needs zero_stage {'3' if self.offload == 'all' else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization is {zero!r}; it must hold keys, or be left out")
        for key in ("offload_optimizer", "offload_param"):
            if (zero.get(key) or {}).get("device") == "nvme":
                raise ValueError(f"deepspeed.zero_optimization.{key}.device nvme is not supported; use offload")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}; it must be positive")
        for key in self.deepspeed:
            if key in _OURS:
                raise ValueError(f"deepspeed.{key} would bypass what checkpoints and guards rely on; use {_OURS[key]}")
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: use zero_stage")

    @property
    def micro(self) -> int:
        """Windows of one process in one forward pass."""
        return self.micro_batch_size or self.batch_size // self.num_processes

    def total_steps(self, samples: int) -> int:
        """Optimiser steps of the run.

        Parameters
        ----------
        samples : int
            Samples of the training split.

        Returns
        -------
        int
            `steps`, or as many as fill the epochs.
        """
        return self.steps or math.ceil(self.epochs * samples / self.batch_size)
