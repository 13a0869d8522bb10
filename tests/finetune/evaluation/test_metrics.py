from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from finetune.evaluation import metrics


def test_frechet_distance_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(300, 5)) * [1, 2, 3, 4, 5] + 1
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    plain = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx + sy - 2 * scipy.linalg.sqrtm(sx @ sy).real)
    assert metrics.frechet_distance(x, y) == pytest.approx(plain, rel=1e-8)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    # With fewer rows than columns the covariance matrices are singular, but the Fréchet distance must be a real number.
    assert metrics.frechet_distance(x[:3], y[:3]) > 0
    # If there are fewer rows than columns, another formula computes the Fréchet distance. Both formulas must agree.
    few, other = rng.normal(size=(5, 9)), rng.normal(size=(7, 9)) * 2 + 1
    gaussians = metrics.RunningGaussian(), metrics.RunningGaussian()
    for gaussian, rows in zip(gaussians, (few, other), strict=True):
        gaussian.add(rows)
    assert metrics.frechet_distance(few, other) == pytest.approx(metrics._compare_gaussians(*gaussians), rel=1e-6)


def test_features_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)).astype(np.float32), rng.normal(size=(50, 5)) + 1
    ids = [f"i{number % 20}" for number in range(60)]
    words = {"real_ids": ids, "generated_ids": ids[:50]}
    whole = (metrics.frechet_distance(x, y), metrics.kernel_distance(x, y), metrics.kernel_distance(x, y, **words))
    sizes = []
    iterate = metrics.iterate_blocks
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 5 * 7)
    monkeypatch.setattr(
        metrics, "iterate_blocks", lambda *words: (sizes.append(block.shape) or block for block in iterate(*words))
    )
    blocks = (metrics.frechet_distance(x, y), metrics.kernel_distance(x, y), metrics.kernel_distance(x, y, **words))
    assert blocks == pytest.approx(whole, rel=1e-10)
    assert max(rows for rows, _ in sizes) == 7
    # The Fréchet distance alone reads 9 blocks of the 60 rows and 8 blocks of the 50 rows, and the kernel distances
    # read more.
    assert len(sizes) > 17


def test_mean_and_covariance_are_added_block_by_block() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)) * [1, 10, 100, 1] + 1000
    gaussian = metrics.RunningGaussian()
    for part in np.split(x, [1, 1, 40, 41]):
        gaussian.add(part)
    np.testing.assert_allclose(gaussian.mean_D, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance_DD, np.cov(x, rowvar=False), rtol=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    null = [metrics.kernel_distance(rng.normal(size=(12, 4)), rng.normal(size=(9, 4))) for _ in range(400)]
    assert abs(np.mean(null)) < 4 * np.std(null) / 20
    assert metrics.kernel_distance(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 2) > 10 * np.std(null)


def test_kernel_distance_with_repeated_images_is_unbiased() -> None:
    """Each image is shown in three trials, and the generated image of each trial resembles the seen image.

    Both sets of images come from the same distribution, so the mean of an unbiased estimate is zero. Without the ids,
    pairs of rows that show the same image count as independent, and the estimate is far from zero.
    """
    rng = np.random.default_rng(0)
    with_ids, without = [], []
    for _ in range(200):
        real = np.repeat(rng.normal(size=(8, 4)), 3, axis=0)
        generated = np.sqrt(0.7) * real + np.sqrt(0.3) * rng.normal(size=real.shape)
        ids = [f"i{number // 3}" for number in range(24)]
        with_ids.append(metrics.kernel_distance(real, generated, real_ids=ids, generated_ids=ids))
        without.append(metrics.kernel_distance(real, generated))
    error = np.std(with_ids) / np.sqrt(200)
    assert abs(np.mean(with_ids)) < 3 * error
    assert abs(np.mean(without)) > 10 * np.std(without) / np.sqrt(200)
    # Each real image counts once, so more rows of the same real image change nothing.
    again = metrics.kernel_distance(
        np.concatenate([real, real[:3]]), generated, real_ids=ids + ids[:3], generated_ids=ids
    )
    assert again == pytest.approx(with_ids[-1], rel=1e-12)


def test_kernel_distance_refuses_wrong_ids() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ValueError, match="both real_ids and generated_ids"):
        metrics.kernel_distance(x, x, real_ids=list("abcd"))
    with pytest.raises(ValueError, match="one id for each row"):
        metrics.kernel_distance(x, x, real_ids=list("abc"), generated_ids=list("abcd"))
    with pytest.raises(ValueError, match="two different images"):
        metrics.kernel_distance(x, x, real_ids=list("aaaa"), generated_ids=list("aaaa"))


def test_nan_is_refused_by_every_metric() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    bad = x.copy()
    bad[4, 1] = np.nan
    labels = np.array([0, 1, 2, 0, 1, 2])
    for compute in (
        lambda: metrics.frechet_distance(x, bad),
        lambda: metrics.kernel_distance(bad, x),
        lambda: metrics.inception_score(bad),
        lambda: metrics.n_way_top_k(bad, labels, n=2),
        lambda: metrics.n_way_scores(np.full((6, 3), np.nan), labels, n=2),
    ):
        with pytest.raises(ValueError, match=r"row [04] holds nan"):
            compute()


def test_inception_score_at_its_limits() -> None:
    assert metrics.inception_score(np.eye(5)[[0, 1, 2, 3, 4] * 3]) == pytest.approx(5)
    assert metrics.inception_score(np.eye(5)[[2] * 6]) == pytest.approx(1)
    assert metrics.inception_score(np.full((4, 5), 0.2)) == pytest.approx(1)


def test_n_way_accuracy_against_its_expectation() -> None:
    """Compare the n-way accuracy with its expected value.

    A draw of classes counts as correct if every wrong class in the draw is less likely than the true class.
    """
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(6), 40), rng.integers(0, 6, 40)
    beaten = (p > p[np.arange(40), labels][:, None]).sum(1)
    two_way = np.mean(1 - beaten / 5)
    assert metrics.n_way_top_k(p, labels, n=2)["accuracy"] == pytest.approx(two_way, abs=1e-12)
    assert metrics.n_way_top_k(p, labels, n=6)["accuracy"] == pytest.approx(np.mean(p.argmax(1) == labels))
    assert metrics.n_way_top_k(p, labels, n=6, k=3)["accuracy"] == pytest.approx(np.mean(beaten < 3))
    for bad in ({"n": 50}, {"n": 3, "k": 3}):
        with pytest.raises(ValueError, match="2 <= n <= 6"):
            metrics.n_way_top_k(p, labels, **bad)
    with pytest.raises(ValueError, match="label from 0 to 5"):
        metrics.n_way_top_k(p, labels + 1, n=2)


def test_n_way_accuracy_against_drawn_classes() -> None:
    rng = np.random.default_rng(1)
    p, labels = rng.integers(0, 4, (30, 8)) / 4, rng.integers(0, 8, 30)
    hits = np.zeros((400, 30))
    for draw in range(400):
        # The added random numbers are smaller than any difference of two scores, so they only order classes with equal
        # scores.
        scores = p + rng.random(p.shape) / 100
        for trial, label in enumerate(labels):
            others = rng.permutation(np.delete(np.arange(8), label))[:4]
            hits[draw, trial] = (scores[trial, others] > scores[trial, label]).sum() < 2
    found = metrics.n_way_top_k(p, labels, n=5, k=2, draws=400)
    np.testing.assert_allclose(metrics.n_way_scores(p, labels, n=5, k=2), hits.mean(0), atol=0.1)
    assert found["accuracy"] == pytest.approx(hits.mean(), abs=0.02)
    assert found["std"] == pytest.approx(hits.mean(1).std(), rel=0.2)


def test_n_way_accuracy_of_constant_answers() -> None:
    uniform = np.full((40, 6), 1 / 6)
    balanced, skewed = np.arange(36) % 6, np.array([2] * 30 + [0, 1, 3, 4, 5, 1, 2, 2, 0, 0])
    # A classifier that gives all classes equal scores can only guess, so its accuracy is k / n.
    assert metrics.n_way_top_k(uniform, skewed, n=4, k=2)["accuracy"] == pytest.approx(0.5)
    found = metrics.n_way_top_k(uniform[:36], balanced, n=4, k=2)
    assert found["constant"] == pytest.approx(found["chance"]) == 0.5
    always_2 = np.tile([0.2, 0.15, 0.3, 0.12, 0.1, 0.13], (40, 1))
    found = metrics.n_way_top_k(always_2, skewed, n=6)
    assert found["accuracy"] == found["constant"] == pytest.approx(32 / 40) and found["chance"] == 1 / 6
    # No constant answer is better than `constant`.
    for seed in range(20):
        order = np.tile(np.random.default_rng(seed).random(6), (40, 1))
        found = metrics.n_way_top_k(order, skewed, n=3, k=1, draws=2)
        assert found["accuracy"] <= found["constant"] + 1e-12


def test_wilson_interval_of_a_known_case() -> None:
    # The example is in Table I of Newcombe (1998): 81 successes in 263 trials.
    assert metrics.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0, 10)[0] == 0


def test_p_value_keeps_its_level_although_trials_of_an_image_agree() -> None:
    """Check the p-value of predictions that depend on the image but not on its label.

    In a test that shuffles single trials, predictions that depend on the image would be significant too often.
    """
    rng = np.random.default_rng(0)
    small = 0
    for run in range(300):
        label_of, guess_of = rng.permutation(np.arange(24) % 4), rng.integers(0, 4, 24)
        image = np.repeat(np.arange(24), 6)
        found = metrics.accuracy_with_p_value(
            guess_of[image], label_of[image], [f"i{i}" for i in image], permutations=199, seed=run
        )
        small += found["p_value"] <= 0.1
        assert found["p_value"] >= 1 / 200
    # Of 300 p-values, a share of 0.1 should be at most 0.1, so `small` is binomial(300, 0.1), or a little smaller
    # because of ties.
    assert 12 <= small <= 48


def test_accuracy_chance_and_p_value_of_a_clear_case() -> None:
    labels = np.repeat(np.arange(4), 12)
    ids = [f"i{n // 2}" for n in range(48)]
    found = metrics.accuracy_with_p_value(labels, labels, ids)
    assert found["accuracy"] == 1 and found["chance"] == pytest.approx(0.25)
    assert found["n"] == 48 and found["images"] == 24 and found["p_value"] == pytest.approx(1 / 10_001)
    always = metrics.accuracy_with_p_value(np.zeros(48, int), labels, ids)
    assert always["accuracy"] == always["chance"] == 0.25 and always["p_value"] == 1
    # Half of the images are of class 0, so always predicting class 0 gives an accuracy of one half by chance.
    skewed = metrics.accuracy_with_p_value(np.zeros(8, int), np.array([0, 0, 0, 0, 1, 1, 2, 3]), list("abcdefgh"))
    assert skewed["chance"] == 0.5 and skewed["p_value"] == 1
    assert skewed["constant"] == 0.5 and skewed["uniform"] == 0.25
    # With three images, the labels are shuffled in all 3! orders. With a single image, there is no other order of
    # labels.
    few = metrics.accuracy_with_p_value(np.arange(3), np.arange(3), list("abc"))
    assert few["p_value"] == pytest.approx(1 / 6)
    assert metrics.accuracy_with_p_value(np.array([1, 0]), np.array([1, 1]), ["a", "a"])["p_value"] == 1
    with pytest.raises(ValueError, match="two labels"):
        metrics.accuracy_with_p_value(np.array([0, 0]), np.array([0, 1]), ["a", "a"])
