"""The demo's figures: examples, loss curves and the picture for the README."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

INK, GREY = "#22303c", "#8d99a6"
TRAINING, HELD_OUT = "#2a6f97", "#d1495b"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    list of dict
        Its lines.
    """
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def curves(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Collect the loss curves of a stage.

    Parameters
    ----------
    folder : Path
        Its run directory, which may hold further ones.

    Returns
    -------
    dict
        Name of the run to name of the curve to its points.
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


def draw_curves(folders: list[Path], path: Path) -> None:
    """Draw the loss curves of the stages, a panel a run.

    Parameters
    ----------
    folders : list of Path
        Run directories.
    path : Path
        PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: lines for folder in folders for name, lines in curves(folder).items()}
    figure = Figure(figsize=(3.4 * max(1, len(panels)), 2.8), constrained_layout=True)
    FigureCanvasAgg(figure)
    for index, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for label, points in lines.items():
            held_out = label.startswith("val")
            style: dict[str, Any] = {"color": TRAINING, "label": "training"}
            if held_out:
                style = {"color": HELD_OUT, "label": "held out", "marker": "o"}
            axes.plot(*zip(*points, strict=True), lw=1.5, ms=3, **style)
        axes.set_title(name.replace("_", " "), color=INK, fontsize=10)
        axes.set_xlabel("step", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture.

    Parameters
    ----------
    path : Path
        PNG.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        RGB.
    """
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def draw_overview(
    columns: list[tuple[str, list[Path]]], reconstruction: Path, path: Path, *, title: str, footer: str
) -> None:
    """Draw what was seen beside what was generated, and the reconstruction below.

    Parameters
    ----------
    columns : list of (str, list of Path)
        Heading and pictures; every list has one picture a trial.
    reconstruction : Path
        Pretraining's figure.
    path : Path
        PNG to write.
    title, footer : str
        Above and below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(columns[0][1])
    below = read_picture(reconstruction)
    width = 12.0
    below_height = width * below.shape[0] / below.shape[1]
    cell = (width - 1.6) / count
    top = cell * len(columns) + 0.4
    figure = Figure(figsize=(width, top + below_height + 0.7), facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", va="center", fontsize=15, color=INK)
    for row, (heading, pictures) in enumerate(columns):
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
