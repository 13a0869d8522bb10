"""Tests of the metrics of classifiers and of their control with shuffled categories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.dm_re2i.classification.measure import save_results, score, summarise
from finetune.dm_re2i.config import EVRNetStage
from finetune.dm_re2i.train_evrnet import choose_targets


def _logits(answers: list[int], classes: int) -> torch.Tensor:
    """Return scores: the highest score for the class in `answers`, and lower scores for the next classes in cyclic
    order."""
    distance = (torch.arange(classes)[None] - torch.tensor(answers)[:, None]) % classes
    return -distance.float()


def test_metrics_of_known_answers() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 7, 7])
    answers = [0, 7, 1, 4, 2, 2, 7, 2]
    found = score(_logits(answers, 8), labels)
    assert found["accuracy"] == 5 / 8
    # The true class of a trial has the rank (label - answer) mod 8 among the scores: 0, 1, 0, 5, 0, 0, 0, 5.
    assert found["top5"] == 6 / 8
    # Compute kappa by its definition. The agreement is 5/8. The agreement by chance is the sum of (share of answers)
    # times (share of labels) over the classes.
    answered, true = (np.bincount(x, minlength=8) / 8 for x in (answers, labels.numpy()))
    chance = float((answered * true).sum())
    assert found["kappa"] == pytest.approx((5 / 8 - chance) / (1 - chance))
    p = _logits(answers, 8).double().softmax(dim=1)[range(8), labels]
    assert found["loss"] == pytest.approx(float(-p.log().mean()))
    assert "top5" not in score(_logits([0, 1, 2], 3), torch.tensor([0, 1, 2]))
    assert "kappa" not in score(_logits([1, 1], 3), torch.tensor([1, 1]))


def test_results_of_each_person_and_their_files(tmp_path: Path) -> None:
    labels, answers = [0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 1, 0]
    people, images = ["b", "b", "b", "a", "a", "a"], ["x", "y", "z", "x", "y", "z"]
    found = summarise(_logits(answers, 3), torch.tensor(labels), people, images, ["cat", "dog", "sun"])
    assert found["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]  # rows: true classes
    assert list(found["subjects"]) == ["a", "b"] and found["trials"] == 6 and found["chance"] == 1 / 3
    assert [found["subjects"][name]["accuracy"] for name in "ab"] == [pytest.approx(1 / 3), 1.0]
    for low, high in (found["interval_images"], found["interval_subjects"]):
        assert found["accuracy"] == pytest.approx(4 / 6) and low < 4 / 6 < high
    save_results({"split": "val", **found}, tmp_path)
    stored = json.loads((tmp_path / "classification.json").read_text())
    assert stored["confusion"] == found["confusion"] and stored["labels"] == ["cat", "dog", "sun"]
    for name in ("confusion.png", "subjects.png"):
        with Image.open(tmp_path / "plots" / name) as image:
            assert min(image.size) > 200 and len(set(image.convert("L").resize((40, 40)).getdata())) > 5


class _Table:
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    row_of = np.tile(np.arange(60), 3)

    def __len__(self) -> int:
        return 60


def test_shuffled_categories_are_those_of_whole_images() -> None:
    table: object = _Table()
    true = _Table.labels[choose_targets(table, EVRNetStage(), 0)]  # type: ignore[arg-type]
    assert (true == _Table.labels[_Table.row_of]).all()
    shuffled = _Table.labels[choose_targets(table, EVRNetStage(permute_labels=True), 0)]  # type: ignore[arg-type]
    assert (shuffled.reshape(3, 60) == shuffled[:60]).all() and (shuffled != true).mean() > 0.3
    assert (np.bincount(shuffled) == np.bincount(true)).all()
    again = _Table.labels[choose_targets(table, EVRNetStage(permute_labels=True), 0)]  # type: ignore[arg-type]
    other = _Table.labels[choose_targets(table, EVRNetStage(permute_labels=True), 1)]  # type: ignore[arg-type]
    assert (again == shuffled).all() and (other != shuffled).any()
