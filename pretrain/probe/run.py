"""What an encoder's features are worth: ``dreamscale probe ENCODER DATASET``.

A linear classifier on the encoder's tokens, on subjects and images that it was not fitted on; beside it, on the very
same trials, an encoder with random weights, classical features, EEGNet, and controls that must be at chance.

Letters in names: n trials, F features, S sets of labels, K classes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from data_sharding.common.files import write_json
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from pretrain.probe.features import Standardize, Trials, band_power, collect, covariance, standardized, time_courses
from pretrain.probe.folds import Fold, inner_folds, outer_folds, shuffled_labels
from pretrain.probe.statistics import FEWEST_SUBJECTS, accuracy_interval, difference_interval, flip_test

if TYPE_CHECKING:
    import torch

    from pretrain.encoder.encoder import EEGEncoder

STRENGTHS = np.logspace(-3, 3, 13)
"""Of the ridge's penalty, in units of the features' mean eigenvalue."""
Method = Literal["random weights", "band power", "covariance", "time courses", "EEGNet", "fine-tuning"]
DEFAULT_METHODS: tuple[Method, ...] = ("random weights", "band power", "covariance", "time courses", "EEGNet")
TUNED, TUNED_RANDOM = "encoder, fine-tuned", "random weights, fine-tuned"
ENCODER, COMMONEST, SHUFFLED = "encoder", "commonest label", "encoder, labels shuffled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe of an encoder on a labelled dataset, with baselines and controls."""

    encoder: str
    """Encoder package: a directory, or a name on the Hugging Face hub."""
    dataset: str
    """Labelled (EEG-image) dataset, preprocessed as the encoder expects."""
    output: str | None = None
    """JSON file to write the result to as well."""
    figure: str | None = None
    """PNG, PDF or SVG file to draw the accuracies into."""
    folds: Literal["split", "subjects"] = "split"
    """split: fit on the dataset's train split, score another. subjects: leave each subject of the dataset out once."""
    split: Literal["test", "val"] = "test"
    """Split to score, under folds: split."""
    methods: list[Method] = dataclasses.field(default_factory=lambda: list(DEFAULT_METHODS))
    """What to compare the encoder with. fine-tuning, which takes longest, trains the whole encoder and a head on the
    mean token, from the encoder's weights and from random ones."""
    time_bins: int = 16
    """Parts of the window over which tokens and time courses are averaged; 1 loses all that is locked in time."""
    standardize: Standardize = "subject"
    """Mean and variance of the features taken over each subject's own trials (no labels), or over training trials."""
    image_groups: int = 3
    """Under folds: subjects, where subjects saw the same images: parts into which images are divided."""
    random_seeds: int = 5
    """Encoders with random weights."""
    shuffles: int = 10
    """Sets of shuffled training labels for the control; 0 for none."""
    seed: int = 0
    """Of random weights, EEGNet, shuffles, bootstrap and permutations."""
    resamples: int = 10_000
    """Bootstrap resamples of the intervals, and random flips of the tests."""
    eegnet_epochs: int = 100
    """EEGNet's epochs at most; it stops when the validation loss no longer falls."""
    eegnet_patience: int = 15
    """Epochs that it waits for that."""
    finetune_epochs: int = 10
    """Passes over the training trials in fine-tuning."""
    finetune_rates: list[float] = dataclasses.field(default_factory=lambda: [3e-4, 1e-3])
    """Learning rates of fine-tuning, chosen among as penalties are, on the first inner fold where there is no val."""
    batch_size: int = 64
    """Trials encoded at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 100")
        for name in (
            "batch_size",
            "time_bins",
            "image_groups",
            "random_seeds",
            "eegnet_epochs",
            "eegnet_patience",
            "finetune_epochs",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.finetune_rates or min(self.finetune_rates) <= 0:
            raise ValueError(f"finetune_rates is {self.finetune_rates}; give one or more rates above 0")
        if self.shuffles < 0:
            raise ValueError(f"shuffles is {self.shuffles}; it must not be negative")


def ridge_scores(x_nF: np.ndarray, y_nK: np.ndarray, new_mF: np.ndarray) -> Iterator[np.ndarray]:
    """Ridge regression for every penalty.

    Parameters
    ----------
    x_nF, y_nK : ndarray
        Features and targets to fit.
    new_mF : ndarray
        Features to score.

    Yields
    ------
    ndarray, [m, K]
        Scores for one of `STRENGTHS`.
    """
    mean_F, mean_K = x_nF.mean(axis=0), y_nK.mean(axis=0)
    x_nF, new_mF, y_nK = x_nF - mean_F, new_mF - mean_F, y_nK - mean_K
    # Whichever of the two products is smaller has the same eigenvalues.
    if x_nF.shape[1] < len(x_nF):
        value, vector = np.linalg.eigh(x_nF.T @ x_nF)
        weights, basis = vector.T @ (x_nF.T @ y_nK), new_mF @ vector
    else:
        value, vector = np.linalg.eigh(x_nF @ x_nF.T)
        weights, basis = vector.T @ y_nK, new_mF @ (x_nF.T @ vector)
    value = np.maximum(value, 0)
    unit = value.mean() or 1.0
    for strength in STRENGTHS:
        yield basis @ (weights / (value + strength * unit)[:, None]) + mean_K


def choose_and_predict(
    x_nF: np.ndarray, labels_Sn: np.ndarray, fold: Fold, inner: list[tuple[np.ndarray, np.ndarray]], classes: int
) -> tuple[np.ndarray, float]:
    """Choose the penalty on the inner folds, fit on the training trials and label the test trials.

    Parameters
    ----------
    x_nF : ndarray, [n, F]
        Features of all trials.
    labels_Sn : ndarray, [S, n]
        Sets of labels, each of which gets a classifier of its own; those of test trials are not looked at.
    fold : Fold
        The trials.
    inner : list of (ndarray, ndarray)
        Trials fitted on and held out, to choose by.
    classes : int
        Number of labels.

    Returns
    -------
    ndarray, [S, n of test]
        Predicted labels.
    float
        Penalty of the first set, in units of the mean eigenvalue.
    """
    sets = len(labels_Sn)

    def predicted(fit: np.ndarray, new: np.ndarray) -> np.ndarray:
        targets = np.eye(classes, dtype=x_nF.dtype)[labels_Sn[:, fit]]
        scores = ridge_scores(x_nF[fit], np.concatenate(list(targets), axis=1), x_nF[new])
        return np.stack([each.reshape(-1, sets, classes).argmax(axis=-1).T for each in scores])

    hits = np.zeros((len(STRENGTHS), sets))
    for fit, held in inner:
        hits += (predicted(fit, held) == labels_Sn[:, held]).sum(axis=-1)
    # The strongest penalty among equals; without inner folds nothing tells them apart, and the middle one is taken.
    best = len(STRENGTHS) - 1 - hits[::-1].argmax(axis=0) if inner else np.full(sets, len(STRENGTHS) // 2)
    return predicted(fold.train, fold.test)[best, np.arange(sets)], float(STRENGTHS[best[0]])


def _predict_eegnet(
    trials: Trials, x_nCT: np.ndarray, fold: Fold, sfreq: float, classes: int, config: ProbeConfig, device: torch.device
) -> tuple[np.ndarray, int]:
    from pretrain.probe.eegnet import EEGNetConfig, predict_eegnet, train_eegnet

    fit, val = fold.train, fold.val
    if not len(val):
        inner = inner_folds(trials, fold)
        if not inner:
            raise RequestError(
                f"{config.dataset}: nothing to stop EEGNet's training by; leave EEGNet out of methods, or shard with a "
                "val split"
            )
        fit, val = inner[0]
    model, epochs = train_eegnet(
        x_nCT[fit],
        trials.labels_n[fit],
        x_nCT[val],
        trials.labels_n[val],
        sfreq=sfreq,
        classes=classes,
        config=EEGNetConfig(epochs=config.eegnet_epochs, patience=config.eegnet_patience),
        seed=config.seed,
        device=device,
    )
    return predict_eegnet(model, x_nCT[fold.test], device), epochs


def _finetuned(
    trials: Trials,
    folds: list[Fold],
    inner: list[list[tuple[np.ndarray, np.ndarray]]],
    encoder: EEGEncoder,
    classes: int,
    config: ProbeConfig,
    device: torch.device,
) -> tuple[np.ndarray, list[float]]:
    from pretrain.probe.finetune import finetune_and_predict

    labels, rates = [], []
    for fold, pairs in zip(folds, inner, strict=True):
        if len(fold.val):
            choose_by = (fold.train, fold.val)
        elif pairs:
            choose_by = pairs[0]
        elif len(config.finetune_rates) == 1:
            choose_by = (fold.train[:0], fold.train[:0])
        else:
            raise RequestError(f"{config.dataset}: nothing to choose among finetune_rates by; give one rate")
        labels_n, rate = finetune_and_predict(
            encoder,
            trials,
            fold,
            choose_by,
            classes=classes,
            epochs=config.finetune_epochs,
            rates=config.finetune_rates,
            seed=config.seed,
            device=device,
        )
        labels.append(labels_n)
        rates.append(rate)
    return np.concatenate(labels), rates


def compare(
    trials: Trials,
    folds: list[Fold],
    encoders: dict[str, EEGEncoder],
    *,
    sfreq: float,
    classes: int,
    config: ProbeConfig,
    device: torch.device,
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[float]]]:
    """Let every method label the same test trials.

    Parameters
    ----------
    trials : Trials
        All trials.
    folds : list of Fold
        The folds.
    encoders : dict of str to EEGEncoder
        Those to fine-tune, by name.
    sfreq : float
        Rate in Hz.
    classes : int
        Number of labels.
    config : ProbeConfig
        The request.
    device : torch.device
        Where networks train.

    Returns
    -------
    scored : ndarray of int
        Trials scored.
    hits : dict of str to ndarray
        By method: 1 where the label is right, else 0; [n scored], or [S, n scored] where there are several classifiers.
    chosen : dict of str to list of float
        By method: penalty chosen (of EEGNet: epochs), by fold.
    """
    eeg_nCT = trials.eeg_nCT.astype(np.float32)
    raw: dict[str, Any] = dict(trials.tokens)
    makers = {
        "band power": lambda: band_power(eeg_nCT, sfreq),
        "covariance": lambda: covariance(eeg_nCT),
        "time courses": lambda: time_courses(eeg_nCT, config.time_bins),
        "EEGNet": lambda: eeg_nCT,
    }
    raw |= {name: maker() for name, maker in makers.items() if name in config.methods}
    label_sets = {name: trials.labels_n[None] for name in raw}
    if config.shuffles:
        label_sets[ENCODER] = np.concatenate(
            [label_sets[ENCODER], shuffled_labels(trials, config.shuffles, config.seed)]
        )
    truth = np.concatenate([trials.labels_n[fold.test] for fold in folds])
    inner = [inner_folds(trials, fold) for fold in folds]
    hits: dict[str, np.ndarray] = {}
    chosen: dict[str, list[float]] = {}
    with progress("folds", len(raw) * len(folds)) as advance:
        for name, features in raw.items():
            parts = []
            x: np.ndarray | None = None
            for fold, pairs in zip(folds, inner, strict=True):
                if x is None or config.standardize == "none":
                    in_train = np.zeros(len(trials), bool)
                    in_train[fold.train] = True
                    x = standardized(features, trials.subjects_n, in_train, config.standardize)
                if name == "EEGNet":
                    labels_n, choice = _predict_eegnet(trials, x, fold, sfreq, classes, config, device)
                    parts.append(labels_n[None])
                else:
                    labels_Sn, choice = choose_and_predict(x, label_sets[name], fold, pairs, classes)
                    parts.append(labels_Sn)
                chosen.setdefault(name, []).append(float(choice))
                advance(1)
            hits[name] = (np.concatenate(parts, axis=1) == truth).astype(float)
    commonest = [np.full(len(fold.test), np.bincount(trials.labels_n[fold.train]).argmax()) for fold in folds]
    hits[COMMONEST] = (np.concatenate(commonest) == truth).astype(float)[None]
    if config.shuffles:
        hits[ENCODER], hits[SHUFFLED] = hits[ENCODER][:1], hits[ENCODER][1:]
    random = [name for name in trials.tokens if name != ENCODER]
    if random:
        hits["random weights"] = np.concatenate([hits.pop(name) for name in random])
    for name, encoder in encoders.items() if "fine-tuning" in config.methods else ():
        labels_n, rates = _finetuned(trials, folds, inner, encoder, classes, config, device)
        title = TUNED if name == ENCODER else TUNED_RANDOM
        hits[title] = np.concatenate([hits.get(title, np.empty((0, len(truth)))), (labels_n == truth)[None]])
        chosen.setdefault(title, []).extend(rates)
    order = (ENCODER, *DEFAULT_METHODS, TUNED, TUNED_RANDOM, COMMONEST, SHUFFLED)
    hits = {name: hits[name] for name in order if name in hits}
    return np.concatenate([fold.test for fold in folds]), hits, chosen


def probe(config: ProbeConfig) -> int:
    """Score an encoder's features beside the baselines.

    Parameters
    ----------
    config : ProbeConfig
        The request.

    Returns
    -------
    int
        0.

    Raises
    ------
    RequestError
        If dataset and encoder do not fit each other, or there is nothing to learn or to score.
    """
    train_set = EEGDataset(config.dataset, "train")
    if not train_set.labels:
        raise RequestError(f"{config.dataset}: no labels; a probe needs an EEG-image dataset")
    have = [name for name in ("train", "val", "test") if train_set.manifest.samples(name)]
    splits = have if config.folds == "subjects" else [s for s in have if s in ("train", "val", config.split)]
    if config.folds == "split":
        EEGDataset(config.dataset, config.split)
    for path in (config.output, config.figure):
        if path and not Path(path).absolute().parent.is_dir():
            raise RequestError(f"{path}: no such folder to write to; make it first")
    if config.figure and Path(config.figure).suffix not in (".png", ".pdf", ".svg"):
        raise RequestError(f"figure is {config.figure}; give a name that ends in .png, .pdf or .svg")
    import torch

    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.runs.distributed import choose_device

    device = choose_device(config.device)
    encoder = EEGEncoder.from_pretrained(config.encoder)
    train_set.require_preprocess(encoder.spec, f"encoder {config.encoder}")
    if config.time_bins > min(encoder.n_tokens, encoder.n_times):
        raise RequestError(
            f"time_bins is {config.time_bins}, but the encoder has {encoder.n_tokens} tokens a window; "
            "give at most as many"
        )
    encoders = {ENCODER: encoder.to(device)}
    for number in range(config.random_seeds if {"random weights", "fine-tuning"} & set(config.methods) else 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + number)
            encoders[f"random weights {number}"] = EEGEncoder(encoder.config, encoder.spec).eval().to(device)
    trials = collect(
        config.dataset, splits, encoders, bins=config.time_bins, batch_size=config.batch_size, device=device
    )
    folds, left_out = outer_folds(trials, config)
    if config.standardize == "subject" and all(
        len(np.unique(trials.labels_n[trials.subjects_n == subject])) == 1 for subject in np.unique(trials.subjects_n)
    ):
        raise RequestError(
            f"{config.dataset}: every subject has trials of one label only, and standardize: subject would take the "
            "difference away; give standardize: none, and know that subjects and labels cannot be told apart"
        )
    if "fine-tuning" in config.methods and any(set(meta["ch_names"]) != set(trials.channels) for meta in trials.metas):
        raise RequestError(f"{config.dataset}: trials of several caps; leave fine-tuning out of methods")
    if "random weights" not in config.methods:
        trials.tokens = {ENCODER: trials.tokens[ENCODER]}
    scored, hits, chosen = compare(
        trials, folds, encoders, sfreq=train_set.spec.sfreq, classes=len(train_set.labels), config=config, device=device
    )
    result = {
        "encoder": str(config.encoder),
        "dataset_id": train_set.manifest.dataset_id,
        "labels": train_set.labels,
        "chance": 1 / len(train_set.labels),
        "settings": {
            name: getattr(config, name)
            for name in ("folds", "split", "time_bins", "standardize", "random_seeds", "seed")
        },
        **summary(trials, folds, scored, hits, config),
        "left_out_for_shared_images": left_out,
        "channels_in_common": len(trials.channels),
        "chosen": chosen,
    }
    _show(result)
    if config.output:
        write_json(config.output, result)
    if config.figure:
        draw(result, config.figure)
    return EXIT_DONE


def summary(
    trials: Trials, folds: list[Fold], scored: np.ndarray, hits: dict[str, np.ndarray], config: ProbeConfig
) -> dict[str, Any]:
    """Accuracies, differences, intervals and p-values.

    Parameters
    ----------
    trials : Trials
        All trials.
    folds : list of Fold
        The folds.
    scored : ndarray of int
        Trials scored.
    hits : dict of str to ndarray
        What `compare` gave.
    config : ProbeConfig
        The request.

    Returns
    -------
    dict
        Plain numbers.
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


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Linear probe: {len(result['labels'])} labels, chance {result['chance']:.1%}")
    by_subject = any(more["p_subjects"] is not None for more in result["encoder_minus"].values())
    headings = ["method", "accuracy", "95 % interval", "encoder minus it", "p"] + ["p, subjects"] * by_subject
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, score in result["accuracy"].items():
        cells = [name, f"{score['mean']:.1%}", "{:.1%} to {:.1%}".format(*score["ci95"])]
        if more := result["encoder_minus"].get(name):
            cells += ["{:+.1%} ({:+.1%} to {:+.1%})".format(more["mean"], *more["ci95"]), f"{more['p']:.2g}"]
            cells += [f"{more['p_subjects']:.2g}"] if by_subject else []
        table.add_row(*cells)
    console = Console()
    # A file or a pipe has no width, and 80 columns break every cell of the table.
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(
        f"{result['trials']['scored']} trials of {result['images']} images and {result['subjects']['scored']} "
        f"subject(s), fitted on {result['trials']['train']} trials of {result['subjects']['train']} subject(s), "
        f"{result['fits']} fit(s). Intervals: Wilson's with the scatter between images (accuracies), bootstrap over "
        f"images (differences). p: two-sided, flipping the sign of each of {result['images']} images' difference"
        + (f"; of each of {result['subjects']['scored']} subjects'." if by_subject else ".")
    )
    if not by_subject:
        console.print(
            f"{result['subjects']['scored']} subject(s) are too few to say anything of other subjects "
            f"({FEWEST_SUBJECTS} at least): folds: subjects scores all that the dataset has."
        )
    left_out = result["left_out_for_shared_images"]
    if any(left_out.values()):
        console.print(
            f"Left out because their image is on the other side: {left_out['test']} test trials, "
            f"{left_out['train']} training trials over all fits."
        )
    if TUNED_RANDOM in result["accuracy"]:
        console.print(f"The row '{TUNED_RANDOM}' is compared with '{TUNED}'.")
    if result["subjects_in_both"]:
        console.print(f"Not independent: {len(result['subjects_in_both'])} subject(s) are fitted on and scored.")


def draw(result: dict[str, Any], path: str) -> None:
    """Draw the accuracies with their intervals.

    Parameters
    ----------
    result : dict
        What the probe found.
    path : str
        Figure to write.
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


def main(argv: list[str] | None = None) -> int:
    """Probe from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``ENCODER DATASET [--key value ...]``.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(
        lambda words: probe(
            parse_config(ProbeConfig, words, prog="dreamscale probe", positionals=("encoder", "dataset"))
        ),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
