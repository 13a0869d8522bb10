"""Write the report of a retrieval: verdict, scores with controls, and the scores of each person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.html.render import Cell, Table, render_page
from finetune.evaluation.verdict import explain_comparisons, make_comparison_table

PUBLISHED = (
    ("NICE", "15.6 / 42.8", ""),
    ("UBP", "50.9 / 79.7", "12.4 / 33.4"),
    ("CognitionCapturerPro (arXiv 2603.12722)", "61.2 / 90.8", ""),
    ("NeuroBridge (arXiv 2511.06836)", "63.2 / 89.9", ""),
    ("VisualEEGDecoding (AAAI 2026)", "80.0 / 96.9", ""),
    ("SAMGA (arXiv 2604.17782)", "91.3 / 98.8", "34.4 / 64.8"),
)
"""Results on THINGS-EEG2, as printed by their authors. Each entry has the model, and the top-1 / top-5 accuracy in per
cent among 200 images: first within people (the tested person is in the training data), then between people (the tested
person is not). An empty text stands for a missing result."""
TEMPLATE = Path(__file__).with_name("report.html.j2")


def _show(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell(text="", is_number=True)
    return Cell(text=f"{value:.1f}" if name == "rank" else f"{value:.1%}", is_number=True)


def _show_interval(name: str, interval: list[float] | None) -> Cell:
    if interval is None:
        return Cell(text="")
    return Cell(text=" to ".join(_show(name, value).text for value in interval), is_number=True)


def _make_row(name: str, row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        return {"name": name, "reason": row}
    scores = Table(
        head=["score", "own EEG", "over images", "over people", "EEG shuffled", "chance"],
        rows=[
            [
                key,
                _show(key, found["mean"]),
                _show_interval(key, found["over_images"]),
                _show_interval(key, found["over_people"]),
                _show(key, row["shuffled"][key]["mean"]),
                _show(key, found["chance"]),
            ]
            for key, found in row["scores"].items()
        ],
    )
    people = Table(
        head=["person", "in the train split", "trials", *row["scores"]],
        rows=[
            [person, "yes" if found["in_train"] else "no", found["trials"]]
            + [_show(key, found[key]) for key in row["scores"]]
            for person, found in row["by_person"].items()
        ],
    )
    matching, hubness = row["matching"], row["hubness"]
    return {
        "name": name,
        "reason": "",
        "verdict": row["verdict"],
        "counts": f"{row['trials']:,} trials of {row['people']} people; {row['images']:,} images.",
        "scores": scores,
        "people": people,
        "comparisons": make_comparison_table(row["verdict"]),
        "comparison_note": explain_comparisons(row["verdict"]),
        "matching": f"Bipartite matching finds {matching['accuracy']:.1%} of the images (chance "
        f"{matching['chance']:.1%}; {matching['note']}).",
        "hubness": f"Hubness: the most frequent image is among the {hubness['k']} nearest images of "
        f"{hubness['largest']:.1%} of the trials, and {hubness['never']:.1%} of the images are among the nearest "
        f"images of no trial (skewness {hubness['skewness']:.2f}).",
    }


def render_retrieval(result: dict[str, Any]) -> str:
    """Render the report as HTML.

    Parameters
    ----------
    result : dict
        Content of retrieval.json.

    Returns
    -------
    str
        HTML page that needs no other files.
    """
    return render_page(
        TEMPLATE,
        split=result["split"],
        model=result["model"],
        target=result["target"],
        layer="final embedding" if result["layer"] is None else f"hidden layer {result['layer']}",
        openings=result["openings"],
        notes=result["notes"],
        published=Table(head=["model", "within people", "between people"], rows=[list(row) for row in PUBLISHED]),
        rows=[_make_row(name, row) for name, row in result["rows"].items()],
    )
