"""The state of a training: weights, their moving average, AdamW's moments, and the best weights so far.

A checkpoint holds these tensors by name: ``weights/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``, ``ema/NAME`` and
``best/NAME``. All processes hold the same tensors, so each writes a part of them.
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
    """Return the parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_trainables(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load exactly the parameters that train.

    Parameters
    ----------
    module : Module
        The module to change.
    tensors : dict
        Name to tensor.

    Raises
    ------
    RequestError
        If names or shapes are not exactly those of the module's trainable parameters.
    """
    own = trainables(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise RequestError(
            f"the checkpoint holds other parameters than this model trains: {odd[0]} and {len(odd) - 1} more"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise RequestError(
                    f"checkpoint: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


def make_optimizer(
    module: torch.nn.Module, config: TrainingConfig, lr_scale: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """Make AdamW with one group for each learning rate and weight decay.

    Parameters
    ----------
    module : Module
        Its trainable parameters are optimised.
    config : TrainingConfig
        Rates and weight decay.
    lr_scale : callable, optional
        Factor of the learning rate by parameter name.

    Returns
    -------
    AdamW
        Each group has an entry ``scale``, the factor of its learning rate.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainables(module).items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr_scale(name) if lr_scale else 1.0, decay), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()],
        lr=config.lr,
        betas=config.betas,
    )


class EMA:
    """Exponential moving average of the trainable weights, in fp32.

    diffusers' `EMAModel` is not used: it keeps its averages in a list, while the checkpoint needs their names, and it
    rounds its update in another way, so that runs would not repeat to the digit.

    Parameters
    ----------
    module : Module
        The module whose trainable parameters are averaged.
    decay : float
        Final decay. The decay of update n is the smaller of this value and ``(1 + n) / (10 + n)``.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in trainables(module).items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Include the current weights in the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in trainables(module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextmanager
    def apply_to(self, module: torch.nn.Module) -> Iterator[None]:
        """Replace the module's weights by their averages within a ``with`` block."""
        kept = {name: p.detach().clone() for name, p in trainables(module).items()}
        load_trainables(module, self.shadow)
        try:
            yield
        finally:
            load_trainables(module, kept)


class TrainingState:
    """Everything that changes while a module trains.

    Parameters
    ----------
    module : Module
        The bare module, on its device.
    optimizer : AdamW
        Its optimiser.
    ema : EMA or None
        The moving average of its weights.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    evaluation_due : bool
        The evaluation of this step has not been done yet, because a stop came first.
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
        """Return one process's share of the tensors of a checkpoint, on the CPU.

        Parameters
        ----------
        rank, world_size : int
            Number of this process, and of all processes.
        copy : bool
            True for copies that the training does not change.

        Returns
        -------
        dict
            Name to tensor.
        """
        found: dict[str, torch.Tensor] = {}
        for name, parameter in trainables(self.module).items():
            found[f"weights/{name}"] = parameter.detach()
            # A parameter that never had a gradient has no moments.
            for moment in _MOMENTS:
                if moment in (state := self.optimizer.state.get(parameter, {})):
                    found[f"{moment}/{name}"] = state[moment]
        for group, tensors in (("ema", self.ema and self.ema.shadow), ("best", self.best_weights)):
            found |= {f"{group}/{name}": tensor for name, tensor in (tensors or {}).items()}
        own = divide_by_size({name: tensor.numel() for name, tensor in found.items()}, world_size)[rank]
        # Weights may lie channels-last in memory, which safetensors does not keep.
        held = {name: found[name].cpu().contiguous() for name in own}
        return {name: t.clone() if copy and t is found[name] else t for name, t in held.items()}

    def values(self) -> dict[str, Any]:
        """Return the numbers of a checkpoint, for its manifest."""
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
        """Continue from a checkpoint.

        Parameters
        ----------
        reader : CheckpointReader
            The open checkpoint.

        Raises
        ------
        RequestError
            If the checkpoint belongs to another model.
        """
        manifest = reader.manifest
        load_trainables(self.module, reader.group("weights/"))
        moments = {moment: reader.group(f"{moment}/") for moment in _MOMENTS}
        for name, parameter in trainables(self.module).items():
            if name in moments["exp_avg"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(manifest["optimizer_step"])),
                    # Copied into the layout of the weights, as AdamW itself makes them.
                    **{key: torch.zeros_like(parameter).copy_(tensors[name]) for key, tensors in moments.items()},
                }
        if self.ema is not None:
            shadow = reader.group("ema/")
            if shadow.keys() != self.ema.shadow.keys():
                raise RequestError(f"{reader.folder}: this checkpoint has no moving average of this model's weights")
            self.ema.shadow = {name: tensor.copy_(shadow[name]) for name, tensor in self.ema.shadow.items()}
            self.ema.updates = manifest["ema_updates"]
        self.best_weights = reader.group("best/") or None
        self.step, self.best, self.best_step = manifest["step"], manifest["best"], manifest["best_step"]
        self.evaluation_due = manifest["evaluation_due"]
