"""Draw plots of a fine-tuning run."""

from __future__ import annotations

from pathlib import Path

from pretrain.runs.directory import RunDirectory


def plot_losses(run: RunDirectory, path: Path, columns: list[str]) -> None:
    """Plot metrics of a run over its steps.

    Parameters
    ----------
    run : RunDirectory
        Directory of the run.
    path : Path
        PNG file to write.
    columns : list of str
        Names of the metrics, e.g. ``train/loss``. Metrics that the run does not have are left out.
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
