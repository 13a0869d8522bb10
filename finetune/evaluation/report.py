"""The page that shows what was generated beside what was seen, and the numbers with their controls."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import numpy as np

from finetune.evaluation.generated import GeneratedSet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } td.note { color: #777; }
.grid { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; }
figure img { display: block; width: 72px; height: 72px; image-rendering: pixelated; }
figcaption { font-size: .75rem; color: #555; text-align: center; }
.key { color: #555; font-size: .9rem; }
"""


def _png(image_HW3: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _number(value: Any) -> str:
    if isinstance(value, dict) and "accuracy" in value:
        text = f"{value['accuracy']:.3f}"
        if "interval" in value:
            text += f" [{value['interval'][0]:.2f}, {value['interval'][1]:.2f}]"
        return text + (f"<br>p = {value['p_value']:.2g}" if "p_value" in value else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "&ndash;" if value is None else escape(str(value))
    return f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _metric_rows(result: dict[str, Any]) -> list[list[str]]:
    columns = [result["generated"], result["shuffled"], result["random_pairs"], result["real"]]
    rows = []
    for name, value in result["generated"].items():
        if name in ("confusion", "frechet_note") or (isinstance(value, str) and value.startswith("not computed")):
            continue
        rows.append([escape(name), *(_number(c.get(name)) if isinstance(c, dict) else "&ndash;" for c in columns)])
    return rows


def chosen_trials(labels_B: np.ndarray, examples: int) -> list[int]:
    """Trials to show: evenly from all categories, without a look at the images.

    Parameters
    ----------
    labels_B : ndarray of int, shape (B,)
        Categories of the trials.
    examples : int
        How many at most.

    Returns
    -------
    list of int
        Numbers of the trials, category by category.
    """
    classes = np.unique(labels_B)
    each = max(1, examples // len(classes))
    out: list[int] = []
    for label in classes[:examples]:
        numbers = np.flatnonzero(labels_B == label)
        places = np.linspace(0, len(numbers) - 1, min(each, len(numbers))).round().astype(int)
        out += numbers[np.unique(places)].tolist()
    return out


def write_report(result: dict[str, Any], own: GeneratedSet, control: GeneratedSet | None, *, examples: int) -> str:
    """Compose the page.

    Parameters
    ----------
    result : dict
        What metrics.json holds.
    own : GeneratedSet
        The generated images.
    control : GeneratedSet or None
        Those from shuffled EEG.
    examples : int
        Trials to show.

    Returns
    -------
    str
        HTML that needs no other file.
    """
    labels = result["labels"]
    figures = []
    for number in chosen_trials(own.labels_B, examples):
        trial = own.trials[number]
        stack = [own.real_BHW3[number], own.images_BHW3[number]]
        stack += [control.images_BHW3[number]] if control is not None else []
        tags = "".join(f'<img alt="" src="data:image/png;base64,{_png(image)}">' for image in stack)
        figures.append(f"<figure>{tags}<figcaption>{escape(labels[trial['label']])}</figcaption></figure>")
    accuracy = next(value for name, value in result["generated"].items() if name.startswith("accuracy["))
    held = result["classifier"]["held_out"]
    judge = (
        f"Judge: {escape(result['classifier']['name'])}, trained on {result['classifier']['trained_on']['images']} "
        f"real training images; on {held['n']} real held-out images its accuracy is {_number(held['accuracy'])}."
    )
    confusion = result["generated"]["confusion"]
    missing = [
        f"{escape(name)}: {escape(value)}"
        for name, value in result["generated"].items()
        if isinstance(value, str) and value.startswith("not computed")
    ]
    confusion_rows = [[escape(name), *map(str, row)] for name, row in zip(labels, confusion, strict=True)]
    memory = result["memorisation"]
    memory_rows = [
        [name, *(f"{memory[key][q]:.1f}" for q in ("quartile_1", "median", "quartile_3"))]
        for name, key in (("generated", "generated"), ("real, of this split", "real"))
    ]
    rows = "what was seen, what was generated" + (", and what shuffled EEG gave" if control is not None else "")
    leak = result["images_also_in_train"]
    warning = f"<p><b>{leak} of the images were also in the training split.</b></p>" if leak else ""
    note = result["generated"]["frechet_note"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Dreamscale: generated images</title>
<style>{STYLE}</style></head><body>
<h1>Images from EEG: {escape(str(result["kind"]))}, split {escape(result["split"])}</h1>
<p>{result["trials"]} trials of {result["subjects"]} subjects and {result["images"]} images. The category is right in
<b>{accuracy["accuracy"]:.1%}</b> of them (chance {accuracy["chance"]:.1%}, p = {accuracy["p_value"]:.2g}, labels
permuted between images).</p>{warning}
<h2>Examples</h2>
<p class="key">From top to bottom: {rows}. Chosen evenly over the categories, not by quality.</p>
<div class="grid">{"".join(figures)}</div>
<h2>Metrics and controls</h2>
{_table(["metric", "generated", "EEG shuffled", "random other image", "real images (ceiling)"], _metric_rows(result))}
<p class="key">In square brackets after a name: the network whose features or classes were used. {escape(note)}</p>
<p class="key">{judge}</p>
<p class="key">{"<br>".join(missing)}</p>
<h2>Confusion</h2>
{_table(["shown / generated", *labels], confusion_rows)}
<h2>Is it copying?</h2>
<p class="key">{escape(memory["measure"])}. Generated images much nearer than real ones would be copies.</p>
{_table(["images", "first quartile", "median", "third quartile"], memory_rows)}
</body></html>
"""
