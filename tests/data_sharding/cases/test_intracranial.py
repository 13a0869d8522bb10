"""With ``intracranial: true``, electrodes inside the skull are used, and keep their names from the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(window=256, stride=256)
SEEG = ["A1", "A2", "T3", "P3", "LO1", "Z1", "X2", "EMG1"]
"""Names of depth electrodes that look like the names of ear electrodes, scalp electrodes and other channels."""
PLAIN = ["A1", "A2", "T3", "P3", "B'4", "TM5", "LH6", "C3"]


def write(
    path: Path, true_uv: Callable, seed: int, names: list[str], *, kind: str = "eeg", extra: dict | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = true_uv(seed, 8, np.arange(30 * 500) / 500)
    extra = extra or {}
    more = [value * np.sin(np.arange(x.shape[1]) / 40)[None] for value in extra.values()]
    info = mne.create_info([*names, *extra], 500.0, [kind] * 8 + ["eeg"] * len(extra))
    raw = mne.io.RawArray(1e-6 * np.vstack([x, *more]), info, verbose="ERROR")
    if path.suffix == ".fif":
        raw.save(path, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, physical_range=(-200.0, 200.0), verbose="ERROR")


def make_bids(root: Path, recording: Path, channels: list[str] | None) -> None:
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.9.0"}))
    stem = recording.name.rsplit("_ieeg", 1)[0]
    if channels is not None:
        lines = ["name\ttype\tunits\tlow_cutoff\thigh_cutoff", *channels]
        (recording.parent / f"{stem}_channels.tsv").write_text("\n".join(lines) + "\n")
    frame = {"iEEGCoordinateSystem": "MNI152Lin", "iEEGCoordinateUnits": "mm"}
    (recording.parent / f"{stem}_coordsystem.json").write_text(json.dumps(frame))
    (recording.parent / f"{stem}_electrodes.tsv").write_text("name\tx\ty\tz\tsize\nA1\t10\t20\t30\t1\n")
    about = {"PowerLineFrequency": 60, "iEEGReference": "white matter", "SamplingFrequency": 500}
    (recording.parent / f"{stem}_ieeg.json").write_text(json.dumps(about))


@pytest.mark.parametrize(("ending", "kind"), [("edf", "SEEG"), ("vhdr", "ECOG"), ("set", "DBS")])
def test_bids_names_the_contacts(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, ending: str, kind: str
) -> None:
    path = tmp_path / "b" / "sub-01" / "ses-1" / "ieeg" / f"sub-01_ses-1_task-rest_ieeg.{ending}"
    write(path, true_uv, 7, SEEG, extra={"TRIG": 50.0, "HE": 30.0})
    rows = [f"{name}\t{kind}\tuV\t0.1\t200" for name in SEEG]
    make_bids(tmp_path / "b", path, [*rows, "TRIG\tTRIG\tV\tn/a\tn/a", "HE\tECG\tuV\tn/a\tn/a"])
    (sharded,) = shard_all(tmp_path / "b", kind="bids", intracranial=True).values()
    assert_true(sharded, 7, names=SEEG)
    row = sharded.row
    assert row.channels_by_type == {kind.lower(): 8, "ecg": 1, "stim": 1} and row.n_eeg == 8
    assert (row.subject, row.session, row.line_freq, row.reference) == ("sub-01", "ses-1", 60.0, "white matter")
    assert row.montage_confidence == 0.0 and sharded.samples[0][0]["positions"] == [None] * 8
    assert any("the coordinate system 'mni152lin' with the unit 'mm' cannot be read" in note for note in row.notes)
    (sharded,) = shard_all(tmp_path / "b", kind="bids").values()
    assert sharded.row.status == "excluded" and sharded.row.reason_category == "intracranial"


def test_without_a_channel_table_the_folder_says_what_was_recorded(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    path = tmp_path / "b" / "sub-02" / "ieeg" / "sub-02_task-rest_ieeg.edf"
    write(path, true_uv, 8, PLAIN, extra={"ECG1": 40.0, "DC01": 60.0})
    make_bids(tmp_path / "b", path, None)
    (sharded,) = shard_all(tmp_path / "b", kind="bids", intracranial=True).values()
    assert_true(sharded, 8, names=PLAIN)
    assert sharded.row.channels_left_out == {"ecg": ["ECG1"], "trigger": ["DC01"]}
    assert sharded.samples[0][0]["positions"] == [None] * 8


@pytest.mark.parametrize(
    ("name", "kind"), [("grid_ecog.edf", "ecog"), ("seeg/p1.vhdr", "seeg"), ("p2_ieeg_raw.fif", "seeg")]
)
def test_a_folder_of_recordings(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, name: str, kind: str
) -> None:
    write(tmp_path / "f" / name, true_uv, 9, PLAIN, kind=kind if name.endswith("fif") else "eeg")
    (sharded,) = shard_all(tmp_path / "f", intracranial=True).values()
    assert_true(sharded, 9, names=PLAIN)
    assert sharded.row.channels_by_type == {kind: 8}


def test_scalp_and_depth_electrodes_together(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    """With ``intracranial: false``, only the scalp electrodes are used if a recording has both kinds of electrodes."""
    names = ["Fp1", "Fp2", "C3", "C4", "LA1", "LA2", "T3", "A1"]
    path = tmp_path / "f" / "a_raw.fif"
    write(path, true_uv, 10, names)
    raw = mne.io.read_raw_fif(path, preload=True, verbose="ERROR")
    raw.set_channel_types(dict.fromkeys(names[4:], "seeg"), verbose="ERROR").save(path, overwrite=True, verbose="ERROR")
    keep = dataclasses.replace(SPEC, reference="keep")
    (sharded,) = shard_all(tmp_path / "f", keep, intracranial=True).values()
    assert_true(sharded, 10, names=names, spec=keep)
    places = dict(zip(names, sharded.samples[0][0]["positions"], strict=True))
    assert all(places[name] for name in names[:4]) and not any(places[name] for name in names[4:])
    (sharded,) = shard_all(tmp_path / "f", keep).values()
    assert sharded.row.channels == names[:4]


def test_arrays_name_the_type(tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable) -> None:
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "x.npy", true_uv(11, 8, np.arange(15_000) / 500))
    about = {"sfreq": 500, "ch_names": SEEG, "unit": "uV", "ch_types": ["seeg"] * 8}
    (tmp_path / "a" / "x.json").write_text(json.dumps(about))
    (sharded,) = shard_all(tmp_path / "a", kind="arrays", intracranial=True).values()
    assert_true(sharded, 11, names=SEEG)
    (sharded,) = shard_all(tmp_path / "a", kind="arrays").values()
    assert sharded.row.reason_category == "no EEG channel"
