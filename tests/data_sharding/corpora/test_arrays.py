"""Tests of corpora that consist of array files with metadata in sidecar files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.corpora import CorpusConfig, Item, list_items, open_item
from data_sharding.corpora.array_signal import ArraySignal
from data_sharding.dataset.splits import SplitConfig
from data_sharding.formats.open_signal import ReadError
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec

RNG = np.random.default_rng(0)
ABOUT: dict[str, Any] = {"sfreq": 250, "ch_names": ["Fz", "Cz", "Pz"], "unit": "uV"}
X = RNG.normal(0, 10, (3, 1000))
EPOCHS = RNG.normal(0, 10, (4, 3, 100)).astype(np.float32)


def write(root: Path, name: str, x: Any, **about: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, **x)
    else:
        from scipy.io import savemat

        savemat(path, x)
    path.with_suffix(".json").write_text(json.dumps(ABOUT | about))


def items_of(root: Path, **more: Any) -> dict[str, Item]:
    return {i.path: i for i in list_items(CorpusConfig(kind="arrays", root=str(root), name="mine", **more))}


def microvolts(item: Item) -> np.ndarray:
    signal = open_item(item)
    picks = list(range(len(signal.info.ch_names)))
    return 1e6 * signal.info.scale * signal.read(0, signal.info.n_samples, picks)


@pytest.mark.parametrize(
    ("name", "x", "about"),
    [
        ("a.npy", X, {}),
        ("a.npy", (1e-6 * X).T, {"unit": "V", "axes": "TC"}),
        ("a.npz", {"eeg": X, "y": np.arange(3)}, {"data": "eeg"}),
        ("a.npz", {"eeg": X / 1000}, {"unit": "mV"}),
        ("a.mat", {"eeg": X, "rate": 250.0}, {"data": "eeg"}),
        ("a.npy", X / 10, {"unit": "standardised"}),
    ],
)
def test_continuous(tmp_path: Path, name: str, x: Any, about: dict[str, Any]) -> None:
    write(tmp_path, name, x, subject="S3", session="2", line_freq=60, reference="Cz", bads=["Pz"], **about)
    item = items_of(tmp_path)[name]
    assert (item.subject, item.session, item.trials) == ("S3", "2", None)
    info = open_item(item).info
    assert (info.sfreq, info.line_freq, info.reference, info.bads) == (250, 60, "Cz", ["Pz"])
    assert info.unit_known == (about.get("unit") == "standardised") and not info.epoched
    assert np.allclose(microvolts(item), X)


def test_matlab_7_3(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        entry = file.create_dataset("eeg", data=X.T)  # MATLAB stores arrays in column-major order
        entry.attrs["MATLAB_class"] = np.bytes_("double")
    with (tmp_path / "a.mat").open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    (tmp_path / "a.json").write_text(json.dumps(ABOUT | {"data": "eeg"}))
    assert np.allclose(microvolts(items_of(tmp_path)["a.mat"]), X)


def test_epochs_with_images(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    shown = ["cat/1.png", "dog/1.png", "dog/1.png", "cat/1.png"]
    write(tmp_path, "eeg/sub-07/a.npy", EPOCHS, images=shown, splits=["train", "train", "val", "test"])
    item = items_of(tmp_path / "eeg", images=str(tmp_path / "images"))["sub-07/a.npy"]
    assert item.subject == "sub-07"
    assert [(t.segment, t.label_name, t.image_id, t.split) for t in item.trials or ()] == [
        (0, "cat", "cat/1", "train"),
        (1, "dog", "dog/1", "train"),
        (2, "dog", "dog/1", "val"),
        (3, "cat", "cat/1", "test"),
    ]
    signal = open_item(item)
    assert signal.info.epoched and [s.stop for s in signal.info.segments] == [100, 200, 300, 400]
    assert np.array_equal(signal.read(200, 300, [1, 2]), EPOCHS[2, 1:])


def test_epochs_with_labels_only(tmp_path: Path) -> None:
    write(tmp_path, "a.npz", {"x": EPOCHS, "y": np.array(["left", "right"] * 2)}, data="x", labels="y")
    write(tmp_path, "b.npy", EPOCHS.transpose(0, 2, 1), axes="NTC", labels=[1, 2, 1, 2])
    items = items_of(tmp_path)
    assert [t.label_name for t in items["a.npz"].trials or ()] == ["left", "right", "left", "right"]
    assert [t.label_name for t in items["b.npy"].trials or ()] == ["1", "2", "1", "2"]
    assert {(t.image, t.image_id) for i in items.values() for t in i.trials or ()} == {("", "")}
    assert np.allclose(microvolts(items["b.npy"]), microvolts(items["a.npz"]))


def test_to_samples(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.npy", EPOCHS, labels=["left", "right"] * 2, subject="S1")
    write(tmp_path / "in", "b.npy", X)
    spec = PreprocessSpec(sfreq=125, highpass=1, lowpass=40, window=50, stride=50, notch="off")
    split = SplitConfig(val_fraction=0, test_fraction=0)
    for item, windows in zip(items_of(tmp_path / "in").values(), (4, 10), strict=True):
        task = Task(item=item, spec=spec, split=split, labels=("left", "right"), work=tmp_path / "work", timeout_s=60)
        result = process_recording(task)
        row = result.row
        assert (row.status, row.unit, row.windows) == ("sharded", "plausible", windows)
        assert result.samples == {"train": windows}


@settings(deadline=None)  # On a busy machine, an example can take longer than the default time limit.
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_any_range_over_segments_is_the_arrays_in_a_row(lengths: list[int], data: st.DataObject) -> None:
    parts = [np.random.default_rng(i).normal(size=(3, n)) for i, n in enumerate(lengths)]
    signal = ArraySignal(lambda i: parts[i], lengths, 100.0, ["a", "b", "c"])
    whole = np.concatenate(parts, axis=1)
    start = data.draw(st.integers(0, whole.shape[1]))
    stop = data.draw(st.integers(start, whole.shape[1]))
    picks = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    assert np.array_equal(signal.read(start, stop, picks), whole[picks, start:stop])
    assert [s.stop - s.start for s in signal.info.segments] == lengths


def test_events_of_a_continuous_recording(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"x")
    (tmp_path / "eeg").mkdir()
    (tmp_path / "eeg" / "shown.tsv").write_text("onset\timage\tlabel_name\n1.5\t1.png\tcat\n")
    write(tmp_path / "eeg", "a.npy", X, events="shown.tsv")
    write(tmp_path / "eeg", "b.npy", X, events=[{"onset": 1.5, "image": "1.png", "label_name": "cat"}, {"onset": 2}])
    items = items_of(tmp_path / "eeg", images=str(tmp_path / "images"))
    assert items["a.npy"].trials == items["b.npy"].trials and len(items["a.npy"].trials or ()) == 1


def test_on_an_object_store(tmp_path: Path) -> None:
    from upath import UPath

    from data_sharding.common.storage import localised

    write(tmp_path, "sub-01/a.npz", {"x": EPOCHS, "y": np.array(["l", "r"] * 2)}, data="x", labels="y")
    root = UPath("memory://arrays")
    for path in tmp_path.rglob("*.*"):
        target = root / path.relative_to(tmp_path).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (item,) = list_items(CorpusConfig(kind="arrays", root="memory://arrays", name="mine"))
    here = items_of(tmp_path)["sub-01/a.npz"]
    assert (item.key, item.subject, item.trials, item.options) == (here.key, here.subject, here.trials, here.options)
    with localised([item.recording.path, *item.recording.files]) as (path, *files):
        local = dataclasses.replace(item.recording, path=path, files=tuple(files))
        assert np.array_equal(microvolts(dataclasses.replace(item, recording=local)), microvolts(here))


def test_yaml_sidecar(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ABOUT))
    assert np.allclose(microvolts(items_of(tmp_path)["a.npy"]), X)


@pytest.mark.parametrize("wrong", [0, 1e-9, 5000, True, "mains", [50], {"a": 1}])
def test_a_wrong_mains_frequency_is_not_used(tmp_path: Path, wrong: Any) -> None:
    write(tmp_path, "a.npy", X, line_freq=wrong)
    info = open_item(items_of(tmp_path)["a.npy"]).info
    assert info.line_freq is None and "line_freq in the sidecar is " in info.notes[0]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"sfrq": 250}, "unknown key 'sfrq'; did you mean 'sfreq'?"),
        ({"unit": "furlong"}, "unit 'furlong' must be V, mV, uV, nV or standardised"),
        ({"sfreq": "fast"}, "sfreq 'fast' is not a sampling rate"),
        ({"ch_names": ["a", "a", "b"]}, "names a channel twice"),
        ({"axes": "XY"}, "axes 'XY'"),
        ({"images": ["x.png"]}, "no key 'images'"),
        ({"labels": [1, 2], "splits": ["train"]}, "the key splits has 1 entries for 2 epochs"),
        ({"labels": "y"}, "the key labels is a text, which is possible only for .npz files"),
        ({"events": "gone.tsv"}, "'gone.tsv' is not in the folder of the array"),
    ],
)
def test_a_broken_sidecar_affects_only_its_recording(tmp_path: Path, about: dict[str, Any], words: str) -> None:
    write(tmp_path, "a.npy", X, **about)
    write(tmp_path, "b.npy", X)
    items = items_of(tmp_path)
    assert words in (items["a.npy"].recording.problem or "") and items["b.npy"].recording.problem is None


@pytest.mark.parametrize(
    ("name", "x", "about", "words"),
    [
        ("a.npy", X[:2], {}, r"has 2 channels, but ch_names has 3 names"),
        ("a.npy", X[0], {}, "1 dimensions"),
        ("a.npy", np.array([["x"]]), {}, "are not numbers"),
        ("a.npy", EPOCHS, {"labels": [1, 2]}, "describes 2 epochs, but the array has 4"),
        ("a.npz", {"x": X, "y": X}, {}, "the variables are x, y; name one in the key 'data' of the sidecar"),
        ("a.npz", {"x": X}, {"data": "z"}, "has no variable 'z'; it has x"),
        ("a.npy", np.array([{"a": 1}], dtype=object), {}, "unreadable: ValueError"),
    ],
)
def test_an_array_that_is_not_what_its_sidecar_says(
    tmp_path: Path, name: str, x: Any, about: dict[str, Any], words: str
) -> None:
    write(tmp_path, name, x, **about)
    with pytest.raises(ReadError, match=words):
        open_item(items_of(tmp_path)[name])


def test_missing_sidecar_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no \.npy, \.npz or \.mat file"):
        items_of(tmp_path)
    np.save(tmp_path / "a.npy", X)
    assert "sidecar missing: a.json" in (items_of(tmp_path)["a.npy"].recording.problem or "")
