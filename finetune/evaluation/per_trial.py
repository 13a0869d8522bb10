"""Values of each trial of an evaluation, and the comparison of several models on the same trials.

`dreamscale evaluate` writes the values to ``trials.json``. Neither trials of the same image nor trials of the same
person are independent, so every confidence interval is computed twice: over images and over people (see
`pretrain.evidence.statistics`).

Array shapes: B trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json, write_json
from data_sharding.common.untrusted import check_group, check_list, check_number, check_text
from pretrain.evidence.statistics import FEWEST_SUBJECTS, difference_interval, flip_test

NAME = "trials.json"
"""Name of the file, in the folder of generated images, that holds the values of each trial."""
ACCURACY = "accuracy"
"""Name of the value that is 1 if the classifier finds the right category in the generated image, and 0 if not."""


@dataclass(frozen=True, kw_only=True)
class TrialValues:
    """Metrics of the generated images of one model, with one value of each metric for each trial."""

    keys: list[str]
    """Key of each trial."""
    subjects_B: NDArray[Any]
    """Subject of each trial."""
    images_B: NDArray[Any]
    """Id of the image that the person saw in each trial."""
    values: dict[str, NDArray[np.float64]]
    """Values [B] of each metric. NaN stands for a value that is not finite: the PSNR of two equal images is
    infinite, and the correlation with an image of one colour is undefined."""
    shuffled: dict[str, NDArray[np.float64]]
    """Values [B] of each metric for the images from shuffled EEG; empty if there are no such images."""


def write_trials(
    folder: Path,
    trials: list[dict[str, Any]],
    values: Mapping[str, NDArray[np.float64]],
    shuffled: Mapping[str, NDArray[np.float64]],
) -> None:
    """Write the values of all evaluated trials to the file `NAME` in a folder of generated images.

    Parameters
    ----------
    folder : Path
        Folder of the generated images.
    trials : list of dict
        Entries of generated.json.
    values, shuffled : mapping of str to ndarray, shape (B,)
        Values of the generated images, and values of the images from shuffled EEG, both from `measure.measure`.
    """

    def row(columns: Mapping[str, NDArray[np.float64]], number: int) -> dict[str, float | None]:
        found = {name: float(column[number]) for name, column in columns.items()}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    rows = [
        {
            **{name: trial[name] for name in ("key", "subject", "image_id")},
            "values": row(values, number),
            **({"shuffled": row(shuffled, number)} if shuffled else {}),
        }
        for number, trial in enumerate(trials)
    ]
    write_json(folder / NAME, {"schema": 1, "trials": rows})


def read_trials_file(folder: str | Path) -> TrialValues:
    """Read the values of all trials of an evaluation.

    Parameters
    ----------
    folder : str or Path
        Folder of the generated images.

    Returns
    -------
    TrialValues
        The values.

    Raises
    ------
    RequestError
        If the file is missing or damaged.
    """
    path = Path(folder) / NAME
    where = str(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file; run 'dreamscale evaluate {folder}' first")
    rows = [
        check_group(row, where, "a trial")
        for row in check_list(check_group(read_json(path), where).get("trials"), where, "trials")
    ]
    if not rows:
        raise RequestError(f"{path}: holds no trials; run 'dreamscale evaluate {folder}' again")
    texts = {name: [check_text(row.get(name), where, name) for row in rows] for name in ("key", "subject", "image_id")}

    if len(set(texts["key"])) < len(rows):
        raise RequestError(f"{path}: a trial occurs twice; run 'dreamscale evaluate {folder}' again")

    def columns(part: str) -> dict[str, NDArray[np.float64]]:
        groups = [check_group(row.get(part, {}), where, part) for row in rows]
        if any(group.keys() != groups[0].keys() for group in groups):
            raise RequestError(f"{path}: the trials have different metrics; run 'dreamscale evaluate {folder}' again")
        return {
            show(name): np.array(
                [math.nan if g[name] is None else check_number(g[name], where, show(name)) for g in groups], np.float64
            )
            for name in groups[0]
        }

    return TrialValues(
        keys=texts["key"],
        # In an array of type str, every text would take as much memory as the longest text.
        subjects_B=np.array(texts["subject"], dtype=object),
        images_B=np.array(texts["image_id"], dtype=object),
        values=columns("values"),
        shuffled=columns("shuffled"),
    )


def summarise(
    values_B: NDArray[np.float64],
    images_B: NDArray[Any],
    subjects_B: NDArray[Any],
    *,
    resamples: int,
    seed: int,
    test: bool = False,
) -> dict[str, Any]:
    """Compute the mean of a value or of a difference, with its 95 % intervals over images and over people.

    Parameters
    ----------
    values_B : ndarray, shape (B,)
        Value of each trial, or difference between two models in each trial. Trials with NaN are left out.
    images_B, subjects_B : ndarray of str, shape (B,)
        Image and subject of each trial.
    resamples : int
        Number of bootstrap resamples, and of permutations of the test.
    seed : int
        Seed of the resamples.
    test : bool
        Whether to compute p-values for the hypothesis that the mean is zero.

    Returns
    -------
    dict
        ``mean``: the mean. ``n``, ``images`` and ``people``: numbers of trials, images and people. ``over_images`` and
        ``over_people``: 95 % intervals; None if there are fewer than two images or people. With `test`: ``p_images``
        and ``p_people``, the p-values of `flip_test`; None if there are too few images or people for a test.
    """
    good = np.isfinite(values_B)
    values, images, people = values_B[good], images_B[good], subjects_B[good]
    counts = {"n": len(values), "images": len(set(images.tolist())), "people": len(set(people.tolist()))}
    found: dict[str, Any] = {"mean": float(values.mean()) if len(values) else None, **counts}
    for name, clusters in (("images", images), ("people", people)):
        enough = counts[name] >= 2
        found[f"over_{name}"] = list(difference_interval(values, clusters, resamples, seed)) if enough else None
        if test:
            enough = counts[name] >= (2 if name == "images" else FEWEST_SUBJECTS)
            found[f"p_{name}"] = flip_test(values, clusters, resamples, seed) if enough else None
    return found


def compare_models(
    models: Mapping[str, TrialValues], base: str, *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare models with a base model, paired by trial.

    Parameters
    ----------
    models : mapping of str to TrialValues
        Values of each model.
    base : str
        Name of the model with which all other models are compared.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed of the resamples.

    Returns
    -------
    dict
        For each model and each of its metrics, four results of `summarise`. ``own``: the mean. ``shuffled``: the mean
        with shuffled EEG, or None. ``own_minus_shuffled``: the mean difference between the value with the trial's own
        EEG and the value with shuffled EEG. ``difference``: the mean difference to the base model; None for the base
        model, and for a metric that the base model does not have. ``difference`` uses only the trials that both models
        have.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    number_in_base = {key: number for number, key in enumerate(models[base].keys)}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, model in models.items():
        both = np.array([number for number, key in enumerate(model.keys) if key in number_in_base], np.int64)
        in_base = np.array([number_in_base[model.keys[number]] for number in both], np.int64)
        found[name] = {}
        for metric, values_B in model.values.items():
            clusters = model.images_B, model.subjects_B
            entry: dict[str, Any] = {"own": summarise(values_B, *clusters, **options)}
            entry |= dict.fromkeys(("shuffled", "own_minus_shuffled", "difference"))
            if (control_B := model.shuffled.get(metric)) is not None:
                entry["shuffled"] = summarise(control_B, *clusters, **options)
                entry["own_minus_shuffled"] = summarise(values_B - control_B, *clusters, **options, test=True)
            base_B = models[base].values.get(metric)
            if name != base and base_B is not None:
                more = values_B[both] - base_B[in_base]
                entry["difference"] = summarise(more, *(column[both] for column in clusters), **options, test=True)
            found[name][metric] = entry
    return found
