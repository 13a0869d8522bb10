"""If a mark of a bad span names channels, only these channels are bad in the span."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.signal import SignalInfo
from data_sharding.formats.sniffing import sniff
from data_sharding.processing.preprocess import PreprocessSpec
from data_sharding.processing.quality import QualitySpec

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
RATE, SECONDS, SEED = 250, 60, 71
BEGIN, LENGTH = 20.5, 2.0
BAD = ["F4"]


@pytest.fixture
def signal(true_uv) -> np.ndarray:
    """Return the true signal with an artefact in F4. The artefact is so small that F4 is bad only if a mark says so."""
    t = np.arange(RATE * SECONDS) / RATE
    uv = true_uv(SEED, 8, t)
    marked = (t >= BEGIN) & (t < BEGIN + LENGTH)
    uv[3, marked] += 400 * np.sin(2 * np.pi * 9 * t[marked])
    return uv


def write_fif(folder: Path, uv: np.ndarray, names: list[str]) -> Path:
    raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES, RATE, "eeg"), verbose="ERROR")
    raw.set_annotations(mne.Annotations([BEGIN, 30.0], [LENGTH, 1.0], ["BAD_pop", "nod"], ch_names=[names, names]))
    raw.save(folder / "a_raw.fif", fmt="double", verbose="ERROR")
    return folder / "a_raw.fif"


def write_brainvision(folder: Path, uv: np.ndarray, names: list[str], kind: str = "Bad Interval") -> Path:
    (folder / "a.eeg").write_bytes(uv.T.astype("<f4").tobytes())
    channels = "\n".join(f"Ch{i}={name},,1,µV" for i, name in enumerate(NAMES, start=1))
    (folder / "a.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
        "MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=8\n"
        f"SamplingInterval=4000\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n[Channel Infos]\n{channels}\n",
        encoding="utf-8",
    )
    numbers = [NAMES.index(name) + 1 for name in names] or [0]
    at, size = int(BEGIN * RATE) + 1, int(LENGTH * RATE)
    lines = [f"{kind},Amplitude,{at},{size},{number}" for number in numbers]
    lines = ["New Segment,,1,1,0,20200101120000000000", "Stimulus,S  1,900,1,3", *lines]
    text = "\n".join(f"Mk{i}={line}" for i, line in enumerate(lines, start=1))
    (folder / "a.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
        f"[Marker Infos]\n{text}\n"
    )
    return folder / "a.vhdr"


def write_edf(folder: Path, uv: np.ndarray, names: list[str]) -> Path:
    import edfio

    limit = (-3276.8, 3276.7)
    signals = [
        edfio.EdfSignal(row, RATE, label=f"EEG {name}-REF", physical_dimension="uV", physical_range=limit)
        for name, row in zip(NAMES, uv, strict=True)
    ]
    texts = [f"BAD_pop@@EEG {name}-REF" for name in names] or ["BAD_pop"]
    edfio.Edf(signals, annotations=[edfio.EdfAnnotation(BEGIN, LENGTH, text) for text in texts]).write(folder / "a.edf")
    return folder / "a.edf"


@pytest.fixture
def write_gdf_marked(write_gdf) -> Callable[..., Path]:
    def write(folder: Path, uv: np.ndarray, names: list[str]) -> Path:
        path = write_gdf(folder / "a.gdf", {name: (row, RATE) for name, row in zip(NAMES, uv, strict=True)})
        numbers = [NAMES.index(name) + 1 for name in names] or [0]
        n = len(numbers)
        table = b"\x03" + n.to_bytes(3, "little") + struct.pack("<f", RATE)
        table += struct.pack(f"<{n}I", *[int(BEGIN * RATE) + 1] * n) + struct.pack(f"<{n}H", *[0x0103] * n)
        table += struct.pack(f"<{n}H", *numbers) + struct.pack(f"<{n}I", *[int(LENGTH * RATE)] * n)
        path.write_bytes(path.read_bytes()[:-8] + table)
        return path

    return write


def write_bids(folder: Path, uv: np.ndarray, names: list[str]) -> Path:
    place = folder / "sub-1" / "eeg"
    place.mkdir(parents=True)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "a", "BIDSVersion": "1.10.0"}))
    path = write_fif(place, uv, names)
    raw = mne.io.read_raw_fif(path, verbose="ERROR").load_data(verbose="ERROR")
    raw.set_annotations(None).save(place / "sub-1_task-rest_eeg.fif", fmt="double", verbose="ERROR")
    path.unlink()
    (place / "sub-1_task-rest_events.tsv").write_text(
        f"onset\tduration\ttrial_type\tchannel\n{BEGIN}\t{LENGTH}\tBAD_pop\t{'; '.join(names) or 'n/a'}\n"
    )
    return place / "sub-1_task-rest_eeg.fif"


def write_eeglab(folder: Path, uv: np.ndarray, names: list[str]) -> Path:
    channel = np.array([NAMES.index(name) + 1 for name in names], float) if names else 0
    return write_set(folder, uv, [channel])


def write_set(
    folder: Path, uv: np.ndarray, channels: list[Any], *, field: str = "channel", text: str = "BAD_pop", **more: Any
) -> Path:
    """Write an EEGLAB file with a bad-span mark for each entry of `channels`.

    `more` is added to the structure EEG of the EEGLAB file; ``urchan`` is the field `urchan` of its channels.
    """
    from scipy.io import savemat

    urchan = more.pop("urchan", [np.zeros(0)] * len(NAMES))
    events = [("nod", 30.0 * RATE + 1, 250.0, 3), *((text, BEGIN * RATE + 1, LENGTH * RATE, c) for c in channels)]
    dtype = [(name, object) for name in ("type", "latency", "duration", field)]
    eeg = {"setname": "a", "nbchan": len(uv), "trials": 1, "pnts": uv.shape[1], "srate": float(RATE), "xmin": 0.0}
    eeg |= {"xmax": (uv.shape[1] - 1) / RATE, "data": uv, "icawinv": [], "icaweights": [], "icasphere": []}
    eeg["chanlocs"] = np.array(list(zip(NAMES, urchan, strict=True)), [("labels", object), ("urchan", object)])
    eeg["event"] = np.array(events, dtype)
    savemat(folder / "a.set", {"EEG": eeg | more}, appendmat=False)
    return folder / "a.set"


@pytest.fixture(params=["fif", "brainvision", "edf", "gdf", "bids", "eeglab"])
def write(request: pytest.FixtureRequest) -> Callable[..., Path]:
    writers = {"fif": write_fif, "brainvision": write_brainvision, "edf": write_edf, "bids": write_bids}
    writers |= {"eeglab": write_eeglab}
    return writers.get(request.param) or request.getfixturevalue("write_gdf_marked")


def shard_file(shard_all, folder: Path, path: Path, **more):
    kind = "bids" if "sub-" in path.name else "folder"
    return shard_all(folder, kind=kind, **more)[path.relative_to(folder).as_posix()]


def info_of(path: Path) -> SignalInfo:
    recording = sniff(path)
    assert recording is not None
    return open_signal(recording).info


def test_only_the_named_channel_is_bad_in_the_span(
    tmp_path: Path, shard_all, assert_true, signal: np.ndarray, write: Callable[..., Path]
) -> None:
    sharded = shard_file(shard_all, tmp_path, write(tmp_path, signal, BAD))
    overlapping = [
        (meta, x) for meta, x in sharded.samples if meta["start"] < BEGIN + LENGTH and meta["start"] + 1 > BEGIN
    ]
    assert len(overlapping) in (2, 3)
    for meta, x in overlapping:
        assert meta["bads"] == ["F4"] and not x[3].any() and x[0].any()
    far = [meta for meta, _ in sharded.samples if abs(meta["start"] - BEGIN) > 4]
    assert len(far) > 40 and not any(meta["bads"] for meta in far)
    assert sharded.row.bad_in_windows["marked bad"] >= len(overlapping)
    assert not sharded.row.windows_left_out and not sharded.row.bads
    # The artefact in F4 changes neither the reference of the other channels, nor windows that are further away than the
    # filter's transient.
    marked, clear = ([pair for pair in sharded.samples if bool(pair[0]["bads"]) is bad] for bad in (True, False))
    assert_true(dataclasses.replace(sharded, samples=marked), SEED, skip=["F4"], ends=True)
    assert_true(dataclasses.replace(sharded, samples=clear), SEED)


def test_a_mark_without_channels_leaves_out_the_windows(
    tmp_path: Path, shard_all, assert_true, signal: np.ndarray, write: Callable[..., Path]
) -> None:
    sharded = shard_file(shard_all, tmp_path, write(tmp_path, signal, []))
    assert not sharded.touches(BEGIN, BEGIN + LENGTH) and not sharded.row.bad_in_windows
    assert sharded.row.windows_left_out["overlaps a span marked as bad"] in (2, 3)


def test_a_mark_of_every_channel_is_a_gap(tmp_path: Path, shard_all, signal: np.ndarray, write) -> None:
    sharded = shard_file(shard_all, tmp_path, write(tmp_path, signal, NAMES))
    assert not sharded.touches(BEGIN, BEGIN + LENGTH)
    assert set(sharded.row.windows_left_out) == {"marked bad in every channel"}


def test_too_many_marked_channels_leave_the_window_out(tmp_path: Path, shard_all, signal: np.ndarray) -> None:
    sharded = shard_file(shard_all, tmp_path, write_fif(tmp_path, signal, NAMES[:5]))
    assert not sharded.touches(BEGIN, BEGIN + LENGTH)
    assert set(sharded.row.windows_left_out) == {"too many bad channels: marked bad"}


def test_marks_are_used_without_checks_of_the_quality(tmp_path: Path, shard_all, signal: np.ndarray) -> None:
    spec = PreprocessSpec(window=256, stride=256, quality=QualitySpec(check=False))
    sharded = shard_file(shard_all, tmp_path, write_fif(tmp_path, signal, BAD), spec=spec)
    assert sum("F4" in meta["bads"] for meta, _ in sharded.samples) in (2, 3)


def test_several_types_of_markers(tmp_path: Path, signal: np.ndarray) -> None:
    info = info_of(write_brainvision(tmp_path, signal, ["C3", "P4"], "Comment/bad_pop"))
    assert info.bad_channel_spans == [(20.5, 22.5, "C3"), (20.5, 22.5, "P4")] and not info.bad_spans


def test_a_name_that_is_not_in_the_recording_is_used_for_all_channels(tmp_path: Path, signal: np.ndarray) -> None:
    path = write_edf(tmp_path, signal, ["F4"])
    path.write_bytes(path.read_bytes().replace(b"@@EEG F4-REF", b"@@EEG F9-REF"))
    info = info_of(path)
    assert info.bad_spans == [(20.5, 22.5, "BAD_pop")] and not info.bad_channel_spans
    assert info.notes == [
        "the mark 'BAD_pop' names the channel 'EEG F9-REF', which is not in the recording; it is used for all channels"
    ]


def test_a_mark_of_a_channel_that_is_not_read_changes_nothing(tmp_path: Path, signal: np.ndarray) -> None:
    raw = mne.io.RawArray(1e-6 * signal, mne.create_info([*NAMES[:7], "ECG"], RATE, [*["eeg"] * 7, "ecg"]))
    raw.set_annotations(mne.Annotations([BEGIN], [LENGTH], ["BAD_beat"], ch_names=[["ECG"]]))
    raw.save(tmp_path / "a_raw.fif")
    info = info_of(tmp_path / "a_raw.fif")
    assert info.bad_channel_spans == [(20.5, 22.5, "ECG")] and not info.bad_spans and not info.notes


class TestEEGLAB:
    """An EEGLAB event gives its channels as numbers or names. If the channels are unclear, the mark belongs to all
    channels."""

    @pytest.mark.parametrize(
        ("channel", "names"),
        [
            (4, ["F4"]),
            (np.array([4.0, 7.0]), ["F4", "P3"]),
            ("F4", ["F4"]),
            ("f4; P3", ["F4", "P3"]),
            (np.array(["F4", "P3"], object), ["F4", "P3"]),
            (0, []),
            (-1, []),
            (np.nan, []),
            (np.zeros(0), []),
            ("", []),
            ("n/a", []),
            ("All", []),
        ],
    )
    def test_numbers_and_names(self, tmp_path: Path, signal: np.ndarray, channel: object, names: list[str]) -> None:
        info = info_of(write_set(tmp_path, signal, [channel]))
        assert info.bad_channel_spans == [(20.5, 22.5, name) for name in names]
        assert [(a, b) for a, b, _ in info.bad_spans] == ([] if names else [(20.5, 22.5)]) and not info.notes

    def test_each_event_has_its_own_channels(self, tmp_path: Path, signal: np.ndarray) -> None:
        info = info_of(write_set(tmp_path, signal, [4, "P3", 0], field="chanindex"))
        assert info.bad_channel_spans == [(20.5, 22.5, "F4"), (20.5, 22.5, "P3")]
        assert [(a, b) for a, b, _ in info.bad_spans] == [(20.5, 22.5)]

    @pytest.mark.parametrize(("channel", "said"), [(9, "9"), (2.5, "2.5"), ("Fpz", "Fpz")])
    def test_unknown_channel(self, tmp_path: Path, signal: np.ndarray, channel: object, said: str) -> None:
        info = info_of(write_set(tmp_path, signal, [channel]))
        assert [(a, b) for a, b, _ in info.bad_spans] == [(20.5, 22.5)] and not info.bad_channel_spans
        assert info.notes == [
            f"the mark 'BAD_pop' names the channel '{said}', which is not in the recording; it is used for all channels"
        ]

    def test_a_mask_is_no_list_of_numbers(self, tmp_path: Path, signal: np.ndarray) -> None:
        info = info_of(write_set(tmp_path, signal, [np.array([0, 0, 0, 1, 0, 0, 0, 0])]))
        assert [(a, b) for a, b, _ in info.bad_spans] == [(20.5, 22.5)] and not info.bad_channel_spans
        assert "the channels of 1 bad-span marks are not known" in info.notes[0]

    def test_numbers_after_channels_were_removed(self, tmp_path: Path, signal: np.ndarray) -> None:
        """Channels before the first removed channel keep their numbers. The number 6 is unclear: it belongs to one
        channel before the removal of channels, and to another channel after it."""
        path = write_set(tmp_path, signal, [3, 6, 10], urchan=[1, 2, 3, 4, 6, 7, 9, 10])
        info = info_of(path)
        assert info.bad_channel_spans == [(20.5, 22.5, "F3")] and len(info.bad_spans) == 2
        assert len(info.notes) == 1 and "the channels of 2 bad-span marks are not known" in info.notes[0]
        removed = {"removedchans": np.array([("Fz",)], [("labels", object)])}
        info = info_of(write_set(tmp_path, signal, [3, "F4"], chaninfo=removed))
        assert info.bad_channel_spans == [(20.5, 22.5, "F4")] and len(info.bad_spans) == 1
        assert "the channels of 1 bad-span marks are not known" in info.notes[0]

    def test_boundaries_divide_all_channels(self, tmp_path: Path, signal: np.ndarray) -> None:
        info = info_of(write_set(tmp_path, signal, [4], text="boundary"))
        assert [s.start for s in info.segments] == [0, 5125] and not info.notes
