"""Tests that compare the plan of a pretraining run with measurements on a small model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_sharding.dataset.dataset import EEGDataset, write_dataset
from pretrain.model.build import build_autoencoder, count_parameters
from pretrain.model.config import ComputeConfig, MaskedAutoencoderConfig
from pretrain.model.flops import training_flops
from pretrain.model.masking import keep_indices
from pretrain.model.presets import PRESETS
from pretrain.plan import GIB, main
from pretrain.training.estimates import activation_bytes, exchanged_bytes, state_bytes, tokens_of

from .conftest import ROOT, environment, write_config

TINY = dataclasses.replace(PRESETS["tiny"], compute=ComputeConfig(attention="sdpa"))


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_bytes(config: MaskedAutoencoderConfig, windows: int) -> int:
    """Return the bytes that autograd keeps between a forward and a backward pass, without the weights."""
    torch.manual_seed(0)
    model = build_autoencoder(config)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        # Storages are counted by address. Keep a reference to each, so that its memory is not used for another tensor.
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(windows, config.encoder.channels, config.encoder.samples)
    keep = keep_indices(0, [0] * windows, list(range(windows)), config.encoder.tokens, config.mask_ratio)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(x, keep).mean()
    assert loss.isfinite()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def test_weights_gradients_and_moments_are_exact() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 128, 128), keep_indices(0, [0, 0], [1, 2], 32, 0.5)).mean().backward()
    optimizer.step()
    planned = state_bytes(count_parameters(model), zero_stage=0, gpus=1, precision="fp32")
    assert planned.weights == nbytes(model.parameters())
    assert planned.gradients == nbytes(p.grad for p in model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned.optimizer == nbytes(moments)


@pytest.mark.parametrize("mask_ratio", [0.1, 0.75])
def test_activations_are_what_autograd_keeps(mask_ratio: float) -> None:
    config = dataclasses.replace(TINY, mask_ratio=mask_ratio)
    measured = kept_bytes(config, 8) / 8
    planned = activation_bytes(config, precision="fp32", checkpointing=False)
    assert 0.9 < measured / planned < 1.1
    # With recomputation, the plan is a little larger than the measurement: the plan also counts the activations of the
    # block that is being recomputed, which `kept_bytes` does not see.
    spared = dataclasses.replace(config, compute=ComputeConfig(attention="sdpa", checkpointing=True))
    measured_spared = kept_bytes(spared, 8) / 8
    planned_spared = activation_bytes(spared, precision="fp32", checkpointing=True)
    assert measured_spared < planned_spared < measured_spared + 0.3 * measured
    assert planned_spared < 0.5 * planned


def test_arithmetic_follows_from_the_shapes() -> None:
    """Count operations by hand: 2 for each weight and token, and 4 for each pair of tokens and each dimension of
    attention."""

    def blocks(dim: int, depth: int, ratio: float, tokens: int) -> float:
        return depth * (2 * tokens * (4 + 2 * ratio) * dim**2 + 4 * tokens**2 * dim)

    encoder, decoder = PRESETS["paper"].encoder, PRESETS["paper"].decoder
    seen, every = tokens_of(PRESETS["paper"])
    assert (seen, every) == (33, 129)
    forward = blocks(encoder.dim, 24, 4.0, seen) + blocks(decoder.dim, 8, 4.0, every)
    forward += 2 * 128 * 512 * encoder.dim + 2 * seen * encoder.dim * decoder.dim + 2 * 128 * decoder.dim * 512
    assert training_flops(PRESETS["paper"]) == pytest.approx(3 * forward, rel=1e-3)


def test_each_zero_stage_divides_its_part() -> None:
    size = 302_837_760
    totals = {}
    for stage in range(4):
        one, eight = (state_bytes(size, zero_stage=stage, gpus=n, precision="bf16") for n in (1, 8))
        totals[stage] = eight
        assert one.weights / eight.weights == (8 if stage == 3 else 1)
        assert one.gradients / eight.gradients == (8 if stage >= 2 else 1)
        assert one.optimizer / eight.optimizer == (8 if stage else 1)
    # At stage 3, 8 GPUs share the 18 bytes of each parameter: 2 for the weight, 4 for the gradient, and 12 for the
    # master weight and the moments.
    assert totals[3].weights + totals[3].gradients + totals[3].optimizer == 18 * size / 8
    # If 8 GPUs exchange values in a ring, each GPU sends 7/8 of the bytes. In each step, stage 1 exchanges 4 bytes
    # (gradient) and 2 bytes (weight) for each parameter. Stage 3 exchanges 4 bytes (gradient) and two times 2 bytes
    # (weight) for each parameter in each of the 4 micro batches.
    words: dict[str, Any] = {"gpus": 8, "precision": "bf16", "micro_batches": 4}
    assert exchanged_bytes(size, zero_stage=1, **words) == size * 6 * 7 / 8
    assert exchanged_bytes(size, zero_stage=3, **words) == size * 8 * 4 * 7 / 8
    assert exchanged_bytes(size, zero_stage=2, gpus=1, precision="bf16", micro_batches=4) == 0


ENGINE = """
import gc, torch
from pretrain.runs.distributed import choose_device, import_deepspeed, process_group
from pretrain.model.masking import keep_indices
from pretrain.model.build import build_autoencoder, count_parameters
from pretrain.model.presets import PRESETS

device = choose_device("cpu")
deepspeed = import_deepspeed(device)

def live():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

with process_group(deepspeed, device):
    before = live()
    model = build_autoencoder(PRESETS["tiny"])
    size = count_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters())
    settings = {"train_batch_size": 2, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    settings |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.backward(engine(torch.randn(2, 128, 128), keep_indices(0, [0, 0], [1, 2], 32, 0.5)).mean())
    engine.step()
    print("BYTES", live() - before, size)
"""


def test_deepspeed_holds_what_is_planned() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], env=environment(), text=True, capture_output=True, timeout=120, check=True
    )
    held, size = map(int, next(line for line in done.stdout.splitlines() if line.startswith("BYTES")).split()[1:])
    planned = state_bytes(size, zero_stage=1, gpus=1, precision="bf16")
    # After a step, there are no temporary buffers, so the memory contains only the model's state, the windows and a few
    # numbers.
    assert held == pytest.approx(planned.weights + planned.gradients + planned.optimizer, rel=0.02)


class TestCommand:
    def test_preset(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "plan.json"
        words = ["--preset", "3b", "--gpus", "64", "--batch_size", "6400", "--windows", "10_000_000", "--epochs", "10"]
        assert main([*words, "--output", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "2,991.0M" in shown and "days" in shown and "H200: 989 TFLOP/s" in shown and "this run" in shown
        plan = json.loads(out.read_text())
        assert plan["time"]["steps"] == 15_625
        arithmetic = plan["model"]["training_flops_a_window"] * 6400 / (64 * 989e12 * 0.4)
        assert plan["time"]["arithmetic_s"] == pytest.approx(arithmetic)
        assert plan["time"]["days"] == pytest.approx(15_625 * plan["time"]["step_s"] / 86400)
        rows = {(row["zero_stage"], row["checkpointing"]): row for row in plan["memory"]}
        assert rows[1, False]["total"] > rows[2, False]["total"] > rows[3, False]["total"] > rows[3, True]["total"]
        for row in rows.values():
            # The largest micro batch fits into memory, but one window more does not fit. Of the 140 GiB of an H200, 3
            # GiB are reserved.
            window = row["activations"] / 100
            state = row["total"] - row["activations"]
            assert state + row["largest_micro_batch"] * window <= 137 * GIB
            assert state + (row["largest_micro_batch"] + 1) * window > 137 * GIB

    def test_config_and_what_does_not_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "plan.json"
        config = write_config(tmp_path / "c.yaml", dataset="nowhere", output="x", steps=50, zero_stage=2)
        assert main([str(config), "--output", str(out), "--gpu", "RTX 4090"]) == 0
        plan = json.loads(out.read_text())
        assert plan["time"]["steps"] == 50 and plan["request"]["micro"] == 16
        assert [row["zero_stage"] for row in plan["memory"]] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert all(row["fits"] for row in plan["memory"])
        assert main(["--preset", "3b", "--gpu", "RTX 4090", "--output", str(out)]) == 0
        assert not any(row["fits"] for row in json.loads(out.read_text())["memory"])
        assert "none" in capsys.readouterr().out

    def test_windows_of_a_mixture_are_counted_as_in_training(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        data, small = EEGDataset(unpaired_dataset), tmp_path / "small"
        write_dataset(small, {"train": [data[number] for number in range(5)]}, data.spec)
        config = write_config(
            tmp_path / "c.yaml",
            datasets={str(unpaired_dataset): 1.0, str(small): 1.0},
            output="x",
            steps=None,
            epochs=2.0,
        )
        assert main([str(config), "--output", str(tmp_path / "p.json")]) == 0
        request = json.loads((tmp_path / "p.json").read_text())["request"]
        assert request["windows"] == len(data) + 5
        assert request["steps"] == -(-2 * (len(data) + 5) // 16)

    def test_offloaded_state_is_not_on_the_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = {}
        for offload in ("none", "optimizer", "all"):
            words = ["--preset", "paper", "--gpus", "8", "--offload", offload, "--output", str(tmp_path / "p.json")]
            assert main(words) == 0
            assert (f"offload {offload}" in capsys.readouterr().out) == (offload != "none")
            plan = json.loads((tmp_path / "p.json").read_text())
            rows[offload] = {row["zero_stage"]: row for row in plan["memory"] if not row["checkpointing"]}
        assert rows["optimizer"][2]["optimizer"] == rows["all"][3]["optimizer"] == rows["all"][3]["weights"] == 0
        assert rows["all"][2]["weights"] == rows["none"][2]["weights"] > 0
        assert rows["none"][3]["total"] > rows["optimizer"][3]["total"] > rows["all"][3]["total"]

    def test_utilisation_is_that_of_the_metrics(self, tmp_path: Path) -> None:
        """The user gives the measured utilisation, which recomputation lowers, so the plan must not add time for it
        again."""
        seconds = []
        for again in ("true", "false"):
            words = ["--preset", "paper", "--checkpointing", again, "--output", str(tmp_path / "p.json")]
            assert main(words) == 0
            seconds.append(json.loads((tmp_path / "p.json").read_text())["time"]["step_s"])
        assert seconds[0] == seconds[1]

    def test_montage_counts_true_channels(self, tmp_path: Path) -> None:
        sizes = []
        for channels in ("32", "128"):
            words = ["--preset", "montage", "--channels", channels, "--output", str(tmp_path / "p.json")]
            assert main(words) == 0
            plan = json.loads((tmp_path / "p.json").read_text())
            sizes.append(plan["model"]["tokens"]["decoder"])
        assert sizes == [32 * 16 + 1, 128 * 16 + 1]

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "--preset"),
            (["--preset", "huge"], "'huge' is unknown"),
            (["--preset", "paper", "--gpu", "abacus"], "--peak_tflops"),
            (["--preset", "paper", "--gpus", "3", "--batch_size", "100"], "batch_size"),
            (["--preset", "paper", "--batch_size", "100", "--micro_batch_size", "7"], "micro_batch_size"),
            (["--preset", "paper", "--channels", "32"], "channels"),
            (["--preset", "paper", "--mfu", "1.5"], "mfu"),
            (["--preset", "tiny", "--output", str(ROOT)], "cannot be written"),
            ([str(ROOT / "configs" / "pretrain" / "paper.yaml"), "--preset", "paper"], "either"),
        ],
    )
    def test_bad_requests(self, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and "\n" not in error
