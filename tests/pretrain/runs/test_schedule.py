"""Tests of the learning-rate schedule of pretraining and fine-tuning."""

from __future__ import annotations

import math

import pytest

from pretrain.runs.schedule import check_schedule, learning_rate, warmup_steps


def test_warmup_is_a_number_of_steps_or_a_fraction() -> None:
    assert [warmup_steps(warmup, 200) for warmup in (0, 0.1, 0.5, 1, 50)] == [0, 20, 100, 1, 50]
    for step in range(200):
        settings = {"lr": 1e-3, "min_lr": 1e-5}
        assert learning_rate(step, 200, warmup=0.1, **settings) == learning_rate(step, 200, warmup=20, **settings)


def test_rises_in_a_line_then_falls_along_half_a_cosine() -> None:
    rates = [learning_rate(step, 110, lr=2.0, min_lr=0.5, warmup=10) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.25)
    assert rates[110] == 0.5
    assert rates[35] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 4)))


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert learning_rate(9, 10, lr=1.0, min_lr=0.0, warmup=50) == 0.2


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"warmup": 1.5}, "warmup"), ({"warmup": -1}, "warmup"), ({"lr": 0.0}, "lr"), ({"min_lr": 2.0}, "min_lr")],
)
def test_bad_values_are_named(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key} is"):
        check_schedule("optimizer.", **({"lr": 1.0, "min_lr": 0.0, "warmup": 0} | settings))
