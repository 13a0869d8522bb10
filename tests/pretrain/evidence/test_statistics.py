"""Tests of the confidence intervals and significance tests."""

from __future__ import annotations

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from pretrain.evidence.statistics import (
    accuracy_interval,
    compare_paired,
    crossed_interval,
    difference_interval,
    flip_test,
    holm,
    permute_labels,
    repeat_agreement,
    split_half_reliability,
)


def test_the_crossed_interval_is_as_wide_as_the_fewest_clusters_demand() -> None:
    rng = np.random.default_rng(0)
    subjects, images = np.repeat(np.arange(6), 50), np.tile(np.arange(50), 6)
    noise = rng.normal(0, 1, 300)
    plain = crossed_interval(noise, subjects, images, 2000, 0)
    assert plain[0] < noise.mean() < plain[1]
    # If all trials of a subject have the same value, the interval must be as wide as for six values (one for each
    # subject), not as for 300 values.
    of_subject = rng.normal(0, 1, 6)[subjects]
    wide = crossed_interval(of_subject, subjects, images, 2000, 0)
    by_subject = difference_interval(of_subject, subjects, 2000, 0)
    assert wide[1] - wide[0] == pytest.approx(by_subject[1] - by_subject[0], rel=0.1)
    assert wide[1] - wide[0] > 2 * (plain[1] - plain[0])
    # If all trials of an image have the same value, the interval must be as wide as for 50 values (one for each image).
    of_image = rng.normal(0, 1, 50)[images]
    low, high = crossed_interval(of_image, subjects, images, 2000, 0)
    by_image = difference_interval(of_image, images, 2000, 0)
    assert high - low == pytest.approx(by_image[1] - by_image[0], rel=0.1)


def test_flip_test_is_exact_for_few_clusters() -> None:
    clusters = np.repeat(np.arange(6), 3)
    assert flip_test(np.ones(18), clusters, 1000, 0) == 2 / 64
    assert flip_test(np.zeros(18), clusters, 1000, 0) == 1.0
    more = np.where(clusters == 0, -1.0, 1.0)
    assert flip_test(more, clusters, 1000, 0) == 14 / 64


def test_flip_test_agrees_with_mcnemars_test() -> None:
    from scipy.stats import binomtest

    more = np.array([1.0] * 21 + [-1.0] * 8 + [0.0] * 40)
    exact = binomtest(21, 29).pvalue
    assert flip_test(more, np.arange(69), 20_000, 0) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("hits", "images"), [([0, 1] * 30, 30), ([0, 1, 1] * 8, 8), ([0] * 20, 20), ([1] * 9, 9)])
def test_accuracy_interval_agrees_with_scipy_if_images_do_not_scatter(hits: list[int], images: int) -> None:
    from scipy.stats import binomtest

    image = np.repeat(np.arange(images), len(hits) // images)
    expected = binomtest(sum(hits), len(hits)).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(accuracy_interval(np.array(hits, float), image), expected, atol=1e-7)


def test_clusters_widen_the_intervals() -> None:
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.integers(0, 2, 30), 10).astype(float)
    images = np.repeat(np.arange(30), 10)
    apart, together = accuracy_interval(hits, np.arange(300)), accuracy_interval(hits, images)
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert together[0] < hits.mean() < together[1]
    wide, narrow = (difference_interval(hits, c, 500, 0) for c in (images, np.arange(300)))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert flip_test(hits - 0.45, images, 2000, 0) > flip_test(hits - 0.45, np.arange(300), 2000, 0)


def test_the_crossed_interval_agrees_with_resampling_trial_by_trial() -> None:
    rng = np.random.default_rng(1)
    keep = rng.random(60) < 0.8
    subjects, images = np.repeat(np.arange(5), 12)[keep], np.tile(np.arange(12), 5)[keep]
    values = rng.normal(0.2, 1, len(images))
    means = []
    for _ in range(4000):
        weight = np.bincount(rng.integers(5, size=5), minlength=5)[subjects]
        weight = weight * np.bincount(rng.integers(12, size=12), minlength=12)[images]
        if weight.sum():
            means.append((values * weight).sum() / weight.sum())
    found = crossed_interval(values, subjects, images, 4000, 0)
    np.testing.assert_allclose(found, np.percentile(means, [2.5, 97.5]), atol=0.04)


def test_nan_is_refused() -> None:
    values = np.array([0.0, np.nan, 1.0])
    with pytest.raises(RequestError, match="1 of 3 values are NaN"):
        crossed_interval(values, np.arange(3), np.arange(3), 10, 0)
    for test in (difference_interval, flip_test):
        with pytest.raises(RequestError, match="NaN"):
            test(values, np.arange(3), 10, 0)
    with pytest.raises(RequestError, match="NaN"):
        accuracy_interval(values, np.arange(3))
    with pytest.raises(RequestError, match="NaN"):
        holm([0.1, np.nan])
    with pytest.raises(RequestError, match="NaN"):
        split_half_reliability(values[:, None], np.zeros(3))


def test_holm_agrees_with_its_definition() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1.0, 1.0])
    assert holm([]).shape == (0,)


class TestPairedDifferences:
    people, images = np.repeat(np.arange(8), 20), np.tile(np.arange(20), 8)

    def test_what_decides_depends_on_the_number_of_people_and_images(self) -> None:
        more = np.random.default_rng(0).normal(0.5, 1, (1, 160))
        (both,) = compare_paired(more, self.images, self.people, resamples=500)
        assert both.decides == "people and images"
        assert both.over_people is not None and both.p_people is not None
        few = self.people < 3
        (same_people,) = compare_paired(more[:, few], self.images[few], self.people[few], resamples=500)
        assert (same_people.decides, same_people.over_people, same_people.p_people) == ("images", None, None)
        (same_images,) = compare_paired(more, self.images % 4, self.people, resamples=500)
        assert same_images.decides == "people"
        with pytest.raises(RequestError, match="too few for an interval"):
            compare_paired(more[:, few], self.images[few] % 4, self.people[few])

    def test_p_agrees_with_the_interval(self) -> None:
        rng = np.random.default_rng(3)
        more = rng.normal(0, 1, (40, 160)) + np.linspace(-0.6, 0.6, 40)[:, None]
        for found in compare_paired(more, self.images, self.people, resamples=500):
            low, high = found.interval
            if found.p < 0.04:
                assert low > 0 or high < 0
            if found.p > 0.06:
                assert low < 0 < high

    def test_equal_methods_have_p_of_1(self) -> None:
        (found,) = compare_paired(np.zeros((1, 160)), self.images, self.people, resamples=200)
        assert (found.p, found.p_people, found.interval) == (1.0, 1.0, (0.0, 0.0))


class TestShuffledLabels:
    def test_repeats_in_a_block_move_together_and_blocks_keep_their_labels(self) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 30, 200)
        labels, blocks = images % 4, rng.integers(0, 9, 200)
        shuffled = permute_labels(labels, blocks, images, 20, 0)
        assert (shuffled != labels).any(axis=1).all()
        for block in range(9):
            rows = np.flatnonzero(blocks == block)
            _, first, unit = np.unique(images[rows], return_index=True, return_inverse=True)
            for row in shuffled[:, rows]:
                assert (row == row[first][unit]).all()
                assert sorted(row[first]) == sorted(labels[rows][first])

    def test_labels_in_blocks_of_one_label_stay(self) -> None:
        labels = np.repeat([0, 1, 2], 5)
        assert (permute_labels(labels, labels, np.arange(15), 5, 0) == labels).all()

    def test_an_image_with_two_labels_is_refused(self) -> None:
        with pytest.raises(RequestError, match="one label"):
            permute_labels(np.array([0, 1]), np.zeros(2), np.zeros(2), 1, 0)


class TestNoiseCeiling:
    def test_the_reliability_of_known_noise(self) -> None:
        rng = np.random.default_rng(0)
        images = np.repeat(np.arange(300), 4)
        values = rng.normal(0, 1, (300, 3))[images] + rng.normal(0, 2, (1200, 3))
        # The image contributes variance 1, and the noise variance 4. In the mean of four repeats, the noise has
        # variance 4 / 4 = 1, so the reliability is 1 / (1 + 1).
        assert split_half_reliability(values, images, splits=20) == pytest.approx(0.5, abs=0.05)
        assert abs(split_half_reliability(rng.normal(size=(1200, 3)), images, splits=20)) < 0.2

    def test_too_few_repeats(self) -> None:
        with pytest.raises(RequestError, match="repeats"):
            split_half_reliability(np.zeros((4, 1)), np.array([0, 0, 1, 2]))
        with pytest.raises(RequestError, match="varies"):
            split_half_reliability(np.zeros((6, 1)), np.array([0, 0, 1, 1, 2, 2]))
        with pytest.raises(RequestError, match="two trials"):
            repeat_agreement(np.zeros(3), np.arange(3))

    def test_agreement_of_repeats(self) -> None:
        assert repeat_agreement(np.array([1, 1, 1, 0, 2]), np.array([0, 0, 0, 1, 2])) == 1.0
        assert repeat_agreement(np.array([1, 2, 1, 0, 0]), np.array([0, 0, 0, 1, 1])) == pytest.approx((1 / 3 + 1) / 2)
