"""Tests of how a training counts its work and its time between two lines of metrics."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.flops import batch_flops, training_flops
from pretrain.runs.distributed import World
from pretrain.training.config import PretrainConfig
from pretrain.training.throughput import Throughput


def small(tokenizer: Any, **more: Any) -> PretrainConfig:
    encoder = EncoderConfig(tokenizer=tokenizer, samples=64, patch=16, dim=16, depth=1, heads=2, mlp_ratio=1.0)
    model = MaskedAutoencoderConfig(encoder=encoder, decoder=DecoderConfig(dim=8, depth=1, heads=2))
    return PretrainConfig(dataset="none", output="none", batch_size=2, model=model, **more)


@pytest.mark.parametrize("tokenizer", ["temporal", "montage"])
def test_operations_are_counted_before_the_first_step(tokenizer: str) -> None:
    training_flops.cache_clear()
    config = small(tokenizer, peak_tflops=1.0)
    throughput = Throughput(config, World())
    counted = training_flops.cache_info().misses
    assert counted
    batch: Any = SimpleNamespace(channels=[19, 64])
    throughput.add(batch, 0.5)
    assert training_flops.cache_info().misses == counted
    assert throughput._flops == batch_flops(config.model, [19, 64])


def test_pauses_do_not_count_and_waiting_does() -> None:
    throughput = Throughput(small("temporal"), World())
    batch: Any = SimpleNamespace(channels=[19, 64])
    with throughput.waiting_for_data():
        time.sleep(0.05)
    throughput.add(batch, 0.5)
    throughput.add(batch, float("nan"))
    with throughput.paused():
        time.sleep(1.0)
    rates = throughput.rates()
    # Waiting 0.05 s for data counts as time of the four windows, so the rate is below 80 windows per second. The pause
    # of 1 s does not count, so the rate is above 4.
    assert 4 < rates["samples_per_s"] < 80
    assert rates["tokens_per_s"] == pytest.approx(4 * rates["samples_per_s"])
    assert rates["mfu"] is None
    assert 0.05 <= rates["data_stall_s"] < 1
    assert throughput.losses == [0.5, None] and math.isnan(throughput.loss)


def test_a_resumed_run_does_not_count_the_time_before() -> None:
    throughput = Throughput(small("temporal"), World())
    throughput.reset(3, [1.0, 2.0, 3.0])
    batch: Any = SimpleNamespace(channels=[19, 64])
    throughput.add(batch, 4.0)
    time.sleep(0.1)
    assert throughput.loss == 2.5
    assert throughput.rates()["samples_per_s"] < 2 / 0.1
