"""DeepSpeed around the autoencoder: its config, optimiser, checkpoints and whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimizerConfig, PretrainConfig
from pretrain.distributed import World

TAG = "deepspeed"
"""Folder of DeepSpeed's own files inside a checkpoint."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient and leaves out a step whose gradient is not finite.

    ZeRO's optimisers do so themselves; this one is for stage 0, where DeepSpeed would step into the NaN.

    Parameters
    ----------
    groups : list of dict
        Parameter groups.
    clip : float
        Largest norm of the whole gradient; 0 for no limit.
    **options
        As for `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._clip = clip
        # DeepSpeed's engine looks for these two.
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step, unless the gradient is not finite.

        Parameters
        ----------
        closure : None
            Not supported.
        """
        # Gradients are averaged over the processes by now, so all of them come to the same verdict.
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip or float("inf"))
        self._global_grad_norm = float(norm)
        self.overflow = not torch.isfinite(norm).item()
        if not self.overflow:
            super().step(closure)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not.

    Parameters
    ----------
    module : nn.Module
        The model.
    weight_decay : float
        Decay of the matrices.

    Returns
    -------
    list of dict
        Two groups for an optimiser; every trainable parameter is in exactly one.
    """
    decayed, kept = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(("cls_token", "mask_token"))
            (kept if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, zero_stage: int, device: torch.device
) -> torch.optim.Optimizer:
    """PyTorch's own AdamW: nothing to compile, and one of those that ZeRO knows.

    Parameters
    ----------
    module : nn.Module
        The model.
    config : OptimizerConfig
        How it learns.
    zero_stage : int
        ZeRO's stage.
    device : torch.device
        Where the model trains.

    Returns
    -------
    torch.optim.Optimizer
        The optimiser that DeepSpeed wraps.
    """
    groups = parameter_groups(module, config.weight_decay)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if device.type == "cuda":
        options["fused"] = True
    if zero_stage == 0:
        return GuardedAdamW(groups, clip=config.clip, **options)
    return torch.optim.AdamW(groups, **options)


def deepspeed_config(config: PretrainConfig, *, parameters: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own config out of ours.

    Parameters
    ----------
    config : PretrainConfig
        The request.
    parameters : int
        Trainable values of the model.
    device : torch.device
        Where it trains.

    Returns
    -------
    dict
        What `deepspeed.initialize` takes; `config.deepspeed` is merged over it.
    """
    share = config.batch_size // config.num_processes
    # The buckets are buffers: of DeepSpeed's 5e8 values each, a small model would pay gigabytes.
    bucket = int(min(5e8 if device.type == "cuda" else 5e7, max(parameters, 2**16)))
    generated: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro,
        "gradient_accumulation_steps": share // config.micro,
        # Stage 0 clips in its optimiser, where the norm is seen and a NaN stopped.
        "gradient_clipping": config.optimizer.clip if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": config.precision == "bf16"},
        # Without these two, bf16 gradients are summed over processes and micro batches in bf16.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return merged(generated, config.deepspeed)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries.

    Parameters
    ----------
    base, over : mapping
        Where both have a value, `over` wins.

    Returns
    -------
    dict
        A new dictionary.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def save_engine(engine: Any, folder: Path, world: World) -> None:
    """Write what is needed to go on, and the whole float32 weights beside it; every process must call it.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.
    folder : Path
        A checkpoint under way.
    world : World
        This process among all.
    """
    from pretrain.encoder import WEIGHTS, save_weights

    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=False)
    weights = whole_weights(engine, world)
    if world.first:
        save_weights(weights, folder / WEIGHTS)


def load_engine(engine: Any, folder: Path) -> None:
    """Restore weights and optimiser from a checkpoint of as many processes; every process must call it.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.
    folder : Path
        A complete checkpoint.
    """
    found, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=True)
    if found is None:
        raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint there")


def whole_weights(engine: Any, world: World) -> dict[str, Tensor]:
    """Gather the float32 weights from all processes, for any ZeRO stage; every process must call it.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.
    world : World
        This process among all.

    Returns
    -------
    dict of str to Tensor
        Weights by name on the first process, on the processor; empty on the others.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
            whole = parameter.detach()
        else:
            # Collective: every process walks the same parameters in the same order.
            whole = safe_get_full_fp32_param(parameter)
            assert whole is not None, name
        if world.first:
            weights[name] = (
                whole.detach().float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
            )
    return weights
