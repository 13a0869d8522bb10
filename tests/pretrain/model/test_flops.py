"""Tests of the number of operations of a model, and of the peak speeds of devices."""

from __future__ import annotations

import pytest
import torch

from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.flops import batch_flops, peak_flops, training_flops


def test_montage_flops_are_those_of_true_channels() -> None:
    def shape(channels: int) -> MaskedAutoencoderConfig:
        encoder = EncoderConfig(
            tokenizer="montage", channels=channels, samples=64, patch=16, dim=16, depth=2, heads=2, mlp_ratio=2.0
        )
        return MaskedAutoencoderConfig(encoder=encoder, decoder=DecoderConfig(dim=8, depth=1, heads=2))

    expected = sum(training_flops(shape(channels)) for channels in (19, 37, 37))
    assert batch_flops(shape(128), [19, 37, 37]) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.5 * 3 * training_flops(shape(128))


def test_flops_are_those_of_the_matrix_products() -> None:
    shape = MaskedAutoencoderConfig(
        encoder=EncoderConfig(channels=8, samples=64, patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0),
        decoder=DecoderConfig(dim=8, depth=1, heads=2, mlp_ratio=2.0),
        mask_ratio=0.5,
    )

    def block(tokens: int, dim: int) -> int:
        # A block has projections to queries, keys, values and output, two products of attention, and an MLP of twice
        # the width.
        return 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim + 2 * tokens * dim * 4 * dim

    forward = 2 * 16 * (8 * 4) * 16 + 2 * block(9, 16) + 2 * 9 * 16 * 8 + block(17, 8) + 2 * 16 * 8 * 32
    assert training_flops(shape) == 3 * forward
    assert batch_flops(shape, [3, 8]) == 2 * training_flops(shape)
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", 2.0) == 2e12


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA L4", 121.0), ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3", 989.0)],
)
def test_a_device_is_recognised_by_whole_words(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == (tflops and tflops * 1e12)
