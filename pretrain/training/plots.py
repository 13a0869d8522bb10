"""Draw the figures of a pretraining run.

In tensor names, B is the number of windows, C of channels, T of time samples, and N of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_sharding.common.errors import figure_text
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.mixture import Mixture
from pretrain.runs.distributed import World
from pretrain.training.validation import MASK_SEED

INK, TRUE, MADE, SHADE, SOFT = "#22303c", "#8d99a6", "#d1495b", "#eef1f4", "#9cc5d8"


@torch.no_grad()
def plot_reconstruction(
    path: Path, model: Any, dataset: EEGDataset | Mixture, world: World, *, step: int, windows: int = 4
) -> None:
    """Draw the true and the reconstructed signal of some val windows; every process must call this function.

    Parameters
    ----------
    path : Path
        Path of the image; only the first process writes the image.
    model : MaskedAutoencoder
        The model; its weights may be divided among the processes (ZeRO stage 3).
    dataset : EEGDataset or Mixture
        The val split.
    world : World
        The processes of the run.
    step : int
        Number of optimiser steps done, for the title of the figure.
    windows : int
        Number of windows to draw; they are spread evenly over the split.
    """
    numbers = sorted(
        set(np.linspace(0, len(dataset) - 1, min(windows, len(dataset)) + 2).round().astype(int)[1:-1].tolist())
    )
    batch = collate(dataset, numbers)
    x_BCT = model.windows(batch, dataset.spec, world.device)
    shape = model.config.encoder
    prepared = model.prepare(batch, MASK_SEED, training=False)
    inputs = {name: value.to(world.device) for name, value in prepared.items()}
    model.eval()
    made_BNP = model.reconstruct(x_BCT, **inputs).float()
    model.train()
    hidden_BCT = model.hidden_signal(**inputs).cpu().numpy()
    # The montage tokenizer reconstructs only recorded channels, so remove the rows that are padding.
    x_BCT = x_BCT[:, : hidden_BCT.shape[1]]
    if model.config.normalize_targets:
        # The model predicts tokens with mean 0 and variance 1. Scale each predicted token back with the mean and the
        # standard deviation of the true token.
        true_BNP = model.tokenize(x_BCT)
        made_BNP = made_BNP * (true_BNP.var(dim=-1, keepdim=True) + 1e-6).sqrt() + true_BNP.mean(dim=-1, keepdim=True)
    if not world.first:
        return
    made_BCT, true_BCT = model.untokenize(made_BNP).cpu().numpy(), x_BCT.cpu().numpy()
    # Factor that converts the signal back to microvolts.
    uv = np.broadcast_to(dataset.spec.divisor(batch.eeg.float(), model.channels_for_scale(batch)), (len(batch), 1, 1))
    _draw(path, true_BCT * uv, made_BCT * uv, hidden_BCT, batch.metas, dataset, shape.patch, step)


def _draw(
    path: Path,
    true_BCT: np.ndarray,
    made_BCT: np.ndarray,
    hidden_BCT: np.ndarray,
    metas: list[dict[str, Any]],
    dataset: EEGDataset | Mixture,
    patch: int,
    step: int,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 1.2 + 2.15 * len(metas)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(metas), 2, squeeze=False, sharex=True)
    time_T = np.arange(true_BCT.shape[-1]) / dataset.spec.sfreq
    for row, meta in enumerate(metas):
        true_CT, made_CT = true_BCT[row], made_BCT[row]
        # Draw the channels at one quarter and three quarters of the list. Channels are usually ordered from the front
        # of the head to the back, so one channel is from the front and one from the back.
        for column, channel in enumerate((meta["n"] // 4, (3 * meta["n"]) // 4)):
            axis = axes[row][column]
            hidden_T = hidden_BCT[row, channel]
            for start in np.flatnonzero(hidden_T[::patch]) * patch:
                axis.axvspan(
                    time_T[start], time_T[start] + patch / dataset.spec.sfreq, color=SHADE, linewidth=0, zorder=0
                )
            axis.plot(time_T, true_CT[channel], color=TRUE, linewidth=1.1, zorder=2)
            seen = np.where(hidden_T, np.nan, true_CT[channel])
            axis.plot(time_T, seen, color=INK, linewidth=2.4, zorder=3, solid_capstyle="round")
            reconstructed = np.where(hidden_T, made_CT[channel], np.nan)
            axis.plot(time_T, reconstructed, color=MADE, linewidth=1.8, zorder=4)
            fit = _correlation(true_CT[channel][hidden_T], made_CT[channel][hidden_T])
            axis.set_title(
                f"{figure_text(meta['subject'])} · {figure_text(meta['ch_names'][channel])}",
                loc="left",
                fontsize=10,
                color=INK,
                pad=4,
            )
            axis.set_title(f"r = {fit:.2f} where hidden", loc="right", fontsize=9, color=MADE, pad=4)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(TRUE)
            axis.tick_params(colors=INK, labelsize=8, length=3)
            axis.set_xlim(time_T[0], time_T[-1])
            if column == 0:
                axis.set_ylabel("µV", color=INK, fontsize=9)
            if row == len(metas) - 1:
                axis.set_xlabel("seconds", color=INK, fontsize=9)
    handles = [
        Line2D([], [], color=INK, linewidth=2.4, label="shown to the model"),
        Line2D([], [], color=TRUE, linewidth=1.1, label="true signal"),
        Line2D([], [], color=MADE, linewidth=1.8, label="reconstructed by the model"),
        Patch(color=SHADE, label="hidden from the model"),
    ]
    # The figure shows only two channels of each window, so its title gives the median and the quartiles of the
    # correlations of all channels.
    fits = [
        _correlation(true_BCT[row, channel][hidden_BCT[row, channel]], made_BCT[row, channel][hidden_BCT[row, channel]])
        for row, meta in enumerate(metas)
        for channel in range(meta["n"])
    ]
    low, middle, high = np.percentile(fits, [25, 50, 75])
    figure.suptitle(
        f"Held-out EEG, reconstructed from the {1 - hidden_BCT[0, 0].mean():.0%} that the model saw (step {step})\n"
        f"r where hidden, over all {len(fits)} channels of these windows: median {middle:.2f}, "
        f"quartiles {low:.2f} and {high:.2f}",
        color=INK,
        fontsize=13,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white")


def _correlation(a_T: np.ndarray, b_T: np.ndarray) -> float:
    if a_T.std() == 0 or b_T.std() == 0:
        return 0.0
    return float(np.corrcoef(a_T, b_T)[0, 1])


def plot_loss(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Draw the training loss and the held-out loss over the steps.

    Parameters
    ----------
    path : Path
        Path of the image.
    metrics : list of dict
        The lines of metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = np.array([(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]).reshape(-1, 2)
    held = np.array([(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]).reshape(-1, 2)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    if len(train):
        width = max(1, len(train) // 40)
        smooth = np.convolve(train[:, 1], np.ones(width) / width, mode="valid")
        axis.plot(train[:, 0], train[:, 1], color=SOFT, linewidth=1)
        axis.plot(train[width - 1 :, 0], smooth, color="#2a7f9e", linewidth=2, label="training")
    if len(held):
        axis.plot(held[:, 0], held[:, 1], "o-", color=MADE, linewidth=1.6, markersize=4.5, label="held-out")
        axis.annotate(
            f"{held[-1, 1]:.3f}",
            held[-1],
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=MADE,
            fontsize=10,
        )
    axis.set_title("Masked-signal reconstruction error", loc="left", color=INK, fontsize=12)
    axis.set_xlabel("optimiser step", color=INK)
    axis.set_ylabel("mean squared error on hidden tokens", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=SHADE, linewidth=1)
    axis.set_axisbelow(True)
    if len(train) or len(held):
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")
