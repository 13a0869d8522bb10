"""How much arithmetic a training does, and how much its device could do."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pretrain.model.build import build_autoencoder
from pretrain.model.config import ComputeConfig, MaskedAutoencoderConfig

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense, from the makers' data sheets; the first name that is part of the device's wins.
    "B200": {"bf16": 2250.0, "fp32": 75.0},
    "GH200": {"bf16": 989.0, "fp32": 67.0},
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "fp32": 60.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "A800": {"bf16": 312.0, "fp32": 19.5},
    "A40": {"bf16": 149.7, "fp32": 37.4},
    "A10": {"bf16": 125.0, "fp32": 31.2},
    "RTX A6000": {"bf16": 154.8, "fp32": 38.7},
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "RTX 4090": {"bf16": 165.2, "fp32": 82.6},
    "RTX 3090": {"bf16": 71.0, "fp32": 35.6},
    "MI300X": {"bf16": 1307.0, "fp32": 163.4},
}
"""TFLOP/s by name of the device and precision."""


@functools.cache
def training_flops(config: MaskedAutoencoderConfig) -> float:
    """Count the floating-point operations of training on one window.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Shape of the model.

    Returns
    -------
    float
        Three times those of the forward pass's matrix products and convolutions: forward, and backward to inputs and
        weights. What is computed twice to save memory counts once. Counted by PyTorch on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = config.encoder
    with torch.device("meta"):
        # Fixed positions are made on the processor whatever the device.
        model = build_autoencoder(dataclasses.replace(config, compute=ComputeConfig(attention="plain"))).to("meta")
    window: Any = SimpleNamespace(
        numbers=[0], epochs=[0], metas=[{"n": shape.channels, "positions": [None] * shape.channels}]
    )
    inputs = {name: value.to("meta") for name, value in model.prepare(window, 0).items()}
    x_BCT = torch.empty(1, shape.channels, shape.samples, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x_BCT, **inputs)
    return 3.0 * counter.get_total_flops()


def _window_flops(config: MaskedAutoencoderConfig, rows: int) -> float:
    """Operations of a window of which the model reads `rows` rows."""
    if rows == config.encoder.channels:
        return training_flops(config)
    constant, linear, square = _by_channels(config)
    return constant + linear * rows + square * rows * rows


@functools.cache
def _by_channels(config: MaskedAutoencoderConfig) -> tuple[float, float, float]:
    """Polynomial in the true channels: tokens grow with them, and attention with their square."""
    some = (1, 64, 128)
    counts = [
        training_flops(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, channels=n)))
        for n in some
    ]
    constant, linear, square = np.polynomial.Polynomial.fit(some, counts, 2).convert().coef.tolist()
    return constant, linear, square


def batch_flops(config: MaskedAutoencoderConfig, channels: Sequence[int]) -> float:
    """Count the floating-point operations of training on some windows.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Shape of the model.
    channels : sequence of int, [B]
        True channels of each window: the montage tokenizer's arithmetic is of these, the temporal one's of 128 rows
        always.

    Returns
    -------
    float
        Operations, as `training_flops` counts them; those on padding, which is no use to anybody, do not count.
    """
    return math.fsum(_window_flops(config, config.encoder.signal_rows(n)) for n in channels)


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> float | None:
    """Look up what a device can do at most.

    Parameters
    ----------
    device : torch.device
        Where training runs.
    precision : str
        fp32 or bf16.
    override_tflops : float, optional
        TFLOP/s as the user knows them.

    Returns
    -------
    float or None
        FLOP/s; None for processors and devices that `PEAK_TFLOPS` does not know.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an L40 is no L4.
    found = next(
        (v[precision] for known, v in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(known)}\b", name)), None
    )
    return None if found is None else found * 1e12
