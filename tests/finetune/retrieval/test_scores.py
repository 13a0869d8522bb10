import itertools

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from finetune.evaluation.identification import rank_true_images
from finetune.retrieval.scores import identify, match_images, measure_hubness, top_k


def _perfect(images: int, repeats: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target = np.random.default_rng(seed).standard_normal((images, 8))
    rows = np.repeat(np.arange(images), repeats)
    return target[rows] * 3, target, rows


def test_perfect_embeddings_find_every_image() -> None:
    embeds, target, rows = _perfect(12, 2)
    better, tied = rank_true_images(embeds, target, rows)
    assert not better.any() and not tied.any()
    assert (top_k(better, tied, images=12) == 1).all() and (identify(better, tied, 12) == 1).all()
    assert match_images(embeds, target, rows) == 1.0


def test_equal_embeddings_are_at_chance() -> None:
    _, target, rows = _perfect(10, 3)
    for embeds, gallery in ((np.ones((30, 8)), np.ones((10, 8))), (np.zeros((30, 8)), target)):
        better, tied = rank_true_images(embeds, gallery, rows)
        np.testing.assert_allclose(top_k(better, tied, images=10), 0.1)
        np.testing.assert_allclose(top_k(better, tied, images=10, n=4, k=2), 0.5)
        np.testing.assert_allclose(identify(better, tied, 10), 0.5)


def test_top_k_equals_the_count_over_all_choices_of_other_images() -> None:
    rng = np.random.default_rng(1)
    images, n = 7, 4
    # Use scores with few different values, so that there are ties.
    similarity = rng.integers(0, 4, images).astype(float)
    own, others = similarity[0], similarity[1:]
    better, tied = np.array([(others > own).sum()]), np.array([(others == own).sum()])
    for k in (1, 2, 3):
        chances = []
        for chosen in itertools.combinations(others, n - 1):
            above, same = sum(x > own for x in chosen), sum(x == own for x in chosen)
            # Among images with the same similarity, each rank is equally likely.
            chances.append(np.mean([above + place < k for place in range(same + 1)]))
        assert top_k(better, tied, images=images, n=n, k=k)[0] == pytest.approx(np.mean(chances))


def test_values_that_are_not_finite_are_refused() -> None:
    embeds, target, rows = _perfect(5, 1)
    embeds[2, 3] = np.nan
    with pytest.raises(RequestError, match="EEG embeddings hold values that are not finite"):
        match_images(embeds, target, rows)
    with pytest.raises(RequestError, match="EEG embeddings hold values that are not finite"):
        measure_hubness(embeds, target)
    with pytest.raises(ValueError, match="k < n <= 5"):
        top_k(np.zeros(1, int), np.zeros(1, int), images=5, n=6)


def test_a_hub_is_found() -> None:
    rng = np.random.default_rng(2)
    target = rng.standard_normal((40, 16))
    spread = measure_hubness(target, target, k=1)
    assert spread["skewness"] == 0 and spread["never"] == 0 and spread["largest"] == pytest.approx(1 / 40)
    hub = measure_hubness(np.repeat(target[:1], 40, axis=0), target, k=1)
    assert hub["largest"] == 1 and hub["never"] == pytest.approx(39 / 40) and hub["skewness"] > 5


def test_matching_averages_the_trials_of_an_image() -> None:
    rng = np.random.default_rng(3)
    _, target, rows = _perfect(20, 10)
    noisy = target[rows] + 2 * rng.standard_normal((200, 8))
    assert match_images(noisy, target, rows) > 0.8
    assert match_images(rng.standard_normal((200, 8)), target, rows) < 0.3
