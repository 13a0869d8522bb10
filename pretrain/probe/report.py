"""Compute the numbers in the result of a probe, print them as a table, and draw a chart.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.evidence.statistics import FEWEST_SUBJECTS, accuracy_interval, difference_interval, flip_test
from pretrain.probe.compare import ENCODER, TUNED, TUNED_RANDOM
from pretrain.probe.config import ProbeConfig
from pretrain.probe.features import Trials
from pretrain.probe.folds import Fold


def summarize(
    trials: Trials, folds: list[Fold], scored: np.ndarray, hits: dict[str, np.ndarray], config: ProbeConfig
) -> dict[str, Any]:
    """Compute each method's accuracy, its difference from the encoder's accuracy, confidence intervals and p-values.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    folds : list of Fold
        The training and test trials of each fold.
    scored : ndarray of int
        Indices of the test trials of all folds.
    hits : dict of str to ndarray
        For each method, an array of shape [S, number of scored trials], with one row for each of its S classifiers. A
        value is 1 if the predicted label is right, else 0.
    config : ProbeConfig
        Config of the probe.

    Returns
    -------
    dict
        The result as plain numbers, lists and strings, so that JSON can store the result.
    """
    images_n, subjects_n = trials.images_n[scored], trials.subjects_n[scored]
    subjects = np.unique(subjects_n)
    by_subject = len(subjects) >= FEWEST_SUBJECTS
    fitted = np.unique(np.concatenate([fold.train for fold in folds]))
    both = {s for fold in folds for s in set(trials.subjects_n[fold.train]) & set(trials.subjects_n[fold.test])}
    accuracy: dict[str, Any] = {}
    minus: dict[str, Any] = {}
    for name, hits_Sn in hits.items():
        hit_n = hits_Sn.mean(axis=0)
        accuracy[name] = {
            "mean": float(hit_n.mean()),
            "ci95": list(accuracy_interval(hit_n, images_n)),
            "by_subject": {str(s): float(hit_n[subjects_n == s].mean()) for s in subjects},
        }
        if len(hits_Sn) > 1:
            accuracy[name]["each"] = hits_Sn.mean(axis=1).tolist()
        if name == ENCODER:
            continue
        reference = TUNED if name == TUNED_RANDOM else ENCODER
        more_n = hits[reference][0] - hit_n
        how = (config.resamples, config.seed)
        minus[name] = {
            "of": reference,
            "mean": float(more_n.mean()),
            "ci95": list(difference_interval(more_n, images_n, *how)),
            "p": flip_test(more_n, images_n, *how),
            "ci95_subjects": list(difference_interval(more_n, subjects_n, *how)) if by_subject else None,
            "p_subjects": flip_test(more_n, subjects_n, *how) if by_subject else None,
        }
    return {
        "trials": {"train": len(fitted), "scored": len(scored)},
        "subjects": {"train": len(np.unique(trials.subjects_n[fitted])), "scored": len(subjects)},
        "images": len(np.unique(images_n)),
        "fits": len(folds),
        "subjects_in_both": sorted(map(str, both)),
        "accuracy": accuracy,
        "encoder_minus": minus,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table, with notes that explain the numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Linear probe: {len(result['labels'])} labels, chance {result['chance']:.1%}")
    by_subject = any(more["p_subjects"] is not None for more in result["encoder_minus"].values())
    headings = ["method", "accuracy", "95 % interval", "encoder minus method", "p"] + ["p, subjects"] * by_subject
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, score in result["accuracy"].items():
        cells = [name, f"{score['mean']:.1%}", "{:.1%} to {:.1%}".format(*score["ci95"])]
        if more := result["encoder_minus"].get(name):
            cells += ["{:+.1%} ({:+.1%} to {:+.1%})".format(more["mean"], *more["ci95"]), f"{more['p']:.2g}"]
            cells += [f"{more['p_subjects']:.2g}"] if by_subject else []
        table.add_row(*cells)
    console = Console()
    # In a file or a pipe, which has no width, use 120 columns, because rich's default of 80 columns would break every
    # cell of the table.
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    for note in _make_notes(result, by_subject):
        console.print(note, markup=False)


def _make_notes(result: dict[str, Any], by_subject: bool) -> list[str]:
    notes = [
        f"The accuracies are those on {result['trials']['scored']} test trials of {result['images']} images and "
        f"{result['subjects']['scored']} subject(s). Each classifier was trained in {result['fits']} fold(s), with "
        f"{result['trials']['train']} training trials of {result['subjects']['train']} subject(s) in total. Trials of "
        "one image are not independent: the Wilson intervals of the accuracies allow for this, and the bootstrap "
        "intervals of the differences draw whole images. p is the p-value of a two-sided permutation test, which "
        f"flips the signs of the differences of whole images ({result['images']} images)"
        + (f"; 'p, subjects' flips those of whole subjects ({result['subjects']['scored']})." if by_subject else ".")
    ]
    if not by_subject:
        notes.append(
            f"The test trials come from {result['subjects']['scored']} subject(s); conclusions about other subjects "
            f"need at least {FEWEST_SUBJECTS}. Set folds: subjects to test on every subject of the dataset."
        )
    for what, key in (("image", "left_out_for_shared_images"), ("EEG", "left_out_for_shared_eeg")):
        left_out = result[key]
        if any(left_out.values()):
            notes.append(
                f"Trials left out because their {what} is in both training and test: {left_out['test']} test trials, "
                f"{left_out['train']} training trials (sum over all folds)."
            )
    if result["settings"]["standardize"] == "subject":
        notes.append(
            "The features were standardised over all trials of each subject, with the test trials and without labels. "
            "The result therefore needs all trials of a subject at the same time (it is transductive)."
        )
    if TUNED_RANDOM in result["accuracy"]:
        notes.append(f"The row '{TUNED_RANDOM}' is compared with '{TUNED}'.")
    if result["subjects_in_both"]:
        notes.append(
            f"The test is not independent of the training: {len(result['subjects_in_both'])} subject(s) have trials in "
            "both."
        )
    if result["openings"]:
        notes.append(result["openings"])
    return notes


def draw(result: dict[str, Any], path: str) -> None:
    """Draw a chart of the accuracies with their confidence intervals.

    Parameters
    ----------
    result : dict
        Result of the probe.
    path : str
        Path of the figure to write.
    """
    from matplotlib.figure import Figure

    names = list(result["accuracy"])
    mean = np.array([result["accuracy"][name]["mean"] for name in names])
    low, high = np.array([result["accuracy"][name]["ci95"] for name in names]).T
    figure = Figure(figsize=(6.4, 0.45 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#c44e52" if name == ENCODER else "#4c72b0" for name in names]
    axes.barh(names, mean, xerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)], color=colours, capsize=3)
    axes.axvline(result["chance"], color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"accuracy, {result['trials']['scored']} trials (dashed: chance)")
    figure.savefig(path, dpi=150)
