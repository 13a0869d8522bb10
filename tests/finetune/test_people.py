"""Tests of the input layers of people, and of the calibration for a new person."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import RequestError, run_main
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from finetune.align import main
from finetune.eeg import load_encoder
from finetune.images import ImageTable, open_paired
from finetune.people import PersonLayers, PersonLayersConfig, list_people, name_person
from finetune.retrieval.maps import AlignmentRun
from finetune.targets.images import embed_images
from tests.finetune.frozen_decoder.layouts import write_clip


def test_only_the_layer_of_a_trials_person_changes_the_trial(tmp_path: Path) -> None:
    layers = PersonLayers(PersonLayersConfig(people=("a/1", "a/2")))
    x = torch.randn(3, 128, 5)
    person = layers.find(["a/2", "b/9", "a/1"])
    assert person.tolist() == [1, -1, 0]
    assert torch.equal(layers(x, person), x), "a new layer changes nothing"
    with torch.no_grad():
        layers.changes[1].copy_(torch.eye(128))
    found = layers(x, person)
    torch.testing.assert_close(found[0], 2 * x[0])
    assert torch.equal(found[1:], x[1:])
    more = layers.add(["b/9"])
    assert [change.requires_grad for change in more.changes] == [False, False, True]
    assert torch.equal(more(x, more.find(["a/2", "b/9", "a/1"])), found)
    more.save_pretrained(tmp_path / "people")
    again = PersonLayers.from_pretrained(tmp_path / "people")
    assert again.config.people == ("a/1", "a/2", "b/9") and torch.equal(again.changes[1], torch.eye(128))
    empty = PersonLayers(PersonLayersConfig())
    assert torch.equal(empty(x, empty.find(["a/1"] * 3)), x)


def write_new_person(dataset: Path, path: Path) -> Path:
    """Write the trials of a person whose electrodes were connected the other way round."""
    splits = {}
    for split, limit in (("train", 32), ("val", 16)):
        data = EEGDataset(dataset, split)
        splits[split] = [
            Sample(
                key=sample.key,
                eeg=-sample.eeg,
                meta={**sample.meta, "subject": "new"},
                image=sample.image,
                image_ext=sample.image_ext,
            )
            for sample in (data[number] for number in range(min(limit, len(data))))
        ]
    manifest = EEGDataset(dataset).manifest
    write_dataset(path, splits, manifest.preprocess, labels=manifest.labels)
    return path


def measure_similarity(run: Path, data: EEGDataset, target_MP: np.ndarray) -> float:
    """Return the mean cosine similarity of the trials of a split and their images."""
    groups = [[number] for number in range(len(data))]
    found = AlignmentRun.load(run).embed(data, groups, torch.device("cpu"))
    own = target_MP[ImageTable(data).row_of]
    return float(((found * own).sum(axis=1) / np.linalg.norm(found, axis=1)).mean())


def test_a_new_person_is_added_from_a_few_trials(
    paired_dataset: Path, encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, run, new = write_clip(tmp_path / "clip"), tmp_path / "run", tmp_path / "calibrated"
    tiny = {"training.batch_size": 16, "training.warmup": 2, "training.evaluation.every": 20}
    common = {**tiny, "tracker.kind": "none", "device": "cpu", "loss": "cosine"}

    def make_words(**values: object) -> list[str]:
        return [str(word) for name, value in {**common, **values}.items() for word in (f"--{name}", value)]

    words = make_words(dataset=paired_dataset, encoder=encoder_package, output=run, people="linear")
    assert main([*words, "--target.model", str(clip), "--training.steps", "60", "--training.lr", "3e-3"]) == 0
    found = json.loads((run / "align" / "result.json").read_text())
    assert found["people"] == ["tiny/train-0", "tiny/train-1"]
    before = load_file(run / "people" / "model.safetensors")
    assert all(bool(change.any()) for change in before.values())
    with pytest.raises(RequestError, match="an input layer for each person"):
        load_encoder(str(run / "encoder"), EEGDataset(paired_dataset))

    other = write_new_person(paired_dataset, tmp_path / "other")
    words = make_words(dataset=other, calibrate=run, output=new)
    assert main([*words, "--training.steps", "100", "--training.lr", "1e-2"]) == 0
    assert "calibration of" in capsys.readouterr().out
    for part in ("encoder", "align"):
        kept, now = (load_file(folder / part / "model.safetensors") for folder in (run, new))
        assert all(torch.equal(kept[name], now[name]) for name in kept), part
    after = load_file(new / "people" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AlignmentRun.load(new).people.config.people == (*found["people"], "tiny/new")  # type: ignore[union-attr]
    val = open_paired(other, "val")
    assert set(list_people(val)) == {name_person(val.meta(0))} == {"tiny/new"}
    target = embed_images(ImageTable(val), clip).numpy()
    assert measure_similarity(new, val, target) > measure_similarity(run, val, target)
    # Everybody of this dataset has a layer now.
    assert run_main(main, make_words(dataset=other, calibrate=new, output=tmp_path / "again")) == 2
    assert "nobody can be added" in capsys.readouterr().err


def test_an_encoder_or_a_run_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, ["--dataset", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "'encoder' is missing" in capsys.readouterr().err
