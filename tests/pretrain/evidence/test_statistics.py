"""Tests of the confidence intervals and significance tests."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.evidence.statistics import accuracy_interval, crossed_interval, difference_interval, flip_test


def test_the_crossed_interval_is_as_wide_as_the_fewest_clusters_demand() -> None:
    rng = np.random.default_rng(0)
    subjects, images = np.repeat(np.arange(6), 50), np.tile(np.arange(50), 6)
    noise = rng.normal(0, 1, 300)
    plain = crossed_interval(noise, subjects, images, 2000, 0)
    assert plain[0] < noise.mean() < plain[1]
    # If all trials of a subject have the same value, the interval must be that of six values, not that of 300.
    of_subject = rng.normal(0, 1, 6)[subjects]
    wide = crossed_interval(of_subject, subjects, images, 2000, 0)
    by_subject = difference_interval(of_subject, subjects, 2000, 0)
    assert wide[1] - wide[0] == pytest.approx(by_subject[1] - by_subject[0], rel=0.1)
    assert wide[1] - wide[0] > 2 * (plain[1] - plain[0])
    # If all trials of an image have the same value, the interval must be that of 50 values.
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
