"""Names from files are drawn as plain text in figures. Without protection, matplotlib would draw text between dollar
signs as a formula, and raise an error if the formula is invalid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_sharding.common.errors import figure_text
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from finetune.dm_re2i.classification.measure import save_results, summarise
from pretrain.model.autoencoder import MaskedAutoencoder
from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.runs.distributed import World
from pretrain.training.plots import plot_reconstruction
from tests.security.conftest import SPEC, make_samples

FORMULAS = [r"$\frac{$", "$x_{$", r"\$a$_$", "$" * 1001, "\x1b[31m$$", "x" * 4000]


@pytest.mark.parametrize("name", FORMULAS, ids=range(len(FORMULAS)))
def test_names_are_no_formulas(name: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", {"val": make_samples(subject=name, ch_names=[name, f"{name}2"])}, SPEC)
    encoder = EncoderConfig(samples=50, patch=10, dim=8, depth=1, heads=2)
    model = MaskedAutoencoder(MaskedAutoencoderConfig(encoder=encoder, decoder=DecoderConfig(dim=8, depth=1, heads=2)))
    plot_reconstruction(tmp_path / "a.png", model, EEGDataset(tmp_path / "dataset", "val"), World(), step=1)
    found = summarise(torch.eye(4)[:, :2], torch.tensor([0, 1, 0, 1]), [name, "b"] * 2, list("abcd"), [name, "b"])
    save_results({"split": "val", **found}, tmp_path / "run")
    assert {path.name for path in tmp_path.rglob("*.png")} == {"a.png", "confusion.png", "subjects.png"}


def test_texts_of_figures_are_short() -> None:
    assert figure_text("$a\n$") == r"\$a \$" and len(figure_text("$" * 5000)) < 130
