"""Measure how well a classifier recognises the category of the image from EEG, and draw the results.

Tensor shapes: B trials, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_sharding.common.errors import figure_text
from data_sharding.common.files import write_json
from data_sharding.dataset.dataset import EEGDataset
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.model import compute_features
from finetune.eeg import group_repeats, read_trials
from finetune.images import ImageTable
from pretrain.evidence.statistics import accuracy_interval

TOP = 5
"""In the top-5 accuracy, a trial is right if its true category has one of the five highest scores."""


def score(logits_BK: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Compute the metrics of a set of trials.

    Parameters
    ----------
    logits_BK : Tensor, shape (B, K)
        Class scores.
    labels_B : Tensor of int, shape (B,)
        True classes.

    Returns
    -------
    dict
        ``accuracy``: top-1 accuracy. ``top5``: top-5 accuracy, only with more than five classes. ``kappa``: Cohen's
        kappa, which is left out if all trials have the same true class and this class is always predicted. ``loss``:
        cross-entropy.
    """
    from sklearn.metrics import cohen_kappa_score

    logits, labels = logits_BK.float().cpu(), labels_B.cpu()
    found = {"accuracy": float((logits.argmax(1) == labels).float().mean())}
    if logits.shape[1] > TOP:
        found["top5"] = float((logits.topk(TOP, dim=1).indices == labels[:, None]).any(1).float().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where kappa is not defined
        kappa = float(cohen_kappa_score(labels, logits.argmax(1), labels=list(range(logits.shape[1]))))
    if np.isfinite(kappa):
        found["kappa"] = kappa
    return {**found, "loss": float(F.cross_entropy(logits, labels))}


def summarise(
    logits_BK: Tensor, labels_B: Tensor, subjects: Sequence[str], images: Sequence[str], names: list[str]
) -> dict[str, Any]:
    """Compute the metrics over all trials and over the trials of each person, and the confusion matrix.

    Parameters
    ----------
    logits_BK : Tensor, shape (B, K)
        Class scores.
    labels_B : Tensor of int, shape (B,)
        True classes.
    subjects, images : sequence of str
        Person and image of each trial.
    names : list of str
        Names of the classes.

    Returns
    -------
    dict
        The metrics of `score`. ``trials``: number of trials. ``chance``: 1 / K. ``largest_class``: share of the most
        frequent class, which is the accuracy of a classifier that always predicts this class. ``interval_images`` and
        ``interval_subjects``: 95 % intervals of the accuracy, which are valid even if trials of one image, or of one
        person, depend on each other. ``interval_subjects`` is left out if there is only one person. ``confusion``: for
        each true class, the number of trials with each predicted class. ``labels``: names of the classes. ``subjects``:
        for each person, the metrics of `score`, ``trials`` and ``interval_images``.
    """
    from sklearn.metrics import confusion_matrix

    labels, predicted = labels_B.cpu().numpy(), logits_BK.argmax(1).cpu().numpy()
    hits, person, image = (predicted == labels).astype(float), np.asarray(subjects), np.asarray(images)
    people: dict[str, Any] = {}
    for name in sorted(set(subjects)):
        own = person == name
        rows = torch.from_numpy(np.flatnonzero(own))
        people[name] = {
            **score(logits_BK.cpu()[rows], labels_B.cpu()[rows]),
            "trials": len(rows),
            "interval_images": accuracy_interval(hits[own], image[own]),
        }
    result: dict[str, Any] = {
        **score(logits_BK, labels_B),
        "trials": len(labels),
        "chance": 1 / len(names),
        "largest_class": float(np.bincount(labels).max() / len(labels)),
        "interval_images": accuracy_interval(hits, image),
    }
    if len(people) > 1:
        result["interval_subjects"] = accuracy_interval(hits, person)
    confusion = confusion_matrix(labels, predicted, labels=list(range(len(names))))
    return {**result, "labels": names, "confusion": confusion.tolist(), "subjects": people}


@torch.no_grad()
def compute_logits(net: EEGClassifier, dataset: EEGDataset, groups: list[list[int]], device: Any) -> Tensor:
    """Compute the class scores [B, K] of groups of trials. Only the EEG of 256 groups is in memory at a time.

    Parameters
    ----------
    net : EEGClassifier
        Network in evaluation mode.
    dataset : EEGDataset
        Trials of a split.
    groups : list of list of int
        Numbers of the trials in each group, from `group_repeats`; the EEG of each group is averaged.
    device : torch.device
        Device of the network.
    """
    scaling, parts = net.scaling(dataset.spec), []
    for start in range(0, len(groups), 256):
        parts.append(compute_features(net, read_trials(dataset, groups[start : start + 256], scaling, device))[1].cpu())
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of a classifier on the trials of a split, each of which may be a mean over presentations of one image."""

    summary: dict[str, Any]
    """Result of `summarise`, and the name of the split."""
    right_B: NDArray[np.bool_]
    """Whether the answer for each trial is right."""
    subjects: list[str]
    """Person of each trial."""
    images: list[str]
    """Image of each trial."""


def evaluate_classifier(
    net: EEGClassifier, dataset: EEGDataset, table: ImageTable, device: Any, average_repeats: int
) -> Evaluation:
    """Evaluate a classifier on all trials of a split.

    Parameters
    ----------
    net : EEGClassifier
        Network in evaluation mode.
    dataset : EEGDataset
        The split.
    table : ImageTable
        Images of the split.
    device : torch.device
        Device of the network.
    average_repeats : int
        Largest number of presentations of the same image to the same person that are averaged; 0 averages all
        presentations.
    """
    groups = group_repeats(dataset, average_repeats)
    first = [group[0] for group in groups]
    rows = table.row_of[first]
    logits_BK, labels_B = compute_logits(net, dataset, groups, device), torch.as_tensor(table.labels[rows])
    subjects = [dataset.trials.text("subject", number) or "unknown" for number in first]
    images = [table.ids[row] for row in rows]
    summary = {"split": dataset.split, **summarise(logits_BK, labels_B, subjects, images, dataset.labels)}
    right_B = (logits_BK.argmax(1) == labels_B).numpy()
    return Evaluation(summary=summary, right_B=right_B, subjects=subjects, images=images)


def save_results(result: dict[str, Any], folder: Path) -> None:
    """Write the summary of an evaluation to ``classification.json``, and plot the summary in the folder ``plots``.

    Parameters
    ----------
    result : dict
        The summary.
    folder : Path
        Run directory.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    write_json(folder / "classification.json", result)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    names, people = [figure_text(name) for name in result["labels"]], result["subjects"]
    side = min(14.0, 3.5 + 0.35 * len(names))
    figure, axes = plt.subplots(figsize=(side + 0.8, side), constrained_layout=True)
    counts = np.array(result["confusion"], float)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= 12:
        for row, column in np.ndindex(*shares.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel="true category", title=f"{result['split']}: {result['accuracy']:.1%} right")
    figure.colorbar(shown, label="share of the category's trials", shrink=0.7)
    figure.savefig(folder / "plots" / "confusion.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(min(14.0, 2.5 + 0.5 * len(people)), 4), constrained_layout=True)
    accuracy = np.array([person["accuracy"] for person in people.values()])
    ends = np.array([person["interval_images"] for person in people.values()])
    places = np.arange(len(people))
    axes.bar(places, accuracy, color="tab:blue")
    axes.errorbar(places, accuracy, np.abs(ends.T - accuracy), fmt="none", ecolor="black", capsize=3)
    axes.axhline(result["chance"], color="tab:red", linestyle="--", label="chance")
    axes.set_xticks(places, [figure_text(name) for name in people], rotation=90)
    axes.set(ylabel="share of right answers", ylim=(0, 1), title=f"{result['split']}: results of each person")
    axes.legend(loc="upper right")
    figure.savefig(folder / "plots" / "subjects.png", dpi=120)
    plt.close(figure)
