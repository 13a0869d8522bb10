"""Config of a pretraining run."""

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
    """Steps between two evaluations. There is always one before the first step and one after the last step."""
    windows: int = 2048
    """Largest number of windows to evaluate on, spread evenly over the split; 0 for all windows."""
    batch_size: int | None = None
    """Windows of one process in one forward pass; by default as many as in training."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "batch_size", prefix="evaluation.")
        check_at_least(self, 0, "windows", prefix="evaluation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a masked-signal autoencoder on a sharded dataset with DeepSpeed ZeRO."""

    dataset: str = ""
    """Directory written by 'dreamscale shard', on a disk or an object store (s3://bucket/lab). The length of its
    windows must be model.encoder.samples."""
    datasets: dict[str, float] = dataclasses.field(default_factory=dict)
    """Several datasets in place of one: directory of each dataset, and its share of the samples that training sees. All
    must have the same preprocessing."""
    order: Literal["global", "shards"] = "global"
    """Order of samples in an epoch. global: random over all samples; shards: random over 16 shards at a time. Use
    shards for a remote dataset that is larger than the cache (its folder is DREAMSCALE_CACHE, its size
    DREAMSCALE_CACHE_GB, 50 by default)."""
    output: str
    """Run directory. The same command resumes a run that was interrupted."""
    num_processes: int = 1
    """Number of processes over all machines, one for each GPU. The launcher must start exactly this number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one, else the CPU."""
    seed: int = 0
    """Seed for initial weights, order of samples and masks."""
    model: MaskedAutoencoderConfig = dataclasses.field(default_factory=MaskedAutoencoderConfig)
    """Shape and objective of the model."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimiser and learning-rate schedule."""
    epochs: float = 500.0
    """Passes over the training split; not used if steps is given."""
    steps: int | None = None
    """Number of optimiser steps, in place of epochs."""
    batch_size: int = 128
    """Windows of one optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Windows of one process in one forward pass. Gradients are accumulated until the batch is complete. By default
    each process computes its whole share of the batch at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation. bf16 still keeps float32 master weights, and accumulates and reduces gradients
    in float32; it needs zero_stage 1 to 3."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO divides among the processes. 0: nothing; 1: optimiser state; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the CPU's memory. optimizer: the optimiser state, for zero_stage 1 to 3; all: the weights too,
    for zero_stage 3."""
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keys of DeepSpeed's own config. They take precedence over the generated values."""
    num_workers: int = 2
    """Reading processes for each training process; 0 reads in the training process itself."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Evaluation on the val split."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When to write checkpoints."""
    max_skipped: int = 20
    """The run fails when the gradient was not finite for this many steps in a row. Such steps are skipped."""
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """Detection of loss spikes."""
    timeout_s: float = 1800.0
    """Seconds without progress after which the run fails and names the hanging process; 0 for never."""
    restarts: int = 0
    """How many times 'dreamscale pretrain' restarts its processes after one of them was killed; the run resumes from
    its newest checkpoint. With torchrun, use its own flag --max-restarts."""
    peak_tflops: float | None = None
    """Peak of the device in TFLOP/s, for the utilisation in the metrics (mfu). The peak of common GPUs is known."""
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.datasets):
            raise ValueError("set either dataset, or datasets with a share for each of them")
        check_at_least(self, 1, "num_processes", "batch_size", "log_every", "max_skipped", "steps")
        check_at_least(self, 0, "num_workers", "timeout_s", "restarts")
        if not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; it must be positive")
        samples_per_process(self.batch_size, self.num_processes, self.micro_batch_size)
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3; stage 0 keeps no float32 master weights")
        if self.model.compute.compile and self.zero_stage == 3:
            raise ValueError(
                "model.compute.compile needs zero_stage 0, 1 or 2: stage 3 gathers weights inside each block, "
                "which the compiler cannot handle"
            )
        if (self.offload == "all" and self.zero_stage != 3) or (self.offload == "optimizer" and not self.zero_stage):
            raise ValueError(
                f"offload {self.offload} needs zero_stage {'3' if self.offload == 'all' else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization is {zero!r}; it must be a mapping of keys, or be left out")
        for key in ("offload_optimizer", "offload_param"):
            if (zero.get(key) or {}).get("device") == "nvme":
                raise ValueError(f"deepspeed.zero_optimization.{key}.device nvme is not supported; use offload")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}; it must be positive")
        for key in self.deepspeed:
            if key in _OURS:
                raise ValueError(f"deepspeed.{key} is set by Dreamscale, which relies on its value; use {_OURS[key]}")
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage is set by Dreamscale; use zero_stage")

    @property
    def micro(self) -> int:
        """Windows of one process in one forward pass, resolved."""
        return self.micro_batch_size or self.batch_size // self.num_processes

    def total_steps(self, samples: int) -> int:
        """Return the number of optimiser steps for a training split with this number of samples."""
        return self.steps or math.ceil(self.epochs * samples / self.batch_size)
