"""Write the report of an evaluation: examples of generated images and images that the person saw, and all metrics.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.html.render import Cell, Picture, Table, embed_png, render_page
from finetune.evaluation.generated import GeneratedSet
from finetune.evaluation.verdict import explain_comparisons, make_comparison_table

TEMPLATE = Path(__file__).with_name("report.html.j2")
PUBLISHED = (
    ("Brain2Image", None, 18.76, 5.06, 12.8, 0.213, 0.701),
    ("DreamDiffusion", 0.458, 3.61, 28.54, 14.6, 0.267, 0.644),
)
"""Results on EEG-ImageNet, as printed by Bai et al., "DreamDiffusion", arXiv 2306.16934, for one person (subject 4):
model, 50-way top-1 accuracy, FID, Inception Score, PSNR, SSIM and LPIPS. None stands for a missing value."""
MISSING = "-"
"""Text that a table shows in place of a missing value."""


def _to_picture(image_HW3: np.ndarray, text: str, caption: str) -> Picture:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return Picture(url=embed_png(buffer.getvalue()), text=text, caption=caption)


def _metric_cell(value: Any) -> Cell:
    """Format the value of a metric: a number, a text, or an accuracy with its confidence interval and its p-value."""
    if isinstance(value, dict) and "accuracy" in value:
        text = f"{value['accuracy']:.3f}"
        if "interval" in value:
            text += f" [{value['interval'][0]:.2f}, {value['interval'][1]:.2f}]"
        if "p_value" in value:
            text += f"\np = {value['p_value']:.2g}"
        return Cell(text=text, is_number=True)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(text=f"{value:.3f}", is_number=True)
    return Cell(text=MISSING if value is None else str(value), is_number=True)


def _is_not_computed(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("not computed")


def _make_metric_table(result: dict[str, Any]) -> Table:
    controls = {name: found for name, found in result["controls"].items() if isinstance(found, dict)}
    other = result["other_real"]["metrics"] if isinstance(result["other_real"], dict) else None
    columns = [
        result["generated"],
        result["shuffled"],
        *controls.values(),
        result["random_pairs"],
        other,
        result["real"],
    ]
    rows = [
        [name, *(_metric_cell(column.get(name) if isinstance(column, dict) else None) for column in columns)]
        for name, value in result["generated"].items()
        if name not in ("confusion", "frechet_note") and not _is_not_computed(value)
    ]
    head = ["metric", "generated", "EEG shuffled", *controls, "random other image", "other real images", "real images"]
    return Table(head=head, rows=rows)


def _make_seed_table(found: dict[str, Any]) -> Table:
    """Make a table with the mean and the spread of each metric over models that were trained with different seeds."""
    rows = [
        [name, *(_metric_cell(values[key]) for key in ("mean", "std", "least", "most"))]
        for name, values in found["metrics"].items()
    ]
    return Table(head=["metric", "mean", "standard deviation", "lowest", "highest"], rows=rows)


def choose_trials(labels_B: np.ndarray, examples: int) -> list[int]:
    """Choose the trials whose images are shown, spread evenly over the categories and without regard to quality.

    Parameters
    ----------
    labels_B : ndarray of int, shape (B,)
        Category of each trial.
    examples : int
        Largest number of trials to choose.

    Returns
    -------
    list of int
        Indices of the chosen trials, sorted by category.
    """
    classes = np.unique(labels_B)
    each = max(1, examples // len(classes))
    chosen: list[int] = []
    for label in classes[:examples]:
        numbers = np.flatnonzero(labels_B == label)
        places = np.linspace(0, len(numbers) - 1, min(each, len(numbers))).round().astype(int)
        chosen += numbers[np.unique(places)].tolist()
    return chosen


def _describe_origin(result: dict[str, Any], generated: GeneratedSet) -> list[list[Any]]:
    """Describe the model and the data in table rows: each row has a name and a value."""
    about = generated.about
    sampling = ", ".join(f"{key} {value}" for key, value in result["sampling"].items() if value is not None)
    cards = [
        ("model", f"{result['kind']}, {about.get('model', MISSING)}"),
        ("checksum of the model", about.get("model_digest") or MISSING),
        ("sampling", sampling),
        ("dataset", Path(about["dataset"]).name),
        ("id and version of the dataset", f"{result['dataset_id']}, version {about.get('dataset_version', MISSING)}"),
        ("images of the training split", result["classifier"]["trained_on"]["images"]),
        ("people, images and trials of this split", f"{result['subjects']}, {result['images']}, {result['trials']}"),
        ("judge of categories", result["classifier"]["name"]),
        ("checksum of the judge", result["classifier"].get("sha256", MISSING)),
    ]
    return [[what, str(value)] for what, value in cards]


def _share_cell(value: float | None) -> Cell:
    return Cell(text=MISSING if value is None else f"{value:.1%}", is_number=True)


def _rank_examples(
    generated: GeneratedSet, control: GeneratedSet | None, similarity_B: np.ndarray | None, each: int = 6
) -> list[tuple[str, list[list[Picture]]]]:
    """Return pictures of the trials whose generated image is most, moderately or least similar to the seen image."""
    if similarity_B is None:
        return []
    order = np.argsort(-np.nan_to_num(similarity_B, nan=-np.inf), kind="stable")
    middle = max(0, len(order) // 2 - each // 2)
    parts = {"best": order[:each], "median": order[middle : middle + each], "worst": order[::-1][:each]}
    return [(name, _make_examples(generated, control, part.tolist())) for name, part in parts.items()]


def _make_examples(generated: GeneratedSet, control: GeneratedSet | None, numbers: list[int]) -> list[list[Picture]]:
    """Return the pictures of some trials: the image that the person saw, the generated image, and the control image."""
    chosen = []
    for number in numbers:
        trial = generated.trials[number]
        label = f"{generated.about['labels'][trial['label']]} ({trial['subject']})"
        images = {"seen": generated.real_BHW3[number], "generated": generated.images_BHW3[number]}
        if control is not None:
            images["generated from shuffled EEG"] = control.images_BHW3[number]
        chosen.append([_to_picture(image, f"{label}, {name}", label) for name, image in images.items()])
    return chosen


def render_report(
    result: dict[str, Any],
    generated: GeneratedSet,
    control: GeneratedSet | None,
    *,
    examples: int,
    similarity_B: np.ndarray | None = None,
) -> str:
    """Render the report as HTML.

    Parameters
    ----------
    result : dict
        Content of metrics.json.
    generated : GeneratedSet
        Generated images and the images that the person saw.
    control : GeneratedSet or None
        Images that were generated from shuffled EEG; None if there are no such images.
    examples : int
        Largest number of trials whose images are shown.
    similarity_B : ndarray, shape (B,), optional
        Similarity of each generated image to the image that the person saw. The trials with the largest, the middle and
        the smallest similarity are shown.

    Returns
    -------
    str
        HTML page that needs no other files.
    """
    labels, found = result["labels"], result["generated"]
    memory = result["memorisation"]
    quartiles = ("quartile_1", "median", "quartile_3")
    return render_page(
        TEMPLATE,
        kind=result["kind"],
        split=result["split"],
        n_trials=result["trials"],
        n_subjects=result["subjects"],
        n_images=result["images"],
        n_images_in_train=result["images_also_in_train"],
        repeats=generated.describe_repeats(),
        accuracy=next(value for name, value in found.items() if name.startswith("accuracy[")),
        has_control=control is not None,
        verdict=result["verdict"],
        comparisons=make_comparison_table(result["verdict"]),
        comparison_note=explain_comparisons(result["verdict"]),
        protocol=result["protocol"],
        origin=Table(head=["what", "value"], rows=_describe_origin(result, generated)),
        published=Table(
            head=["model", "50-way top-1", "FID", "IS", "PSNR", "SSIM", "LPIPS"],
            rows=[[name, *(MISSING if value is None else value for value in values)] for name, *values in PUBLISHED],
        ),
        missing_controls=[(n, found) for n, found in result["controls"].items() if isinstance(found, str)],
        people=Table(
            head=["person", "trials", "right", "right, EEG shuffled"],
            rows=[
                [name, found["trials"], *(_share_cell(found[key]) for key in ("accuracy", "shuffled"))]
                for name, found in result["by_person"].items()
            ],
        ),
        examples=_make_examples(generated, control, choose_trials(generated.labels_B, examples)),
        ranked=_rank_examples(generated, control, similarity_B),
        metrics=_make_metric_table(result),
        other_real=result["other_real"],
        ceiling=result["noise_ceiling"],
        seeds=result["training_seeds"],
        seed_table=_make_seed_table(result["training_seeds"]) if isinstance(result["training_seeds"], dict) else None,
        frechet_note=found["frechet_note"],
        classifier=result["classifier"],
        not_computed=[(name, value) for name, value in found.items() if _is_not_computed(value)],
        confusion=None
        if isinstance(found["confusion"], str)
        else Table(
            head=["seen / found", *labels],
            rows=[[name, *row] for name, row in zip(labels, found["confusion"], strict=True)],
            limit=len(labels),
        ),
        distance=memory["measure"],
        distances=Table(
            head=["images", "first quartile", "median", "third quartile"],
            rows=[
                [name, *(Cell(text=f"{memory[key][q]:.1f}", is_number=True) for q in quartiles)]
                for name, key in (("generated", "generated"), ("real, of this split", "real"))
            ],
        ),
    )
