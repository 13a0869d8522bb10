"""The training state: weights, their moving average, AdamW's moments, and the best weights so far.

A checkpoint stores the tensors of the training state under the names ``weights/NAME``, ``exp_avg/NAME``,
``exp_avg_sq/NAME``, ``ema/NAME`` and ``best/NAME``. All processes have the same tensors, so each process writes only a
part of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data_sharding.common.errors import RequestError
from finetune.training.config import TrainingConfig
from pretrain.runs.checkpoint import CheckpointReader, divide_by_size

_MOMENTS = ("exp_avg", "exp_avg_sq")


def trainables(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a dictionary of the trainable parameters, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_trainables(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors into all trainable parameters of a module.

    Parameters
    ----------
    module : Module
        Module whose parameters are changed.
    tensors : dict
        Maps the name of each trainable parameter to its new value.

    Raises
    ------
    RequestError
        If the names or shapes differ from those of the module's trainable parameters.
    """
    own = trainables(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise RequestError(
            f"the parameters of the checkpoint and of this model differ: {odd[0]} and {len(odd) - 1} more; "
            "choose another output to train again"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise RequestError(
                    f"the parameter {name} of the checkpoint has shape {list(tensors[name].shape)}, but this model "
                    f"needs {list(parameter.shape)}; choose another output to train again"
                )
            parameter.copy_(tensors[name])


def make_optimizer(
    module: torch.nn.Module, config: TrainingConfig, lr_scale: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """Make an AdamW optimiser with one parameter group for each pair of learning rate and weight decay.

    Parameters
    ----------
    module : Module
        Module whose trainable parameters are optimised.
    config : TrainingConfig
        Settings with the learning rate and the weight decay.
    lr_scale : callable, optional
        Function that takes the name of a parameter and returns the factor of this parameter's learning rate.

    Returns
    -------
    AdamW
        Optimiser in which each parameter group has an entry ``scale``, the factor of the group's learning rate.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainables(module).items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr_scale(name) if lr_scale else 1.0, decay), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    # In each step, the fused AdamW reads and writes a weight only once, and the default AdamW several times, also on
    # CPUs.
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


class EMA:
    """Exponential moving average of the trainable weights, in fp32.

    `EMAModel` of diffusers is not used, because it stores the averages without the names that the checkpoint needs.

    Parameters
    ----------
    module : Module
        The module whose trainable parameters are averaged.
    decay : float
        Largest decay. The decay of the n-th update is the smaller of `decay` and ``(1 + n) / (10 + n)``.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in trainables(module).items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Update the average with the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in trainables(module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextmanager
    def apply_to(self, module: torch.nn.Module) -> Iterator[None]:
        """Context manager that replaces the module's weights by their averages inside a ``with`` block."""
        kept = {name: p.detach().clone() for name, p in trainables(module).items()}
        load_trainables(module, self.shadow)
        try:
            yield
        finally:
            load_trainables(module, kept)


class TrainingState:
    """All values that change while a module is trained.

    Parameters
    ----------
    module : Module
        The module on its device, not wrapped by Accelerate.
    optimizer : AdamW
        Optimiser of the module.
    ema : EMA or None
        Moving average of the module's weights; None if the average is switched off.

    Attributes
    ----------
    step : int
        Number of optimiser steps that were done.
    evaluation_due : bool
        True if an evaluation is due after the step `step`, but has not been done yet.
    best, best_step, best_weights
        Metrics, step and weights of the best evaluation so far.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
        self.module, self.optimizer, self.ema = module, optimizer, ema
        self.step = 0
        self.evaluation_due = False
        self.best: dict[str, float] = {}
        self.best_step = -1
        self.best_weights: dict[str, torch.Tensor] | None = None

    def tensors(self, rank: int, world_size: int, *, copy: bool) -> dict[str, torch.Tensor]:
        """Return, on the CPU, the tensors of the checkpoint that one process writes.

        Parameters
        ----------
        rank, world_size : int
            Number of this process, and total number of processes.
        copy : bool
            True: return copies, which the training does not change later.

        Returns
        -------
        dict
            Maps the name of each tensor to the tensor.
        """
        found: dict[str, torch.Tensor] = {}
        for name, parameter in trainables(self.module).items():
            found[f"weights/{name}"] = parameter.detach()
            # AdamW stores no moments for a parameter that never had a gradient.
            for moment in _MOMENTS:
                if moment in (state := self.optimizer.state.get(parameter, {})):
                    found[f"{moment}/{name}"] = state[moment]
        for group, tensors in (("ema", self.ema and self.ema.shadow), ("best", self.best_weights)):
            found |= {f"{group}/{name}": tensor for name, tensor in (tensors or {}).items()}
        own = divide_by_size({name: tensor.numel() for name, tensor in found.items()}, world_size)[rank]
        # Weights may be stored channels-last in memory, but safetensors does not store this memory format.
        held = {name: found[name].cpu().contiguous() for name in own}
        return {name: t.clone() if copy and t is found[name] else t for name, t in held.items()}

    def values(self) -> dict[str, Any]:
        """Return the values that the manifest of a checkpoint stores, e.g. the best metrics."""
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        assert len(steps) <= 1
        return {
            "optimizer_step": max(steps, default=0),
            "ema_updates": self.ema.updates if self.ema else 0,
            "evaluation_due": self.evaluation_due,
            "best": self.best,
            "best_step": self.best_step,
        }

    def load(self, reader: CheckpointReader) -> None:
        """Load the training state from a checkpoint.

        Parameters
        ----------
        reader : CheckpointReader
            Reader of the checkpoint.

        Raises
        ------
        RequestError
            If the checkpoint is of another model.
        """
        manifest = reader.check_manifest(
            "step", "optimizer_step", "ema_updates", "best", "best_step", "evaluation_due", "loader.step"
        )
        load_trainables(self.module, reader.group("weights/"))
        moments = {moment: reader.group(f"{moment}/") for moment in _MOMENTS}
        for name, parameter in trainables(self.module).items():
            if name in moments["exp_avg"]:
                self.optimizer.state[parameter] = {
                    # A fused AdamW stores its step count on the device of the weights.
                    "step": torch.tensor(float(manifest["optimizer_step"]), device=parameter.device),
                    # AdamW creates its moments in the memory format of the weights, so copy the loaded moments into
                    # this format.
                    **{key: torch.zeros_like(parameter).copy_(tensors[name]) for key, tensors in moments.items()},
                }
        if self.ema is not None:
            shadow = reader.group("ema/")
            if shadow.keys() != self.ema.shadow.keys():
                raise RequestError(
                    f"{reader.folder}: this checkpoint has no moving average of this model's weights; "
                    "choose another output to train again"
                )
            self.ema.shadow = {name: tensor.copy_(shadow[name]) for name, tensor in self.ema.shadow.items()}
            self.ema.updates = manifest["ema_updates"]
        self.best_weights = reader.group("best/") or None
        self.step, self.best, self.best_step = manifest["step"], manifest["best"], manifest["best_step"]
        self.evaluation_due = manifest["evaluation_due"]
