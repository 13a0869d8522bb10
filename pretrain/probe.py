"""What an encoder's features are worth: ``dreamscale probe ENCODER DATASET``.

A linear classifier on pooled tokens, fitted on the train split and scored on the test split, whose subjects and images
it has not seen; beside it the same classifier on an encoder with random weights and on band power.

Letters in names: n trials, B trials of a batch, C channels, T time samples, F features.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any, Literal

import numpy as np

from data_sharding.config import parse_config
from data_sharding.dataset import EEGDataset
from data_sharding.errors import EXIT_DONE, RequestError, run_main
from data_sharding.files import write_json
from data_sharding.loader import sequential
from data_sharding.progress import progress

BANDS = {"delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 45)}
"""Edges in Hz."""
STRENGTHS = np.logspace(-5, 1, 7)
"""Inverse strengths of the classifier's penalty, chosen on the val split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe of an encoder on a labelled dataset, with baselines."""

    encoder: str
    """Encoder package: a directory, or a name on the Hugging Face hub."""
    dataset: str
    """Labelled (EEG-image) dataset, preprocessed as the encoder expects."""
    output: str | None = None
    """JSON file to write the result to as well."""
    split: Literal["test", "val"] = "test"
    """Split to score on."""
    seed: int = 0
    """Of the random-weights encoder and of the bootstrap."""
    resamples: int = 2000
    """Bootstrap resamples for the intervals."""
    batch_size: int = 64
    """Windows encoded at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""

    def __post_init__(self) -> None:
        if self.resamples < 100 or self.batch_size < 1:
            raise ValueError("resamples must be at least 100 and batch_size at least 1")


@dataclasses.dataclass(kw_only=True)
class Trials:
    """Labelled trials of a split."""

    labels_n: np.ndarray
    """[n] numbers of the labels."""
    images_n: np.ndarray
    """[n] identities of the images."""
    subjects_n: np.ndarray
    """[n] subjects."""
    features: dict[str, np.ndarray]
    """[n, F] by kind of feature."""


def band_power(x_BCT: np.ndarray, sfreq: float) -> np.ndarray:
    """Logarithmic power by channel and band.

    Parameters
    ----------
    x_BCT : ndarray, [B, C, T]
        Signal.
    sfreq : float
        Rate in Hz.

    Returns
    -------
    ndarray, [B, C x 5]
        Features.
    """
    T = x_BCT.shape[-1]
    power = np.abs(np.fft.rfft(x_BCT * np.hanning(T), axis=-1)) ** 2
    frequency = np.fft.rfftfreq(T, 1 / sfreq)
    parts = []
    for low, high in BANDS.values():
        inside = (frequency >= low) & (frequency < high)
        if inside.any():
            parts.append(np.log10(power[..., inside].mean(axis=-1) + 1e-12))
    return np.stack(parts, axis=-1).reshape(len(x_BCT), -1)


def collect(dataset: EEGDataset, encoders: dict[str, Any], batch_size: int, device: Any) -> Trials:
    """Compute every kind of feature of a split.

    Parameters
    ----------
    dataset : EEGDataset
        The split.
    encoders : dict of str to EEGEncoder
        By name.
    batch_size : int
        Windows encoded at once.
    device : torch.device
        Where the encoders are.

    Returns
    -------
    Trials
        Features and labels.

    Raises
    ------
    RequestError
        If a sample has no label.
    """
    import torch

    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*encoders, "band power")}
    metas: list[dict[str, Any]] = []
    with progress(f"features of {dataset.split}", len(dataset)) as advance:
        for batch in sequential(dataset, batch_size):
            eeg_BCT = batch.padded(dtype=torch.float32)
            x_BCT = dataset.spec.scale_for_model(eeg_BCT.to(device))
            with torch.no_grad():
                for name, encoder in encoders.items():
                    tokens_BND = encoder.tokens(x_BCT, **encoder.inputs_of(batch.metas, device))
                    parts[name].append(tokens_BND.mean(dim=1).float().cpu().numpy())
            parts["band power"].append(band_power(eeg_BCT.numpy(), dataset.spec.sfreq))
            metas += batch.metas
            advance(len(batch.keys))
    if any(meta.get("label") is None for meta in metas):
        raise RequestError(
            f"{dataset.path} ({dataset.split}): samples without a label; a probe needs an EEG-image dataset"
        )
    return Trials(
        labels_n=np.array([meta["label"] for meta in metas]),
        images_n=np.array([str(meta.get("image_id", number)) for number, meta in enumerate(metas)]),
        subjects_n=np.array([str(meta["subject"]) for meta in metas]),
        features={name: np.concatenate(arrays) for name, arrays in parts.items()},
    )


def fit_and_predict(name: str, train: Trials, val: Trials | None, test: Trials) -> np.ndarray:
    """Fit the classifier and label the test trials.

    Parameters
    ----------
    name : str
        Kind of feature.
    train, val, test : Trials
        The splits; the penalty is chosen on val, and is 0.01 where there is none. Test is only predicted.

    Returns
    -------
    ndarray, [n]
        Predicted labels of the test trials.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(strength: float) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(train.features[name], train.labels_n)

    if val is None:
        return fitted(0.01).predict(test.features[name])
    models = [fitted(strength) for strength in STRENGTHS]
    # The strongest penalty among equals.
    best = max(models, key=lambda model: model.score(val.features[name], val.labels_n))
    return best.predict(test.features[name])


def accuracy_interval(hits_n: np.ndarray, images_n: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy, where trials of one image are not independent.

    Parameters
    ----------
    hits_n : ndarray, [n]
        1 for a right answer, else 0.
    images_n : ndarray, [n]
        The image of each trial.

    Returns
    -------
    low, high : float
        Wilson's interval for the number of independent trials that the scatter between images leaves.
    """
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=hits_n), np.bincount(image_n)
    n, images, share = len(hits_n), len(sums), float(hits_n.mean())
    # All right or all wrong shows no scatter: count each image once.
    effect = n / images
    if 0 < share < 1 and images > 1:
        clustered = ((sums - share * counts) ** 2).sum() / n**2 * images / (images - 1)
        effect = max(1.0, clustered / (share * (1 - share) / n))
    effective, z = n / effect, 1.959964
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def difference_interval(more_n: np.ndarray, images_n: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean difference, resampling whole images.

    Parameters
    ----------
    more_n : ndarray, [n]
        A number a trial.
    images_n : ndarray, [n]
        The image of each trial: trials of one image are not independent.
    resamples : int
        Number of resamples.
    seed : int
        Of the resampling.

    Returns
    -------
    low, high : float
        The interval.
    """
    _, image_n = np.unique(images_n, return_inverse=True)
    sums, counts = np.bincount(image_n, weights=more_n), np.bincount(image_n)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
    train_set, test_set = EEGDataset(config.dataset, "train"), EEGDataset(config.dataset, config.split)
    if not train_set.labels:
        raise RequestError(f"{config.dataset}: no labels; a probe needs an EEG-image dataset")
    # Penalties are not chosen on what is scored.
    with_val = config.split != "val" and bool(train_set.manifest.samples("val"))
    import torch

    from pretrain.distributed import choose_device
    from pretrain.encoder import EEGEncoder, require_same_preprocessing

    device = choose_device(config.device)
    encoder = EEGEncoder.from_pretrained(config.encoder)
    require_same_preprocessing(encoder, train_set)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        random = EEGEncoder(encoder.config, encoder.spec).eval()
    encoders = {"encoder": encoder.to(device), "random weights": random.to(device)}
    train = collect(train_set, encoders, config.batch_size, device)
    val = collect(EEGDataset(config.dataset, "val"), encoders, config.batch_size, device) if with_val else None
    test = collect(test_set, encoders, config.batch_size, device)
    if len(np.unique(train.labels_n)) < 2:
        raise RequestError(f"{config.dataset}: the training split has one label only; there is nothing to tell apart")
    shared_subjects = sorted(set(train.subjects_n) & set(test.subjects_n))
    shared_images = len(set(train.images_n) & set(test.images_n))
    hits = {
        name: (fit_and_predict(name, train, val, test) == test.labels_n).astype(float)
        for name in ("encoder", "random weights", "band power")
    }
    commonest = np.bincount(train.labels_n).argmax()
    hits["commonest label"] = (test.labels_n == commonest).astype(float)
    result: dict[str, Any] = {
        "encoder": str(config.encoder),
        "dataset_id": train_set.manifest.dataset_id,
        "split": config.split,
        "labels": train_set.labels,
        "trials": {"train": len(train.labels_n), config.split: len(test.labels_n)},
        "subjects": {"train": len(set(train.subjects_n)), config.split: len(set(test.subjects_n))},
        "images": len(set(test.images_n)),
        "subjects_in_both": shared_subjects,
        "images_in_both": shared_images,
        "chance": 1 / len(train_set.labels),
        "accuracy": {},
        "encoder_minus": {},
    }
    for name, hit_n in hits.items():
        low, high = accuracy_interval(hit_n, test.images_n)
        result["accuracy"][name] = {"mean": float(hit_n.mean()), "ci95": [low, high]}
        if name != "encoder":
            more_n = hits["encoder"] - hit_n
            low, high = difference_interval(more_n, test.images_n, config.resamples, config.seed)
            result["encoder_minus"][name] = {"mean": float(more_n.mean()), "ci95": [low, high]}
    _show(result)
    if config.output:
        write_json(config.output, result)
    return EXIT_DONE


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    split = result["split"]
    table = Table(title=f"Linear probe: {len(result['labels'])} labels, chance {result['chance']:.1%}")
    for heading in ("features", "accuracy", "95 % interval", "encoder is better by"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for name, score in result["accuracy"].items():
        more = result["encoder_minus"].get(name)
        table.add_row(
            name,
            f"{score['mean']:.1%}",
            "{:.1%} to {:.1%}".format(*score["ci95"]),
            "{:+.1%} ({:+.1%} to {:+.1%})".format(more["mean"], *more["ci95"]) if more else "",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{result['trials'][split]} trials of {result['images']} images and {result['subjects'][split]} subject(s), "
        f"trained on {result['trials']['train']} trials of {result['subjects']['train']} subject(s); "
        "intervals are over images, not over subjects."
    )
    if result["subjects_in_both"] or result["images_in_both"]:
        console.print(
            f"Not independent: {len(result['subjects_in_both'])} subject(s) and {result['images_in_both']} image(s) "
            "are in both splits."
        )


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
