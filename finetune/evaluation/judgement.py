"""Judge generated images: turn the scores of the images and of the controls into a verdict.

If all categories of the trials occur in the training images, a trial scores 1 if the classifier finds the right
category in the generated image, and 0 if it finds another category. A category that does not occur in the training
images is new, and the classifier cannot recognise it. If the trials have new categories, the score of a trial compares
its generated image with all images that people saw in the trials: the score is the share of the other images that are
less similar to the generated image than the image seen in this trial.

Array shapes: B trials, M images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.dataset.dataset import EEGDataset
from finetune.evaluation.evidence import Setting, make_predictors
from finetune.evaluation.generated import GeneratedSet
from finetune.evaluation.identification import two_way_identification
from finetune.evaluation.networks.sharing import Compute, Sharing
from finetune.evaluation.pixel_metrics import ImageRows, ImageSource
from finetune.generation.predictors import Prediction
from finetune.generation.trials import Trial
from finetune.images import ImageTable, TableImages
from pretrain.evidence.rules import CONTROLS, Control, NotApplicable, judge
from pretrain.evidence.windows import KnownEEG

CHUNK = 2**26
"""Largest size in bytes of the images that are read at once."""
CELLS = 2**22
"""Largest number of correlations of images that are computed at once."""
THUMBNAIL = 16
"""Width and height in pixels of the small copies of images, whose pixels are compared."""
FROM_IMAGES = ("shuffle", "shuffle_within", "noise", "no_eeg")
"""Controls whose scores come from folders of images."""
Features = Callable[[ImageSource], NDArray[np.float64]]
Classify = Callable[[ImageSource], NDArray[np.int64]]


def pixel_features(images_BHW3: ImageSource) -> NDArray[np.float64]:
    """Return the pixels [B, D] of small copies of images.

    Two images are compared by the correlation of these pixels.
    """
    from PIL import Image

    size = (THUMBNAIL, THUMBNAIL)
    features_BD = np.empty((len(images_BHW3), 3 * THUMBNAIL**2))
    for number in range(len(images_BHW3)):
        small = Image.fromarray(images_BHW3[number]).resize(size, Image.Resampling.BOX)
        features_BD[number] = np.asarray(small, np.float64).ravel()
    return features_BD


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The classifier and the feature function that score images."""

    classify: Classify
    """Function that finds the category of each image."""
    features: Features
    """Function that computes features of images; similar images have correlated features."""
    features_name: str
    """Name of the features in reports."""
    sharing: Sharing = field(default_factory=Sharing)
    """Processes among which the images are divided."""

    def list_tasks(self) -> dict[str, Compute]:
        """Return the functions that all processes apply to blocks of images (see `Sharing.follow`), by task name."""
        return {"classify": self.classify, "features": self.features}

    def classify_chunks(self, images_BHW3: ImageSource) -> NDArray[np.int64]:
        """Find the category of images, which are read in chunks of at most `CHUNK` bytes."""
        return self._in_chunks("classify", images_BHW3)

    def compute_features(self, images_BHW3: ImageSource) -> NDArray[np.float64]:
        """Compute the features of images, which are read in chunks of at most `CHUNK` bytes."""
        return self._in_chunks("features", images_BHW3)

    def _in_chunks(self, task: str, images_BHW3: ImageSource) -> NDArray[Any]:
        size = max(1, CHUNK // math.prod(images_BHW3.shape[1:]))
        return np.concatenate(list(self.sharing.compute(task, self.list_tasks()[task], images_BHW3, block=size)))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Functions and values that score images for a verdict."""

    measure: str
    """What the score of a trial is, as a phrase for reports."""
    chance: float
    score: Callable[[GeneratedSet], NDArray[np.float64]]
    """Function that scores the trials of a folder of generated images."""
    predicted: Callable[[Prediction], NDArray[np.float64]]
    """Function that scores the predictions of a predictor. Predictors need no generator."""
    nearest: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    """Function that takes, for each trial, the row of a training image, and scores these training images in place of
    the generated images."""
    judge_n: NDArray[np.float64]
    """Scores of the images that people saw, or of mirrored and darkened copies of these images, in place of generated
    images; one value for each different image. These scores show how well the judge recognises real images."""


def _score_category(own: GeneratedSet, table: ImageTable, judges: Judge) -> Scores:
    labels_B = own.labels_B
    _, first = np.unique([trial["image_id"] for trial in own.trials], return_index=True)
    shares = np.bincount(labels_B) / len(labels_B)
    return Scores(
        measure="the classifier finds the right category in the generated image",
        # Chance is the share of the most common category: a model that always shows this category has this score.
        chance=float(shares.max()) if len(shares[shares > 0]) > 1 else 1.0 / max(2, len(own.about["labels"])),
        score=lambda given: (judges.classify_chunks(given.images_BHW3) == given.labels_B).astype(float),
        predicted=lambda found: (found.labels_B == labels_B).astype(float),
        nearest=lambda rows: (table.labels[rows] == labels_B).astype(float),
        judge_n=(judges.classify_chunks(ImageRows(own.real_BHW3, first)) == labels_B[first]).astype(float),
    )


def _score_identification(own: GeneratedSet, table: ImageTable, judges: Judge) -> Scores:
    ids = [trial["image_id"] for trial in own.trials]
    real_BD = judges.compute_features(own.real_BHW3)
    size = own.real_BHW3.shape[1]

    def identify(images_BD: NDArray[np.float64], trials: Any = slice(None)) -> NDArray[np.float64]:
        if len(set(ids)) < 2:
            # All trials show the same image, so there is no other image to compare with. Every trial gets the chance
            # score 0.5. With a single image, no verdict uses the score.
            return np.full(len(images_BD), 0.5)
        return two_way_identification(images_BD, real_BD[trials], np.asarray(ids)[trials].tolist())

    def of_rows(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        different, number_B = np.unique(rows, return_inverse=True)
        return identify(_read_features(table, different, size, judges)[number_B])

    def of_set(given: GeneratedSet) -> NDArray[np.float64]:
        number_of = {trial["key"]: number for number, trial in enumerate(own.trials)}
        rows = [number_of[trial["key"]] for trial in given.trials]
        # Compare each control image with the images that people saw in all evaluated trials, as for generated images.
        padded_BD = np.zeros_like(real_BD)
        padded_BD[rows] = judges.compute_features(given.images_BHW3)
        return identify(padded_BD)[rows]

    _, first = np.unique(ids, return_index=True)
    copies_MD = np.concatenate(
        [judges.compute_features((own.real_BHW3[int(row)][None, :, ::-1] * 0.7).astype(np.uint8)) for row in first]
    )
    return Scores(
        measure=f"share of other seen images that are less similar than the seen image ({judges.features_name})",
        chance=0.5,
        score=of_set,
        predicted=lambda found: of_rows(found.rows_B),
        nearest=of_rows,
        judge_n=identify(copies_MD, first),
    )


def _read_features(table: ImageTable, rows: NDArray[np.int64], size: int, judges: Judge) -> NDArray[np.float64]:
    """Compute the features of training images."""
    return judges.compute_features(TableImages(table, rows, size))


def find_nearest(images_BD: NDArray[np.float64], train_MD: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return, for each image, the row of the training image whose features correlate most with the image's features."""
    images_BD, train_MD = (x - x.mean(axis=1, keepdims=True) for x in (images_BD, train_MD))
    train_MD /= np.maximum(train_MD.std(axis=1, keepdims=True), 1e-12)
    size = max(1, CELLS // len(train_MD))
    parts = (images_BD[start : start + size] for start in range(0, len(images_BD), size))
    # The features in `part` need not be divided by their standard deviation, because this factor is the same for all
    # training images and does not change which training image is the most similar.
    return np.concatenate([(part @ train_MD.T).argmax(axis=1) for part in parts])


def judge_images(
    own: GeneratedSet,
    controls: Mapping[str, GeneratedSet | NotApplicable],
    judges: Judge,
    *,
    train: EEGDataset,
    data: EEGDataset,
    trials: list[Trial],
    copies: Sequence[tuple[str, str]] | None = None,
    known_eeg: KnownEEG | None = None,
    design_evidence: str = "",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge generated images by the rules of `pretrain.evidence.rules`.

    Parameters
    ----------
    own : GeneratedSet
        The generated images.
    controls : mapping
        Control images by name, from `finetune.evaluation.controls.read_controls`.
    judges : Judge
        Classifier and feature function that score images.
    train, data : EEGDataset
        The train split, and the split of the evaluated trials.
    trials : list of Trial
        The trials of `own`.
    copies : sequence of (str, str), optional
        Pairs of names of the same image, from `pretrain.evidence.copies.find_copies`. By default, this function
        searches for such pairs.
    known_eeg : KnownEEG, optional
        Trials of `data` whose EEG is also in the data that trained the model, from
        `pretrain.evidence.windows.find_known_eeg`. By default, this function compares the EEG with the training trials.
    design_evidence : str
        Publication that shows that the images were presented in random order; see
        `pretrain.evidence.design.describe_design`.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed for the bootstrap and for the predictors.

    Returns
    -------
    dict
        The verdict from `pretrain.evidence.rules.Verdict.as_json`, with ``measure`` (what the score of a trial is),
        ``identification`` (the features that identify images) and ``scores`` (mean score of each control).
    """
    table = ImageTable(train)
    known = set(table.labels.tolist()) >= set(own.labels_B.tolist())
    scores = (_score_category if known else _score_identification)(own, table, judges)
    setting = Setting.read(train, data, trials, design_evidence, copies=copies, known_eeg=known_eeg)
    ids = [trial["image_id"] for trial in own.trials]
    own_BD = judges.compute_features(own.images_BHW3)
    identification = two_way_identification(
        own_BD, judges.compute_features(own.real_BHW3), ids, own.labels_B, within_label=True
    )
    nearest = find_nearest(own_BD, _read_features(table, np.arange(len(table)), own.real_BHW3.shape[1], judges))
    found: dict[str, Control | NotApplicable] = {
        **{name: _read_scores(name, controls.get(name), own, scores) for name in FROM_IMAGES},
        **make_predictors(table, data, trials, scores.predicted, seed),
        "nearest": Control(hits_n=scores.nearest(nearest), checked=True),
    }
    hits_n = scores.score(own)
    verdict = judge(
        setting.weigh(
            hits_n,
            scores.chance,
            score_of="label" if known else "image",
            controls=found,
            identification_n=identification,
            judge_n=scores.judge_n,
        ),
        resamples=resamples,
        seed=seed,
    )
    means = {
        name: None
        if isinstance(control, NotApplicable)
        else float(control.hits_n[~control.left_out_n].mean())
        if control.left_out_n is not None
        else float(control.hits_n.mean())
        for name, control in found.items()
    }
    return {
        **verdict.as_json(),
        "measure": scores.measure,
        "identification": judges.features_name,
        "chance": scores.chance,
        "judge": float(scores.judge_n.mean()),
        "scores": {"own": float(hits_n.mean()), **means},
    }


def _read_scores(
    name: str, given: GeneratedSet | NotApplicable | None, own: GeneratedSet, scores: Scores
) -> Control | NotApplicable:
    """Score the images of a control, and mark the trials for which the control has no image as left out."""
    if given is None:
        return NotApplicable(
            reason=f"the control was not generated ({CONTROLS[name]}: dreamscale generate --control {name})"
        )
    if isinstance(given, NotApplicable):
        return given
    hits_B = np.zeros(len(own.trials))
    left_out_B = np.ones(len(own.trials), bool)
    number_of = {trial["key"]: number for number, trial in enumerate(own.trials)}
    rows = [number_of[trial["key"]] for trial in given.trials]
    hits_B[rows], left_out_B[rows] = scores.score(given), False
    return Control(hits_n=hits_B, checked=True, left_out_n=left_out_B)
