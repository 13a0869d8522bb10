"""Spread of the metrics over models that were trained with different seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import check_group, check_list, check_text
from finetune.evaluation.generated import GeneratedSet

ONE_RUN = "not applicable: one training run; give the evaluated images of runs with other seeds as --training_seeds"
_SAME = ("kind", "dataset_id", "split", "steps", "guidance_scale", "sampler", "average_repeats", "labels")
"""Entries of generated.json that must be equal for all runs."""


def measure_training_seeds(
    own: GeneratedSet, result: Mapping[str, Any], folders: Sequence[str | Path]
) -> dict[str, Any] | str:
    """Compute mean and spread of each metric over models that were trained with different seeds.

    Parameters
    ----------
    own : GeneratedSet
        The evaluated images.
    result : mapping
        Result of the evaluation of `own`, with the keys ``generated`` and ``classifier``.
    folders : sequence of str or Path
        Folders with the images of other training runs, which `dreamscale evaluate` has evaluated.

    Returns
    -------
    dict or str
        ``runs``: number of training runs, including `own`. ``metrics``: for each metric that all runs have, ``values``
        (`own` first), ``mean``, ``std`` (with the divisor runs - 1), ``least`` (the smallest value) and ``most`` (the
        largest value). If there is only one run, the result is a text that says so.

    Raises
    ------
    RequestError
        If a folder was not evaluated, or was evaluated with another classifier. Also if the trials, data or settings of
        a folder differ from those of `own`, if its images are control images, or if two folders hold images of the same
        model.
    """
    if not folders:
        return ONE_RUN
    digests = {str(own.about.get("model_digest"))}
    found = [_take_numbers(result["generated"])]
    for folder in folders:
        about, evaluated = _read(Path(folder))
        _check(own, about, folder)
        where = f"{folder}/generated.json"
        digest = check_text(about.get("model_digest"), where, "model_digest")
        if digest in digests:
            raise RequestError(
                f"{folder}: holds images of the same model as another given folder; give one folder for each model"
            )
        digests.add(digest)
        where = f"{folder}/metrics.json"
        classifier = check_group(evaluated.get("classifier"), where, "classifier")
        if classifier.get("sha256") != result["classifier"]["sha256"]:
            raise RequestError(
                f"{folder}: was judged by another classifier than {own.path}, so the accuracies cannot be compared; "
                f"evaluate this folder again with --classifier {own.path / 'classifier.safetensors'}"
            )
        found.append(_take_numbers(check_group(evaluated.get("generated"), where, "generated")))
    names = [name for name in found[0] if all(name in numbers for numbers in found)]
    return {"runs": len(found), "metrics": {name: _summarise([numbers[name] for numbers in found]) for name in names}}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read generated.json and metrics.json of a folder."""
    found = []
    for name, stage in (("generated.json", "dreamscale generate"), ("metrics.json", f"dreamscale evaluate {folder}")):
        path = folder / name
        if not path.is_file():
            raise RequestError(f"{path}: no such file; run '{stage}' first")
        found.append(check_group(read_json(path), str(path)))
    return found[0], found[1]


def _check(own: GeneratedSet, about: dict[str, Any], folder: str | Path) -> None:
    """Check that the images in a folder were generated for the same trials and with the same settings as `own`."""
    where = f"{folder}/generated.json"
    if about.get("control") != "none":
        raise RequestError(
            f"{folder}: holds images of a control; give a folder of images that were generated from the trials' own EEG"
        )
    for name in _SAME:
        if about.get(name) != own.about.get(name):
            raise RequestError(
                f"{folder}: {name} is {show(repr(about.get(name)))}, but {show(repr(own.about.get(name)))} in "
                f"{own.path}; generate the images of all runs with the same settings"
            )
    trials = check_list(about.get("trials"), where, "trials")
    keys = [check_group(trial, where, "a trial").get("key") for trial in trials]
    if keys != [trial["key"] for trial in own.trials]:
        raise RequestError(
            f"{folder}: the images belong to other trials than the images in {own.path}; generate both folders for the "
            "same trials"
        )


def _take_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, and the entry "accuracy" of the metrics that are dictionaries."""
    found = {}
    for name, value in metrics.items():
        number = value.get("accuracy") if isinstance(value, dict) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and np.isfinite(number):
            found[name] = float(number)
    return found


def _summarise(values: list[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1))
    return {"values": values, "mean": float(np.mean(values)), "std": spread, "least": min(values), "most": max(values)}
