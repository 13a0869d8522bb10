"""Tests of the linear baseline: training, generation, resuming, and damaged packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge

from data_sharding.common.errors import RequestError, run_main
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from finetune.eeg import group_repeats, read_means
from finetune.generate import main as generate
from finetune.generators import load_generator
from finetune.images import ImageTable, open_paired
from finetune.linear.model import LinearModel, compute_time_courses
from finetune.linear.train import LinearConfig, fit_linear_model, main


@pytest.fixture(scope="module")
def run(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear") / "run"
    config = path.parent / "linear.yaml"
    config.write_text(f"dataset: {paired_dataset}\noutput: {path}\nchannels: 16\nbins: 16\ncomponents: 4\n")
    assert main([str(config)]) == 0
    assert main([str(config)]) == 0  # A finished run is not trained again.
    return path


def test_the_map_is_ridge_regression(paired_dataset: Path) -> None:
    data, val = open_paired(paired_dataset, "train"), open_paired(paired_dataset, "val")
    config = LinearConfig(dataset=str(paired_dataset), output="", channels=16, bins=16, components=4)
    model, scores = fit_linear_model(config, data, val)
    x = compute_time_courses(read_means(data, group_repeats(data, 1))[:, :16], data.spec, bins=16)
    table = ImageTable(data)
    targets = np.concatenate([np.eye(len(data.labels))[table.labels], model.components_MP], axis=1)[table.row_of]
    # Scikit-learn's Ridge takes an absolute penalty. The penalty of the linear baseline is a multiple of the mean
    # eigenvalue of XX' or X'X, whichever matrix is smaller.
    centred = x - x.mean(axis=0)
    product = centred @ centred.T if len(x) <= x.shape[1] else centred.T @ centred
    plain = Ridge(alpha=scores["penalty"] * np.trace(product) / len(product)).fit(x.astype(float), targets)
    new = compute_time_courses(read_means(val, group_repeats(val, 1))[:, :16], val.spec, bins=16)
    np.testing.assert_allclose(np.concatenate(model.predict(new), axis=1), plain.predict(new), atol=2e-3)


def test_every_trial_gets_a_training_image_of_the_predicted_category(run: Path, paired_dataset: Path) -> None:
    out = run.parent / "generated"
    assert generate([str(run), str(paired_dataset), "-o", str(out), "--split", "test"]) == 0
    assert json.loads((out / "generated.json").read_text())["kind"] == "linear"
    generator = load_generator(run)
    test, train = open_paired(paired_dataset, "test"), ImageTable(open_paired(paired_dataset, "train"))
    eeg = read_means(test, group_repeats(test, 1))
    metas = [test.meta(number) for number in range(len(test))]
    images = generator.generate(eeg, seeds=list(range(len(eeg))), metas=metas)
    known = {image.tobytes(): label for image, label in zip(train.pixels(size=32), train.labels, strict=True)}
    shown = np.array([known[image.tobytes()] for image in images])
    features = compute_time_courses(eeg[:, :16], test.spec, bins=16)
    assert (shown == generator.model.predict(features)[0].argmax(axis=1)).all()
    labels = ImageTable(test).labels[ImageTable(test).row_of]
    assert np.mean(shown == labels) > 0.75, "the simulated categories are easy to decode"


def test_the_most_similar_image_of_the_predicted_category_is_shown() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    model = LinearModel(
        channels=("Cz",),
        bins=3,
        mean_F=np.zeros(3, np.float32),
        # The three features are the scores of three categories, and the first feature is also the predicted principal
        # component of the image. No training image has the third category.
        weight_FL=np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32),
        bias_L=np.zeros(4, np.float32),
        labels_M=np.array([0, 0, 1]),
        components_MP=np.array([[-1.0], [2.0], [5.0]], np.float32),
        images_MHW3=images,
    )
    features = np.array([[1, 0, 0], [-1, -2, 0], [-2, -1, 9]], np.float32)
    assert model.look_up(features).tolist() == [1, 0, 2]


def _write_other_cap(dataset: Path, path: Path, order: list[int], split: str) -> Path:
    """Write a copy of the dataset in which one split has only the channels in `order`, in this order."""
    splits = {}
    for name in ("train", "val", "test"):
        data = EEGDataset(dataset, name)
        splits[name] = [data[number] for number in range(len(data))]
    for number, sample in enumerate(splits[split]):
        meta = {**sample.meta, "n": len(order)}
        for key in ("ch_names", "positions"):
            meta[key] = [sample.meta[key][row] for row in order]
        splits[split][number] = Sample(
            key=sample.key, eeg=sample.eeg[order], meta=meta, image=sample.image, image_ext=sample.image_ext
        )
    manifest = EEGDataset(dataset).manifest
    write_dataset(path, splits, manifest.preprocess, labels=manifest.labels)
    return path


def _generate(run: Path, dataset: Path, output: Path, control: str = "none") -> list[bytes]:
    assert generate([str(run), str(dataset), "-o", str(output), "--split", "test", "--control", control]) == 0
    return [path.read_bytes() for path in sorted((output / "images").iterdir())]


@pytest.mark.parametrize("control", ["none", "shuffle"])
def test_channels_in_another_order_give_the_same_images(
    run: Path, paired_dataset: Path, tmp_path: Path, control: str
) -> None:
    other = _write_other_cap(paired_dataset, tmp_path / "other", [*range(15, -1, -1)], "test")
    plain, turned = (
        _generate(run, dataset, tmp_path / name, control) for name, dataset in (("a", paired_dataset), ("b", other))
    )
    assert plain == turned


def test_only_channels_that_train_and_val_have_in_common_are_read(paired_dataset: Path, tmp_path: Path) -> None:
    other = _write_other_cap(paired_dataset, tmp_path / "other", [4, 9, 2], "val")
    data, val = open_paired(str(other), "train"), open_paired(str(other), "val")
    config = LinearConfig(dataset=str(other), output="", channels=2, bins=16, components=4)
    assert fit_linear_model(config, data, val)[0].channels == ("E3", "E5")


def test_a_trial_without_a_channel_of_the_model_is_refused(
    run: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _write_other_cap(paired_dataset, tmp_path / "other", [*range(15)], "test")
    assert run_main(generate, [str(run), str(other), "-o", str(tmp_path / "out"), "--split", "test"]) == 2
    assert "a trial of the dataset has no channel E16; train the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_channels_by_row_is_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "model", tmp_path / "model"))
    values = json.loads((copy / "dreamscale.json").read_text())
    (copy / "dreamscale.json").write_text(json.dumps(values | {"channels": 16}))
    with pytest.raises(RequestError, match=r"the entry 'channels' is a number.*train the model again"):
        load_generator(copy)


@pytest.mark.parametrize("name", ["mean_F", "bias_L", "labels_M", "images_MHW3"])
def test_a_damaged_package_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(run / "model", tmp_path / "model"))
    arrays = load_file(copy / "model.safetensors")
    save_file({**arrays, name: arrays[name][:-1].copy()}, copy / "model.safetensors")
    with pytest.raises(RequestError, match=r"the model is damaged.*dreamscale linear"):
        load_generator(copy)


def test_wrong_settings_are_refused(paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", str(paired_dataset), "--output", str(tmp_path / "run")]
    config = tmp_path / "linear.yaml"
    config.write_text("dataset: x\noutput: y\n")
    assert main([str(config), *words, "--bins", "1000"]) == 2
    assert "'bins' is 1000" in capsys.readouterr().err
    assert main([str(config), *words, "--num_processes", "2"]) == 2
    assert "num_processes" in capsys.readouterr().err
