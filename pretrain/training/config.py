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
    """Peak learning rate for the run's batch_size, or for a batch size of base_batch if base_batch is set."""
    base_batch: int | None = None
    """Batch size for which lr and min_lr are meant. If the run's batch_size is another number, lr and min_lr are scaled
    (see batch_scaling). If base_batch is not set, they are never scaled."""
    batch_scaling: Literal["linear", "sqrt"] = "linear"
    """How lr and min_lr are scaled if base_batch is set. linear: multiply by batch_size / base_batch; sqrt: multiply by
    the square root of batch_size / base_batch, which suits Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule, where the cosine is lowest."""
    warmup: float = 0.08
    """Length of the learning rate's warm-up: a number of steps, or a fraction of all steps if the value is below 1. The
    default is 8 % of all steps: 40 of 500 epochs, as in the released DreamDiffusion code."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments (beta1 and beta2)."""
    eps: float = 1e-8
    """Small number added to the denominator of Adam's update."""
    weight_decay: float = 0.05
    """Decoupled weight decay, applied to weight matrices only. Biases, layer norms, class tokens and mask tokens have
    no decay."""
    grad_clip: float = 0.8
    """Largest norm of the whole gradient; a larger gradient is scaled down. 0: the norm has no limit."""

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
        """Return the peak learning rate (the rate at the end of the warm-up) for a batch size."""
        return self._scale(batch_size) * self.lr

    def lr_at(self, step: int, total: int, batch_size: int | None = None) -> float:
        """Return the learning rate of a step.

        Parameters
        ----------
        step : int
            Index of the optimiser step, counted from 0.
        total : int
            Number of optimiser steps in the whole run.
        batch_size : int, optional
            Number of windows in one step. If `base_batch` is set, the learning rate is scaled for this batch size; with
            None, it is not scaled.

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
"""For each key of DeepSpeed's config that users may not set, the Dreamscale key that they must use instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation of the loss on the val split. Every evaluation uses the same masks."""

    every: int = 500
    """Number of steps between two evaluations. In addition, the loss is evaluated before the first step and after the
    last step."""
    windows: int = 2048
    """Largest number of windows on which the loss is evaluated. They are spread evenly over the val split. 0: all
    windows of the split."""
    batch_size: int | None = None
    """Number of windows that one process evaluates in one forward pass; by default, as many as in training."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "batch_size", prefix="evaluation.")
        check_at_least(self, 0, "windows", prefix="evaluation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a masked-signal autoencoder on a sharded dataset with DeepSpeed ZeRO."""

    dataset: str = ""
    """Directory written by 'dreamscale shard', on a disk or an object store (s3://bucket/lab). The length of the
    dataset's windows must be model.encoder.samples."""
    datasets: dict[str, float] = dataclasses.field(default_factory=dict)
    """Use this key in place of 'dataset' to train on several datasets. For each directory of a dataset, give the
    fraction of the training samples that is drawn from it. All datasets must have the same preprocessing."""
    allowed_licenses: list[str] = dataclasses.field(default_factory=list)
    """Licences that the training data may have, as glob patterns: [CC0*, CC-BY-*]. If the list is not empty and a
    recording has another licence, or no known licence, training and export stop with an error."""
    order: Literal["global", "shards"] = "global"
    """Order of samples in an epoch. global: all samples are shuffled together; shards: 16 shards at a time are read,
    and only their samples are shuffled together. Use 'order: shards' for a remote dataset that is larger than the
    cache. The environment variable DREAMSCALE_CACHE names the folder of the cache, and DREAMSCALE_CACHE_GB gives its
    size in GB (50 by default)."""
    output: str
    """Run directory. To resume an interrupted run, give the same command again."""
    num_processes: int = 1
    """Number of processes over all machines, one for each GPU. The launcher must start exactly num_processes
    processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the training. auto: a GPU if the machine has a GPU, else the CPU."""
    seed: int = 0
    """Seed of the random numbers for the initial weights, the order of samples and the masks."""
    model: MaskedAutoencoderConfig = dataclasses.field(default_factory=MaskedAutoencoderConfig)
    """Settings of the model's architecture and of its training objective."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimiser and learning-rate schedule."""
    epochs: float = 500.0
    """Number of passes over the training split; ignored if 'steps' is given."""
    steps: int | None = None
    """Number of optimiser steps. If 'steps' is given, 'epochs' is ignored."""
    batch_size: int = 128
    """Number of windows in one optimiser step, summed over all processes."""
    micro_batch_size: int | None = None
    """Number of windows that one process computes in one forward pass. The process accumulates gradients until its
    share of the batch is complete. By default, each process computes its whole share of the batch in one forward
    pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation. With bf16, the optimiser still updates a float32 copy of the weights (master
    weights), and gradients are still added up in float32; bf16 needs zero_stage 1 to 3."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of ZeRO: what is divided among the processes. 0: nothing; 1: the optimiser state; 2: also the gradients; 3:
    also the weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Which state is kept in the CPU's memory instead of the GPU's memory. optimizer: the optimiser state (needs
    zero_stage 1 to 3); all: also the weights (needs zero_stage 3)."""
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further keys for DeepSpeed's config; they override the values that Dreamscale would set."""
    num_workers: int = 2
    """Number of additional processes that each training process starts to read its data. 0: the training process itself
    reads the data."""
    log_every: int = 10
    """Number of steps between two lines of metrics."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Evaluation on the val split."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When to write checkpoints."""
    max_skipped: int = 20
    """Number of skipped steps in a row after which the run fails. A step is skipped if its gradient is not finite."""
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """Settings for the detection of loss spikes."""
    timeout_s: float = 1800.0
    """If the training makes no progress for this many seconds, the run fails with a message that names the hanging
    process. 0: the run may wait without limit."""
    restarts: int = 0
    """How many times 'dreamscale pretrain' restarts its processes after one of them was killed. Each restart resumes
    from the newest checkpoint. If you start the run with torchrun, use torchrun's flag --max-restarts instead."""
    peak_tflops: float | None = None
    """Peak speed of the device in TFLOP/s, used to compute the metric mfu (model-FLOPs utilisation). By default, the
    peak speed is taken from a table of common GPUs."""
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    """Where metrics are sent, in addition to metrics.jsonl."""

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.datasets):
            raise ValueError(
                "set exactly one of the keys 'dataset' and 'datasets' ('datasets' holds a share for each dataset)"
            )
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
        """The value of `micro_batch_size`, or, if it is not set, each process's whole share of the batch."""
        return self.micro_batch_size or self.batch_size // self.num_processes

    def total_steps(self, samples: int) -> int:
        """Return the number of optimiser steps of the run, given the number of samples in the training split."""
        return self.steps or math.ceil(self.epochs * samples / self.batch_size)
