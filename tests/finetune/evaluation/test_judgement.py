"""Tests of the judgement of generated images: new categories, single images, and images that are read in chunks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.evaluation import judgement
from finetune.evaluation.evaluate import _list_trials, measure_nearest_training_image
from finetune.evaluation.evidence import Setting
from finetune.evaluation.generated import GeneratedSet, Images
from finetune.evaluation.judgement import Judge, find_nearest, judge_images, pixel_features
from finetune.generation.trials import list_trials
from finetune.images import ImageTable
from pretrain.evidence.statistics import difference_interval


class CountedImages:
    """Images that remember the largest number of bytes that were read at once."""

    def __init__(self, images: Images) -> None:
        self.images, self.shape, self.largest = images, images.shape, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any, /) -> Images:
        found = self.images[rows]
        self.largest = max(self.largest, found.nbytes)
        return found


def make_own(data: EEGDataset, numbers: range, label: int | None = None) -> GeneratedSet:
    """Make a folder whose generated images are the seen images; `label` replaces the label of all trials."""
    table = ImageTable(data)
    pixels = table.pixels()[table.row_of[list(numbers)]]
    trials = []
    for number in numbers:
        meta, key = data.meta(number), data.key(number)
        facts = {name: meta[name] for name in ("image_id", "subject", "label")}
        trials.append({"key": key, "eeg_key": key, **facts, **({} if label is None else {"label": label})})
    about = {"labels": [*data.labels, "new"], "trials": trials, "control": "none"}
    return GeneratedSet(
        path=Path("own"), about=about, images_BHW3=CountedImages(pixels), real_BHW3=CountedImages(pixels)
    )


def judge_set(own: GeneratedSet, paired_dataset: Path) -> dict[str, Any]:
    data = EEGDataset(paired_dataset, "test")
    groups = [[number] for number in range(len(own.trials))]
    return judge_images(
        own,
        {},
        Judge(classify=lambda images: np.zeros(len(images), np.int64), features=pixel_features, features_name="pixels"),
        train=EEGDataset(paired_dataset, "train"),
        data=data,
        trials=list_trials(data, groups, groups),
        resamples=500,
    )


def test_images_are_read_in_chunks(paired_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_own(EEGDataset(paired_dataset, "test"), range(16))
    whole = judge_set(own, paired_dataset)
    monkeypatch.setattr(judgement, "CHUNK", 3 * 32 * 32 * 3)
    own = make_own(EEGDataset(paired_dataset, "test"), range(16))
    assert judge_set(own, paired_dataset) == whole
    assert isinstance(own.images_BHW3, CountedImages) and isinstance(own.real_BHW3, CountedImages)
    assert own.images_BHW3.largest <= 3 * 32 * 32 * 3 and own.real_BHW3.largest <= 3 * 32 * 32 * 3


@pytest.mark.parametrize("count", [1, 16])
def test_images_of_a_new_category_are_identified(count: int, paired_dataset: Path) -> None:
    found = judge_set(make_own(EEGDataset(paired_dataset, "test"), range(count), label=2), paired_dataset)
    assert found["word"] in ("confounded", "not judgeable") and found["chance"] == 0.5
    # Each generated image is the seen image. If there is only one image, there is no other image to compare with, and
    # the score is chance.
    assert found["scores"]["own"] == (0.5 if count == 1 else 1.0)


def encode_again(image: bytes) -> bytes:
    """Return a JPEG file of the image, enlarged to 80 x 80 pixels."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).resize((80, 80), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@pytest.mark.parametrize("copy", [bytes, encode_again], ids=["equal files", "encoded again"])
def test_copies_of_an_image_under_other_names_count_as_one_image(
    copy: Callable[[bytes], bytes], paired_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, data = (EEGDataset(paired_dataset, split) for split in ("train", "test"))
    groups = [[number] for number in range(len(data))]
    before = Setting.read(train, data, list_trials(data, groups, groups))
    shared = np.isin(before.trials.images_n, before.train.images_n)
    assert not shared[2:4].any()
    shown = EEGDataset.image
    copied = copy(shown(train, 5))
    monkeypatch.setattr(
        EEGDataset, "image", lambda self, n: copied if self.split == "test" and n in (2, 3) else shown(self, n)
    )
    setting = Setting.read(train, data, list_trials(data, groups, groups))
    assert np.isin(setting.trials.images_n, setting.train.images_n).nonzero()[0].tolist() == sorted(
        [2, 3, *shared.nonzero()[0]]
    )
    assert len(np.unique(setting.trials.images_n)) == len(np.unique(before.trials.images_n)) - 1


def test_trials_must_have_the_facts_of_the_dataset(paired_dataset: Path) -> None:
    data = EEGDataset(paired_dataset, "test")
    assert len(_list_trials(data, make_own(data, range(4)))) == 4
    with pytest.raises(RequestError, match="has another label than in"):
        _list_trials(data, make_own(data, range(4), label=2))


def test_blocks_give_the_same_nearest_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images_BD, train_MD = rng.standard_normal((7, 12)), rng.standard_normal((9, 12))
    expected = np.corrcoef(images_BD, train_MD)[:7, 7:].argmax(axis=1)
    monkeypatch.setattr(judgement, "CELLS", 20)
    assert (find_nearest(images_BD, train_MD) == expected).all()
    train = rng.integers(0, 256, (30, 4, 4, 3), np.uint8)
    assert measure_nearest_training_image(np.repeat(train[5:6], 600, axis=0), train).tolist() == [0.0] * 600


def test_a_bootstrap_in_parts_draws_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    values, images = np.random.default_rng(0).standard_normal(90), np.repeat(np.arange(31), 3)[:90]
    whole = difference_interval(values, images, 500, 3)
    monkeypatch.setattr("pretrain.evidence.statistics._CELLS", 100)
    assert difference_interval(values, images, 500, 3) == whole
