"""What a checkpoint keeps: trainable weights, their average, the optimiser, the place in the data, the best so far."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_sharding.common.errors import RequestError
from data_sharding.common.files import write_json
from data_sharding.dataset.loader import Loader
from pretrain.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import Accelerator


def trainables(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that train, by name.

    Parameters
    ----------
    module : Module
        Any module; wrappers of Accelerate taken off.

    Returns
    -------
    dict
        Name to parameter.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_trainables(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load exactly the parameters that train.

    Parameters
    ----------
    module : Module
        Where to.
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
            f"checkpoint holds other parameters than this model trains: {odd[0]} and {len(odd) - 1} more"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise RequestError(
                    f"checkpoint: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


class EMA:
    """Moving average of the trainable weights, in fp32.

    Parameters
    ----------
    module : Module
        Whose trainable parameters to average.
    decay : float
        Final decay; early on it is ``(1 + n) / (10 + n)``.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in trainables(module).items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the present weights in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in trainables(module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Put the averages into the module for the length of a block."""
        kept = {name: p.detach().clone() for name, p in trainables(module).items()}
        load_trainables(module, self.shadow)
        try:
            yield
        finally:
            load_trainables(module, kept)


class TrainingState:
    """All that a checkpoint keeps."""

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Loader, ema: EMA | None
    ) -> None:
        self.module, self.optimizer, self.loader, self.ema = module, optimizer, loader, ema
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_step = -1
        self.best_weights: dict[str, torch.Tensor] | None = None

    def save(self, run: RunDirectory, accelerator: Accelerator) -> None:
        """Write a checkpoint; every rank must call this."""
        from safetensors.torch import save_file

        accelerator.wait_for_everyone()
        directory = run.begin_checkpoint(self.step)
        if accelerator.is_main_process:
            weights = {name: p.detach().cpu().contiguous() for name, p in trainables(self.module).items()}
            save_file(weights, directory / "trainables.safetensors")
            if self.ema is not None:
                save_file({n: p.cpu().contiguous() for n, p in self.ema.shadow.items()}, directory / "ema.safetensors")
            if self.best_weights is not None:
                # Weights may lie channels-last in memory, which safetensors does not keep.
                best = {n: p.contiguous() for n, p in self.best_weights.items()}
                save_file(best, directory / "best.safetensors")
            torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
            write_json(
                directory / "state.json",
                {
                    "step": self.step,
                    "loader": self.loader.state_dict(),
                    "best": self.best,
                    "best_step": self.best_step,
                    "ema_updates": self.ema.updates if self.ema else 0,
                },
            )
            run.commit_checkpoint(self.step)
        accelerator.wait_for_everyone()

    def load(self, directory: Path) -> None:
        """Load a checkpoint; every rank must call this."""
        from safetensors.torch import load_file

        load_trainables(self.module, load_file(directory / "trainables.safetensors"))
        state = json.loads((directory / "state.json").read_text())
        if self.ema is not None:
            shadow = load_file(directory / "ema.safetensors")
            assert shadow.keys() == self.ema.shadow.keys()
            self.ema.shadow = {n: shadow[n].to(p.device) for n, p in self.ema.shadow.items()}
            self.ema.updates = state["ema_updates"]
        if (directory / "best.safetensors").is_file():
            self.best_weights = load_file(directory / "best.safetensors")
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu"))
        self.loader.load_state_dict(state["loader"])
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
