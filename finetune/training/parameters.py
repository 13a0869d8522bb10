"""The trainable parameters of a module, their optimiser, and their moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from data_sharding.common.errors import RequestError
from finetune.training.config import TrainingConfig


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
    weights : mapping of str to Tensor
        Start of the average, by name: each tensor is a trainable weight, or the part of the weight that this process
        holds (see `finetune.training.engines.Engine.weights`).
    decay : float
        Largest decay. The decay of the n-th update is the smaller of `decay` and ``(1 + n) / (10 + n)``.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Update the average with the current weights, in the same order."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parts = [tensor.detach().float() for tensor in weights.values()]
        torch._foreach_lerp_(list(self.shadow.values()), parts, 1 - decay)
