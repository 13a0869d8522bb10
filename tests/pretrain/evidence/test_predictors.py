"""Tests of the predictors: each finds the fault that it looks for, and is at chance if there is no fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from pretrain.evidence.predictors import noise_features, predict_from_features, predict_from_time
from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.evidence.trials import TrialTable

PEOPLE, TRIALS, LABELS = 6, 60, 4


def make_trials(labels_PT: np.ndarray, **columns: Any) -> TrialTable:
    """Make the table of one recording for each person; each trial has an image of its own."""
    people, trials = labels_PT.shape
    values: dict[str, Any] = {
        "images_n": [f"{i}" for i in range(people * trials)],
        "subjects_n": np.repeat([f"s{p}" for p in range(people)], trials),
        "sessions_n": [""] * people * trials,
        "recordings_n": np.repeat([f"r{p}" for p in range(people)], trials),
        "times_n": np.tile(np.arange(trials) * 2.0, people),
    }
    return TrialTable(labels_n=labels_PT.ravel(), **(values | columns))


def score(table: TrialTable, test_n: np.ndarray) -> float:
    found = predict_from_time(table.select(~test_n), table.select(test_n))
    return float((found == table.labels_n[test_n]).mean())


class TestTime:
    rng = np.random.default_rng(0)
    n = PEOPLE * TRIALS
    random_split = np.random.default_rng(1).random(n) < 0.25
    new_people = np.repeat(np.arange(PEOPLE) >= 4, TRIALS)

    def blocks(self, seed: int) -> np.ndarray:
        """Return labels in blocks of five trials, in a different order for each person."""
        rng = np.random.default_rng(seed)
        return np.stack([np.repeat(rng.permutation(np.arange(TRIALS // 5) % LABELS), 5) for _ in range(PEOPLE)])

    def test_blocks_are_found_from_neighbouring_trials(self) -> None:
        assert score(make_trials(self.blocks(0)), self.random_split) > 0.7

    def test_a_common_order_is_found_for_new_people(self) -> None:
        same = np.tile(self.blocks(1)[:1], (PEOPLE, 1))
        assert score(make_trials(same), self.new_people) == 1.0
        # If some recordings take twice as long as others, the time as a fraction of the duration still predicts the
        # label.
        slow = np.tile(np.arange(TRIALS) * 2.0, PEOPLE) * np.repeat([1, 2, 1, 2, 1, 2], TRIALS)
        assert score(make_trials(same, times_n=slow), self.new_people) == 1.0

    def test_a_common_order_is_found_if_whole_blocks_are_held_out(self) -> None:
        same = np.tile(self.blocks(2)[:1], (PEOPLE, 1))
        block = np.tile(np.arange(TRIALS) // 5, PEOPLE) + np.repeat(np.arange(PEOPLE), TRIALS)
        assert score(make_trials(same), block % 4 == 0) > 0.9

    def test_labels_of_people_are_found(self) -> None:
        person = np.repeat(np.arange(PEOPLE)[:, None] % 3, TRIALS, axis=1)
        recordings = np.array([f"r{i // 10}" for i in range(self.n)])
        last = np.tile(np.arange(TRIALS) >= 40, PEOPLE)
        table = make_trials(person, recordings_n=recordings, times_n=np.full(self.n, np.nan))
        assert score(table, last) == 1.0
        assert score(table, self.random_split) == 1.0
        # Even if a person has only two recordings, one for training and one for the test, the label is found.
        two = make_trials(person, recordings_n=np.array([f"r{i // 30}" for i in range(self.n)]))
        assert score(two, np.tile(np.arange(TRIALS) >= 30, PEOPLE)) == 1.0

    @pytest.mark.parametrize("split", ["random_split", "new_people"])
    def test_a_random_order_gives_chance(self, split: str) -> None:
        scores = []
        for seed in range(8):
            rng = np.random.default_rng(seed)
            labels = np.stack([rng.permutation(np.arange(TRIALS) % LABELS) for _ in range(PEOPLE)])
            scores.append(score(make_trials(labels), getattr(self, split)))
        assert abs(np.mean(scores) - 1 / LABELS) < 0.04

    def test_labels_of_test_trials_are_not_used(self) -> None:
        table = make_trials(self.blocks(3))
        train, test = table.select(~self.random_split), table.select(self.random_split)
        other = TrialTable(**{**vars(test), "labels_n": np.roll(test.labels_n, 7), "images_n": test.images_n[::-1]})
        np.testing.assert_array_equal(predict_from_time(train, test), predict_from_time(train, other))

    def test_labels_keep_their_numbers(self) -> None:
        table = make_trials(np.where(self.blocks(4) == 0, 7, 100))
        found = predict_from_time(table.select(~self.random_split), table.select(self.random_split))
        assert set(found.tolist()) <= {7, 100}

    def test_no_training_trials(self) -> None:
        table = make_trials(self.blocks(0))
        with pytest.raises(RequestError, match="no training trials"):
            predict_from_time(table.select([]), table)


class TestFeatures:
    def test_ridge_finds_labels(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 200) * 5
        x = rng.normal(0, 1, (200, 10)) * 100 + 1e4
        x[:, 3] += 300 * (labels == 5)
        x[:, 4] += 300 * (labels == 10)
        x = np.c_[x, np.full(200, 1e6)]
        found = predict_from_features(x[:150], labels[:150], x[150:])
        assert (found == labels[150:]).mean() > 0.7
        grouped = predict_from_features(x[:150], labels[:150], x[150:], groups_n=np.arange(150) // 30)
        assert (grouped == labels[150:]).mean() > 0.7

    @pytest.mark.parametrize("features", [6, 200])
    @pytest.mark.parametrize("groups", [1, 7])
    def test_sums_over_parts_give_the_labels_of_a_regression_in_memory(
        self, features: int, groups: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = np.random.default_rng(4)
        labels, new = rng.integers(0, 3, 120), rng.integers(0, 3, 90)
        weights = rng.standard_normal((3, features))
        x, new_x = (50 + weights[seen] + rng.normal(0, 2, (len(seen), features)) for seen in (labels, new))
        x[:, 0], new_x[:, 0] = 0.1, 5.0
        monkeypatch.setattr("pretrain.evidence.predictors._ROWS", 17)
        found = predict_from_features(x, labels, new_x, groups_n=np.arange(120) % groups, seed=3)
        scale = np.where(x.std(axis=0) > 1e-9, x.std(axis=0), np.inf)
        z, new_z, one_hot = (x - x.mean(axis=0)) / scale, (new_x - x.mean(axis=0)) / scale, np.eye(3)[labels]
        hits = np.zeros(len(STRENGTHS))
        fold_n = (np.random.default_rng([3, 120]).permutation(groups) % min(5, groups))[np.arange(120) % groups]
        for fold in range(fold_n.max() + 1 if groups > 1 else 0):
            held = fold_n == fold
            scores = ridge_scores(z[~held], one_hot[~held], z[held])
            hits += [(score.argmax(axis=1) == labels[held]).sum() for score in scores]
        best = len(STRENGTHS) - 1 - int(hits[::-1].argmax()) if hits.any() else len(STRENGTHS) // 2
        expected = list(ridge_scores(z, one_hot, new_z))[best].argmax(axis=1)
        assert (found == expected).mean() > 0.98 and (expected == new).mean() > 0.4

    def test_one_training_label(self) -> None:
        assert predict_from_features(np.ones((3, 2)), [4, 4, 4], np.zeros((2, 2))).tolist() == [4, 4]

    @pytest.mark.parametrize(
        ("train", "labels", "test", "says"),
        [
            ([[np.nan], [1.0]], [0, 1], [[1.0]], "NaN"),
            ([[0.0], [1.0]], [0, 1], [[np.inf]], "test trials"),
            ([[0.0], [1.0]], [0], [[1.0]], "one label"),
            ([[0.0], [1.0]], [0, 1], [[1.0, 2.0]], "equal numbers"),
            (np.zeros((0, 1)), [], [[1.0]], "at least one"),
        ],
    )
    def test_wrong_arrays_are_refused(self, train: Any, labels: Any, test: Any, says: str) -> None:
        with pytest.raises(RequestError, match=says):
            predict_from_features(train, labels, test)

    def test_features_of_noise_show_offset_and_power(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(0, 1, (4, 3, 64))
        x[1] *= 10
        x[2] += 50
        found = noise_features(x, 128.0)
        assert found.shape == (4, 3 * 6)
        np.testing.assert_allclose(found[:, :3], x.mean(axis=-1))
        assert (found[1, 3:] - found[0, 3:]).mean() > 1.5

    def test_a_short_part_is_refused(self) -> None:
        with pytest.raises(RequestError, match="too short"):
            noise_features(np.zeros((2, 3, 2)), 128.0)
        with pytest.raises(RequestError, match="NaN"):
            noise_features(np.full((2, 3, 20), np.nan), 128.0)
