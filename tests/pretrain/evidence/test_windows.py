"""Tests of the search for test trials whose EEG is also in the training trials or in the pretraining data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.fingerprints import write_fingerprints
from data_sharding.audit.leakage import Contents
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from data_sharding.processing.survey import assess
from finetune.evaluation.evidence import Setting
from finetune.generation.trials import list_trials
from pretrain.evidence.windows import PRETRAINING, TRAINING, find_known_eeg

SPEC = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=25.0, window=64, stride=64)


def make_sample(key: str, recording: str, start: float, seed: int, **facts: Any) -> Sample:
    """Make a window of noise; windows with an equal seed have equal EEG."""
    names = ["Fz", "Cz", "Pz"]
    meta: dict[str, Any] = {
        "n": 3, "ch_names": names, "positions": [None] * 3, "reference": "average", "sfreq": 64.0, "start": start,
        "recording": recording, "subject": recording.split("-")[0], "session": "", "corpus": "tiny", "bads": [],
    }  # fmt: skip
    eeg = np.random.default_rng(seed).normal(0, 10, (3, 64)).astype(np.float32)
    return Sample(key=key, eeg=eeg, meta=meta | facts)


def make_row(key: str, seconds: float) -> LedgerRow:
    """Make the ledger row of a recording with eight channels."""
    return LedgerRow(
        **{"key": key, "status": "sharded", "corpus": "tiny", "path": key, "files": [key], "bytes": 1, "sha256": key},
        **{"format": "edf", "reader": "edf", "subject": key, "sfreq": 64.0, "seconds": seconds, "unit": "plausible"},
        **{"unit_factor": 1.0, "line_freq": 50.0, "line_freq_from": "spectrum", "n_eeg": 8, "n_kept": 8},
    )


def make_trial(split: str, number: int, recording: str, start: float, seed: int) -> Sample:
    facts = {"image_id": f"{split}-{number}", "label": number % 2, "label_name": "ab"[number % 2], "split": split}
    return make_sample(f"{split}-{number:03d}", recording, start, seed, **facts)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset with two test trials whose EEG is also in the train split: test trial 1 overlaps in time with a
    training trial, and test trial 2 has EEG equal to that of a training trial."""
    path = tmp_path_factory.mktemp("windows") / "paired"
    train = [make_trial("train", i, "p1-a", 2.0 * i, i) for i in range(4)]
    test = [
        make_trial("test", 0, "p1-a", 9.0, 100),
        make_trial("test", 1, "p1-a", 6.9, 101),  # Overlaps the last training window, which ends at 7 s.
        make_trial("test", 2, "p2-a", 0.0, 3),  # Equal to the EEG of the last training trial.
        make_trial("test", 3, "p2-a", 2.0, 103),
        make_trial("test", 4, "p2-a", 7.0, 104),  # The training windows are of another recording.
    ]
    write_dataset(path, {"train": train, "test": test}, SPEC, labels=["a", "b"])
    return path


def test_eeg_of_the_training_trials_is_found_by_time_and_by_content(dataset: Path) -> None:
    train, data = (EEGDataset(dataset, split) for split in ("train", "test"))
    assert find_known_eeg(train, data).trials[TRAINING].tolist() == [False, True, True, False, False]
    # Here, the EEG of a trial is the mean over one or two presentations. If the EEG of one of these presentations is in
    # the training trials, the model counts as knowing the whole trial.
    trials = list_trials(data, [[0], [2, 3], [3, 4]], [[0], [2, 3], [3, 4]])
    setting = Setting.read(train, data, trials, copies=[])
    assert setting.known_eeg.trials[TRAINING].tolist() == [False, True, False]


@pytest.mark.parametrize("windows", [True, False], ids=["windows", "names"])
def test_eeg_and_people_of_the_pretraining_data_are_found(dataset: Path, tmp_path: Path, windows: bool) -> None:
    before = [make_sample("w-0", "p2-a", 1.5, 200), make_sample("w-1", "other-a", 0.0, 104)]
    # Pretraining reads only the train split of its dataset, so windows of the test split must not be found.
    unread = [make_sample("w-2", "p2-a", 0.0, 3), make_sample("w-3", "p1-a", 9.0, 201)]
    write_dataset(tmp_path / "unpaired", {"train": before, "test": unread}, SPEC)
    train, data = (EEGDataset(dataset, split) for split in ("train", "test"))
    contents = [Contents.read(path, windows=windows) for path in (tmp_path / "unpaired", dataset)]
    known = find_known_eeg(train, data, *contents)
    assert known.trials[PRETRAINING].tolist() == [False, False, False, True, windows]
    assert known.people_in_pretraining == 1


def test_a_recording_that_is_stored_under_two_names_is_found_by_its_signal(tmp_path: Path) -> None:
    path, rng = tmp_path / "paired", np.random.default_rng(0)
    signal = np.cumsum(rng.normal(0, 10, (8, 4000)), axis=1)
    signal -= signal.mean(axis=1, keepdims=True)
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    # The second recording is the first with its channels in another order, so no window equals a window of the first.
    for split, recording, values in (("train", "p1-a", signal), ("test", "p2-a", signal[::-1])):
        for number, start in enumerate(range(640, 1280, 128)):
            trial = make_trial(split, number, recording, start / 64, number)
            eeg = values[:3, start : start + 64].astype(np.float32)
            splits[split].append(Sample(key=trial.key, eeg=eeg, meta=trial.meta))
    write_dataset(path, splits, SPEC, labels=["a", "b"])
    points = {"p1-a": assess(signal, 64.0).fingerprint, "p2-a": assess(signal[::-1], 64.0).fingerprint}
    write_fingerprints(path / FINGERPRINTS, [make_row(name, 4000 / 64) for name in points], points.__getitem__)
    train, data = (EEGDataset(path, split) for split in ("train", "test"))
    assert not find_known_eeg(train, data).trials[TRAINING].any()
    contents = Contents.read(path, windows=False)
    assert find_known_eeg(train, data, contents=contents).trials[TRAINING].all()
