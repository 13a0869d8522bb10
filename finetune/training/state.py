"""The training state: weights, their moving average, AdamW's moments, and the best weights so far.

A checkpoint stores the tensors of the training state under the names ``weights/NAME``, ``exp_avg/NAME``,
``exp_avg_sq/NAME``, ``ema/NAME`` and ``best/NAME``. The checkpoint contains whole tensors, whatever engine trains the
weights, and each process writes only some of the tensors. Therefore a run can be resumed with another engine.
"""

from __future__ import annotations

from typing import Any

import torch

from data_sharding.common.errors import RequestError
from finetune.training.engines import Engine
from finetune.training.parameters import EMA
from pretrain.runs.checkpoint import CheckpointReader, divide_by_size
from pretrain.training.deepspeed_engine import MOMENTS


class TrainingState:
    """All values that change while a module is trained.

    Parameters
    ----------
    engine : Engine
        Engine that trains the module.
    ema : EMA or None
        Moving average of the engine's weights; None if the average is switched off.

    Attributes
    ----------
    step : int
        Number of optimiser steps that were done.
    evaluation_due : bool
        True if an evaluation is due after the step `step`, but has not been done yet.
    best, best_step, best_weights
        Metrics, step and weights of the best evaluation so far.
    """

    def __init__(self, engine: Engine, ema: EMA | None) -> None:
        self.engine, self.ema = engine, ema
        self.step = 0
        self.evaluation_due = False
        self.best: dict[str, float] = {}
        self.best_step = -1
        self.best_weights: dict[str, torch.Tensor] | None = None

    def tensors(self, rank: int, world_size: int, *, copy: bool) -> dict[str, torch.Tensor]:
        """Return, on the CPU, the tensors of the checkpoint that one process writes. Every process must call this.

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
        engine, weights = self.engine, self.engine.weights()
        sizes = {}
        for name, shape in engine.shapes.items():
            kinds = ["weights", *(MOMENTS if engine.has_moments(name) else []), *(["ema"] if self.ema else [])]
            kinds += ["best"] if self.best_weights else []
            sizes |= {f"{kind}/{name}": shape.numel() for kind in kinds}
        own, found = set(divide_by_size(sizes, world_size)[rank]), {}
        for key in sizes:
            kind, _, name = key.partition("/")
            # To gather a tensor, all processes must take part, whoever writes the tensor.
            if kind == "best":
                assert self.best_weights is not None
                tensor = self.best_weights[name]
            elif kind in MOMENTS:
                tensor = engine.gather_moment(name, kind)
            else:
                tensor = engine.gather(name, self.ema.shadow[name] if kind == "ema" and self.ema else weights[name])
            if key in own:
                # Weights may be stored channels-last in memory, but safetensors does not store this memory format.
                held = tensor.detach().cpu().contiguous()
                found[key] = held.clone() if copy and held.data_ptr() == tensor.data_ptr() else held
        return found

    def values(self) -> dict[str, Any]:
        """Return the values that the manifest of a checkpoint stores, e.g. the best metrics."""
        return {
            "optimizer_step": self.engine.adam_steps(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "evaluation_due": self.evaluation_due,
            "best": self.best,
            "best_step": self.best_step,
        }

    def load(self, reader: CheckpointReader) -> None:
        """Load all values except the weights from a checkpoint; the engine was made with the checkpoint's weights.

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
        self.engine.set_moments({key: reader.group(f"{key}/") for key in MOMENTS}, manifest["optimizer_step"])
        if self.ema is not None:
            shadow = reader.group("ema/")
            if shadow.keys() != self.ema.shadow.keys():
                raise RequestError(
                    f"{reader.folder}: this checkpoint has no moving average of this model's weights; "
                    "choose another output to train again"
                )
            for name, part in self.ema.shadow.items():
                part.copy_(self.engine.take_part(name, shadow[name]))
            self.ema.updates = manifest["ema_updates"]
        self.best_weights = reader.group("best/") or None
        self.step, self.best, self.best_step = manifest["step"], manifest["best"], manifest["best_step"]
        self.evaluation_due = manifest["evaluation_due"]
