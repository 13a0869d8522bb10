"""Identification and retrieval of images in the embeddings of a frozen network.

All functions take NumPy arrays of embeddings of any network. The similarities are computed in blocks of rows, so the
memory grows with the number of images, and not with its square.

Array shapes: B trials, M different images, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.metrics import Floats, iterate_blocks

TIE = 1e-6
"""Two similarities that differ by at most this value count as equal. A network computes in single precision, so the
similarities of two equal images in different batches can differ by about this value."""
FLAT = 1e-10
"""A row whose length after centring is below this fraction of its length before centring has no direction."""


def _unit_rows(rows_BD: NDArray[np.float64], *, centre: bool) -> NDArray[np.float64]:
    """Scale rows to length one. A row without direction (see `FLAT`) becomes zero, so all its similarities are zero."""
    length_B1 = np.linalg.norm(rows_BD, axis=1, keepdims=True)
    least_B1 = FLAT * length_B1
    if centre:
        rows_BD = rows_BD - rows_BD.mean(axis=1, keepdims=True)
        length_B1 = np.linalg.norm(rows_BD, axis=1, keepdims=True)
    return np.divide(rows_BD, length_B1, out=np.zeros_like(rows_BD), where=length_B1 > least_B1)


def _similarities(query_BD: Floats, gallery_MD: Floats, *, centre: bool) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield the similarities [B, M] of one block of queries after another to all images of the gallery."""
    if np.ndim(query_BD) != 2 or np.ndim(gallery_MD) != 2 or query_BD.shape[1] != gallery_MD.shape[1]:
        raise ValueError(
            f"need two arrays of embeddings of equal width, not {np.shape(query_BD)} and {np.shape(gallery_MD)}"
        )
    start = 0
    for block in iterate_blocks(query_BD, "query embeddings"):
        query = _unit_rows(block, centre=centre)
        parts = [query @ _unit_rows(part, centre=centre).T for part in iterate_blocks(gallery_MD, "gallery embeddings")]
        yield slice(start, start + len(block)), np.concatenate(parts, axis=1)
        start += len(block)


def two_way_identification(
    generated_BD: Floats,
    real_BD: Floats,
    image_ids: Sequence[str],
    labels: Sequence[int] | NDArray[np.integer] | None = None,
    within_label: bool = False,
) -> NDArray[np.float64]:
    """Compute how often a generated image is more similar to its own real image than to another real image.

    The similarity is the Pearson correlation of two embeddings, as in the paper below. For each generated image, its
    own real image is compared with every other real image. An image that several trials show is compared only once. A
    tie has the value one half, so embeddings that are all equal give exactly one half.

    Parameters
    ----------
    generated_BD, real_BD : ndarray, shape (B, D)
        Embeddings of the generated images, and of the images that the person saw in the same trials.
    image_ids : sequence of str
        Id of the image that the person saw in each trial. Real images with the same id are treated as one image.
    labels : sequence of int, optional
        Category of the image that the person saw in each trial; needed for `within_label`.
    within_label : bool
        Whether to compare only with other images of the same category. With `within_label`, a model that knows only the
        category scores at chance.

    Returns
    -------
    ndarray, shape (B,)
        Fraction of comparisons that the trial's own image wins, from 0 to 1; chance is 0.5. The value is NaN for a
        trial without any other image for the comparison.

    Raises
    ------
    ValueError
        If an embedding is NaN or infinite, the lengths differ, an image has two labels, or labels are missing.

    References
    ----------
    Ozcelik & VanRullen, "Natural scene reconstruction from fMRI signals using generative latent diffusion", Scientific
    Reports 13 (2023).
    """
    trials = len(generated_BD)
    if not len(real_BD) == len(image_ids) == trials or (labels is not None and len(labels) != trials):
        raise ValueError(f"need one real image, one id and one label for each of {trials} generated images")
    if within_label and labels is None:
        raise ValueError("within_label needs the labels of the trials")
    _, rows_M, image_B = np.unique(np.asarray(image_ids), return_index=True, return_inverse=True)
    label_B = np.zeros(trials, np.int64) if labels is None else np.asarray(labels)
    label_M = label_B[rows_M]
    if within_label and (label_M[image_B] != label_B).any():
        raise ValueError(f"image {image_ids[int(np.argmax(label_M[image_B] != label_B))]} has two labels")
    scores_B = np.full(trials, np.nan)
    for part, similarity_BM in _similarities(generated_BD, np.asarray(real_BD)[rows_M], centre=True):
        own_B1 = np.take_along_axis(similarity_BM, image_B[part, None], axis=1)
        compared = image_B[part, None] != np.arange(len(rows_M))[None, :]
        if within_label:
            compared &= label_B[part, None] == label_M[None, :]
        wins = (similarity_BM < own_B1 - TIE) + 0.5 * (np.abs(similarity_BM - own_B1) <= TIE)
        count = compared.sum(axis=1)
        scores_B[part] = np.divide(
            (wins * compared).sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0
        )
    return scores_B


def rank_true_images(
    query_BD: Floats, gallery_MD: Floats, true_B: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count, for each query, the images of the gallery that are more similar to the query than the true image.

    Parameters
    ----------
    query_BD : ndarray, shape (B, D)
        Embeddings for which the true image is searched, for example embeddings of generated images.
    gallery_MD : ndarray, shape (M, D)
        Embeddings of the images to choose from; each image once.
    true_B : ndarray of int, shape (B,)
        For each query, the row of the true image in the gallery.

    Returns
    -------
    better_B, tied_B : ndarray of int, shape (B,)
        Number of images that are more similar to the query than the true image (by cosine similarity), and number of
        other images that are as similar to the query as the true image.

    Raises
    ------
    ValueError
        If an embedding is NaN or infinite, or if a true row is not in the gallery.
    """
    true = np.asarray(true_B)
    if true.shape != (len(query_BD),) or (len(true) and not 0 <= true.min() <= true.max() < len(gallery_MD)):
        raise ValueError(
            f"need a row from 0 to {len(gallery_MD) - 1} of the gallery for each of {len(query_BD)} queries"
        )
    better_B, tied_B = np.zeros(len(true), np.int64), np.zeros(len(true), np.int64)
    for part, similarity_BM in _similarities(query_BD, gallery_MD, centre=False):
        own_B1 = np.take_along_axis(similarity_BM, true[part, None], axis=1)
        better_B[part] = (similarity_BM > own_B1 + TIE).sum(axis=1)
        tied_B[part] = (np.abs(similarity_BM - own_B1) <= TIE).sum(axis=1) - 1
    return better_B, tied_B


def compute_ranks(better_B: NDArray[np.integer], tied_B: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute the expected rank of the true image of each query, with ties in random order.

    Parameters
    ----------
    better_B, tied_B : ndarray of int, shape (B,)
        Result of `rank_true_images`.

    Returns
    -------
    ndarray, shape (B,)
        Rank from 1 (most similar) to M. Chance is (M + 1) / 2 for M images.
    """
    return 1 + better_B + tied_B / 2


def top_k_hits(better_B: NDArray[np.integer], tied_B: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    """Compute the probability that the true image is among the k most similar images, with ties in random order.

    Parameters
    ----------
    better_B, tied_B : ndarray of int, shape (B,)
        Result of `rank_true_images`.
    k : int
        Number of most similar images.

    Returns
    -------
    ndarray, shape (B,)
        Probability from 0 to 1. Chance is k / M for M images.
    """
    return np.clip((k - better_B) / (tied_B + 1), 0, 1)


def cosine_similarity(a_BD: Floats, b_BD: Floats) -> NDArray[np.float64]:
    """Compute the cosine similarity of each row of one array with the same row of another array.

    Parameters
    ----------
    a_BD, b_BD : ndarray, shape (B, D)
        The two embeddings of each pair.

    Returns
    -------
    ndarray, shape (B,)
        Similarity from -1 to 1. The similarity is NaN if an embedding is zero.

    Raises
    ------
    ValueError
        If the shapes differ, or if an embedding is NaN or infinite.
    """
    if np.shape(a_BD) != np.shape(b_BD):
        raise ValueError(f"need two arrays of equal shape, not {np.shape(a_BD)} and {np.shape(b_BD)}")
    parts = []
    for a, b in zip(iterate_blocks(a_BD, "a_BD"), iterate_blocks(b_BD, "b_BD"), strict=True):
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        parts.append(np.divide((a * b).sum(axis=1), norm, out=np.full(len(a), np.nan), where=norm > 0))
    return np.clip(np.concatenate(parts), -1, 1) if parts else np.zeros(0)
