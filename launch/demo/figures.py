"""Draw the demo's figures: the loss curves, and the overview of pictures for the README."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.untrusted import open_image
from pretrain.runs.metrics import read_metrics

INK, GREY = "#22303c", "#8d99a6"
TRAINING, HELD_OUT = "#2a6f97", "#d1495b"


def read_curves(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read the loss curves of a training run.

    Parameters
    ----------
    folder : Path
        The run directory. It may contain other run directories, such as the runs of both stages of DM-RE2I.

    Returns
    -------
    dict
        For each run, a dictionary from the name of each curve to the points of the curve: (step, loss).
    """
    found = {}
    for file in sorted(folder.rglob("metrics.jsonl")):
        points: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for line in read_metrics(file):
            for key, value in line.items():
                if key.split("/")[-1] in ("loss", "val_loss") and isinstance(value, int | float):
                    points[key].append((line["step"], float(value)))
        run = file.parent
        name = folder.name if run == folder else f"{folder.name}: {run.relative_to(folder)}"
        if points:
            found[name] = dict(points)
    return found


def draw_curves(runs: list[Path], folder: Path) -> dict[str, Path]:
    """Draw the loss curves of the training runs.

    Parameters
    ----------
    runs : list of Path
        Run directories.
    folder : Path
        Folder for the PNG files, one for each run.

    Returns
    -------
    dict
        PNG file of each run, by name of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    panels = {name: lines for run in runs for name, lines in read_curves(run).items()}
    paths = {}
    for name, lines in panels.items():
        # Draw the figure as wide as a phone's screen, so that the text is readable on a phone.
        figure = Figure(figsize=(3.7, 2.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for label, points in lines.items():
            held_out = label.startswith("val")
            style: dict[str, Any] = {"color": TRAINING, "label": "training", "marker": "." if len(points) == 1 else ""}
            if held_out:
                style = {"color": HELD_OUT, "label": "held out", "marker": "o"}
            axes.plot(*zip(*points, strict=True), lw=1.5, ms=3, **style)
        axes.set_xlabel("step", color=INK, fontsize=9)
        axes.set_ylabel("loss", color=INK, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        paths[name] = folder / f"loss_{name.replace(': ', '_').replace('/', '_')}.png"
        figure.savefig(paths[name], dpi=130)
    return {name.replace("_", " "): path for name, path in paths.items()}


def read_picture(path: Path) -> np.ndarray:
    """Read a PNG file as RGB: uint8, shape (H, W, 3)."""
    return np.asarray(open_image(path).convert("RGB"))


def draw_overview(
    rows: list[tuple[str, list[Path]]], reconstruction: Path, path: Path, *, title: str, footer: str
) -> None:
    """Draw the overview: seen pictures at the top, generated pictures below, reconstructed EEG at the bottom.

    Parameters
    ----------
    rows : list of (str, list of Path)
        For each row of the overview: its heading, and the files of its pictures, one for each trial.
    reconstruction : Path
        PNG file with reconstructed EEG, written by the pretraining.
    path : Path
        PNG file to write.
    title, footer : str
        `title` is the text above the pictures; `footer` is the text between the pictures and the reconstructed EEG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(rows[0][1])
    below = read_picture(reconstruction)
    width = 12.0
    below_height = width * below.shape[0] / below.shape[1]
    cell = (width - 1.6) / count
    top = cell * len(rows) + 0.4
    figure = Figure(figsize=(width, top + below_height + 0.7), facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", va="center", fontsize=15, color=INK)
    for row, (heading, pictures) in enumerate(rows):
        bottom = height - 0.6 - cell * (row + 1)
        figure.text(1.5 / width, (bottom + cell / 2) / height, heading, ha="right", va="center", fontsize=10, color=INK)
        for column, picture in enumerate(pictures):
            box = ((1.6 + cell * column) / width, bottom / height, 0.94 * cell / width, 0.94 * cell / height)
            axes = figure.add_axes(box)
            axes.imshow(read_picture(picture), interpolation="nearest")
            axes.set_axis_off()
    figure.text(0.5, (below_height + 0.25) / height, footer, ha="center", va="center", fontsize=10, color=GREY)
    axes = figure.add_axes((0, 0, 1, below_height / height))
    axes.imshow(below)
    axes.set_axis_off()
    figure.savefig(path, dpi=110)
