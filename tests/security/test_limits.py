"""Values in files that are valid, but ask for very much work: long texts, extreme sampling rates, empty datasets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import mne
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_sharding.common.errors import RequestError
from data_sharding.common.typed_values import check_typed
from data_sharding.common.untrusted import MAX_LABELS, MAX_NAME, MAX_TEXT, check_meta, check_text
from data_sharding.corpora import CorpusConfig, list_items
from data_sharding.dataset.ledger import LedgerRow, read_ledger_file, write_ledger
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec
from launch.cli import main
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig
from pretrain.runs.tracking import TrackerConfig
from tests.security.conftest import SPEC, make_samples


def make_encoder(folder: Path, **changes: Any) -> EEGEncoder:
    """Write a small encoder package, change its preprocessing, and load the package."""
    spec = PreprocessSpec(sfreq=128.0, lowpass=50.0, window=128, stride=128)
    EEGEncoder(EncoderConfig(samples=128, dim=8, depth=1, heads=2, mlp_ratio=1.0), spec).save_pretrained(folder)
    path = folder / "preprocess.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return EEGEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sfreq": 100_000.0}, "more than 8 times this rate"), ({"stride": 1}, "stride of at least 1/64 of the window")],
    ids=["rate", "overlap"],
)
def test_an_encoder_cannot_ask_for_endless_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder", **changes)
    x = np.random.default_rng(0).normal(0, 10, (2, 1000))
    with pytest.raises(RequestError, match=message) as caught:
        encoder.encode((x, ["Cz", "Pz"], 100.0, "uV"))
    assert "\n" not in str(caught.value)


def test_a_filter_that_needs_gigabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"preprocess\.json is damaged .preprocess\.highpass must be at least 0\.2"):
        make_encoder(tmp_path / "encoder", sfreq=100_000.0, highpass=0.001)
    assert PreprocessSpec(sfreq=256.0, highpass=0.001) and PreprocessSpec(sfreq=100_000.0)


@pytest.mark.parametrize("changes", [{"clip": 1e299}, {"quality": {"mains_uv": 1e299}}, {"scale_uv": 1e13}], ids=str)
def test_numbers_of_the_preprocessing_that_overflow_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"preprocess\.json: damaged or changed .*, beyond 1e\+12") as caught:
        make_encoder(tmp_path / "encoder", **changes)
    assert "\n" not in str(caught.value)


def test_texts_have_a_largest_length() -> None:
    assert check_text("x" * MAX_NAME, "file.json", "subject") and check_typed(str, "x" * MAX_TEXT, "", "")
    with pytest.raises(RequestError, match=r"file\.json: damaged .*subject has 4097 characters"):
        check_text("x" * (MAX_NAME + 1), "file.json", "subject")
    for hint, value in ((str, "x" * (MAX_TEXT + 1)), (list[str], ["a", "x" * (MAX_TEXT + 1)])):
        with pytest.raises(RequestError, match=r"file\.json: damaged .*note has 131073 characters"):
            check_typed(hint, value, "file.json", "note")
    meta = make_samples(1)[0].meta
    assert check_meta({**meta, "caption": "x" * MAX_TEXT})
    for name in ("subject", "label_name", "recording", "caption"):
        with pytest.raises(ValueError, match=f"{name} has 131073 characters"):
            check_meta({**meta, name: "x" * (MAX_TEXT + 1)})
    with pytest.raises(ValueError, match="a name that is too long"):
        check_meta({**meta, "ch_names": ["Cz", "x" * (MAX_NAME + 1)]})


def test_a_long_subject_in_generated_images_is_refused(
    tmp_path: Path, run_command: Callable[..., Any], assert_refused: Callable[..., None]
) -> None:
    trial = {
        "key": "k",
        "image_id": "i",
        "subject": "x" * 20_000_000,
        "label": 0,
        "file": "a.png",
        "real_file": "b.png",
    }
    about = {"dataset": "d", "dataset_id": "d", "split": "test", "control": "none", "labels": ["a"], "trials": [trial]}
    (tmp_path / "generated.json").write_text(json.dumps(about))
    assert_refused(run_command("evaluate", tmp_path), "generated.json", "subject of a trial has 20000000 characters")


def test_a_ledger_never_has_a_text_that_readers_refuse(tmp_path: Path) -> None:
    row = LedgerRow(key="a", corpus="c", path="p", subject="s", files=["p"], status="sharded", device="y" * 10**6)
    row.notes = ["x" * 10**6]
    write_ledger(tmp_path / "ledger.parquet", [row])
    (found,) = read_ledger_file(tmp_path / "ledger.parquet")
    assert found.device.endswith("(shortened; the whole text has 1000000 characters)")
    row.subject = "s" * (MAX_NAME + 1)
    write_ledger(tmp_path / "ledger.parquet", [row])
    with pytest.raises(RequestError, match="subject has 4097 characters"):
        read_ledger_file(tmp_path / "ledger.parquet")


def test_a_ledger_never_has_a_number_that_readers_refuse(tmp_path: Path) -> None:
    row = LedgerRow(key="a", corpus="c", path="p", subject="s", files=["p"], status="sharded", sfreq=1e300, age=-3.0)
    row.unit_factor, row.recording_year, row.seconds = math.nan, 2**70, 5.0
    write_ledger(tmp_path / "ledger.parquet", [row])
    (found,) = read_ledger_file(tmp_path / "ledger.parquet")
    assert (found.sfreq, found.age, found.unit_factor, found.recording_year, found.seconds) == (0, None, None, None, 5)
    assert "age was -3.0, which is not possible, so this value was left out" in found.notes and len(found.notes) == 4


@pytest.mark.parametrize(
    ("rate", "name", "reason"),
    [(1e300, b"Cz", "unreadable"), (1e-300, b"Cz", "unreadable"), (100.0, b"C" * 5000, "text too long")],
    ids=["high", "low", "name"],
)
def test_a_recording_with_impossible_values_is_quarantined(
    rate: float, name: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "eeg").mkdir()
    with h5py.File(tmp_path / "eeg" / "a.nwb", "w") as file:
        series = file.create_group("acquisition/series")
        series.attrs["neurodata_type"] = "ElectricalSeries"
        series["data"], series["starting_time"] = np.random.default_rng(0).normal(0, 1e-5, (2000, 2)), 0.0
        series["starting_time"].attrs["rate"] = rate
        file["general/extracellular_ephys/electrodes/label"] = np.array([name, b"Pz"])
    (item,) = list_items(CorpusConfig(kind="folder", root=str(tmp_path / "eeg")))
    task = Task(item=item, spec=SPEC, split=SplitConfig(), labels=(), work=tmp_path / "work", timeout_s=60)
    result = process_recording(task)
    assert result.row.status == "quarantined" and result.row.category == reason, result.row.reason
    write_ledger(tmp_path / "ledger.parquet", [result.row])
    assert read_ledger_file(tmp_path / "ledger.parquet")[0].reason == result.row.reason


def test_a_recording_whose_trials_have_very_long_names_is_excluded(tmp_path: Path) -> None:
    images, root = tmp_path / "images", tmp_path / "eeg"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "cat.png")
    for name, label in (("a", "x" * (MAX_NAME + 1)), ("b", "cat")):
        folder = root / f"sub-{name}"
        folder.mkdir(parents=True)
        info = mne.create_info(["Cz", "Pz"], 100.0, "eeg")
        mne.io.RawArray(np.zeros((2, 200)), info, verbose="ERROR").save(folder / f"{name}_raw.fif", verbose="ERROR")
        (folder / f"{name}_raw_events.tsv").write_text(f"onset\timage\tlabel_name\n1.0\tcat.png\t{label}\n")
    long, short = list_items(CorpusConfig(kind="events", root=str(root), images=str(images)))
    assert long.reason is not None and long.reason.category == "text too long" and not long.trials
    assert short.reason is None and short.trials


def test_a_dataset_without_samples_is_not_valid(dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.change_manifest(lambda values: values["splits"].update(val=[]))
    assert main(["verify", str(dataset.root)]) == 0
    for splits in ({}, {"train": []}, {"train": [], "val": [], "test": []}):
        dataset.change_manifest(lambda values, splits=splits: values.update(splits=splits))
        dataset.tar.unlink(missing_ok=True)
        capsys.readouterr()
        assert main(["verify", str(dataset.root)]) == 1
        assert "manifest.json: no split has samples, so the dataset is empty" in capsys.readouterr().out


def test_a_dataset_with_very_many_labels_is_refused(dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.change_manifest(lambda values: values.update(labels=[f"l{i}" for i in range(MAX_LABELS + 1)]))
    for words in (["verify"], ["inspect"]):
        assert main([*words, str(dataset.root)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "manifest.json" in error and "20001 labels" in error


def test_a_job_with_very_many_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, folder = tmp_path / "images", tmp_path / "eeg" / "sub-01"
    images.mkdir()
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "cat.png")
    info = mne.create_info(["Cz", "Pz"], 100.0, "eeg")
    mne.io.RawArray(np.zeros((2, 200)), info, verbose="ERROR").save(folder / "a_raw.fif", verbose="ERROR")
    rows = "".join(f"1.0\tcat.png\tlabel{number}\n" for number in range(MAX_LABELS + 1))
    (folder / "a_raw_events.tsv").write_text(f"onset\timage\tlabel_name\n{rows}")
    config = {
        "corpora": [{"kind": "events", "root": str(tmp_path / "eeg"), "images": str(images)}],
        "output": str(tmp_path / "out"),
        "split": {"val_fraction": 0, "test_fraction": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["shard", str(tmp_path / "config.yaml")]) == 2
    assert "20001 different labels" in capsys.readouterr().err and not (tmp_path / "out" / "manifest.json").exists()


def test_a_package_that_cannot_be_written_gives_one_line(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/x"), tmp_path / "file" / "encoder", tmp_path / ("x" * 300)):
        with pytest.raises(RequestError, match=r"cannot be written .*; choose another output") as caught:
            encoder.save_pretrained(place)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("project", ["../../x", "a\nb", "x" * 129, "a:b", "", "\x1b[31m"])
def test_project_names_that_wandb_refuses_are_refused(project: str) -> None:
    with pytest.raises(ValueError, match=r"tracker\.project .*: use 1 to 128 characters") as caught:
        TrackerConfig(project=project)
    assert caught.value.args[0].isprintable() and TrackerConfig(project="our EEG (2026)")


def test_an_eeglab_file_with_very_many_epochs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eeg = {"setname": "a", "nbchan": 2, "pnts": 1000, "trials": 500_000_000, "srate": 100.0, "xmin": 0.0, "xmax": 9.99}
    eeg |= {"data": np.zeros((2, 1000), np.float32), "event": [], "epoch": [], "icawinv": [], "icasphere": []}
    eeg |= {"icaweights": [], "chanlocs": np.array([("Cz",), ("Pz",)], dtype=[("labels", object)])}
    savemat(tmp_path / "a.set", {"EEG": eeg}, appendmat=False)
    make_encoder(tmp_path / "encoder")
    assert main(["encode", str(tmp_path / "encoder"), str(tmp_path / "a.set"), "-o", str(tmp_path / "x.npz")]) == 2
    said = capsys.readouterr().err.strip()
    assert "500000000 epochs; a recording has at most" in said and "\n" not in said
