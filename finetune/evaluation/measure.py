"""Compute all metrics of a set of images: generated images, control images, or real images.

Array shapes: B trials, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation import metrics
from finetune.evaluation.metrics import JUDGE
from finetune.evaluation.networks.judges import Judges, RealImages, choose_n_way, measure_embedding, measure_halves
from finetune.evaluation.networks.sharing import Compute
from finetune.evaluation.per_trial import ACCURACY
from finetune.evaluation.pixel_metrics import PAIRED_METRICS, Floats, ImageRows, ImageSource, average_pairs

SAME_IMAGE = "not computed: all trials show the same image"
SAME_SET = "not computed: the metric would compare images with themselves"
MOST_CONFUSED = 100
"""Largest number of categories for which there is a confusion matrix. The matrix has a row and a column for each
category, so the matrix of many categories would be too large for a report."""
PAIRS = 8
"""Number of pairs of images that are read at once; a multiple of the batch of LPIPS."""
RANDOM_PAIRS = 10_000
"""Largest number of random pairs of trials. If there are more trials, each trial forms one random pair."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Settings of the metrics."""

    n_way: Sequence[int] = (2, 50)
    """Values of n for the n-way accuracy."""
    top_k: Sequence[int] = (1, 5)
    """Values of k for the n-way accuracy."""
    draws: int = 100
    """Number of random draws for the standard deviation of the n-way accuracy."""
    permutations: int = 10_000
    """Largest number of times that labels are shuffled for a p-value."""
    seed: int = 0
    """Seed of all random choices."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of a set of images."""

    metrics: dict[str, Any]
    """Maps the name of each metric to a number, to a dictionary of numbers, or to a text that says why the metric was
    not computed. If a metric uses a network, the metric's name contains the network's name in brackets, except for FID,
    KID, Inception Score and LPIPS. Other keys are ``confusion`` (the confusion matrix) and ``frechet_note``."""
    predicted_B: NDArray[np.int64]
    """Category that the dataset's classifier gives to each image."""
    trials: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Values [B] of the metrics that have one value for each trial."""


def _compare_pixels(a_BHW3: ImageSource, b_BHW3: ImageSource) -> dict[str, Floats | str]:
    """Compare pairs of images by every metric of `PAIRED_METRICS`."""
    return {name: compare(a_BHW3, b_BHW3) for name, compare in PAIRED_METRICS.items()}


def list_tasks(judges: Judges) -> dict[str, Compute]:
    """Return the functions that all processes apply to blocks of images (see `Sharing.follow`), by task name."""

    def compare(a_BHW3: ImageSource, b_BHW3: ImageSource) -> dict[str, Floats | str]:
        return _compare_pixels(a_BHW3, b_BHW3) | {lpips.name: lpips.compare(a_BHW3, b_BHW3) for lpips in judges.lpips}

    networks = {network.task: network.judge_batch for network in judges.networks}
    return {"pixels": _compare_pixels, "pairs": compare} | networks


def _compare_pairs(a_BHW3: ImageSource, b_BHW3: ImageSource, judges: Judges, task: str) -> dict[str, Floats | str]:
    """Compare pairs of images by all paired metrics (task "pairs"), or by all except LPIPS (task "pixels")."""
    if a_BHW3.shape != b_BHW3.shape:
        raise ValueError(f"images must have equal shapes, not {a_BHW3.shape} and {b_BHW3.shape}")
    blocks = list(judges.sharing.compute(task, list_tasks(judges)[task], a_BHW3, b_BHW3, block=PAIRS))
    return {
        name: values if isinstance(values, str) else np.concatenate([block[name] for block in blocks])
        for name, values in blocks[0].items()
    }


def _classify(
    probabilities_BK: NDArray[np.float64], labels_B: NDArray[np.integer], ids: list[str], options: MeasureOptions
) -> dict[str, Any]:
    """Compute the accuracies and the confusion matrix from the category probabilities of images."""
    predicted_B, classes = probabilities_BK.argmax(axis=1), probabilities_BK.shape[1]
    confusion: list[list[int]] | str = (
        f"not computed: the table is made for at most {MOST_CONFUSED} categories, and there are {classes}"
    )
    if classes <= MOST_CONFUSED:
        counts_KK = np.zeros((classes, classes), int)
        np.add.at(counts_KK, (labels_B, predicted_B), 1)
        confusion = counts_KK.tolist()
    accuracy = metrics.accuracy_with_p_value(
        predicted_B, labels_B, ids, permutations=options.permutations, seed=options.seed
    )
    found: dict[str, Any] = {f"accuracy[{JUDGE}]": accuracy}
    for n, k in choose_n_way(options.n_way, options.top_k, classes):
        found[f"{n}-way-top-{k}[{JUDGE}]"] = metrics.n_way_top_k(
            probabilities_BK, labels_B, n=n, k=k, draws=options.draws, seed=options.seed
        )
    return found | {"confusion": confusion}


def measure(images_BHW3: ImageSource, real: RealImages, judges: Judges, options: MeasureOptions) -> Measured:
    """Compute every metric for a set of generated images.

    Parameters
    ----------
    images_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Generated image of each trial.
    real : RealImages
        The images that the person saw in the same trials.
    judges : Judges
        Networks that compute features and class probabilities. The first network is the dataset's own classifier.
    options : MeasureOptions
        Settings of the metrics.

    Returns
    -------
    Measured
        The metrics.

    Raises
    ------
    RequestError
        If a network computes NaN or infinity.
    """
    different = len(real.first_M)
    note = f"biased: there are only {different} different images, papers use 2048 or more" if different < 2048 else ""
    found: dict[str, Any] = {}
    of_networks: dict[str, Any] = {}
    trials: dict[str, NDArray[np.float64]] = {}
    words: dict[str, Any] = {"n_way": options.n_way, "top_k": options.top_k, "draws": options.draws}
    predicted_B = np.zeros(0, np.int64)
    for number, network in enumerate(judges.networks):
        judgement = measure_embedding(network, images_BHW3, real, seed=options.seed, **words)
        if number == 0:
            assert judgement.probabilities_BK is not None
            found |= _classify(judgement.probabilities_BK, real.labels_B, real.ids, options)
            predicted_B = judgement.probabilities_BK.argmax(axis=1)
            trials[ACCURACY] = (predicted_B == real.labels_B).astype(np.float64)
        of_networks |= judgement.metrics
        trials |= judgement.trials
    for name, values_B in _compare_pairs(images_BHW3, real.images_BHW3, judges, "pairs").items():
        found |= average_pairs(name, values_B)
        if not isinstance(values_B, str):
            trials[name] = values_B
    found |= of_networks | judges.missing | {"frechet_note": note}
    return Measured(metrics=found, predicted_B=predicted_B, trials=trials)


def measure_real(real: RealImages, judges: Judges, options: MeasureOptions) -> dict[str, Any]:
    """Compute every metric that is defined for the real images, as a reference for generated images.

    For a metric of two sets of images, the two sets are random halves of the different real images. A metric that
    compares a generated image with the real image of its trial has no value for real images.

    Parameters
    ----------
    real, judges, options
        The arguments of `measure`.

    Returns
    -------
    dict
        The metrics, as in `Measured.metrics`.

    Raises
    ------
    RequestError
        If a network computes NaN or infinity.
    """
    output = real.output(judges.networks[0])
    assert not isinstance(output, str) and output.probabilities_BK is not None
    found = _classify(output.probabilities_BK[real.row_B], real.labels_B, real.ids, options)
    found |= dict.fromkeys((*PAIRED_METRICS, *(lpips.name for lpips in judges.lpips)), SAME_SET)
    for network in judges.networks:
        found |= measure_halves(network, real, options.seed)
    return found


def _choose_other_trials(image_ids: list[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose, for each trial, a random trial that shows another image."""
    ids = np.asarray(image_ids)
    order = np.argsort(ids, kind="stable")
    first, last = (np.searchsorted(ids[order], ids, side=side) for side in ("left", "right"))
    # In `order`, the trials that show the same image as a trial have the places from `first` to `last` - 1. If the
    # random place is `first` or more, it is increased by the number of these trials, so that they are skipped.
    chosen = rng.integers(0, len(ids) - (last - first))
    return order[chosen + np.where(chosen >= first, last - first, 0)]


def compare_random_pairs(
    images_BHW3: ImageSource,
    real_BHW3: ImageSource,
    image_ids: list[str],
    judges: Judges | None = None,
    *,
    seed: int,
    draws: int | None = None,
) -> dict[str, Any]:
    """Compare each generated image with the real image of a random other trial, by every paired metric.

    The paired metrics are those of `pixel_metrics.PAIRED_METRICS`, and the variants of LPIPS.

    Parameters
    ----------
    images_BHW3, real_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Generated and real images.
    image_ids : list of str
        Id of the image of each trial. A generated image is never compared with the image of its own trial.
    judges : Judges, optional
        Networks that compute the variants of LPIPS. Because LPIPS is slow, it compares each generated image with the
        real image of only one other trial.
    seed : int
        Seed for the random choice of the other trials.
    draws : int, optional
        Number of other trials with which each trial is compared. By default 10, but fewer (at least 1) if 10 would give
        more than `RANDOM_PAIRS` pairs in total.

    Returns
    -------
    dict
        Maps each metric's name to its mean, or to a text that says why the metric was not computed.
    """
    judges = judges or Judges(networks=[])
    rng = np.random.default_rng(seed)
    if len(set(image_ids)) < 2:
        return dict.fromkeys((*PAIRED_METRICS, *(lpips.name for lpips in judges.lpips)), SAME_IMAGE)
    found: dict[str, list[Any]] = {}
    for draw in range(draws or max(1, min(10, RANDOM_PAIRS // len(image_ids)))):
        others_BHW3 = ImageRows(real_BHW3, _choose_other_trials(image_ids, rng))
        task = "pixels" if draw else "pairs"
        for name, values in _compare_pairs(images_BHW3, others_BHW3, judges, task).items():
            found.setdefault(name, []).append(values)
    return {
        name: average_pairs(name, values[0] if isinstance(values[0], str) else np.concatenate(values))[name]
        for name, values in found.items()
    }
