"""Curves of a fine-tuning run."""

from __future__ import annotations

from pathlib import Path

from pretrain.runs.directory import RunDirectory


def plot_losses(run: RunDirectory, path: Path, columns: list[str]) -> None:
    """Draw curves of metrics.jsonl.

    Parameters
    ----------
    run : RunDirectory
        The run.
    path : Path
        PNG to write.
    columns : list of str
        Metrics to draw, e.g. ``train/loss``; those that are not there are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = run.metrics()
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for column in columns:
        points = [(line["step"], line[column]) for line in lines if line.get(column) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=column)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
