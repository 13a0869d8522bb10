import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.images import ImageTable, decode_image, find_components, open_paired, to_model_range, to_pixels


def test_pixels_are_unchanged_after_conversion_to_the_model_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    x = to_model_range(pixels)
    assert x.shape == (2, 3, 8, 8) and x.min() >= -1 and x.max() <= 1
    np.testing.assert_array_equal(to_pixels(x), pixels)


def test_an_image_becomes_a_centred_square() -> None:
    import io

    from PIL import Image

    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue(), 10) == 200).all()


def test_a_broken_image_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="trial-7"):
        decode_image(b"no image", name="trial-7")


def test_each_image_has_one_row(paired_dataset: Path) -> None:
    data = open_paired(paired_dataset, "train")
    table = ImageTable(data)
    number = 17
    row = table.row_of[number]
    assert table.ids[row] == data[number].meta["image_id"]
    assert table.labels[row] == data[number].meta["label"]
    np.testing.assert_array_equal(table.pixels([row])[0], decode_image(data[number].image))


def test_a_dataset_without_images_is_refused(unpaired_dataset: Path) -> None:
    with pytest.raises(RequestError, match="no paired images"):
        open_paired(unpaired_dataset, "train")


def test_another_preprocessing_is_refused_with_the_key(paired_dataset: Path) -> None:
    data = EEGDataset(paired_dataset)
    # The settings for stride and rejection only choose windows, so they may differ between model and dataset.
    assert data.require_preprocess(dataclasses.replace(data.spec, stride=7, reject_uv=80.0), "model") is data
    with pytest.raises(RequestError, match=r"\(preprocess\.highpass 2\.0 against 0\.5\)"):
        data.require_preprocess(dataclasses.replace(data.spec, highpass=2.0, reject_uv=80.0), "model m")


def test_components_have_no_mean_and_one_sign(paired_dataset: Path) -> None:
    train, val = (ImageTable(EEGDataset(paired_dataset, split)) for split in ("train", "val"))
    images, held = train.pixels(size=8), val.pixels(size=8)
    train_MP, val_MP = find_components(images, held, 3)
    assert train_MP.shape == (len(train), 3) and val_MP.shape == (len(val), 3)
    np.testing.assert_allclose(train_MP.mean(axis=0), 0, atol=1e-4)
    variances = train_MP.var(axis=0)
    assert (np.diff(variances) <= 0).all()
    pixels_MX = images.reshape(len(train), -1) / 127.5 - 1
    # All components together keep all information of the images, so the distances between images stay the same.
    all_MP, _ = find_components(images, held, 1000)
    for one, other in ((0, 1), (0, len(train) - 1)):
        expected = np.linalg.norm(pixels_MX[one] - pixels_MX[other])
        np.testing.assert_allclose(np.linalg.norm(all_MP[one] - all_MP[other]), expected, rtol=1e-3)
    again, _ = find_components(images, images, 3)
    np.testing.assert_allclose(again, train_MP)
