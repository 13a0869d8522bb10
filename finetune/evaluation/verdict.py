"""Show the verdict of `pretrain.evidence.rules` in reports."""

from __future__ import annotations

from typing import Any

from data_sharding.common.html.render import Cell, Table


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
                _percent(found["left"]),
                _percent(found["right"]),
                _percent(more["mean"], "+"),
                _interval(more["over_images"]),
                _interval(more["over_people"]),
                Cell(text=f"{found['p_corrected']:.2g}", is_number=True),
                "yes" if found["holds"] else "no",
            ]
        )
    head = ["comparison", "left", "right", "difference", "over images", "over people", "p (Holm)", "larger"]
    return Table(head=head, rows=rows)
