"""Tests of the optimiser's settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.train import main
from pretrain.training.config import OptimizerConfig, PretrainConfig
from pretrain.training.deepspeed_engine import deepspeed_config

from ..conftest import losses, write_config


class TestOptimizer:
    @pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
    def test_base_batch_scales_the_learning_rate(self, rule: Any, factor: float) -> None:
        plain = OptimizerConfig(lr=1e-3, warmup=0.1)
        scaled = OptimizerConfig(lr=1e-3, warmup=0.1, base_batch=64, batch_scaling=rule)
        for step in (0, 9, 10, 50, 99):
            assert math.isclose(scaled.lr_at(step, 100, 256), factor * plain.lr_at(step, 100))
            assert plain.lr_at(step, 100, 256) == plain.lr_at(step, 100)

    def test_the_optimiser_state_can_be_offloaded(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output=str(tmp_path / "a"), zero_stage=2
        )
        assert main([str(config)]) == 0
        assert main([str(config), "--output", str(tmp_path / "b"), "--offload", "optimizer"]) == 0
        np.testing.assert_allclose(losses(tmp_path / "b"), losses(tmp_path / "a"), atol=1e-5)


def test_a_model_with_an_odd_number_of_parameters_has_even_buckets() -> None:
    """DeepSpeed refuses odd buckets at ZeRO stages 1 and 2."""
    config = PretrainConfig(dataset="data", output="run", num_processes=2, batch_size=16, zero_stage=2)
    for parameters in (3, 99_999, 100_001, 70_000_001):
        zero = deepspeed_config(config, parameters=parameters, device=torch.device("cpu"))["zero_optimization"]
        assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"] >= min(parameters, 5e7)
        assert zero["allgather_bucket_size"] % 2 == 0
