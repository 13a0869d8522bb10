"""Tests of the limits of generated images: other real images, repeats of trials, and other training seeds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.evaluation.generated import GeneratedSet
from finetune.evaluation.limits.other_images import (
    OtherImages,
    choose_of_category,
    hash_images,
    measure_other_images,
    read_folder,
    take_training_images,
)
from finetune.evaluation.limits.repeats import measure_agreement, measure_noise_ceiling
from finetune.evaluation.limits.training_seeds import ONE_RUN, measure_training_seeds
from finetune.evaluation.measure import MeasureOptions
from finetune.evaluation.networks.judges import Judges, RealImages
from finetune.evaluation.networks.network import FrozenNetwork
from finetune.generation.trials import list_trials
from finetune.images import ImageTable
from pretrain.evidence.rules import NotApplicable
from pretrain.evidence.trials import tabulate_trials

SPEC = PreprocessSpec(sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=128)


def test_images_of_the_training_split_without_seen_images_and_copies(paired_dataset: Path) -> None:
    table = ImageTable(EEGDataset(paired_dataset, "train"))
    other = take_training_images(table, [table.ids[0], "x"], [(table.ids[1], "y"), (table.ids[2], table.ids[3])], 16)
    assert isinstance(other, OtherImages) and len(other.images_MHW3) == 60
    np.testing.assert_array_equal(other.images_MHW3[:2], table.pixels([4, 5], 16))
    np.testing.assert_array_equal(other.labels_M, table.labels[4:])
    assert isinstance(take_training_images(table, table.ids[1:], [], 16), NotApplicable)


def test_each_seen_image_gets_another_image_of_its_category() -> None:
    other = OtherImages(source="", images_MHW3=np.zeros((5, 4, 4, 3), np.uint8), labels_M=np.array([0, 0, 1, 1, 1]))
    real = RealImages(np.zeros((6, 4, 4, 3), np.uint8), list("aabcde"), np.array([1, 1, 1, 1, 0, 1]))
    rows_B = choose_of_category(other, real, seed=0)
    assert rows_B is not None and rows_B[0] == rows_B[1] and rows_B[4] < 2
    # Four seen images of category 1 share three other images, so one other image occurs twice.
    assert sorted(np.bincount(rows_B[[0, 2, 3, 5]], minlength=5)[2:]) == [1, 1, 2]
    unknown = dataclasses.replace(other, labels_M=np.array([0, 0, -1, -1, -1]))
    assert choose_of_category(unknown, real, seed=0) is None


def test_a_folder_of_images_with_and_without_categories(paired_dataset: Path, tmp_path: Path) -> None:
    table = ImageTable(EEGDataset(paired_dataset, "test"))
    seen = hash_images(table, table.ids[:3])
    assert len(seen) == 3
    files = list(table.read_files(range(9)))
    for number, (folder, data) in enumerate(zip(["circle"] * 5 + ["square"] * 3 + ["."], files, strict=True)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{number}.png").write_bytes(data)
    (tmp_path / "copy.png").write_bytes(files[8])
    (tmp_path / "notes.txt").write_text("no image")
    other = read_folder(tmp_path, ["circle", "square"], seen, 16)
    # The files 0, 1 and 2 are seen images; the files 8 and copy.png are equal and have no category.
    assert other.labels_M.tolist() == [-1, 0, 0, 1, 1, 1] and other.images_MHW3.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(other.images_MHW3[1:3], table.pixels([3, 4], 16))
    with pytest.raises(RequestError, match="no such folder"):
        read_folder(tmp_path / "missing", [], set(), 16)
    with pytest.raises(
        RequestError,
        match=r"at least 2 images .* that were not seen in the trials and are not equal to another file; found 1$",
    ):
        read_folder(tmp_path, [], seen | hash_images(table, table.ids[4:]), 16)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"bad\.png: the image cannot be decoded"):
        read_folder(tmp_path, [], seen, 16).images_MHW3[:]


def test_other_images_without_categories_get_the_metrics_of_sets() -> None:
    import torch

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)

    def compute(x: Any) -> tuple[Any, Any]:
        return x.mean((1, 2)), x[:, 0, :2, 0] / 255

    network = FrozenNetwork(
        name="dataset-classifier",
        file="",
        sha256="",
        prepare=lambda x: torch.from_numpy(x).float(),
        compute=compute,
    )
    real = RealImages(images[:8], [f"i{n // 2}" for n in range(8)], np.arange(8) // 2 % 2)
    other = OtherImages(source="a folder", images_MHW3=images[8:], labels_M=np.full(22, -1))
    found = measure_other_images(other, real, Judges(networks=[network]), MeasureOptions())
    # Four different images were seen, so four other images are used.
    assert isinstance(found, dict) and (found["images"], found["paired"]) == (4, False)
    assert {name.split("[")[0] for name in found["metrics"]} == {
        "frechet_distance",
        "kernel_distance",
        "inception_score",
    }
    labelled = dataclasses.replace(other, labels_M=np.arange(22) % 2)
    paired = measure_other_images(labelled, real, Judges(networks=[network]), MeasureOptions(permutations=99))
    assert isinstance(paired, dict) and paired["paired"] and paired["images"] == 4
    assert {"psnr", "accuracy[dataset-classifier]", "retrieval_rank[dataset-classifier]"} <= paired["metrics"].keys()
    reason = measure_other_images(NotApplicable(reason="none"), real, Judges(networks=[]), MeasureOptions())
    assert reason == "not applicable: none"


def write_repeats(path: Path, response: float) -> EEGDataset:
    """Write 2 people x 12 images x 4 presentations; the response to an image has the given strength."""
    rng = np.random.default_rng(0)
    responses = rng.normal(0, 10, (2, 12, 3, 128))
    samples = []
    for number in range(96):
        person, image, repeat = number // 48, number % 12, number % 48 // 12
        eeg = response * responses[person, image] + rng.normal(0, 10, (3, 128)) + 5 * repeat
        meta = {
            **{"n": 3, "ch_names": ["A", "B", "C"], "positions": [None] * 3, "reference": "average", "sfreq": 128.0},
            **{"start": float(number), "recording": f"rec-{person}-{repeat}", "subject": f"s{person}", "session": ""},
            **{"corpus": "tiny", "bads": [], "split": "test", "image_id": f"i{image}", "label": image % 2},
        }
        meta |= {"label_name": f"label {image % 2}"}
        samples.append(
            Sample(key=f"t{number:03d}", eeg=eeg.astype(np.float32), meta=meta, image=b"png", image_ext="png")
        )
    write_dataset(path, {"test": samples}, SPEC, labels=["label 0", "label 1"])
    return EEGDataset(path, "test")


def test_noise_ceiling_of_the_eeg(tmp_path: Path) -> None:
    for response, low, high in ((0.0, -0.4, 0.4), (1.0, 0.6, 0.95), (20.0, 0.99, 1.0)):
        data = write_repeats(tmp_path / str(response), response)
        groups = [list(range(48 * person + image, 48 * person + 48, 12)) for person in (0, 1) for image in range(12)]
        trials = list_trials(data, groups, groups)
        found = measure_noise_ceiling(data, trials, np.zeros(24, int))
        # The mean of each recording is removed, so the offset of 5 microvolts between recordings does not matter.
        assert low <= found["eeg"]["reliability"] <= high, response
        assert found["eeg"]["by_person"].keys() == {"tiny/s0", "tiny/s1"} and found["eeg"]["images"] == 24
        assert found["eeg"]["ceiling"] == pytest.approx(max(0, found["eeg"]["reliability"]) ** 0.5)
        assert "--average_repeats 1" in found["generated"]
    single = list_trials(data, [[n] for n in range(12)], [[n] for n in range(12)])
    assert measure_noise_ceiling(data, single, np.zeros(12, int))["eeg"].startswith("not applicable: no person")


def test_agreement_of_generated_images(tmp_path: Path) -> None:
    table = tabulate_trials(write_repeats(tmp_path / "d", 1.0))
    images = np.unique(table.images_n, return_inverse=True)[1]
    found = measure_agreement(images % 2, table)
    assert found == {"agreement": 1.0, "chance": 0.5, "ceiling": 1.0, "images": 24}
    random = measure_agreement(np.random.default_rng(0).integers(0, 2, 96), table)
    assert isinstance(random, dict) and random["agreement"] == pytest.approx(random["chance"], abs=0.1)


def write_run(folder: Path, digest: str, accuracy: float, **changes: Any) -> GeneratedSet:
    """Write the two files of an evaluated folder."""
    folder.mkdir()
    about = {"control": "none", "kind": "k", "dataset_id": "d", "split": "test", "labels": ["a"]}
    about |= {"model_digest": digest, "trials": [{"key": "t0"}], **changes.get("about", {})}
    metrics = {"accuracy": {"accuracy": accuracy}, "psnr": 10 * accuracy, "fid": "not computed", "confusion": [[1]]}
    result = {"generated": metrics, "classifier": {"sha256": changes.get("classifier", "c")}}
    (folder / "generated.json").write_text(json.dumps(about))
    (folder / "metrics.json").write_text(json.dumps(result))
    none = np.zeros((0, 1, 1, 3), np.uint8)
    return GeneratedSet(path=folder, about=about, images_BHW3=none, real_BHW3=none)


def test_spread_over_training_seeds(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", "0", 0.5)
    for name, digest, accuracy in (("b", "1", 0.7), ("c", "2", 0.6)):
        write_run(tmp_path / name, digest, accuracy)
    result = json.loads((tmp_path / "own" / "metrics.json").read_text())
    found = measure_training_seeds(own, result, [tmp_path / "b", tmp_path / "c"])
    assert isinstance(found, dict) and found["runs"] == 3 and found["metrics"].keys() == {"accuracy", "psnr"}
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["values"] == [0.5, 0.7, 0.6] and (accuracy["least"], accuracy["most"]) == (0.5, 0.7)
    assert accuracy["mean"] == pytest.approx(0.6) and accuracy["std"] == pytest.approx(0.1)
    assert measure_training_seeds(own, result, []) == ONE_RUN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"about": {"control": "shuffle"}}, "images of a control"),
        ({"about": {"split": "val"}}, "split is 'val', but 'test'"),
        ({"about": {"trials": [{"key": "t1"}]}}, "the images belong to other trials than"),
        ({"about": {"model_digest": "0"}}, "holds images of the same model as another given folder"),
        ({"about": {"model_digest": 3}}, "model_digest"),
        ({"classifier": "other"}, "another classifier"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    own = write_run(tmp_path / "own", "0", 0.5)
    result = json.loads((tmp_path / "own" / "metrics.json").read_text())
    write_run(tmp_path / "b", "1", 0.5, **changes)
    with pytest.raises(RequestError, match=message):
        measure_training_seeds(own, result, [tmp_path / "b"])
    with pytest.raises(RequestError, match="no such file; run 'dreamscale generate' first"):
        measure_training_seeds(own, result, [tmp_path / "missing"])
