"""Score the generated pictures of the demo: category, colour, and identification of the seen picture.

Array shapes: B trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.classifier import ImageClassifier
from finetune.evaluation.generated import read_generated
from launch.demo.attributes import identify, measure_colour
from pretrain.evidence.statistics import crossed_interval

RESAMPLES = 10_000
MEASURES = {"category": 0.25, "colour": 0.25, "identification": 0.5}
"""The measures, each with its chance level. Among the test pictures, all categories are equally frequent, and all
colours almost equally frequent."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of the pictures in one folder, trial by trial."""

    keys: list[str]
    """Key of each trial."""
    subjects_B: NDArray[np.str_]
    """Person of each trial."""
    images_B: NDArray[np.str_]
    """Id of the seen picture of each trial."""
    new_B: NDArray[np.bool_]
    """Whether the seen picture has a combination of category and colour that no training picture has."""
    values: dict[str, NDArray[np.float64]]
    """For each measure of `MEASURES`, a value from 0 (wrong) to 1 (right) for each trial."""

    def select(self, chosen_B: NDArray[np.bool_]) -> Scores:
        """Return the scores of only the chosen trials."""
        return Scores(
            keys=[key for key, chosen in zip(self.keys, chosen_B, strict=True) if chosen],
            subjects_B=self.subjects_B[chosen_B],
            images_B=self.images_B[chosen_B],
            new_B=self.new_B[chosen_B],
            values={name: values[chosen_B] for name, values in self.values.items()},
        )

    def summarise(self, seed: int) -> dict[str, Any]:
        """Return the mean of each measure, with its 95 % interval from a bootstrap over people and pictures."""
        return {
            name: {
                "mean": float(values_B.mean()),
                "interval": list(crossed_interval(values_B, self.subjects_B, self.images_B, RESAMPLES, seed)),
                "n": len(values_B),
            }
            for name, values_B in self.values.items()
        }

    def by_person(self) -> dict[str, dict[str, float]]:
        """Return the mean of each measure for each person."""
        return {
            str(subject): {name: float(v[self.subjects_B == subject].mean()) for name, v in self.values.items()}
            for subject in np.unique(self.subjects_B)
        }


def score_folder(folder: Path, pictures: dict[str, dict[str, Any]], judge: ImageClassifier) -> Scores:
    """Score the pictures that `dreamscale generate` wrote to a folder.

    Parameters
    ----------
    folder : Path
        Folder with generated.json.
    pictures : dict
        Attributes of each picture by its id, from ``truth.json``.
    judge : ImageClassifier
        Classifier of categories, trained on real training pictures.

    Returns
    -------
    Scores
        Scores of all trials of the folder.
    """
    found = read_generated(folder)
    seen = [pictures[trial["image_id"]] for trial in found.trials]
    ids = [trial["image_id"] for trial in found.trials]
    _, probabilities_BK = judge.judge(found.images_BHW3[:])
    colours = [measure_colour(image) for image in found.images_BHW3[:]]
    return Scores(
        keys=[trial["key"] for trial in found.trials],
        subjects_B=np.array([trial["subject"] for trial in found.trials], dtype=object),
        images_B=np.array(ids),
        new_B=np.array([picture["new_combination"] for picture in seen]),
        values={
            "category": (probabilities_BK.argmax(axis=1) == found.labels_B).astype(float),
            "colour": np.array([float(c == p["colour"]) for c, p in zip(colours, seen, strict=True)]),
            "identification": identify(found.images_BHW3[:], found.real_BHW3[:], ids, [p["category"] for p in seen]),
        },
    )


def compare(own: Scores, control: Scores, seed: int) -> dict[str, Any]:
    """Compare a model's pictures with control pictures of the same trials.

    Parameters
    ----------
    own, control : Scores
        Scores of the model's pictures and of the control pictures, for the same trials.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        For each measure: the mean over the trials of the score in `own` minus the score in `control`, and its 95 %
        interval from a bootstrap over people and pictures.
    """
    assert own.keys == control.keys
    out = {}
    for name, values_B in own.values.items():
        more_B = values_B - control.values[name]
        low, high = crossed_interval(more_B, own.subjects_B, own.images_B, RESAMPLES, seed)
        out[name] = {"mean": float(more_B.mean()), "interval": [low, high]}
    return out
