from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from finetune.evaluation import metrics


def _images(rng: np.random.Generator, n: int = 3, size: int = 14) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_psnr_by_hand() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 10
    values = metrics.psnr(a, b)
    assert values[0] == pytest.approx(20 * np.log10(255 / 10))
    assert np.isinf(values[1])


def test_ssim_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    a = _images(rng)
    b = np.clip(a.astype(int) + rng.integers(-60, 60, a.shape), 0, 255).astype(np.uint8)
    y, x = np.mgrid[-5:6, -5:6]
    w = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    w /= w.sum()
    for image in range(len(a)):
        values = []
        for top in range(4):
            for left in range(4):
                for c in range(3):
                    p, q = (i[image, top : top + 11, left : left + 11, c].astype(float) for i in (a, b))
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                    cov = (w * (p - mp) * (q - mq)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    values.append(
                        (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)),
                    )
        assert metrics.ssim(a[image : image + 1], b[image : image + 1])[0] == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ssim(a, a) == pytest.approx(1)


def test_image_metrics_refuse_what_they_cannot_compare() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="uint8"):
        metrics.psnr(_images(rng).astype(np.float32), _images(rng))
    with pytest.raises(ValueError, match="equal"):
        metrics.psnr(_images(rng, 2), _images(rng, 3))
    with pytest.raises(ValueError, match="smaller than the window"):
        metrics.ssim(_images(rng, size=8), _images(rng, size=8))


def test_frechet_distance_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(300, 5)) * [1, 2, 3, 4, 5] + 1
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    plain = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx + sy - 2 * scipy.linalg.sqrtm(sx @ sy).real)
    assert metrics.frechet_distance(x, y) == pytest.approx(plain, rel=1e-8)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    # With fewer rows than columns the covariance matrices are singular, but the Fréchet distance must be a real number.
    assert metrics.frechet_distance(x[:3], y[:3]) > 0


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    null = [metrics.kernel_distance(rng.normal(size=(12, 4)), rng.normal(size=(9, 4))) for _ in range(400)]
    assert abs(np.mean(null)) < 4 * np.std(null) / 20
    assert metrics.kernel_distance(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 2) > 10 * np.std(null)


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
    assert metrics.n_way_top_k(p, labels, n=2, repeats=3000)["accuracy"] == pytest.approx(two_way, abs=0.01)
    assert metrics.n_way_top_k(p, labels, n=6)["accuracy"] == pytest.approx(np.mean(p.argmax(1) == labels))
    assert metrics.n_way_top_k(p, labels, n=6, k=3)["accuracy"] == pytest.approx(np.mean(beaten < 3))
    assert metrics.n_way_top_k(np.full((40, 6), 1 / 6), labels, n=2)["accuracy"] == 0
    with pytest.raises(ValueError, match="2 <= n <= 6"):
        metrics.n_way_top_k(p, labels, n=50)


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
    # `small` has a binomial(300, 0.1) distribution, except that ties of accuracies make it a little smaller.
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
    # With three images, the labels are shuffled in all 3! orders. With a single image, there is no other order of
    # labels.
    few = metrics.accuracy_with_p_value(np.arange(3), np.arange(3), list("abc"))
    assert few["p_value"] == pytest.approx(1 / 6)
    assert metrics.accuracy_with_p_value(np.array([1, 0]), np.array([1, 1]), ["a", "a"])["p_value"] == 1
    with pytest.raises(ValueError, match="two labels"):
        metrics.accuracy_with_p_value(np.array([0, 0]), np.array([0, 1]), ["a", "a"])
