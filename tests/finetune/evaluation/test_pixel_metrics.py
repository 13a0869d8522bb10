from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from finetune.evaluation import pixel_metrics
from finetune.evaluation.pixel_metrics import ImageRows, average_pairs


def _images(rng: np.random.Generator, n: int = 3, size: int = 14) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def _noisy(rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(int) + rng.integers(-60, 60, a.shape), 0, 255).astype(np.uint8)


def test_psnr_by_hand() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 10
    values = pixel_metrics.psnr(a, b)
    assert values[0] == pytest.approx(20 * np.log10(255 / 10))
    assert np.isinf(values[1])


def test_psnr_against_scikit_image() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    rng = np.random.default_rng(0)
    a = _images(rng)
    b = _noisy(rng, a)
    by_library = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    assert pixel_metrics.psnr(a, b) == pytest.approx(by_library, rel=1e-12)


def test_ssim_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    a = _images(rng)
    b = _noisy(rng, a)
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
        assert pixel_metrics.ssim(a[image : image + 1], b[image : image + 1])[0] == pytest.approx(
            np.mean(values), abs=1e-9
        )
    assert pixel_metrics.ssim(a, a) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(11, 11), (11, 40), (43, 97), (75, 12)])
def test_ssim_against_scikit_image(shape: tuple[int, int]) -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(1)
    height, width = shape
    a = rng.integers(0, 256, (3, height, width, 3), np.uint8)
    b = a.copy()
    b[1] = rng.integers(0, 256, (height, width, 3))
    a[2], b[2] = 255, 250  # Flat and bright images have the largest rounding errors.
    options: Any = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    for one, other, found in zip(a, b, pixel_metrics.ssim(a, b), strict=True):
        assert found == pytest.approx(structural_similarity(one, other, channel_axis=-1, **options), abs=1e-12)


def test_pixel_correlation_against_numpy() -> None:
    rng = np.random.default_rng(0)
    a = _images(rng, 4)
    b = _noisy(rng, a)
    b[2] = 77
    b[3] = 255 - a[3]
    values = pixel_metrics.pixel_correlation(a, b)
    assert values[0] == pytest.approx(np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1], rel=1e-12)
    assert np.isnan(values[2]) and values[3] == pytest.approx(-1)


def test_image_metrics_refuse_what_they_cannot_compare() -> None:
    rng = np.random.default_rng(0)
    bad: Any = _images(rng).astype(np.float32)
    with pytest.raises(ValueError, match="uint8"):
        pixel_metrics.psnr(bad, _images(rng))
    with pytest.raises(ValueError, match="equal"):
        pixel_metrics.psnr(_images(rng, 2), _images(rng, 3))
    with pytest.raises(ValueError, match="smaller than the window"):
        pixel_metrics.ssim(_images(rng, size=8), _images(rng, size=8))


def test_one_equal_pair_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    a = _images(rng, 4)
    b = _noisy(rng, a)
    b[1] = a[1]
    values = pixel_metrics.psnr(a, b)
    assert average_pairs("psnr", values) == {
        "psnr": pytest.approx(values[[0, 2, 3]].mean()),
        "psnr_equal_pairs": 1,
    }
    all_equal = average_pairs("psnr", pixel_metrics.psnr(a, a))
    assert str(all_equal["psnr"]).startswith("not computed") and all_equal["psnr_equal_pairs"] == 4
    assert average_pairs("ssim", "not computed: too small") == {"ssim": "not computed: too small"}


def test_rows_of_images_are_read_only_when_they_are_needed() -> None:
    a = _images(np.random.default_rng(0), 5)
    chosen = ImageRows(a, np.array([4, 0, 4]))
    assert chosen.shape == (3, 14, 14, 3) and len(chosen) == 3
    np.testing.assert_array_equal(chosen[1], a[0])
    np.testing.assert_array_equal(chosen[1:], a[[0, 4]])
    np.testing.assert_array_equal(pixel_metrics.ssim(chosen, chosen), [1, 1, 1])


@pytest.mark.parametrize("name", pixel_metrics.PAIRED_METRICS)
def test_memory_does_not_grow_with_the_number_of_images(name: str) -> None:
    rng = np.random.default_rng(0)
    few = _images(rng, 2, 64)
    # The rows are read one by one, so 300 images need no more memory than 2 images.
    many = ImageRows(few, np.arange(300) % 2), ImageRows(few, np.arange(1, 301) % 2)
    peaks = []
    for a, b in (few, few[::-1]), many:
        pixel_metrics.PAIRED_METRICS[name](a, b)  # The first call is not measured, because it imports libraries.
        tracemalloc.start()
        pixel_metrics.PAIRED_METRICS[name](a, b)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000
