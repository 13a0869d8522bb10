"""Write the results of an ablation: ``ablation.json``, ``ablation.md`` and ``ablation.png``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_sharding.common.errors import figure_text
from data_sharding.common.files import atomic_write_text, write_json

NAME = "ablation"
MISSING = "-"


def _number(value: float | None, signed: bool = False) -> str:
    return MISSING if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"


def _interval(ends: list[float] | None, signed: bool = False) -> str:
    return MISSING if ends is None else f"[{_number(ends[0], signed)}, {_number(ends[1], signed)}]"


def _difference(found: Mapping[str, Any] | None, over: str) -> str:
    """Format a difference between two variants with its interval and, if there is one, its p-value."""
    if found is None:
        return MISSING
    p = found.get(f"p_{over}")
    return f"{_number(found['mean'], True)} {_interval(found[f'over_{over}'], True)}" + (
        f", p = {p:.2g}" if p is not None else ""
    )


def _text(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def render_markdown(result: Mapping[str, Any]) -> str:
    """Render the tables of an ablation.

    Parameters
    ----------
    result : mapping
        Content of ``ablation.json``.

    Returns
    -------
    str
        Markdown: one table of the variants, and one table for each metric.
    """
    rows, base = result["rows"], result["base"]
    done = {name: row for name, row in rows.items() if row["metrics"]}
    lines = [f"# Ablation: {', '.join(result['stages'])}", ""]
    lines += [f"Images of the {result['split']} split of {_text(result['dataset'])}. Base: {base}.", ""]
    lines += [_row("variant", "what differs", "state", "minutes"), _row("---", "---", "---", "---:")]
    for name, row in rows.items():
        changes = "; ".join(f"{key}: {_text(value)}" for key, value in row["changes"].items()) or "nothing"
        minutes = MISSING if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        lines.append(_row(name, changes, _text(row["state"]), minutes))
    metrics = dict.fromkeys(metric for row in done.values() for metric in row["metrics"])
    for metric in metrics:
        own = next(row["metrics"][metric]["own"] for row in done.values() if metric in row["metrics"])
        lines += ["", f"## {metric}", ""]
        lines += [f"{own['n']} trials, {own['images']} images, {own['people']} people in the first variant.", ""]
        head = ["variant", "own EEG", "shuffled EEG", "own minus shuffled", f"minus {base}, over images"]
        lines += [_row(*head, f"minus {base}, over people", "trials"), _row(*["---"] + ["---:"] * 6)]
        for name, row in done.items():
            if (found := row["metrics"].get(metric)) is None:
                lines.append(_row(name, *[MISSING] * 6))
                continue
            difference = found["difference"]
            cells = [
                f"{_number(found['own']['mean'])} {_interval(found['own']['over_images'])}",
                _number(found["shuffled"]["mean"] if found["shuffled"] else None),
                _difference(found["own_minus_shuffled"], "images"),
                *(_difference(difference, over) for over in ("images", "people")),
                str(difference["n"] if difference else found["own"]["n"]),
            ]
            lines.append(_row(name, *cells))
    lines += [
        "",
        "The brackets hold 95 % bootstrap intervals, for which all trials of an image, or of a person, are drawn "
        "together. The intervals of own EEG and of own minus shuffled are over images. Differences are paired by "
        "trial. The p-values come from a test that flips the signs of whole images or whole people, and are not "
        "corrected for the number of variants. Intervals over few people are too narrow.",
        "",
    ]
    return "\n".join(lines)


def plot_differences(result: Mapping[str, Any], path: Path) -> None:
    """Draw, for each metric, the difference between each variant and the base variant, with intervals.

    Parameters
    ----------
    result : mapping
        Content of ``ablation.json``.
    path : Path
        PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    others = [name for name, row in result["rows"].items() if row["metrics"] and name != result["base"]]
    metrics = list(dict.fromkeys(metric for name in others for metric in result["rows"][name]["metrics"]))
    if not others or not metrics:
        return
    size = (3.2 * len(metrics) + 1.5, 0.45 * len(others) + 1.6)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.axvline(0, color="0.7", linewidth=1)
        for place, name in enumerate(others):
            found = result["rows"][name]["metrics"].get(metric, {}).get("difference")
            if not found or found["mean"] is None:
                continue
            for over, width, colour in (("people", 1.5, "0.6"), ("images", 4.0, "C0")):
                if found[f"over_{over}"]:
                    axis.plot(found[f"over_{over}"], [place, place], color=colour, linewidth=width, zorder=1)
            axis.plot(found["mean"], place, "o", color="black", markersize=4, zorder=2)
        axis.set(xlabel=f"{figure_text(metric)}, minus {figure_text(result['base'])}")
        axis.set_yticks(range(len(others)), [figure_text(name) for name in others])
    axes[0][0].invert_yaxis()
    figure.suptitle("95 % intervals over images (thick) and over people (thin)", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the tables and the figure to the folder of the ablation.

    Parameters
    ----------
    folder : Path
        Folder of the ablation.
    result : mapping
        Mapping with the keys ``stages``, ``base``, ``split``, ``dataset`` and ``rows``. In ``rows``, each variant has
        the keys ``changes``, ``state``, ``seconds`` and ``metrics``. The metrics come from
        `finetune.evaluation.per_trial.compare_models`; they are None for a variant that is not complete.
    """
    write_json(folder / f"{NAME}.json", {"schema": 1, **result})
    atomic_write_text(folder / f"{NAME}.md", render_markdown(result))
    plot_differences(result, folder / f"{NAME}.png")
