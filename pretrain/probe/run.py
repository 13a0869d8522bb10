"""Measure how useful an encoder's features are: ``dreamscale probe ENCODER DATASET``.

A linear classifier is trained on the encoder's tokens, and tested on trials of other images and (with ``folds:
subjects``) of other subjects. On the same test trials, the probe tests encoders with random weights, classical
features, EEGNet, and controls whose accuracy must be at chance. The probe ends with a verdict on the encoder by the
written rules of `pretrain.evidence.rules`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.config import command, to_dict
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError
from data_sharding.common.files import sha256_file, write_json
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.manifest import NAME as MANIFEST_NAME
from pretrain.evidence.baseline import compute_baseline_features
from pretrain.evidence.design import describe_design
from pretrain.evidence.openings import record_opening
from pretrain.evidence.rules import NotApplicable, judge
from pretrain.probe.compare import ENCODER, compare
from pretrain.probe.config import ProbeConfig
from pretrain.probe.features import Trials, collect
from pretrain.probe.folds import make_outer_folds
from pretrain.probe.report import draw, show, summarize
from pretrain.probe.verdict import MEASURE, Setting, collect_evidence

if TYPE_CHECKING:
    import torch

    from pretrain.encoder.encoder import EEGEncoder


def probe(config: ProbeConfig) -> int:
    """Measure the accuracy of an encoder's features and of the baselines.

    Parameters
    ----------
    config : ProbeConfig
        Config of the probe.

    Returns
    -------
    int
        Exit code of the command: 1 if `config.require` is signal and the verdict is not signal, else 0.

    Raises
    ------
    RequestError
        If dataset and encoder have different preprocessing, or if there are no usable training or test trials.
    """
    train_set = _open_dataset(config)
    manifest, classes = train_set.manifest, len(train_set.labels)
    design, evidence = describe_design(manifest, config.design_evidence, where=str(train_set.path / MANIFEST_NAME))
    from pretrain.runs.distributed import choose_device

    device = choose_device(config.device)
    encoders = _load_encoders(config, train_set, device)
    have = [name for name in ("train", "val", "test") if manifest.samples(name)]
    splits = have if config.folds == "subjects" else [s for s in have if s in ("train", "val", config.split)]
    openings = _record_opening(config, splits, manifest.dataset_id)
    trials = collect(
        config.dataset, splits, encoders, bins=config.time_bins, batch_size=config.batch_size, device=device
    )
    folds, left_out = make_outer_folds(trials, config)
    _check_trials(config, trials)
    if "random weights" not in config.methods:
        trials.tokens = {ENCODER: trials.tokens[ENCODER]}
    scored, predicted, chosen = compare(
        trials, folds, encoders, sfreq=train_set.spec.sfreq, classes=classes, config=config, device=device
    )
    hits = {name: (labels_Sn == trials.labels_n[scored]).astype(float) for name, labels_Sn in predicted.items()}
    setting = Setting(
        trials=trials,
        folds=folds,
        classes=classes,
        design=design,
        design_evidence=evidence,
        baseline_nF=_read_baseline(config, splits),
        seed=config.seed,
    )
    verdict = _judge(setting, predicted[ENCODER][0], config)
    result = {
        "encoder": str(config.encoder),
        "dataset_id": manifest.dataset_id,
        "labels": train_set.labels,
        "chance": 1 / classes,
        "settings": {
            name: getattr(config, name)
            for name in ("folds", "split", "time_bins", "standardize", "random_seeds", "seed")
        },
        **summarize(trials, folds, scored, hits, config),
        "left_out_for_shared_images": left_out["images"],
        "left_out_for_shared_eeg": left_out["eeg"],
        "channels_in_common": len(trials.channels),
        "chosen": chosen,
        "openings": openings,
        "verdict": verdict,
    }
    show(result)
    if config.output:
        write_json(config.output, result)
    if config.figure:
        draw(result, config.figure)
    written = " and ".join(path for path in (config.output, config.figure) if path)
    scope = f" ({verdict['scope']})" if verdict["scope"] else ""
    print(f"verdict: {verdict['word']}{scope}. {verdict['why'][0]}")
    print(
        f"dreamscale probe: {f'result in {written}' if written else 'done; --output FILE.json keeps the result'}; "
        "next: dreamscale align configs/finetune/align.yaml "
        f"--encoder {config.encoder} --dataset {config.dataset}"
    )
    return EXIT_FAILED if config.require == "signal" and verdict["word"] != "signal" else EXIT_DONE


def _record_opening(config: ProbeConfig, splits: list[str], dataset_id: str) -> str | None:
    """Record that the test split is opened, and return a sentence that says how often the split was opened.

    Return None if the probe does not read the test split.
    """
    from pretrain.encoder.package import read_package
    from pretrain.model.weights import WEIGHTS

    if "test" not in splits:
        return None
    result = config.output or config.figure
    found = record_opening(
        config.dataset,
        "test",
        command="probe",
        dataset_id=dataset_id,
        model_digest=sha256_file(read_package(config.encoder).folder / WEIGHTS),
        config=to_dict(config),
        fallback=Path(result).parent if result else Path(),
    )
    return None if found is None else found.describe("test")


def _read_baseline(config: ProbeConfig, splits: list[str]) -> NDArray[np.float32] | NotApplicable:
    """Compute features [n, F] of the EEG before the picture for all trials, if this part of the EEG is stored."""
    parts = [EEGDataset(config.dataset, split) for split in splits]
    features = compute_baseline_features([(part, range(len(part))) for part in parts])
    return features if isinstance(features, NotApplicable) else np.concatenate(features)


def _judge(setting: Setting, predicted_s: NDArray[np.int64], config: ProbeConfig) -> dict[str, Any]:
    """Return the verdict on the encoder, with the meaning of a trial's score and the chance level of the score."""
    evidence = collect_evidence(setting, predicted_s)
    verdict = judge(evidence, resamples=max(500, config.resamples), seed=config.seed)
    return {**verdict.as_json(), "measure": MEASURE, "chance": evidence.chance}


def _open_dataset(config: ProbeConfig) -> EEGDataset:
    """Open the train split, and raise an error early if the probe cannot work with this config."""
    train_set = EEGDataset(config.dataset, "train")
    if not train_set.labels:
        raise RequestError(f"{config.dataset}: the dataset has no labels; a probe needs an EEG-image dataset")
    if config.folds == "split":
        # Opening a split raises an error if the split is empty, so open the splits now, before the long computation.
        EEGDataset(config.dataset, config.split)
    for path in (config.output, config.figure):
        if path and not Path(path).absolute().parent.is_dir():
            raise RequestError(f"{path}: no such folder to write to; make the folder first")
    if config.figure and Path(config.figure).suffix not in (".png", ".pdf", ".svg"):
        raise RequestError(f"figure is {config.figure}; give a name that ends in .png, .pdf or .svg")
    return train_set


def _load_encoders(config: ProbeConfig, train_set: EEGDataset, device: torch.device) -> dict[str, EEGEncoder]:
    """Load the encoder and, if a method needs them, make encoders of the same architecture with random weights."""
    import torch

    from pretrain.encoder.encoder import EEGEncoder

    encoder = EEGEncoder.from_pretrained(config.encoder).fit_to(train_set, f"encoder {config.encoder}")
    if config.time_bins > min(encoder.n_tokens, encoder.n_times):
        raise RequestError(
            f"time_bins is {config.time_bins}, but the encoder has {encoder.n_tokens} tokens in a window; "
            f"give at most {encoder.n_tokens}"
        )
    encoders = {ENCODER: encoder.to(device)}
    for number in range(config.random_seeds if {"random weights", "fine-tuning"} & set(config.methods) else 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + number)
            encoders[f"random weights {number}"] = EEGEncoder(encoder.config, encoder.spec).eval().to(device)
    return encoders


def _check_trials(config: ProbeConfig, trials: Trials) -> None:
    """Raise an error if the results of the requested methods would have no meaning for the dataset's trials."""
    if config.standardize == "subject" and all(
        len(np.unique(trials.labels_n[trials.subjects_n == subject])) == 1 for subject in np.unique(trials.subjects_n)
    ):
        raise RequestError(
            f"{config.dataset}: every subject has trials of one label only, so 'standardize: subject' would "
            "remove the difference between labels; set 'standardize: none', but then a high accuracy may only show "
            "differences between subjects"
        )
    if "fine-tuning" in config.methods and any(set(meta["ch_names"]) != set(trials.channels) for meta in trials.metas):
        raise RequestError(
            f"{config.dataset}: fine-tuning needs the same channels in all trials, but the trials have different "
            "channels; remove 'fine-tuning' from the key 'methods'"
        )


main = command(ProbeConfig, probe, prog="dreamscale probe", positionals=("encoder", "dataset"))

if __name__ == "__main__":
    sys.exit(main())
