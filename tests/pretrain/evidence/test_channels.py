"""Tests of features that compare trials channel by channel, although caps and channel orders differ between
recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from pretrain.evidence.baseline import compute_baseline_features
from pretrain.evidence.channels import find_common_channels, make_row_finder
from pretrain.evidence.predictors import predict_from_features
from pretrain.evidence.rules import NotApplicable
from pretrain.evidence.trials import group_recordings, tabulate_trials

ONSET = 64
ORDERS = (["Oz", "Fz", "C3", "C4", "Pz"], ["C4", "Pz", "Oz", "Fz"], ["Fz", "T7", "C3", "Oz"])
"""Channels of the three recordings; Oz and Fz are in all recordings."""


def write_caps(path: Path, source: Path, orders: Any = ORDERS, places: Any = None) -> Path:
    """Write trials with several caps. Before the picture, the alpha rhythm is strong at Oz for label 1, at Fz for label
    0."""
    old = EEGDataset(source, "train")
    rng, splits = np.random.default_rng(0), {"train": [], "test": []}
    for number in range(90):
        recording, label = number % len(orders), int(rng.integers(2))
        names = orders[recording]
        eeg = rng.normal(0, 5, (len(names), ONSET + 128))
        wave = np.sin(2 * np.pi * 10 / 128 * np.arange(ONSET) + rng.uniform(0, 6))
        for name, strong in (("Oz", label), ("Fz", 1 - label)):
            if name in names:
                eeg[names.index(name), :ONSET] += (20.0 if strong else 5.0) * wave
        split = "test" if number % 3 == (number // 3) % 3 else "train"
        meta = {"n": len(names), "ch_names": names, "onset": ONSET, "start": 3.0 * number, "label": label}
        meta |= {
            "positions": places[recording] if places else [None] * len(names),
            "recording": f"r{recording}",
            "split": split,
        }
        meta |= {"sfreq": 128.0, "subject": f"s{recording}", "corpus": "c", "image_id": f"i{number}"}
        splits[split].append(Sample(key=f"t{number:03d}", eeg=eeg.astype(np.float32), meta=meta, image=old[0].image))
    write_dataset(path, splits, old.spec, labels=old.labels)
    return path


def read_parts(path: Path) -> list[Any]:
    return [(part, range(len(part))) for part in (EEGDataset(path, "train"), EEGDataset(path, "test"))]


def test_the_baseline_compares_channels_by_name(paired_dataset: Path, tmp_path: Path) -> None:
    parts = read_parts(write_caps(tmp_path / "caps", paired_dataset))
    assert find_common_channels(parts) == ["Oz", "Fz"]
    features = compute_baseline_features(parts)
    assert not isinstance(features, NotApplicable)
    train, test = (tabulate_trials(part) for part, _ in parts)
    # Only Oz and Fz show the label. If row 0 of one cap were compared with row 0 of another cap, and so on, Oz would be
    # compared with other electrodes, and the label could hardly be predicted.
    found = predict_from_features(features[0], train.labels_n, features[1], groups_n=group_recordings(train))
    assert np.mean(found == test.labels_n) > 0.9
    one_cap = compute_baseline_features(read_parts(write_caps(tmp_path / "cap", paired_dataset, ORDERS[:1] * 3)))
    assert not isinstance(one_cap, NotApplicable) and one_cap[0].shape[1] == features[0].shape[1] / 2 * 5


def test_rows_are_found_in_each_trial(paired_dataset: Path, tmp_path: Path) -> None:
    data = EEGDataset(write_caps(tmp_path / "caps", paired_dataset), "train")
    find_rows = make_row_finder(data, ["Oz", "Fz"])
    for number in range(len(data)):
        names = data.meta(number)["ch_names"]
        assert [names[row] for row in find_rows(number)] == ["Oz", "Fz"]


def test_without_a_common_channel_the_baseline_is_not_applicable(paired_dataset: Path, tmp_path: Path) -> None:
    orders = (["Oz", "Fz"], ["C3", "C4"], ["E1", "E2", "E3"])
    found = compute_baseline_features(read_parts(write_caps(tmp_path / "caps", paired_dataset, orders)))
    assert found == NotApplicable(reason="the trials have no channel in common")


def test_one_name_at_two_places_is_no_common_channel(paired_dataset: Path, tmp_path: Path) -> None:
    # A1 is at the vertex in a BioSemi cap, and on the left ear in the 10-20 system.
    orders = (["A1", "Fz"], ["Fz", "A1"], ["A1", "Fz"])
    vertex, ear, front = [0.0, 0.0, 0.1], [-0.08, 0.0, -0.02], [0.0, 0.07, 0.07]
    places = ([vertex, front], [front, ear], [vertex, [0.0, 0.08, 0.06]])
    parts = read_parts(write_caps(tmp_path / "caps", paired_dataset, orders, places))
    assert find_common_channels(parts) == ["Fz"]
    unknown = read_parts(write_caps(tmp_path / "unknown", paired_dataset, orders, ([None] * 2, places[1], [None] * 2)))
    assert sorted(find_common_channels(unknown)) == ["A1", "Fz"]
