"""Tests of mirrored images and crops, whose latents are computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.common.errors import run_main
from data_sharding.dataset.dataset import EEGDataset
from finetune.base_models.load import load_base
from finetune.images import ImageTable
from finetune.stable_diffusion.train import main
from finetune.targets.latents import encode_images
from finetune.targets.views import ViewConfig, make_view


def test_the_first_view_is_the_image_and_the_others_are_mirrored_or_cut_out() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    flip = ViewConfig(count=2, flip=True)
    square = image[:, 10:50]
    assert np.array_equal(make_view(image, 40, flip, 0, "a"), square)
    assert np.array_equal(make_view(image, 40, flip, 1, "a"), square[:, ::-1])
    crop = ViewConfig(count=3, crop=0.5)
    views = [make_view(image, 40, crop, number, name) for name in "ab" for number in range(3)]
    assert np.array_equal(views[0], square) and np.array_equal(views[3], square)
    assert len({view.tobytes() for view in views}) == 5
    assert np.array_equal(make_view(image, 40, crop, 1, "a"), views[1])
    # A crop of a smooth image stays inside the range of the central square.
    ramp = np.repeat(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    for number in (1, 2):
        view = make_view(ramp, 40, crop, number, "a")
        assert view.min() >= ramp[:, 10:50].min() and view.max() <= ramp[:, 10:50].max()
        assert float(np.ptp(view.astype(float))) >= 0.4 * float(np.ptp(ramp[:, 10:50].astype(float)))


@pytest.mark.parametrize("keys", [{"count": 0}, {"count": 2}, {"flip": True}, {"count": 2, "crop": 0.0}])
def test_views_that_do_not_fit_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"views\."):
        ViewConfig(**keys)  # pyright: ignore[reportArgumentType] - wrong on purpose


def test_latents_of_all_views_are_encoded_and_used(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path
) -> None:
    vae = load_base(miniature / "stable-diffusion").vae
    table = ImageTable(EEGDataset(paired_dataset))
    config = ViewConfig(count=2, flip=True)
    plain, views = encode_images(table, vae, 32), encode_images(table, vae, 32, views=config)
    assert views.shape == (len(table), 2, *plain.shape[1:])
    torch.testing.assert_close(views[:, 0], plain)
    assert not torch.allclose(views[:, 1], plain, atol=1e-3)

    args = ["--dataset", paired_dataset, "--encoder", encoder_package, "--base", miniature / "stable-diffusion"]
    args += ["--output", tmp_path / "run", "--tracker.kind", "none", "--training.steps", 1, "--training.batch_size", 8]
    args += ["--device", "cpu", "--views.count", 2, "--views.flip", "true"]
    assert run_main(main, [str(arg) for arg in args]) == 0
