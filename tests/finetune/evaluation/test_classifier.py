from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.common.errors import RequestError
from finetune.evaluation.classifier import ClassifierConfig, ImageClassifier, train_classifier

CONFIG = ClassifierConfig(steps=60, batch_size=32, width=8, size=16)


def _bars(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images of bright vertical or horizontal bars at random places and in random colours."""
    images, labels = rng.integers(0, 60, (n, 16, 16, 3), dtype=np.uint8), rng.integers(0, 2, n)
    for image, label in zip(images, labels, strict=True):
        at, colour = rng.integers(3, 11), rng.integers(100, 256, 3)
        (image if label else image.transpose(1, 0, 2))[at : at + 2] = colour
    return images, labels


def test_the_classifier_learns_and_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = _bars(rng, 80)
    state = torch.random.get_rng_state()
    first = train_classifier(images, labels, 2, config=CONFIG, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    second = train_classifier(images, labels, 2, config=CONFIG, seed=3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    for number, classifier in enumerate((first, second)):
        classifier.save(tmp_path / f"{number}", {name: name for name in ("dataset_id", "seed", "é", "a", "b", "c")})
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert ImageClassifier.load(tmp_path / "0")[1]["é"] == "é"
    unseen, truth = _bars(rng, 60)
    features, probabilities = first.judge(unseen)
    assert features.shape == (60, 32) and np.allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == truth).mean() > 0.85
    assert np.allclose(first.judge(unseen[5:6])[1], probabilities[5:6], atol=1e-6)
    first.save(tmp_path / "c.safetensors", {"dataset_id": "d"})
    again, about = ImageClassifier.load(tmp_path / "c.safetensors")
    assert about["dataset_id"] == "d"
    np.testing.assert_array_equal(again.judge(unseen)[1], probabilities)


def test_a_damaged_or_other_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(RequestError, match="no such"):
        ImageClassifier.load(tmp_path / "none")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(RequestError, match="not a classifier"):
        ImageClassifier.load(tmp_path / "other")
    (tmp_path / "broken").write_bytes(b"12345678")
    with pytest.raises(RequestError, match="damaged"):
        ImageClassifier.load(tmp_path / "broken")
