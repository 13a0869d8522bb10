"""Run every method of the probe on the same test trials.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.progress import progress
from pretrain.evidence.features import band_power
from pretrain.probe.config import DEFAULT_METHODS, ProbeConfig
from pretrain.probe.features import Trials, covariance, standardize, time_courses
from pretrain.probe.folds import Fold, make_inner_folds, shuffle_labels
from pretrain.probe.ridge import choose_and_predict

if TYPE_CHECKING:
    import torch

    from pretrain.encoder.encoder import EEGEncoder

TUNED, TUNED_RANDOM = "encoder, fine-tuned", "random weights, fine-tuned"
ENCODER, COMMONEST, SHUFFLED = "encoder", "commonest label", "encoder, labels shuffled"

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""Inner folds, each with the indices of its training trials and of its held-out trials."""


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
    """Let every method predict the labels of the same test trials.

    Parameters
    ----------
    trials : Trials
        All trials of the dataset.
    folds : list of Fold
        The training and test trials of each fold.
    encoders : dict of str to EEGEncoder
        Encoders to fine-tune, by their names.
    sfreq : float
        Sampling rate in Hz.
    classes : int
        Number of labels.
    config : ProbeConfig
        Config of the probe.
    device : torch.device
        Device on which networks are trained.

    Returns
    -------
    scored : ndarray of int
        Indices of the test trials of all folds.
    predicted : dict of str to ndarray of int
        For each method, the predicted labels: an array of shape [S, number of scored trials], with one row for each of
        the S classifiers that were trained, such as one for each random encoder.
    chosen : dict of str to list of float
        For each method, the value that was chosen in each fold: the number of the best epoch for EEGNet, the learning
        rate for fine-tuning, and the ridge penalty for all other methods.
    """
    features = _compute_features(trials, sfreq, config)
    label_sets = {name: trials.labels_n[None] for name in features}
    if config.shuffles:
        shuffled_Sn = shuffle_labels(trials, config.shuffles, config.seed)
        label_sets[ENCODER] = np.concatenate([label_sets[ENCODER], shuffled_Sn])
    inner = [make_inner_folds(trials, fold) for fold in folds]
    predicted: dict[str, np.ndarray] = {}
    chosen: dict[str, list[float]] = {}
    with progress("folds", len(features) * len(folds)) as advance:
        for name, features_nF in features.items():
            parts = []
            x: np.ndarray | None = None
            for fold, pairs in zip(folds, inner, strict=True):
                if x is None or config.standardize == "none":
                    in_train = np.zeros(len(trials), bool)
                    in_train[fold.train] = True
                    x = standardize(features_nF, trials.subjects_n, in_train, config.standardize)
                if name == "EEGNet":
                    labels_n, choice = _predict_eegnet(trials, x, fold, sfreq, classes, config, device)
                    parts.append(labels_n[None])
                else:
                    labels_Sn, choice = choose_and_predict(x, label_sets[name], fold, pairs, classes)
                    parts.append(labels_Sn)
                chosen.setdefault(name, []).append(float(choice))
                advance(1)
            predicted[name] = np.concatenate(parts, axis=1)
    commonest = [np.full(len(fold.test), np.bincount(trials.labels_n[fold.train]).argmax()) for fold in folds]
    predicted[COMMONEST] = np.concatenate(commonest)[None]
    if config.shuffles:
        predicted[ENCODER], predicted[SHUFFLED] = predicted[ENCODER][:1], predicted[ENCODER][1:]
    random = [name for name in trials.tokens if name != ENCODER]
    if random:
        predicted["random weights"] = np.concatenate([predicted.pop(name) for name in random])
    for name, encoder in encoders.items() if "fine-tuning" in config.methods else ():
        labels_n, rates = _fine_tune(trials, folds, inner, encoder, classes, config, device)
        title = TUNED if name == ENCODER else TUNED_RANDOM
        predicted[title] = np.stack([*predicted.get(title, []), labels_n])
        chosen.setdefault(title, []).extend(rates)
    order = (ENCODER, *DEFAULT_METHODS, TUNED, TUNED_RANDOM, COMMONEST, SHUFFLED)
    predicted = {name: predicted[name] for name in order if name in predicted}
    return np.concatenate([fold.test for fold in folds]), predicted, chosen


def _compute_features(trials: Trials, sfreq: float, config: ProbeConfig) -> dict[str, np.ndarray]:
    """Return the features of all trials, before standardisation: one array for each encoder and each other method."""
    eeg_nCT = trials.eeg_nCT.astype(np.float32)
    makers = {
        "band power": lambda: band_power(eeg_nCT, sfreq),
        "covariance": lambda: covariance(eeg_nCT),
        "time courses": lambda: time_courses(eeg_nCT, config.time_bins),
        "EEGNet": lambda: eeg_nCT,
    }
    found: dict[str, Any] = dict(trials.tokens)
    return found | {name: make() for name, make in makers.items() if name in config.methods}


def _predict_eegnet(
    trials: Trials, x_nCT: np.ndarray, fold: Fold, sfreq: float, classes: int, config: ProbeConfig, device: torch.device
) -> tuple[np.ndarray, int]:
    """Train EEGNet on a fold; return the predicted labels of the test trials and the number of the best epoch."""
    from pretrain.probe.eegnet import EEGNetConfig, predict_eegnet, train_eegnet

    fit, val = fold.train, fold.val
    if not len(val):
        inner = make_inner_folds(trials, fold)
        if not inner:
            raise RequestError(
                f"{config.dataset}: there are no trials for EEGNet's validation loss; leave EEGNet out of methods, or "
                "shard with a val split"
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


def _fine_tune(
    trials: Trials,
    folds: list[Fold],
    inner: list[Pairs],
    encoder: EEGEncoder,
    classes: int,
    config: ProbeConfig,
    device: torch.device,
) -> tuple[np.ndarray, list[float]]:
    """Fine-tune an encoder on each fold; return the predicted labels of all test trials and the learning rates."""
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
            raise RequestError(
                f"{config.dataset}: there are no held-out trials for choosing among the learning rates of "
                "'finetune_rates'; give only one rate"
            )
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
