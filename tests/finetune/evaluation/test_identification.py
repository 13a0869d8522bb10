from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from finetune.evaluation import metrics
from finetune.evaluation.identification import (
    compute_ranks,
    cosine_similarity,
    rank_true_images,
    top_k_hits,
    two_way_identification,
)

B, D = 30, 12
IDS = [f"i{number // 2}" for number in range(B)]
LABELS = np.arange(B) // 2 % 3


def _embeddings(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of generated images that resemble the embeddings of the real images."""
    rng = np.random.default_rng(seed)
    real = np.repeat(rng.normal(size=(B // 2, D)), 2, axis=0)
    return real + rng.normal(size=real.shape), real


def test_two_way_identification_against_plain_loops() -> None:
    generated, real = _embeddings()
    for within in (False, True):
        found = two_way_identification(generated, real, IDS, LABELS, within_label=within)
        for trial in range(B):
            own = np.corrcoef(generated[trial], real[trial])[0, 1]
            others = [n for n in range(0, B, 2) if n // 2 != trial // 2 and (not within or LABELS[n] == LABELS[trial])]
            wins = [own > np.corrcoef(generated[trial], real[n])[0, 1] for n in others]
            assert found[trial] == pytest.approx(np.mean(wins))
    assert two_way_identification(real, real, IDS).tolist() == [1.0] * B


def test_category_alone_is_at_chance_within_categories() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 50)) * 3
    real = np.repeat(rng.normal(size=(60, 50)), 2, axis=0)
    labels = np.arange(120) // 2 % 3
    ids = [f"i{number // 2}" for number in range(120)]
    real += centres[labels]
    generated = centres[labels] + rng.normal(size=real.shape)
    assert two_way_identification(generated, real, ids).mean() > 0.8
    within = two_way_identification(generated, real, ids, labels, within_label=True)
    assert abs(within.mean() - 0.5) < 0.06


@pytest.mark.parametrize("collapsed", ["equal rows", "constant rows", "zeros"])
def test_collapsed_embeddings_are_at_chance(collapsed: str) -> None:
    _, real = _embeddings()
    rows = {"equal rows": np.tile(real[0], (B, 1)), "constant rows": np.full((B, D), 0.1), "zeros": np.zeros((B, D))}
    flat = rows[collapsed]
    np.testing.assert_array_equal(two_way_identification(real, flat, IDS), np.full(B, 0.5))
    if collapsed != "equal rows":
        np.testing.assert_array_equal(two_way_identification(flat, real, IDS), np.full(B, 0.5))
    # All images of the gallery are equally similar, so every rank is the mean rank of a guess.
    np.testing.assert_array_equal(compute_ranks(*rank_true_images(real, flat, np.arange(B))), np.full(B, (B + 1) / 2))
    assert top_k_hits(*rank_true_images(real, flat, np.arange(B)), 3) == pytest.approx(3 / B)


def test_a_trial_without_other_images_has_no_value() -> None:
    generated, real = _embeddings()
    found = two_way_identification(generated[:4], real[:4], IDS[:4], [0, 0, 1, 1], within_label=True)
    assert np.isnan(found).all()
    assert np.isnan(two_way_identification(generated[:2], real[:2], IDS[:2])).all()


def test_retrieval_ranks_against_plain_loops() -> None:
    generated, real = _embeddings()
    gallery, true = real[::2], np.arange(B) // 2
    ranks = compute_ranks(*rank_true_images(generated, gallery, true))
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    for trial in range(B):
        similarity = unit @ generated[trial]
        assert ranks[trial] == 1 + (similarity > similarity[true[trial]] + 1e-9).sum()
    better, tied = rank_true_images(generated, gallery, true)
    assert top_k_hits(better, tied, 1).tolist() == (ranks == 1).astype(float).tolist()
    hits = [top_k_hits(better, tied, k).mean() for k in range(1, len(gallery) + 1)]
    assert all(a <= b for a, b in pairwise(hits)) and hits[-1] == 1


def test_ties_have_their_expected_rank() -> None:
    gallery = np.eye(4)[[0, 0, 0, 1]]
    query = np.eye(4)[[0, 1, 2]]
    # The first query is most similar to three equal images, and the last query has the similarity zero to all four
    # images.
    true = np.array([1, 3, 0])
    assert compute_ranks(*rank_true_images(query, gallery, true)).tolist() == [2.0, 1.0, 2.5]
    better, tied = rank_true_images(query, gallery, true)
    assert top_k_hits(better, tied, 1) == pytest.approx([1 / 3, 1, 1 / 4])
    assert top_k_hits(better, tied, 2) == pytest.approx([2 / 3, 1, 1 / 2])


def test_blocks_do_not_change_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = _embeddings()
    generated, real = generated.astype(np.float32), real.astype(np.float32)

    def compute() -> list[np.ndarray]:
        return [
            two_way_identification(generated, real, IDS, LABELS, within_label=True),
            compute_ranks(*rank_true_images(generated, real[::2], np.arange(B) // 2)),
            cosine_similarity(generated, real),
        ]

    whole = compute()
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 7 * D)
    for a, b in zip(whole, compute(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_wrong_embeddings_are_refused() -> None:
    generated, real = _embeddings()
    bad = generated.copy()
    bad[5, 2] = np.nan
    with pytest.raises(ValueError, match="row 5 holds nan"):
        two_way_identification(bad, real, IDS)
    with pytest.raises(ValueError, match="row 5 holds nan"):
        rank_true_images(real, bad, np.arange(B))
    with pytest.raises(ValueError, match="row 5 holds nan"):
        cosine_similarity(real, bad)
    with pytest.raises(ValueError, match="has two labels"):
        two_way_identification(generated, real, IDS, np.arange(B), within_label=True)
    with pytest.raises(ValueError, match="needs the labels"):
        two_way_identification(generated, real, IDS, within_label=True)
    with pytest.raises(ValueError, match="one real image"):
        two_way_identification(generated, real[1:], IDS)
    with pytest.raises(ValueError, match="row from 0 to 9"):
        rank_true_images(generated, real[:10], np.arange(B))
    with pytest.raises(ValueError, match="equal width"):
        rank_true_images(generated, real[:, 1:], np.arange(B))


def test_cosine_similarity_by_hand() -> None:
    a = np.array([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    b = np.array([[2.0, 0, 0], [0, 3, 0], [1, 0, 0]])
    found = cosine_similarity(a, b)
    assert found[:2] == pytest.approx([1, np.sqrt(0.5)]) and np.isnan(found[2])
