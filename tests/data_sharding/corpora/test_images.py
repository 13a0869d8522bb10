"""Tests on small versions of EEG-ImageNet and THINGS-EEG2 in the file formats of the published datasets."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.corpora import CorpusConfig, Item, describe_design, list_items, open_item
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.samples import decode_eeg
from data_sharding.dataset.splits import TRAIN_OR_VAL, SplitConfig
from data_sharding.formats.open_signal import ReadError
from data_sharding.job.process_recording import process_recording
from data_sharding.job.run import main as shard_main
from data_sharding.job.task import PartResult, Task
from data_sharding.processing.preprocess import PreprocessSpec

SYNSETS = ["n02106662", "n02124075", "n02281787"]
RNG = np.random.default_rng(0)
BY_CORPUS = SplitConfig(by="concept", val_fraction=0, test_fraction=0, image_val_fraction=0.2)


def _encode_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _encode_jpeg()


def shard(item: Item, work: Path, spec: PreprocessSpec, split: SplitConfig) -> tuple[PartResult, list[dict[str, Any]]]:
    """Process one recording; return the result and the metadata of its samples.

    The metadata of each sample also contain the window under 'eeg' and the image under 'bytes'.
    """
    labels = tuple(sorted({trial.label_name for trial in item.trials or ()}))
    result = process_recording(Task(item=item, spec=spec, split=split, labels=labels, work=work, timeout_s=60))
    out = []
    for name in result.samples:
        folder = work / "parts" / result.part[:2] / result.part
        data = (folder / f"{name}.tar").read_bytes()
        for entry in read_json(folder / f"{name}.idx"):
            parts = {name: data[at : at + size] for name, (at, size) in entry["members"].items()}
            meta = json.loads(parts["json"])
            image = next((parts[key] for key in parts if key.startswith("image.")), None)
            out.append({**meta, "eeg": decode_eeg(parts["eeg.npy.zst"], meta["n"]).astype(float), "bytes": image})
    return result, out


def released(lengths: dict[int, int] | None = None) -> dict[str, Any]:
    """Return a small EEG-ImageNet: two subjects see four images of each of three categories, in blocks."""
    images = [f"{synset}_{100 + i}" for synset in SYNSETS for i in range(4)]
    dataset = []
    for subject in (1, 4):
        for image, name in enumerate(images):
            length = (lengths or {}).get(len(dataset), 500)
            eeg = torch.from_numpy(RNG.normal(size=(128, length)).astype(np.float32))
            dataset.append({"eeg": eeg, "image": image, "label": SYNSETS.index(name.split("_")[0]), "subject": subject})
    return {"dataset": dataset, "labels": SYNSETS, "images": images}


def splits() -> dict[str, Any]:
    """Return splits by image: in each category the third image is for validation and the fourth for testing."""
    of = {"train": (0, 1), "val": (2,), "test": (3,)}
    return {"splits": [{split: [i for i in range(24) if i % 4 in which] for split, which in of.items()}]}


def write_imagenet(root: Path, data: dict[str, Any], folds: dict[str, Any], *, new: bool = True) -> CorpusConfig:
    torch.save(data, root / "eeg_5_95_std.pth", _use_new_zipfile_serialization=new)
    torch.save(folds, root / "block_splits_by_image_all.pth", _use_new_zipfile_serialization=new)
    for name in data["images"]:
        path = root / "images" / name.split("_")[0] / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG)
    return CorpusConfig(kind="eeg_imagenet", root=str(root), images=str(root / "images"), name="imagenet")


class TestEEGImageNet:
    @pytest.mark.parametrize("new", [True, False])
    def test_the_published_file_is_read(self, tmp_path: Path, new: bool) -> None:
        data = released({1: 449, 2: 450, 13: 601, 14: 600})
        items = list_items(write_imagenet(tmp_path, data, splits(), new=new))
        assert [(i.subject, len(i.trials or ()), i.left_out) for i in items] == [
            ("sub-1", 11, {"shorter than 450 samples": 1}),
            ("sub-4", 11, {"longer than 600 samples": 1}),
        ]
        first = items[0].trials[0]  # type: ignore[index]
        assert (first.label_name, first.image_id, first.split) == ("n02106662", "n02106662_100", "train")
        assert first.image == str(tmp_path / "images" / "n02106662" / "n02106662_100.JPEG")
        signal = open_item(items[1])
        assert (signal.info.sfreq, len(signal.info.segments), signal.info.n_samples) == (1000, 11, 11 * 440)
        assert signal.info.unit_known and any("standardised" in note for note in signal.info.notes)
        # The second trial of the second subject was left out, so the second segment belongs to trial 14 of the file.
        x = np.asarray(data["dataset"][14]["eeg"])[:, 20:460]
        segment = signal.info.segments[1]
        assert np.array_equal(signal.read(segment.start, segment.stop, list(range(128))), x)
        over = signal.read(430, 450, [3, 5])
        assert np.array_equal(over[:, 10:], x[[3, 5], :10]) and over.shape == (2, 20)
        assert 5 < signal.info.scale * 1e6 * over.std() < 15

    def test_splits_are_those_of_the_released_file(self, tmp_path: Path) -> None:
        items = list_items(write_imagenet(tmp_path, released(), splits()))
        config = SplitConfig(val_fraction=0, test_fraction=0)
        found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
        for item in items:
            for trial in item.trials or ():
                found[config.trial(item.subject, trial.image_id, trial.split, trial.concept)].add(trial.image_id)  # type: ignore[index]
        assert {len(found["train"]), len(found["val"]), len(found["test"])} == {6, 3}
        assert not found["train"] & found["val"] and not found["val"] & found["test"]

    def test_single_subject_split(self, tmp_path: Path) -> None:
        folds = {"splits": [{"train": [12, 13, 16, 17], "val": [14], "test": [15, 19]}]}
        items = list_items(write_imagenet(tmp_path, released(), folds))
        assert [(i.subject, len(i.trials or ())) for i in items] == [("sub-1", 0), ("sub-4", 7)]
        assert items[0].left_out == {"in none of the split's lists": 12} and "no trial is left" in (
            items[0].reason or ""
        )

    def test_blocks(self, tmp_path: Path) -> None:
        config = write_imagenet(tmp_path, released(), splits())
        items = list_items(config)
        assert [t.block for t in items[0].trials or ()] == [f"sub-1-block-{b}" for b in (0, 1, 2) for _ in range(4)]
        design = describe_design(config, items)
        assert design["design"] == "block" and design["name"] == "imagenet" and "4.0 trials long" in design["evidence"]

    def test_to_samples(self, tmp_path: Path) -> None:
        items = list_items(write_imagenet(tmp_path, released({12: 400}), splits()))
        spec = PreprocessSpec(sfreq=1000, highpass=5, lowpass=95, window=440, stride=440, notch="off", reference="keep")
        result, samples = shard(items[1], tmp_path / "work", spec, BY_CORPUS)
        row = result.row
        assert (row.status, row.unit, row.windows, row.n_eeg) == ("sharded", "declared", 11, 128)
        assert result.samples == {"train": 5, "val": 3, "test": 3}
        assert {s["block"] for s in samples} == {f"sub-4-block-{i}" for i in range(3)}
        assert all(s["eeg"].shape == (128, 440) and s["bytes"] == JPEG for s in samples)
        assert 1 < np.median([s["eeg"].std() for s in samples]) < 10
        assert all(s["onset"] == -20 and "repeat" in s for s in samples)
        # The published code resamples the 440 samples of a trial to 512, so test this window length too.
        stretched = dataclasses.replace(spec, sfreq=1163.6364, window=512)
        result_512, samples = shard(items[1], tmp_path / "work", stretched, BY_CORPUS)
        assert result_512.row.windows == 11 and all(s["eeg"].shape == (128, 512) for s in samples)
        # One file contains the recordings of six subjects, so each recording must have its own checksum.
        assert shard(items[0], tmp_path / "work", spec, BY_CORPUS)[0].row.sha256 != row.sha256

    def test_a_short_trial_is_left_out_alone(self, tmp_path: Path) -> None:
        """Trials of 450 to 459 samples are left out, because they end before sample 460, where the window ends."""
        data = released({0: 450, 1: 459, 2: 460, 3: 461, 4: 455})
        items = list_items(write_imagenet(tmp_path, data, splits()))
        spec = PreprocessSpec(sfreq=1000, highpass=5, lowpass=95, window=440, stride=440, notch="off", reference="keep")
        result, samples = shard(items[0], tmp_path / "work", spec, BY_CORPUS)
        assert (result.row.status, len(samples)) == ("sharded", 9)
        assert result.row.windows_left_out == {"the epoch ends before the window of 0.44 s": 3}
        shorter = dataclasses.replace(spec, window=430)
        result, samples = shard(items[0], tmp_path / "work", shorter, BY_CORPUS)
        assert len(samples) == 12 and not result.row.windows_left_out
        assert {s["eeg"].shape[1] for s in samples} == {430, 435, 439, 440}

    def test_without_the_given_splits(self, tmp_path: Path) -> None:
        config = write_imagenet(tmp_path, released(), splits())
        items = list_items(dataclasses.replace(config, options={"splits": ""}))
        assert {t.split for i in items for t in i.trials or ()} == {""}

    def test_faults(self, tmp_path: Path) -> None:
        config = write_imagenet(tmp_path, released(), splits())
        with pytest.raises(RequestError, match="the option 'fold' must be from 0 to 0, not 3"):
            list_items(dataclasses.replace(config, options={"fold": 3}))
        with pytest.raises(RequestError, match="no such file"):
            list_items(dataclasses.replace(config, options={"file": "eeg_14_70_std.pth"}))
        torch.save({"splits": [{"train": [0], "val": [0], "test": []}]}, tmp_path / "a.pth")
        with pytest.raises(RequestError, match="trial 0 is in train and in val"):
            list_items(dataclasses.replace(config, options={"splits": "a.pth"}))
        torch.save({"splits": [{"train": [0], "val": [12], "test": [99]}]}, tmp_path / "b.pth")
        with pytest.raises(RequestError, match="lists trial 99, but the recordings have only 24 trials"):
            list_items(dataclasses.replace(config, options={"splits": "b.pth"}))
        torch.save({"splits": [{"train": [0], "val": [12], "test": []}]}, tmp_path / "c.pth")
        with pytest.raises(RequestError, match="'n02106662_100' is in train and in val"):
            list_items(dataclasses.replace(config, options={"splits": "c.pth"}))
        next((tmp_path / "images").rglob("*.JPEG")).unlink()
        with pytest.raises(RequestError, match="1 of 12 images are missing"):
            list_items(config)
        torch.save({"splits": [Path("x")]}, tmp_path / "block_splits_by_image_all.pth")
        with pytest.raises(RequestError, match="refused: it asks for pathlib"):
            list_items(config)
        (tmp_path / "eeg_5_95_std.pth").write_bytes(b"what")
        with pytest.raises(RequestError, match="eeg_5_95_std"):
            list_items(config)


JUNK = st.sampled_from(
    [None, "x", -1, 10**9, 2.5, float("nan"), [], [None], {}, ["a", 1], np.zeros(3), np.array(["a"]), b"\x00", True]
)


def spoil(value: Any, data: st.DataObject) -> Any:
    """Replace a random part of a published file's content with a wrong value."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)):
        copy = value.copy()
        key = data.draw(st.sampled_from(list(copy) if isinstance(copy, dict) else range(len(copy))))
        copy[key] = spoil(copy[key], data)
        return copy
    return data.draw(JUNK)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_content_gives_a_request_error_or_a_row(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "sub-01").is_dir():
        write_things(tmp_path)
        write_imagenet(tmp_path, released(), splits())
    config = CorpusConfig(kind="eeg_imagenet", root=str(tmp_path), images=str(tmp_path / "images"))
    which = data.draw(st.sampled_from(["file", "splits", "metadata", "epochs"]))
    if which in ("file", "splits"):
        torch.save(spoil(released() if which == "file" else splits(), data), tmp_path / "spoilt.pth")
        config = dataclasses.replace(config, options={which: "spoilt.pth"})
    else:
        path = tmp_path / "image_metadata.npy" if which == "metadata" else tmp_path / "sub-01" / THINGS_FILE
        whole = np.load(path, allow_pickle=True).item()
        target = tmp_path / "spoilt.npy" if which == "metadata" else tmp_path / "sub-09" / THINGS_FILE
        target.parent.mkdir(exist_ok=True)
        np.save(target, spoil(whole, data), allow_pickle=True)
        options = {"metadata": str(target)} if which == "metadata" else {}
        config = CorpusConfig(kind="things_eeg2", root=str(tmp_path), images=str(tmp_path / "images"), options=options)
    try:
        items = list_items(config)
    except RequestError as error:
        assert "\n" not in str(error) and which != "epochs"
        return
    assert all(item.recording.problem is None for item in items if "sub-09" not in item.path)
    for item in items:
        if item.recording.problem is None and item.trials:
            try:
                signal = open_item(item)
            except ReadError:
                continue
            signal.read(0, 50, [0])


THINGS_FILE = "preprocessed_eeg_test.npy"
CONCEPTS = ["aardvark", "abacus", "zebra_crossing"]
CHANNELS = ["Pz", "O1", "Oz"]


def write_things(root: Path, *, raw: bool = False) -> CorpusConfig:
    """Write a small THINGS-EEG2 dataset with two subjects.

    The dataset has three training concepts with two images each, and two test concepts with one image each.
    """
    root.mkdir(exist_ok=True)
    train = [f"{i:05d}_{name}" for i, name in enumerate(CONCEPTS, 1) for _ in range(2)]
    table = {
        "train_img_concepts": train,
        "train_img_files": [f"{name[6:]}_0{i % 2 + 1}b.jpg" for i, name in enumerate(train)],
        "test_img_concepts": ["00001_aircraft_carrier", "00002_antelope"],
        "test_img_files": ["aircraft_carrier_06s.jpg", "antelope_01b.jpg"],
    }
    np.save(root / "image_metadata.npy", table)  # type: ignore[arg-type]
    for word, folder in (("train", "training_images"), ("test", "test_images")):
        for concept, file in zip(table[f"{word}_img_concepts"], table[f"{word}_img_files"], strict=True):
            path = root / "images" / folder / concept / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(JPEG)
    for subject in ("sub-01", "sub-02"):
        for partition, images, reps in (("training", 6, 4), ("test", 2, 8)):
            if raw:
                for session in ("ses-01", "ses-02"):
                    rng = np.random.default_rng(len(subject + session))
                    x = rng.normal(0, 1e-5, (4, 30_000))
                    x[3] = 0
                    order = rng.permutation(np.repeat([*range(1, images + 1), 99999], reps))
                    x[3, 200 * (1 + np.arange(len(order)))] = order
                    data = {"raw_eeg_data": x, "ch_names": [*CHANNELS, "stim"], "ch_types": ["eeg"] * 3 + ["stim"]}
                    data |= {"sfreq": 1000, "highpass": 0.01, "lowpass": 100}
                    (root / subject / session).mkdir(parents=True, exist_ok=True)
                    np.save(root / subject / session / f"raw_eeg_{partition}.npy", data)  # type: ignore[arg-type]
            else:
                x = np.random.default_rng(images).normal(size=(images, reps, 3, 100))
                data = {"preprocessed_eeg_data": x, "ch_names": CHANNELS, "times": np.arange(100) / 100}
                (root / subject).mkdir(parents=True, exist_ok=True)
                np.save(root / subject / f"preprocessed_eeg_{partition}.npy", data)  # type: ignore[arg-type]
    return CorpusConfig(kind="things_eeg2", root=str(root), images=str(root / "images"))


def make_trials(item: Item) -> list[tuple[str, str, str]]:
    return [(t.image_id, t.concept, t.split) for t in item.trials or ()]


class TestThingsEEG2:
    def test_preprocessed(self, tmp_path: Path) -> None:
        items = list_items(write_things(tmp_path))
        assert [(i.path, len(i.trials or ())) for i in items] == [
            (f"sub-0{s}/preprocessed_eeg_{p}.npy", n) for s in (1, 2) for p, n in (("test", 16), ("training", 24))
        ]
        test, training = items[:2]
        assert make_trials(training)[4] == ("00001_aardvark/aardvark_02b", "aardvark", TRAIN_OR_VAL)
        assert make_trials(test)[8] == ("00002_antelope/antelope_01b", "antelope", "test")
        signal = open_item(training)
        assert signal.info.sfreq == 100 and signal.info.ch_names == CHANNELS and len(signal.info.segments) == 24
        x = np.load(tmp_path / "sub-01" / "preprocessed_eeg_training.npy", allow_pickle=True).item()
        segment = signal.info.segments[4 * 2 + 3]
        assert np.array_equal(
            signal.read(segment.start, segment.stop, [2, 0]), x["preprocessed_eeg_data"][2, 3, [2, 0]]
        )

    @pytest.mark.parametrize(("sfreq", "tmin"), [(100, -0.2), (250, -0.2), (200, 0.0)])
    def test_trials_begin_at_the_picture_and_keep_baseline_and_repeats(
        self, tmp_path: Path, sfreq: int, tmin: float
    ) -> None:
        """The epochs contain a pulse 0.3 s after the onset of the image."""
        config = write_things(tmp_path)
        for path in tmp_path.glob("sub-0*/preprocessed_eeg_*.npy"):
            x = np.load(path, allow_pickle=True).item()
            times = np.arange(round((1 - tmin) * sfreq)) / sfreq + tmin
            shape = (*x["preprocessed_eeg_data"].shape[:3], len(times))
            noise = np.random.default_rng(0).normal(0, 0.05, shape)
            pulse = np.exp(-0.5 * ((times - 0.3) / 0.02) ** 2) * np.array([1.0, -1.0, 0.5])[:, None]
            np.save(path, x | {"preprocessed_eeg_data": noise + pulse, "times": np.round(times, 3)})
        spec = PreprocessSpec(
            sfreq=sfreq, highpass=1, lowpass=40, window=round(0.8 * sfreq), stride=1, notch="off", reference="keep"
        )
        for number, count in ((0, 16), (1, 24)):
            result, samples = shard(list_items(config)[number], tmp_path / "work", spec, BY_CORPUS)
            assert len(samples) == count and result.row.trial_tmin == tmin
            for sample in samples:
                assert sample["onset"] == round(-tmin * sfreq) and sample["eeg"].shape[1] == len(times)
                peak = int(abs(sample["eeg"][0]).argmax()) - sample["onset"]
                assert abs(peak / sfreq - 0.3) <= 1.5 / sfreq
            shown = [(sample["image_id"], sample["repeat"]) for sample in samples]
            repeats = 8 if number == 0 else 4
            assert sorted(shown) == sorted((image, i) for image in {name for name, _ in shown} for i in range(repeats))

    def test_the_released_epochs_do_not_hold_a_second_after_the_onset(self, tmp_path: Path) -> None:
        config = write_things(tmp_path)
        for path in tmp_path.glob("sub-0*/preprocessed_eeg_*.npy"):
            x = np.load(path, allow_pickle=True).item()
            np.save(path, x | {"times": np.round(np.arange(100) / 100 - 0.2, 2)})
        spec = PreprocessSpec(sfreq=100, highpass=1, lowpass=40, window=100, stride=1, notch="off", reference="keep")
        result, _ = shard(list_items(config)[0], tmp_path / "work", spec, BY_CORPUS)
        assert result.row.reason == "no window left: 16 the epoch ends before the window of 1 s"

    def test_averaging_in_the_shards_is_refused(self, tmp_path: Path) -> None:
        config = write_things(tmp_path)
        for option in ("repetitions", "test_repetitions"):
            with pytest.raises(ValueError, match=f"no option '{option}' any more; .*'average_repeats' of 'dreamscale"):
                dataclasses.replace(config, options={option: "average"})

    def test_raw(self, tmp_path: Path) -> None:
        config = dataclasses.replace(write_things(tmp_path, raw=True), options={"source": "raw"})
        items = list_items(config)
        assert [(i.subject, i.session) for i in items[::2]] == [
            (f"sub-0{s}", f"ses-0{k}") for s in (1, 2) for k in (1, 2)
        ]
        test, training = items[:2]
        assert len(training.trials or ()) == 24 and training.left_out == {"target trials": 4}
        x = np.load(tmp_path / "sub-01" / "ses-01" / "raw_eeg_training.npy", allow_pickle=True).item()["raw_eeg_data"]
        first = int(np.flatnonzero((x[3] > 0) & (x[3] < 99999))[0])
        trial = training.trials[0]  # type: ignore[index]
        assert trial.onset == first / 1000 and trial.concept == CONCEPTS[(int(x[3, first]) - 1) // 2]
        assert {t.split for t in test.trials or ()} == {"test"}
        signal = open_item(training)
        assert signal.info.ch_types == ["eeg", "eeg", "eeg", "stim"] and len(signal.info.segments) == 1
        assert np.array_equal(signal.read(100, 400, [1]), x[[1], 100:400])
        design = describe_design(config, items)
        assert design["design"] == "random" and "160 trials" in design["evidence"]

    def test_to_samples(self, tmp_path: Path) -> None:
        items = list_items(write_things(tmp_path / "epochs"))
        spec = PreprocessSpec(sfreq=100, highpass=1, lowpass=40, window=80, stride=80, notch="off", reference="keep")
        result, samples = shard(items[0], tmp_path / "work", spec, BY_CORPUS)
        row = result.row
        assert (row.status, row.unit, result.samples) == ("sharded", "declared", {"test": 16})
        assert {s["concept"] for s in samples} == {"aircraft_carrier", "antelope"}
        assert {s["image_id"] for s in samples} == {t.image_id for t in items[0].trials or ()}
        assert all(s["eeg"].shape == (3, 100) and s["bytes"] is not None for s in samples)
        raw = dataclasses.replace(write_things(tmp_path / "raw", raw=True), options={"source": "raw"}, tmin=0.1)
        result, samples = shard(list_items(raw)[1], tmp_path / "work", spec, BY_CORPUS)
        row = result.row
        assert row.status == "sharded" and row.unit == "plausible" and row.channels == CHANNELS
        assert row.windows == 24 and set(result.samples) <= {"train", "val"}

    def test_concepts_never_cross(self, tmp_path: Path) -> None:
        items = list_items(write_things(tmp_path))
        config = SplitConfig(seed=3, by="concept", val_fraction=0, test_fraction=0, image_val_fraction=0.4)
        found: dict[str, set[str | None]] = {}
        for item in items:
            for t in item.trials or ():
                found.setdefault(t.concept, set()).add(config.trial(item.subject, t.image_id, t.split, t.concept))
        assert all(len(splits) == 1 for splits in found.values())
        assert {c for c, s in found.items() if s == {"test"}} == {"aircraft_carrier", "antelope"}

    def test_a_broken_file_affects_only_its_recording(self, tmp_path: Path) -> None:
        config = write_things(tmp_path)
        (tmp_path / "sub-01" / "preprocessed_eeg_test.npy").write_bytes(b"\x93NUMPY what")
        np.save(tmp_path / "sub-02" / "preprocessed_eeg_test.npy", {"x": Path("a")})  # type: ignore[arg-type]
        x = {"preprocessed_eeg_data": np.zeros((5, 1, 3, 9)), "ch_names": CHANNELS, "times": np.arange(9) / 100}
        np.save(tmp_path / "sub-02" / "preprocessed_eeg_training.npy", x)  # type: ignore[arg-type]
        problems = [i.recording.problem for i in list_items(config)]
        assert problems[1] is None and "damaged" in (problems[0] or "")
        assert "refused: it asks for pathlib" in (problems[2] or "")
        assert "epochs of 5 images, but image_metadata.npy lists 6" in (problems[3] or "")

    def test_faults(self, tmp_path: Path) -> None:
        config = write_things(tmp_path)
        with pytest.raises(RequestError, match=r"no sub-XX/ses-XX/raw_eeg_training\.npy"):
            list_items(dataclasses.replace(config, options={"source": "raw"}))
        with pytest.raises(ValueError, match=r"'tmax' \(0\.1 s\) must be later than 'tmin' \(0\.2 s\)"):
            dataclasses.replace(config, tmin=0.2, tmax=0.1)
        with pytest.raises(ValueError, match="'stimulus_delay_ms' is 30000, which is more than a second"):
            dataclasses.replace(config, stimulus_delay_ms=30_000)
        with pytest.raises(ValueError, match="the key 'images' is missing"):
            dataclasses.replace(config, images="")
        (tmp_path / "image_metadata.npy").unlink()
        with pytest.raises(RequestError, match=r"image_metadata\.npy"):
            list_items(config)


def test_job_counts_each_trial_left_out_once(tmp_path: Path) -> None:
    write_imagenet(tmp_path, released({1: 449}), splits())
    config = tmp_path / "job.yaml"
    corpus = {"kind": "eeg_imagenet", "root": str(tmp_path), "images": str(tmp_path / "images"), "name": "imagenet"}
    values = {
        "corpora": [corpus],
        "preprocess": {"sfreq": 1000, "window": 440, "stride": 440},
        "split": {"val_fraction": 0, "test_fraction": 0},
        "ray": {"num_cpus": 1},
    }
    config.write_text(yaml.safe_dump(values))
    assert shard_main([str(config), "--output", str(tmp_path / "out")]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.counts["left out: shorter than 450 samples"] == 1
    assert sum(manifest.samples(split) for split in ("train", "val", "test")) == 23
    assert manifest.extra["corpora"][0]["design"] == "block"
