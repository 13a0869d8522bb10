"""Tests of folders of generated images: damaged or forged entries, and controls that do not belong to the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_sharding.common.errors import RequestError
from finetune.evaluation.controls import read_controls
from finetune.evaluation.generated import GeneratedSet, read_generated
from pretrain.evidence.rules import NotApplicable


def write(folder: Path, trials: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a folder of generated images of 4 x 4 pixels."""
    folder.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "image.png")
    about = {"dataset": "data", "dataset_id": "id", "split": "test", "labels": ["cat", "dog"], "model_digest": "1"}
    files = {"file": "image.png", "real_file": "image.png"}
    about |= {"control": "none", "trials": [trial | files for trial in trials]} | changes
    (folder / "generated.json").write_text(json.dumps(about))
    return folder


def list_trials(count: int, *, eeg: bool = True) -> list[dict[str, Any]]:
    names = [f"t{number}" for number in range(count)]
    return [
        {"key": name, "eeg_key": name if eeg else None, "image_id": name, "subject": "a", "label": number % 2}
        for number, name in enumerate(names)
    ]


@pytest.fixture
def own(tmp_path: Path) -> GeneratedSet:
    return read_generated(write(tmp_path / "own", list_trials(4)))


def test_images_without_eeg_may_be_made_for_a_part_of_the_trials(own: GeneratedSet, tmp_path: Path) -> None:
    part = write(tmp_path / "own-no_eeg", list_trials(4, eeg=False)[2:], control="no_eeg")
    found = read_controls(own, [part])["no_eeg"]
    assert isinstance(found, GeneratedSet) and [trial["key"] for trial in found.trials] == ["t2", "t3"]


@pytest.mark.parametrize("name", ["label", "image_id", "subject"])
def test_a_control_with_other_facts_about_a_trial_is_refused(name: str, own: GeneratedSet, tmp_path: Path) -> None:
    trials = list_trials(4, eeg=False)
    trials[1] |= {name: 0 if name == "label" else "x"}
    with pytest.raises(RequestError, match=f"trial t1 has another {name}"):
        read_controls(own, [write(tmp_path / "control", trials, control="no_eeg")])


def test_a_control_without_images_must_belong_to_the_images(own: GeneratedSet, tmp_path: Path) -> None:
    missing = {"control": "shuffle_within", "not_applicable": "the times are unknown"}
    found = read_controls(own, [write(tmp_path / "good", [], **missing)])
    assert found == {"shuffle_within": NotApplicable(reason="the times are unknown")}
    for number, (changes, message) in enumerate(
        [
            ({"model_digest": "2"}, "model_digest is '2'"),
            ({"dataset_id": "other"}, "dataset_id is 'other'"),
            ({"labels": ["cat"]}, "labels is "),
            ({"control": "none"}, "'none' is not the name of a control"),
            ({"control": ["x"]}, "control is"),
        ]
    ):
        with pytest.raises(RequestError, match=message):
            read_controls(own, [write(tmp_path / f"bad{number}", [], **(missing | changes))])


def test_trials_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    twice, two_labels = list_trials(3), list_trials(3)
    twice[2]["key"] = "t0"
    two_labels[1]["image_id"] = "t0"
    with pytest.raises(RequestError, match="trial t0 occurs twice"):
        read_generated(write(tmp_path / "twice", twice))
    with pytest.raises(RequestError, match="image t0 has two labels"):
        read_generated(write(tmp_path / "labels", two_labels))


@pytest.mark.parametrize("changes", [{"kind": {}}, {"average_repeats": "2"}, {"control": []}, {"model_digest": [1]}])
def test_values_of_a_wrong_type_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=next(iter(changes))):
        read_generated(write(tmp_path / "own", list_trials(2), **changes))
