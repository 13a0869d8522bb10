import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from data_sharding.common.errors import RequestError, StopRequested
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.accelerate import make_accelerator, open_run
from finetune.training.config import TrainingConfig
from finetune.training.fit import FitResult, fit
from finetune.training.state import EMA, load_trainables
from finetune.training.step_random import StepRandom


@dataclass(frozen=True, kw_only=True)
class Request:
    output: str
    training: TrainingConfig


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(128, 1), nn.Linear(3, 3).requires_grad_(False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(self.dropout(x))[:, 0] - y).square().mean()}


def _train(
    data: Path, output: Path, module: Regressor, *, signal_at: int = -1, validate: object = None, **training: object
) -> FitResult:
    config = TrainingConfig(**{"steps": 12, "batch": 8, "checkpoint_every": 5, "ema": 0.9, **training})
    accelerator = make_accelerator(num_processes=1, device="cpu")
    run = open_run(Request(output=str(output), training=config), accelerator)

    def inputs(batch: Batch, random: StepRandom) -> dict[str, torch.Tensor]:
        if loader.step - 1 == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = batch.eeg[:, 0].float() / 20
        return {"x": x + 0.1 * random.normal(len(x), 128), "y": torch.tensor([float(m["label"]) for m in batch.metas])}

    loader = Loader(EEGDataset(data), config.batch, 0)
    try:
        return fit(
            module,
            config=config,
            seed=3,
            accelerator=accelerator,
            run=run,
            loader=loader,
            inputs=inputs,
            validate=validate,  # type: ignore[arg-type]
        )
    finally:
        run.close()


def test_a_stopped_run_goes_on_to_the_same_weights(paired_dataset: Path, tmp_path: Path) -> None:
    whole, parts = Regressor(), Regressor()
    _train(paired_dataset, tmp_path / "whole", whole)
    with pytest.raises(StopRequested, match="step 8"):
        _train(paired_dataset, tmp_path / "parts", parts, signal_at=7)
    fresh = Regressor()
    _train(paired_dataset, tmp_path / "parts", fresh)
    assert torch.equal(fresh.layer.weight, whole.layer.weight)
    assert not torch.equal(fresh.layer.weight, Regressor().layer.weight)


def test_accumulating_gives_the_same_step(paired_dataset: Path, tmp_path: Path) -> None:
    modules = []
    for parts in (1, 4):
        module = Regressor()
        module.dropout.p = 0.0
        _train(paired_dataset, tmp_path / str(parts), module, accumulate=parts)
        modules.append(module.layer.weight)
    torch.testing.assert_close(*modules, rtol=1e-4, atol=1e-6)


def test_the_best_validation_is_kept(paired_dataset: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def validate(module: Regressor) -> dict[str, float]:
        seen.append(module.layer.weight.detach().clone())
        return {"loss": [3.0, 1.0, 2.0][len(seen) - 1]}

    module = Regressor()
    result = _train(paired_dataset, tmp_path / "run", module, validate=validate, validate_every=4)
    assert (result.best_step, result.best["loss"]) == (8, 1.0)
    assert torch.equal(module.layer.weight, seen[1])


def test_gradients_that_are_not_finite_end_the_run(paired_dataset: Path, tmp_path: Path) -> None:
    module = Regressor()
    before = module.layer.weight.detach().clone()
    module.layer.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        _train(paired_dataset, tmp_path / "run", module)
    assert torch.equal(module.layer.weight, before)


def test_noise_does_not_depend_on_the_number_of_ranks() -> None:
    whole = StepRandom(1, 5).normal(6, 2)
    halves = [StepRandom(1, 5, rank=r, world_size=2).normal(3, 2) for r in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    assert not torch.equal(StepRandom(1, 6).normal(6, 2), whole)


def test_only_trainables_are_averaged_and_loaded_strictly() -> None:
    module = Regressor()
    ema = EMA(module, 0.5)
    assert set(ema.shadow) == {"layer.weight", "layer.bias"}
    with pytest.raises(RequestError, match="other parameters"):
        load_trainables(module, {"layer.weight": module.layer.weight})


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(RequestError, match="this launch has 1"):
        make_accelerator(num_processes=2, device="cpu")


def test_warm_up_then_cosine() -> None:
    config = TrainingConfig(steps=110, warmup=10, lr=1.0, min_lr_ratio=0.1)
    assert config.lr_at(0) == pytest.approx(0.1) and config.lr_at(10) == pytest.approx(1.0)
    assert config.lr_at(60) == pytest.approx(0.55) and config.lr_at(110) == pytest.approx(0.1)
