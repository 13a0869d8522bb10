"""Tests that train the encoder with Braindecode's datasets and training loop."""

from __future__ import annotations

from typing import Any

import mne
import numpy as np
import pytest
import torch

from pretrain.encoder.encoder import EEGEncoder

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"]
SFREQ, SECONDS = 128.0, 0.5


@pytest.fixture(scope="module")
def braindecode() -> Any:
    """Import Braindecode with its datasets, or skip the test."""
    return pytest.importorskip("braindecode", reason="Braindecode is not installed (pip install -e '.[dev]')")


def trials(count: int) -> tuple[np.ndarray, np.ndarray, mne.Info]:
    """Simulate trials of two classes. In each class, the channels of one half of the head oscillate."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    time = np.arange(int(SFREQ * SECONDS)) / SFREQ
    x = rng.normal(size=(count, len(NAMES), time.size))
    for trial, label in zip(x, labels, strict=True):
        trial[label::2] += 1.5 * np.sin(2 * np.pi * 12 * time + rng.uniform(0, 6))
    info = mne.create_info(NAMES, SFREQ, "eeg")
    info.set_montage("standard_1020")
    return x.astype(np.float32), labels.astype(np.int64), info


@pytest.mark.parametrize("tokenizer", ["temporal", "montage"])
def test_braindecode_trains_the_encoder(tokenizer: str, braindecode: Any) -> None:
    x, labels, info = trials(96)
    windows = braindecode.datasets.create_from_X_y(
        x, labels, drop_last_window=False, sfreq=SFREQ, ch_names=NAMES, window_size_samples=x.shape[-1],
        window_stride_samples=x.shape[-1],
    )  # fmt: skip
    torch.manual_seed(0)
    classifier = braindecode.EEGClassifier(
        EEGEncoder,
        module__chs_info=info["chs"],
        module__n_times=x.shape[-1],
        module__sfreq=SFREQ,
        module__n_outputs=2,
        module__tokenizer=tokenizer,
        module__patch=8,
        module__dim=32,
        module__depth=2,
        module__heads=2,
        module__mlp_ratio=2.0,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__lr=3e-3,
        train_split=None,
        batch_size=16,
        max_epochs=12,
        iterator_train__shuffle=True,
        classes=[0, 1],
        verbose=0,
    )
    classifier.fit(windows, y=None)
    losses = classifier.history[:, "train_loss"]
    assert losses[-1] < 0.5 * losses[0]
    fresh, expected, _ = trials(128)
    assert (classifier.predict(fresh[96:]) == expected[96:]).mean() > 0.85
    model = classifier.module_
    assert (model.n_chans, model.n_times, model.n_outputs, model.sfreq) == (10, 64, 2, SFREQ)


def test_constructor_takes_braindecodes_names(braindecode: Any) -> None:
    import inspect

    from braindecode.models.base import EEGModuleMixin

    # Version 1 of Braindecode no longer has the argument add_log_softmax.
    expected = set(inspect.signature(EEGModuleMixin.__init__).parameters) - {"self", "add_log_softmax"}
    assert expected <= set(inspect.signature(EEGEncoder.__init__).parameters)
