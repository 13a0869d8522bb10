"""Tests of the trial table, of neighbourhoods in time, and of permutations within groups."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from pretrain.evidence.trials import (
    TrialTable,
    derange_within,
    find_blocks,
    find_neighbourhoods,
    group_recordings,
    join_tables,
    label_is_constant_in_recordings,
    merge_copies,
    tabulate_trials,
)


def make_table(labels: Any, **columns: Any) -> TrialTable:
    n = len(labels)
    values: dict[str, Any] = {
        "images_n": [f"image-{i}" for i in range(n)],
        "subjects_n": ["s1"] * n,
        "sessions_n": [""] * n,
        "recordings_n": ["r1"] * n,
        "times_n": np.arange(n, dtype=float),
    }
    return TrialTable(labels_n=labels, **(values | columns))


class TestTable:
    @pytest.mark.parametrize(
        ("columns", "says"),
        [
            ({"times_n": [0.0]}, "one value for each trial"),
            ({"times_n": [0.0, np.inf, 2.0]}, "infinite"),
            ({"labels_n": [0.5, 1.0, 2.0]}, "whole number"),
        ],
    )
    def test_wrong_columns_are_refused(self, columns: dict[str, Any], says: str) -> None:
        table = make_table([0, 1, 0])
        values = {name: getattr(table, name) for name in table.__dataclass_fields__} | columns
        with pytest.raises(RequestError, match=says):
            TrialTable(**values)

    def test_selecting_and_joining(self) -> None:
        table = make_table([0, 1, 2])
        both = join_tables(table.select([2]), table.select(np.array([True, False, False])))
        assert both.labels_n.tolist() == [2, 0]
        assert both.images_n.tolist() == ["image-2", "image-0"]

    def test_the_table_of_a_dataset(self, paired_dataset: Path) -> None:
        data = EEGDataset(paired_dataset, "train")
        table = tabulate_trials(data)
        assert len(table) == len(data)
        for number in range(len(data)):
            meta = data.meta(number)
            assert table.labels_n[number] == meta["label"]
            assert table.images_n[number] == meta["image_id"]
            assert table.subjects_n[number] == f"{meta['corpus']}/{meta['subject']}"
        assert np.isfinite(table.times_n).all()
        assert np.isnan(tabulate_trials(data, times_known=False).times_n).all()

    def test_connected_copies_get_one_name(self) -> None:
        names = merge_copies(["d", "a", "b", "c", "e"], [("c", "d"), ("b", "c"), ("x", "b")])
        assert names.tolist() == ["b", "a", "b", "b", "e"]


class TestTime:
    def test_blocks_are_runs_of_one_label_in_the_order_of_time(self) -> None:
        table = make_table(
            [0, 1, 0, 1, 1, 1, 0],
            times_n=[0.0, 2.0, 1.0, 3.0, 0.0, np.nan, np.nan],
            recordings_n=["a", "a", "a", "a", "b", "b", "b"],
        )
        assert find_blocks(table).tolist() == [0, 1, 0, 1, 2, 3, 4]

    def test_neighbourhoods_follow_time_and_not_labels(self) -> None:
        rng = np.random.default_rng(0)
        times = rng.permutation(20).astype(float)
        table = make_table(np.arange(40) % 3, times_n=[*times, *times], recordings_n=["a"] * 20 + ["b"] * 20)
        found = find_neighbourhoods(table, 6)
        for rows in (np.arange(20), np.arange(20, 40)):
            in_time = found[rows[np.argsort(table.times_n[rows])]]
            assert (np.diff(in_time) >= 0).all()
            assert sorted(np.unique(in_time, return_counts=True)[1]) == [6, 7, 7]
        assert not set(found[:20]) & set(found[20:])

    def test_a_trial_of_unknown_time_has_no_neighbours(self) -> None:
        found = find_neighbourhoods(make_table([0] * 5, times_n=[0.0, np.nan, 1.0, np.nan, 2.0]), 8)
        assert found[0] == found[2] == found[4]
        assert len({found[0], found[1], found[3]}) == 3

    def test_an_unknown_recording_is_the_session_of_the_person(self) -> None:
        table = make_table(
            [0] * 4, recordings_n=[""] * 4, subjects_n=["a", "a", "b", "a"], sessions_n=["", "2", "", ""]
        )
        groups = group_recordings(table)
        assert groups[0] == groups[3]
        assert len(set(groups.tolist())) == 3

    def test_constant_labels(self) -> None:
        recordings = np.repeat([f"r{i}" for i in range(10)], 6)
        constant = np.repeat(np.arange(10) % 2, 6)
        assert label_is_constant_in_recordings(make_table(constant, recordings_n=recordings))
        mixed = constant.copy()
        mixed[3] = 1 - mixed[3]
        assert not label_is_constant_in_recordings(make_table(mixed, recordings_n=recordings))
        # If all trials have the same label, or each recording has only one trial, then one label in each recording
        # proves nothing.
        assert not label_is_constant_in_recordings(make_table([1] * 60, recordings_n=recordings))
        assert not label_is_constant_in_recordings(make_table([0, 1] * 5, recordings_n=[f"r{i}" for i in range(10)]))


class TestDerangement:
    @pytest.mark.parametrize("seed", range(5))
    def test_every_trial_gets_another_image_of_its_group(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        groups = rng.integers(0, 12, 100)
        images = np.array([f"{group}-{image}" for group, image in zip(groups, rng.integers(0, 6, 100), strict=True)])
        order, alone = derange_within(groups, images, seed)
        assert sorted(order) == list(range(100))
        assert (groups[order] == groups).all()
        assert ((order == np.arange(100)) == alone).all()
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            most = max(np.unique(images[rows], return_counts=True)[1])
            kept = int((images[order[rows]] == images[rows]).sum())
            assert kept == max(0, 2 * most - len(rows))

    def test_a_group_of_one_trial_is_reported(self) -> None:
        order, alone = derange_within([0, 0, 1, 2, 2], list("abcde"), 0)
        assert alone.tolist() == [False, False, True, False, False]
        assert order.tolist() == [1, 0, 2, 4, 3]

    def test_a_group_of_one_image_gets_another_trial(self) -> None:
        order, alone = derange_within([0] * 4, ["a"] * 4, 3)
        assert (order != np.arange(4)).all()
        assert not alone.any()

    def test_the_smallest_derangements_are_exact(self) -> None:
        # Of all permutations that move every trial, none gives more trials another image than the result does.
        for images in ("aab", "abb", "aabb", "aaab", "abc", "aabc", "aaabb"):
            n = len(images)
            moves = [order for order in itertools.permutations(range(n)) if all(i != j for i, j in enumerate(order))]
            best = max(sum(images[i] != images[j] for i, j in enumerate(order)) for order in moves)
            order, _ = derange_within([0] * n, list(images), 1)
            assert sum(images[i] != images[j] for i, j in enumerate(order)) == best, images

    def test_no_trials(self) -> None:
        order, alone = derange_within([], [], 0)
        assert len(order) == len(alone) == 0
