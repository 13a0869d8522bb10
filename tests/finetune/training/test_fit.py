import dataclasses
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_sharding.common.config import command
from data_sharding.common.errors import RequestError, StopRequested
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.loader import Loader
from finetune.training.accelerate import flush_subnormals, make_accelerator, open_run
from finetune.training.config import EvaluationConfig, TrainingConfig, free_keys, upgrade_config
from finetune.training.fit import FitResult, fit
from finetune.training.parameters import EMA, load_trainables, trainables
from finetune.training.step_random import StepRandom
from pretrain.runs.checkpoint import complete_checkpoints
from pretrain.runs.config import CheckpointConfig


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


def _request_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _train(
    data: Path,
    output: Path,
    module: Regressor,
    *,
    stop_at: int = -1,
    evaluate: Callable[..., dict[str, float]] | None = None,
    **training: Any,
) -> FitResult:
    defaults: dict[str, Any] = {"steps": 12, "batch_size": 8, "checkpoint": CheckpointConfig(every=5), "ema": 0.9}
    config = TrainingConfig(**{**defaults, **training})
    accelerator = make_accelerator(num_processes=1, device="cpu")
    free = free_keys("training", independent_samples=True)
    run = open_run(Request(output=str(output), training=config), accelerator, free=free)

    def inputs(batch: Batch, random: StepRandom) -> dict[str, torch.Tensor]:
        if loader.step - 1 == stop_at:
            _request_stop()
        x = batch.eeg[:, 0].float() / 20
        return {"x": x + 0.1 * random.normal(len(x), 128), "y": torch.tensor([float(m["label"]) for m in batch.metas])}

    loader = Loader(EEGDataset(data), config.batch_size, 0)
    try:
        return fit(
            module,
            config=config,
            seed=3,
            accelerator=accelerator,
            run=run,
            loader=loader,
            inputs=inputs,
            evaluate=evaluate,
        )
    finally:
        run.close()


def _weight_norm(module: Regressor, pulse: Callable[[], None]) -> dict[str, float]:
    pulse()
    return {"loss": float(module.layer.weight.norm())}


def _curve(run: Path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_resumes_to_the_same_weights(paired_dataset: Path, tmp_path: Path, asynchronous: bool) -> None:
    whole, parts = Regressor(), Regressor()
    more = {"checkpoint": CheckpointConfig(every=3, asynchronous=asynchronous), "log_every": 1}
    _train(paired_dataset, tmp_path / "whole", whole, **more)
    with pytest.raises(StopRequested, match="step 8"):
        _train(paired_dataset, tmp_path / "parts", parts, stop_at=7, **more)
    folders = sorted(folder.name for folder in (tmp_path / "parts" / "checkpoints").iterdir())
    assert folders == ["step_00000006", "step_00000008"]
    names = {path.name for path in (tmp_path / "parts" / "checkpoints" / "step_00000008").iterdir()}
    assert names == {"complete.json", "state_00000.safetensors"}
    fresh = Regressor()
    _train(paired_dataset, tmp_path / "parts", fresh, **more)
    assert torch.equal(fresh.layer.weight, whole.layer.weight)
    assert not torch.equal(fresh.layer.weight, Regressor().layer.weight)
    assert _curve(tmp_path / "parts", "train/loss") == _curve(tmp_path / "whole", "train/loss")


def test_a_stop_interrupts_an_evaluation_which_the_resumed_run_repeats(paired_dataset: Path, tmp_path: Path) -> None:
    more = {"evaluation": EvaluationConfig(every=4), "log_every": 1}
    whole = Regressor()
    _train(paired_dataset, tmp_path / "whole", whole, evaluate=_weight_norm, **more)
    asked = []

    def slow(module: Regressor, pulse: Callable[[], None]) -> dict[str, float]:
        asked.append(len(asked))
        if len(asked) == 2:
            _request_stop()
        pulse()
        assert len(asked) != 2, "an interrupted evaluation must not go on"
        return _weight_norm(module, pulse)

    with pytest.raises(StopRequested, match="step 8"):
        _train(paired_dataset, tmp_path / "parts", Regressor(), evaluate=slow, **more)
    assert [step for step, _ in _curve(tmp_path / "parts", "val/loss")] == [4]
    # A stop just before the last evaluation postpones this evaluation to the resumed run.
    with pytest.raises(StopRequested, match="step 12"):
        _train(paired_dataset, tmp_path / "parts", Regressor(), stop_at=11, evaluate=_weight_norm, **more)
    fresh = Regressor()
    _train(paired_dataset, tmp_path / "parts", fresh, evaluate=_weight_norm, **more)
    for name in ("val/loss", "train/loss"):
        assert _curve(tmp_path / "parts", name) == _curve(tmp_path / "whole", name)
    assert torch.equal(fresh.layer.weight, whole.layer.weight)


def test_what_does_not_change_the_training_may_change_on_resume(paired_dataset: Path, tmp_path: Path) -> None:
    whole = Regressor()
    whole.dropout.p = 0.0
    _train(paired_dataset, tmp_path / "whole", whole)
    output = tmp_path / "parts"
    with pytest.raises(StopRequested):
        _train(paired_dataset, output, Regressor(), stop_at=7)
    for key, changed in {"steps": 20, "lr": 1e-2, "batch_size": 16}.items():
        with pytest.raises(RequestError, match=rf"training\.{key} was"):
            _train(paired_dataset, output, Regressor(), **{key: changed})
    free = {"log_every": 2, "num_workers": 1, "micro_batch_size": 4, "evaluation": EvaluationConfig(every=3)}
    _train(paired_dataset, output, Regressor(), checkpoint=CheckpointConfig(every=4, keep=1), **free)
    assert "training.micro_batch_size" not in free_keys("training", independent_samples=False)


def test_smaller_micro_batches_give_the_same_step(paired_dataset: Path, tmp_path: Path) -> None:
    modules = []
    for size in (8, 2):
        module = Regressor()
        module.dropout.p = 0.0
        _train(paired_dataset, tmp_path / str(size), module, micro_batch_size=size)
        modules.append(module.layer.weight)
    torch.testing.assert_close(*modules, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_divided_is_refused(paired_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"training\.micro_batch_size is 3; it must divide 8"):
        _train(paired_dataset, tmp_path / "run", Regressor(), micro_batch_size=3)


def test_the_best_evaluation_is_kept(paired_dataset: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(module: Regressor, _: Callable[[], None]) -> dict[str, float]:
        seen.append(module.layer.weight.detach().clone())
        return {"loss": [3.0, 1.0, 2.0][len(seen) - 1]}

    module = Regressor()
    more = {"evaluation": EvaluationConfig(every=4)}
    result = _train(paired_dataset, tmp_path / "run", module, evaluate=evaluate, **more)
    assert (result.best_step, result.best["loss"]) == (8, 1.0)
    assert torch.equal(module.layer.weight, seen[1])


def test_gradients_that_are_not_finite_end_the_run(paired_dataset: Path, tmp_path: Path) -> None:
    module = Regressor()
    before = module.layer.weight.detach().clone()
    module.layer.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        _train(paired_dataset, tmp_path / "run", module)
    assert torch.equal(module.layer.weight, before)


class Spoilt(Regressor):
    """Model whose loss is NaN in its fifth forward pass, although all gradients are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"loss": super().forward(x, y)["loss"] + (float("nan") if self.calls == 5 else 0.0)}


def test_a_loss_that_is_not_finite_skips_the_step(paired_dataset: Path, tmp_path: Path) -> None:
    module, weights = Spoilt(), dict[int, torch.Tensor]()

    def remember(module: Regressor, _: Callable[[], None]) -> dict[str, float]:
        weights[len(weights) + 1] = module.layer.weight.detach().clone()
        return {"loss": 1.0}

    more: dict[str, Any] = {"evaluation": EvaluationConfig(every=1), "log_every": 1, "ema": 0.0}
    _train(paired_dataset, tmp_path / "run", module, evaluate=remember, **more)
    assert [step for step in range(2, 13) if torch.equal(weights[step], weights[step - 1])] == [5]
    assert [step for step, skipped in _curve(tmp_path / "run", "skipped") if skipped] == [5]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_while_a_checkpoint_is_written_changes_nothing(
    paired_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    import pretrain.model.weights

    save = pretrain.model.weights.save_weights

    def save_and_ask(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00000005" in str(path):
            _request_stop()
        save(tensors, path)

    whole, more = Regressor(), {"checkpoint": CheckpointConfig(every=5, asynchronous=asynchronous), "log_every": 1}
    _train(paired_dataset, tmp_path / "whole", whole, **more)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.model.weights, "save_weights", save_and_ask)
        with pytest.raises(StopRequested):
            _train(paired_dataset, tmp_path / "parts", Regressor(), **more)
    assert len(complete_checkpoints(tmp_path / "parts" / "checkpoints")) == 2
    fresh = Regressor()
    _train(paired_dataset, tmp_path / "parts", fresh, **more)
    assert torch.equal(fresh.layer.weight, whole.layer.weight)


def test_a_checkpoint_of_an_older_version_is_refused_with_the_way_out(paired_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        _train(paired_dataset, tmp_path / "run", Regressor(), stop_at=7)
    # In checkpoints of older versions of Dreamscale, the optimiser is a pickle file, and the manifest has no entry for
    # the format.
    folder = tmp_path / "run" / "checkpoints" / "step_00000008"
    (folder / "state_00000.safetensors").unlink()
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "complete.json").write_text(json.dumps({"step": 8, "files": {"optimizer.pt": _record(folder)}}))
    with pytest.raises(RequestError, match=r"another version of Dreamscale.*another 'output' to train again"):
        _train(paired_dataset, tmp_path / "run", Regressor())


def _record(folder: Path) -> dict[str, Any]:
    from pretrain.runs.checkpoint import file_record

    return file_record(folder / "optimizer.pt")


def test_a_complete_run_of_an_older_version_is_still_complete(tmp_path: Path) -> None:
    old = {"steps": 12, "batch": 8, "accumulate": 2, "lr": 0.01, "min_lr_ratio": 0.1, "precision": "no"}
    old |= {"clip_norm": 0.5, "workers": 0, "validate_every": 4, "checkpoint_every": 5}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"output": str(run), "training": old}))
    (run / "status.json").write_text(json.dumps({"state": "done", "config": "0123"}))
    config = TrainingConfig(steps=12, batch_size=8, micro_batch_size=4, lr=0.01, min_lr=0.001, grad_clip=0.5)
    accelerator = make_accelerator(num_processes=1, device="cpu")
    free = free_keys("training", independent_samples=True)
    assert open_run(Request(output=str(run), training=config), accelerator, free=free).finished
    with pytest.raises(RequestError, match=r"training\.lr was 0\.01, is 0\.02"):
        open_run(Request(output=str(run), training=dataclasses.replace(config, lr=0.02)), accelerator, free=free)
    assert upgrade_config({"num_processes": 2, "ddpm": {"training": old}})["ddpm"]["training"]["micro_batch_size"] == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch", "training.batch_size"),
        ("accumulate", "training.micro_batch_size"),
        ("workers", "training.num_workers"),
        ("clip_norm", "training.grad_clip"),
        ("min_lr_ratio", "training.min_lr"),
        ("validate_every", "training.evaluation.every"),
        ("checkpoint_every", "training.checkpoint.every"),
    ],
)
def test_an_old_key_names_the_new_one(old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = command(Request, lambda config: 0, prog="stage")
    assert main(["--output", str(tmp_path), f"--training.{old}", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"training.{old}" in error and new in error and "\n" not in error


def test_the_old_precision_names_the_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = command(Request, lambda config: 0, prog="stage")
    (tmp_path / "old.yaml").write_text("training:\n  precision: no\n")
    for words in (["--training.precision", "no"], [str(tmp_path / "old.yaml")]):
        assert main([*words, "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip()
        assert "training.precision" in error and "fp32" in error and "\n" not in error


def test_noise_does_not_depend_on_the_number_of_ranks() -> None:
    whole = StepRandom(1, 5).normal(6, 2)
    halves = [StepRandom(1, 5, rank=r, world_size=2).normal(3, 2) for r in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    assert not torch.equal(StepRandom(1, 6).normal(6, 2), whole)


def test_only_trainables_are_averaged_and_loaded_strictly() -> None:
    module = Regressor()
    ema = EMA(trainables(module), 0.5)
    assert set(ema.shadow) == {"layer.weight", "layer.bias"}
    with pytest.raises(RequestError, match=r"of this model differ: layer[.]bias"):
        load_trainables(module, {"layer.weight": module.layer.weight})


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(RequestError, match="num_processes is 2, but 1 process was started"):
        make_accelerator(num_processes=2, device="cpu")


def test_warm_up_then_cosine() -> None:
    config = TrainingConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    assert config.lr_at(0) == pytest.approx(0.1) and config.lr_at(10) == pytest.approx(1.0)
    assert config.lr_at(60) == pytest.approx(0.55) and config.lr_at(110) == pytest.approx(0.1)
    assert TrainingConfig(steps=100, warmup=0.1, lr=1.0).lr_at(4) == pytest.approx(0.5)


def test_subnormal_numbers_are_zero_only_inside_the_block() -> None:
    tiny = torch.tensor(1e-40)
    assert tiny * 1 != 0
    with flush_subnormals():
        assert tiny * 1 == 0
        with flush_subnormals():
            assert tiny * 1 == 0
        assert tiny * 1 == 0
    assert tiny * 1 != 0
