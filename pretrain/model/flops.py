"""Count the floating-point operations of a training, and look up the peak speed of a device."""

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
    # TFLOP/s for dense matrices, from the makers' data sheets. `peak_flops` uses the first entry that occurs in the
    # name of the device, so "H100 PCIe" must come before "H100".
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
"""Peak speed in TFLOP/s for each device name and each precision."""


@functools.cache
def training_flops(config: MaskedAutoencoderConfig) -> float:
    """Count the floating-point operations of training on one window.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Architecture of the model.

    Returns
    -------
    float
        Number of operations in matrix products and convolutions: three times the number in a forward pass, because a
        backward pass needs twice as many as a forward pass. Operations that activation checkpointing repeats are
        counted once. PyTorch counts the operations on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = config.encoder
    with torch.device("meta"):
        # Although the model is built on the meta device, its fixed position embeddings are on the CPU; `to("meta")`
        # moves them.
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
    """Count the operations of training on one window, if the model reads `rows` rows of the window."""
    if rows == config.encoder.channels:
        return training_flops(config)
    constant, linear, square = _by_channels(config)
    return constant + linear * rows + square * rows * rows


@functools.cache
def _by_channels(config: MaskedAutoencoderConfig) -> tuple[float, float, float]:
    """Fit a polynomial that gives the number of operations for any number of rows; return its three coefficients.

    The number of tokens is proportional to the number of rows, and attention needs operations proportional to the
    square of the number of tokens, so a polynomial of degree 2 is exact.
    """
    some = (1, 64, 128)
    counts = [
        training_flops(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, channels=n)))
        for n in some
    ]
    constant, linear, square = np.polynomial.Polynomial.fit(some, counts, 2).convert().coef.tolist()
    return constant, linear, square


def batch_flops(config: MaskedAutoencoderConfig, channels: Sequence[int]) -> float:
    """Count the floating-point operations of training on several windows.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Architecture of the model.
    channels : sequence of int, [B]
        Number of recorded channels of each window. The montage tokenizer reads only the recorded channels; the temporal
        tokenizer always reads the whole padded window.

    Returns
    -------
    float
        Number of operations, counted as in `training_flops`. Operations on the montage tokenizer's padding tokens are
        not counted.
    """
    return math.fsum(_window_flops(config, config.encoder.signal_rows(n)) for n in channels)


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> float | None:
    """Look up the peak speed of a device.

    Parameters
    ----------
    device : torch.device
        Device of the training.
    precision : str
        Number format of the computation: fp32 or bf16.
    override_tflops : float, optional
        Peak speed in TFLOP/s that the user gives, in place of the speed in the table `PEAK_TFLOPS`.

    Returns
    -------
    float or None
        Peak speed in FLOP/s; None for CPUs and for devices that are not in `PEAK_TFLOPS`.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Compare whole words: the name "L40" contains "L4", but the L40 is another device than the L4.
    found = next(
        (v[precision] for known, v in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(known)}\b", name)), None
    )
    return None if found is None else found * 1e12
