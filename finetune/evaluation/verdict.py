"""Show the verdict of `pretrain.evidence.rules` in reports."""

from __future__ import annotations

from typing import Any

from data_sharding.common.html.render import Cell, Table
from pretrain.evidence.rules import CONTROLS

OTHER_SCORES = {
    "own": "the model's score with the right EEG",
    "chance": "the score by chance",
    "identification": "the share of other images of the same category that are less similar than the seen image",
}
"""Names of scores that are no controls, and their meaning."""


def _percent(value: float | None, sign: str = "") -> Cell:
    return Cell(text="" if value is None else f"{value:{sign}.1%}", is_number=True)


def _interval(interval: list[float] | tuple[float, float] | None) -> Cell:
    return Cell(text="" if interval is None else f"{interval[0]:+.1%} to {interval[1]:+.1%}", is_number=True)


def make_comparison_table(verdict: dict[str, Any]) -> Table:
    """Make the table of all comparisons that led to a verdict.

    Parameters
    ----------
    verdict : dict
        Result of `pretrain.evidence.rules.Verdict.as_json`.

    Returns
    -------
    Table
        One row for each comparison.
    """
    rows = []
    for found in verdict["comparisons"]:
        more = found["difference"]
        rows.append(
            [
                found["name"],
                Cell(text=f"{found['n']:,}", is_number=True),
                _percent(found["left"]),
                _percent(found["right"]),
                _percent(more["mean"], "+"),
                _interval(more["over_images"]),
                _interval(more["over_people"]),
                f"{_interval(more['interval']).text} ({more['decides']})",
                Cell(text=f"{found['p_corrected']:.2g}", is_number=True),
                "yes" if found["holds"] else "no",
                _find_need(found),
            ]
        )
    intervals = ["over images", "over people", "deciding"]
    head = ["A - B", "trials", "A", "B", "difference", *intervals, "p (Holm)", "A is better", "signal needs"]
    return Table(head=head, rows=rows)


def _find_need(comparison: dict[str, Any]) -> str:
    """Return what the column "A is better" must say for the verdict *signal*."""
    if comparison["question"] == "signal" or comparison["name"] == "identification - chance":
        return "yes"
    # Eye channels may hold a response to the picture, so the predictor `eyes` may be better than chance if the model is
    # better than `eyes`. Only for new concepts (categories without training images), the model must be better than
    # `nearest` (the nearest training image).
    return {"eyes - chance": "no, or own - eyes: yes", "own - nearest": "yes for new concepts"}.get(
        comparison["name"], "no"
    )


def explain_comparisons(verdict: dict[str, Any]) -> str:
    """Explain the names in the table of all comparisons that led to a verdict.

    Parameters
    ----------
    verdict : dict
        Result of `pretrain.evidence.rules.Verdict.as_json`.

    Returns
    -------
    str
        Sentences for a report; empty if no comparison was made.
    """
    names = {part for found in verdict["comparisons"] for part in found["name"].split(" - ")}
    meanings = [f"{name}: {meaning}" for name, meaning in (OTHER_SCORES | CONTROLS).items() if name in names]
    if not meanings:
        return ""
    return (
        "Each row compares two scores, A and B, of the same trials. The intervals are 95 % intervals of the "
        "difference: over images, over people, and, under 'deciding', the one that the verdict uses (in brackets: what "
        "its bootstrap draws). A is better only if the deciding interval lies above 0 and p is small enough. "
        + "; ".join(meanings)
        + "."
    )
