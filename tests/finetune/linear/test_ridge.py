"""Tests of the ridge regressions from time courses to vectors of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from finetune.eeg import read_means
from finetune.images import ImageTable, open_paired
from finetune.linear.ridge import RidgeMap, fit_ridge, predict_out_of_fold
from finetune.linear.time_courses import read_time_courses
from pretrain.evidence.ridge import STRENGTHS, RidgeSums, ridge_scores
from pretrain.evidence.trials import tabulate_trials


def make_targets(table: ImageTable) -> np.ndarray:
    """Make a vector for each image, whose first part depends on the label and whose rest is random."""
    target = np.random.default_rng(0).standard_normal((len(table), 5)).astype(np.float32)
    return target + np.where(table.labels == 1, 1.0, -1.0)[:, None].astype(np.float32)


def fit_in_memory(x_BF: np.ndarray, row_B: np.ndarray, target_MP: np.ndarray, new_BF: np.ndarray) -> np.ndarray:
    """Compute the embeddings of new trials with all features in memory; the reference for `fit_ridge`."""
    std_F = x_BF.std(axis=0)
    std_F = np.where(std_F > 1e-6, std_F, np.inf)
    x_BF, new_BF = (x_BF - x_BF.mean(axis=0)) / std_F, (new_BF - x_BF.mean(axis=0)) / std_F
    held = np.isin(row_B, np.unique(row_B)[::5])
    middle_P = target_MP[row_B[~held]].mean(axis=0)
    truth_BP = target_MP[row_B[held]] - middle_P
    similarities = []
    for found_BP in ridge_scores(x_BF[~held], target_MP[row_B[~held]], x_BF[held]):
        dot = ((found_BP - middle_P) * truth_BP).sum(axis=1)
        similarities.append(
            (dot / np.linalg.norm(found_BP - middle_P, axis=1) / np.linalg.norm(truth_BP, axis=1)).mean()
        )
    chosen = len(STRENGTHS) - 1 - int(np.argmax(similarities[::-1]))
    return list(ridge_scores(x_BF, target_MP[row_B], new_BF))[chosen]


@pytest.mark.parametrize("bins", [2, 8])
@pytest.mark.parametrize("fit", ["pooled", "each"])
def test_the_ridge_from_sums_is_that_of_all_features_in_memory(
    bins: int, fit: Any, paired_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two people have 64 trials with 16 channels. With 2 bins, there are fewer features than the 64 trials; with 8
    # bins, there are more.
    data = open_paired(paired_dataset, "train")
    table = ImageTable(data)
    target = make_targets(table)
    groups = [[number] for number in range(len(data))]
    whole = read_time_courses(data, groups, data.meta(0)["ch_names"], bins).astype(np.float64)
    monkeypatch.setattr("finetune.linear.ridge.PART", 7)
    model = fit_ridge(data, target, data, bins=bins, fit=fit)
    people = tabulate_trials(data).subjects_n if fit == "each" else np.full(len(data), "")
    assert set(model.penalties) == set(people.tolist())
    found = model.embed(data, groups)
    for person in np.unique(people):
        own = people == person
        expected = fit_in_memory(whole[own], table.row_of[own], target, whole[own])
        np.testing.assert_allclose(found[own], expected, rtol=1e-3, atol=1e-4)


def test_a_constant_feature_does_not_decide() -> None:
    x_BF = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    x_BF[:, 1] = 0.3
    y_BP = x_BF[:, :1] + 2
    sums = RidgeSums(3, 1)
    for part in (slice(0, 20), slice(20, 50)):
        sums.add(x_BF[part], y_BP[part])
    scale_F = sums.compute_scale()
    assert np.isinf(scale_F).tolist() == [False, True, False]
    weights_FP = sums.fit(scale_F).compute_weights(0)
    assert weights_FP[1] == 0 and weights_FP[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("features", [5, 40])
def test_sums_give_the_scores_of_the_features(features: int) -> None:
    rng = np.random.default_rng(1)
    x_nF, y_nL, new_mF = (rng.standard_normal(shape) for shape in ((30, features), (30, 3), (4, features)))
    x_nF += 1000.0
    parts = [RidgeSums(features, 3) for _ in range(3)]
    for sums, rows in zip(parts, (slice(0, 1), slice(1, 30), slice(30, 30)), strict=True):
        sums.add(x_nF[rows], y_nL[rows])
    found = (parts[0] + parts[1] + parts[2]).fit(np.ones(features))
    for number, expected in enumerate(ridge_scores(x_nF, y_nL, new_mF)):
        scores = (new_mF - found.mean_F) @ found.compute_weights(number) + found.mean_L
        np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fit", ["pooled", "each"])
def test_stored_regressions_predict_the_same_from_eeg(fit: Any, paired_dataset: Path, tmp_path: Path) -> None:
    data, val = open_paired(paired_dataset, "train"), open_paired(paired_dataset, "val")
    model = fit_ridge(data, make_targets(ImageTable(data)), val, bins=4, fit=fit, people=data)
    model.save_pretrained(tmp_path / "ridge")
    again = RidgeMap.from_pretrained(tmp_path / "ridge")
    assert again.penalties == model.penalties and again.channels == model.channels and again.width == 5
    groups = [[0], [5], [1, 3]]
    metas = [data.meta(group[0]) for group in groups]
    found = again.embed_eeg(read_means(data, groups), metas, data.spec)
    np.testing.assert_allclose(found, model.embed(data, groups), rtol=1e-5, atol=1e-6)
    if fit == "each":
        with pytest.raises(RequestError, match="there is none for tiny/val-0"):
            again.check_people([val.meta(0)])
    values = json.loads((tmp_path / "ridge" / "config.json").read_text())
    for change, message in (
        ({"bins": 5}, "do not fit config.json"),
        ({"penalties": []}, "is damaged"),
        ({"people": []}, "there is no regression"),
        ({"fit": "some"}, "no ridge regressions"),
    ):
        shutil.copytree(tmp_path / "ridge", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(RequestError, match=message):
            RidgeMap.from_pretrained(tmp_path / "bad")


def test_predictions_out_of_fold_do_not_see_their_image(paired_dataset: Path) -> None:
    data = open_paired(paired_dataset, "train")
    table = ImageTable(data)
    target = make_targets(table)
    model = fit_ridge(data, target, data, bins=2, fit="pooled")
    found = predict_out_of_fold(data, target, model)
    groups = [[number] for number in range(len(data))]
    x_BF = read_time_courses(data, groups, model.channels, 2)
    number = int(np.argmin(np.abs(STRENGTHS - model.penalties[""])))
    fold_B = table.row_of % 5
    for fold in range(5):
        kept, new = fold_B != fold, fold_B == fold
        std_F = x_BF[kept].std(axis=0)
        scores = list(ridge_scores(x_BF[kept] / std_F, target[table.row_of][kept], x_BF[new] / std_F))
        np.testing.assert_allclose(found[new], scores[number], rtol=1e-3, atol=1e-4)
