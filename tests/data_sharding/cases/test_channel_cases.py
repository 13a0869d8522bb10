"""Channels with repeated labels or with positions in other coordinate systems get the right names and positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.channels import _montage, pick_channels
from data_sharding.formats.edf import unique_names
from data_sharding.formats.positions import fit_positions
from data_sharding.formats.signal import Segment, SignalInfo

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SECONDS = np.arange(40 * 250) / 250


def place_of(done, name: str) -> list[float] | None:
    meta, _ = done.samples[0]
    return meta["positions"][meta["ch_names"].index(name)]


def test_the_cases_of_channels(cases: Path, shard_all: Callable, assert_true: Callable) -> None:
    done = shard_all(cases / "edf")["e19_dup.edf"]
    assert_true(done, 190, names=[*NAMES[:5], "C3-REF-1", *NAMES[6:]])
    assert place_of(done, "C3") is not None and place_of(done, "C3-REF-1") is None
    assert any("'EEG C3-REF'" in note for note in done.row.notes)
    nose = shard_all(cases / "eeglab")["s07_noseY.set"]
    assert_true(nose, 408)
    place = place_of(nose, "Fp1")
    assert place is not None and np.linalg.norm(np.subtract(place, _montage("standard_1005")["Fp1"])) < 0.03
    assert any("axes" in note for note in nose.row.notes)


@pytest.mark.parametrize("kind", ["edf", "bdf", "gdf 1", "gdf 2"])
def test_a_label_three_times(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable,
    write_gdf: Callable, kind: str,
) -> None:  # fmt: skip
    uv, labels = true_uv(20, 8, SECONDS), ["Fp1", "Fp2", "C3", "F4", "C3", "C4", "P3", "C3"]
    if kind.startswith("gdf"):
        version = "GDF 1.25" if kind.endswith("1") else "GDF 2.20"
        signals = [(label, (x, 250)) for label, x in zip(labels, uv, strict=True)]
        write_gdf(tmp_path / "eeg" / "a.gdf", signals, version=version)
    else:
        write_edf(tmp_path / "eeg" / f"a.{kind}", uv, labels=labels, bdf=kind == "bdf")
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 20, names=["Fp1", "Fp2", "C3", "F4", "C3-1", "C4", "P3", "C3-2"])
    assert place_of(done, "C3") is not None and place_of(done, "C3-1") is None
    assert any("3 channels are named 'C3'" in note for note in done.row.notes)


def test_two_labels_of_one_electrode(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable
) -> None:
    uv = true_uv(21, 8, SECONDS)
    write_edf(tmp_path / "eeg" / "a.edf", uv, labels=["EEG Fp1-REF", "Fp1", *NAMES[2:]])
    write_edf(tmp_path / "eeg" / "b.edf", uv, labels=["Fp1", "EEG Fp1-REF", *NAMES[2:]])
    done = shard_all(tmp_path / "eeg")
    assert_true(done["a.edf"], 21, names=["Fp1", "Fp1-1", *NAMES[2:]])
    assert_true(done["b.edf"], 21, names=["Fp1", "EEG Fp1-REF", *NAMES[2:]])
    for path in ("a.edf", "b.edf"):
        assert place_of(done[path], "Fp1") is not None
        assert any("same name as another channel" in note for note in done[path].row.notes)


def test_a_label_at_two_rates_costs_only_that_label(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    import edfio

    uv, fast = true_uv(22, 9, SECONDS), true_uv(23, 1, np.arange(40 * 500) / 500)[0]
    uv[:8] = true_uv(22, 8, SECONDS)
    signals = [
        edfio.EdfSignal(x, rate, label=label, physical_dimension="uV", physical_range=(-500, 500))
        for label, x, rate in [*zip([*NAMES, "Box"], uv, [250] * 9, strict=True), ("Box", fast, 500)]
    ]
    (tmp_path / "eeg").mkdir()
    edfio.Edf(signals).write(tmp_path / "eeg" / "a.edf")
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 22)
    assert any("Box" in names for names in done.row.channels_left_out.values())


TURNS = {
    "nose +Y": ([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], "axes"),
    "nose -Y": ([[0, -1, 0], [1, 0, 0], [0, 0, 1]], "axes"),
    "nose -X": ([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], "axes"),
    "left and right exchanged": ([[-1, 0, 0], [0, 1, 0], [0, 0, 1]], "axes"),
    "z and y exchanged": ([[1, 0, 0], [0, 0, 1], [0, 1, 0]], "axes"),
    "as it should be": ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], ""),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize(("size", "middle"), [(1.0, 0.0), (0.9, 0.045), (2.0, 0.0), (0.4, 0.02)])
def test_positions_in_other_frames(name: str, size: float, middle: float) -> None:
    table = _montage("standard_1005")
    names = ["Fp1", "Fp2", "F7", "F3", "Fz", "T8", "C3", "Cz", "P4", "O2"]
    true = np.array([table[n] for n in names])
    turn, word = TURNS[name]
    own = size * (true - [0, 0.01, middle]) @ np.array(turn, float)
    extra = size * (np.array([0.02, 0.03, 0.12]) - [0, 0.01, middle]) @ np.array(turn, float)
    places, notes = fit_positions([*own.tolist(), extra.tolist(), None], [*true.tolist(), None, None])
    np.testing.assert_allclose(places[:-2], true, atol=0.03)
    np.testing.assert_allclose(places[-2], [0.02, 0.03, 0.12], atol=0.03)
    assert places[-1] is None
    assert any(word in note for note in notes) if word or size != 1.0 else not notes


def test_single_wrong_positions_take_the_standard_place() -> None:
    table = _montage("standard_1005")
    places = [list(table[name]) for name in NAMES]
    places[0], places[1] = places[7], [0.0, 0.0, 0.1]
    info = SignalInfo(
        ch_names=NAMES,
        ch_types=["eeg"] * 8,
        positions=[*places],
        sfreq=250.0,
        n_samples=100,
        segments=[Segment(start=0, stop=100, onset=0.0)],
    )
    channels = pick_channels(info)
    assert channels.montage == "file"
    np.testing.assert_allclose(channels.positions, [table[name] for name in NAMES], atol=1e-4)
    assert any("2 positions" in note for note in channels.notes)


def test_positions_without_any_order_are_replaced() -> None:
    table = _montage("standard_1005")
    names = [*NAMES, "Fz", "Cz"]
    true = [list(table[name]) for name in names]
    wrong = np.random.default_rng(0).permutation(np.array(true)).tolist()
    places, notes = fit_positions([*wrong, [0.05, 0.05, 0.05]], [*true, None])
    assert places == [*true, None] and "do not fit" in notes[0]


@pytest.mark.parametrize("unit", [1000.0, 100.0, 1.0])
@pytest.mark.parametrize("nose", ["+X", "+Y", "-Y"])
def test_eeglab_files_with_other_noses_and_units(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, unit: float, nose: str
) -> None:
    from scipy.io import savemat

    table = _montage("standard_1005")
    # In EEGLAB, x points to the nose and y to the left ear, and the origin is the centre of a sphere.
    eeglab = np.array([[table[n][1] - 0.01, -table[n][0], table[n][2] - 0.04] for n in NAMES]) * 0.9
    x, y, z = eeglab.T
    own = {"+X": (x, y, z), "+Y": (-y, x, z), "-Y": (y, -x, z)}[nose]
    locs = np.zeros(8, dtype=[("labels", object), ("X", object), ("Y", object), ("Z", object)])
    for i, name in enumerate(NAMES):
        locs[i] = (name, *(float(unit * axis[i]) for axis in own))
    eeg = {
        "setname": "a", "nbchan": 8, "trials": 1, "pnts": len(SECONDS), "srate": 250.0, "xmin": 0.0, "xmax": 39.996,
        "data": true_uv(24, 8, SECONDS).astype(np.float32), "chanlocs": locs, "chaninfo": {"nosedir": nose},
        "event": [], "icawinv": [], "icasphere": [], "icaweights": [], "icaact": [], "epoch": [], "ref": "common",
    }  # fmt: skip
    (tmp_path / "eeg").mkdir()
    savemat(tmp_path / "eeg" / "a.set", {"EEG": eeg}, appendmat=False)
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 24)
    for name in NAMES:
        assert np.linalg.norm(np.subtract(place_of(done, name), table[name])) < 0.03, name


def test_equal_labels_without_an_electrode_all_get_a_number() -> None:
    names, notes = unique_names(["EEG-Fz", "EEG", "EEG", "EEG-C3", "EEG"])
    assert names == ["EEG-Fz", "EEG-0", "EEG-1", "EEG-C3", "EEG-2"] and "3 channels are named 'EEG'" in notes[0]
    assert unique_names(["Box", "Box-0", "Box"])[0] == ["Box-1", "Box-0", "Box-2"]
    assert unique_names(["T8-P8", "Cz", "T8-P8"])[0] == ["T8-P8", "Cz", "T8-P8-1"]
