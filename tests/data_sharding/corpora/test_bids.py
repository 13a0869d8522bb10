"""Tests of BIDS datasets: some datasets are as mne-bids writes them, others have typical errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_sharding.common.errors import RequestError
from data_sharding.corpora import CorpusConfig, Item, list_items, open_item
from data_sharding.dataset.splits import SplitConfig
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec


def write_bids(root: Path, build_raw: Any) -> None:
    """Write a BIDS dataset with two subjects, one of whom has two sessions.

    The recordings have a montage, a bad channel, an EOG channel, and mains interference at 60 Hz.
    """
    import mne
    import mne_bids

    for number, (subject, session) in enumerate((("01", "a"), ("01", "b"), ("02", "a"))):
        raw = build_raw(8, 200, 4, seed=number, names=["Fp1", "Fp2", "F3", "F4", "C3", "C4", "O1", "blink"])
        raw.set_channel_types({"blink": "eog"}, verbose="ERROR")
        raw.set_montage("standard_1020", on_missing="ignore", verbose="ERROR")
        raw.info["line_freq"] = 60
        raw.info["bads"] = ["F4"]
        raw.set_annotations(mne.Annotations([1.0, 2.0], [0.5, 0.5], ["picture", "answer"]))
        path = mne_bids.BIDSPath(subject=subject, session=session, task="see", root=root, datatype="eeg")
        mne_bids.write_raw_bids(
            raw,
            path,
            format="BrainVision",
            allow_preload=True,
            overwrite=True,
            verbose="ERROR",
            electrodes_tsv_task=False,
        )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, make_raw) -> Path:
    root = tmp_path_factory.mktemp("bids") / "study"
    write_bids(root, make_raw)
    return root


@pytest.fixture
def bids(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "study"))


def items_of(root: Path, **more: Any) -> dict[str, Item]:
    return {Path(i.path).name: i for i in list_items(CorpusConfig(kind="bids", root=str(root), **more))}


def folder(root: Path, subject: str = "01", session: str = "a") -> Path:
    return root / f"sub-{subject}" / f"ses-{session}" / "eeg"


NAME = "sub-01_ses-a_task-see_eeg.vhdr"


def test_what_mne_bids_writes_is_read(clean: Path) -> None:
    items = items_of(clean)
    assert sorted((i.subject, i.session) for i in items.values()) == [
        ("sub-01", "ses-a"),
        ("sub-01", "ses-b"),
        ("sub-02", "ses-a"),
    ]
    assert {i.corpus for i in items.values()} == {"study"} and not any(i.reason for i in items.values())
    signal = open_item(items[NAME])
    info = signal.info
    assert info.line_freq == 60
    assert info.bads == ["F4"]
    assert dict(zip(info.ch_names, info.ch_types, strict=True))["blink"] == "eog"
    place = info.positions[info.ch_names.index("Fp1")]
    assert place is not None and place[0] < 0 < place[1] and 0.05 < np.linalg.norm(place) < 0.15
    assert 1e-6 < signal.read(0, 800, [0]).std() < 1e-4
    signal.close()


def test_sidecars_reach_the_ledger(clean: Path, tmp_path: Path) -> None:
    spec = PreprocessSpec(sfreq=100, highpass=1, lowpass=40, window=100, stride=100)
    split = SplitConfig(val_fraction=0, test_fraction=0)
    task = Task(item=items_of(clean)[NAME], spec=spec, split=split, labels=(), work=tmp_path, timeout_s=60)
    row = process_recording(task).row
    assert (row.status, row.windows, row.line_freq, row.line_freq_from) == ("sharded", 4, 60, "file")
    assert row.n_eeg == 7 and row.bads == ["F4: marked bad"] and row.montage == "file"


@pytest.mark.parametrize("value", [1e-9, 0, 2, 999.5, 1000.5, 10**400])
def test_an_impossible_mains_frequency_of_a_file_is_not_used(bids: Path, tmp_path: Path, value: float) -> None:
    """A notch filter for every harmonic of 1e-9 Hz would need more memory than any machine has."""
    path = folder(bids, "01", "a") / "sub-01_ses-a_task-see_eeg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"PowerLineFrequency": value}))
    spec = PreprocessSpec(sfreq=100, highpass=1, lowpass=40, window=100, stride=100)
    split = SplitConfig(val_fraction=0, test_fraction=0)
    task = Task(item=items_of(bids)[NAME], spec=spec, split=split, labels=(), work=tmp_path, timeout_s=60)
    row = process_recording(task).row
    assert row.status == "sharded"
    used = 10 <= value <= 1000
    assert (row.line_freq_from == "file") is used
    about = str(value)[:40]
    said = f"PowerLineFrequency is {about}; mains have 50 or 60 Hz, so it must be a number from 10 to 1000; not used"
    assert [note for note in row.notes if "mains" in note] == ([] if used else [said])


def test_the_nearest_sidecar_overrides_those_above(bids: Path) -> None:
    for session in ("a", "b"):
        path = folder(bids, "01", session) / f"sub-01_ses-{session}_task-see_eeg.json"
        values = json.loads(path.read_text())
        values.pop("PowerLineFrequency")
        values.pop("EEGReference", None)
        path.write_text(json.dumps(values | ({"EEGReference": "Cz"} if session == "b" else {})))
    (bids / "task-see_eeg.json").write_text(json.dumps({"PowerLineFrequency": 50, "EEGReference": "linked mastoids"}))
    (bids / "task-other_eeg.json").write_text(json.dumps({"PowerLineFrequency": 40}))
    items = items_of(bids)
    assert items[NAME].info_patch["line_freq"] == 50
    assert open_item(items[NAME]).info.reference == "linked mastoids"
    assert items["sub-01_ses-b_task-see_eeg.vhdr"].info_patch["reference"] == "Cz"
    assert items["sub-02_ses-a_task-see_eeg.vhdr"].info_patch["line_freq"] == 60


@pytest.mark.parametrize("text", ["60", "60 Hz", " 60.0hz "])
def test_a_mains_frequency_that_is_a_text(bids: Path, text: str) -> None:
    path = folder(bids) / "sub-01_ses-a_task-see_eeg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"PowerLineFrequency": text}))
    assert items_of(bids)[NAME].info_patch["line_freq"] == 60.0


def test_sidecars_in_utf_16(bids: Path) -> None:
    """Excel saves tables as `Unicode text` in UTF-16."""
    before = items_of(bids)[NAME].info_patch
    for file in folder(bids).glob("*_task-see_*"):
        if file.suffix in (".tsv", ".json"):
            file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))
    assert items_of(bids)[NAME].info_patch == before


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("eeg.json", "{", "eeg.json: not valid JSON"),
        ("eeg.json", "[1]", "must be a JSON object"),
        ("eeg.json", '{"PowerLineFrequency": "fifty"}', "PowerLineFrequency is fifty; mains have"),
        ("channels.tsv", "name\ttype\nFp1\tEEG\n", "no column units"),
        ("channels.tsv", "type\tunits\nEEG\tuV\n", "no column 'name'; not used"),
        ("channels.tsv", "name\ttype\tunits\nFp1\tEEG\tuV\nFp1\tMISC\tuV\n", "'Fp1' is listed 2 times"),
        ("channels.tsv", "name\ttype\tunits\nFp1\tEEG\nFp2\tEEG\tuV\n", "line 2"),
        ("events.tsv", "onset\tduration\ttrial_type\nsoon\t1\tBAD_move\n", "line 2: the mark 'BAD_move' has no onset"),
        ("events.tsv", "onset\tduration\ttrial_type\n0.5\tn/a\tBAD\n", "the mark 'BAD' has no duration"),
    ],
)
def test_a_broken_part_of_a_sidecar_costs_this_part(bids: Path, suffix: str, content: str, words: str) -> None:
    (folder(bids) / f"sub-01_ses-a_task-see_{suffix}").write_text(content)
    items = items_of(bids)
    assert len(items) == 3 and all(item.recording.problem is None for item in items.values())
    info = open_item(items[NAME]).info
    assert any(words in note for note in info.notes)
    assert info.ch_types.count("eeg") >= 7 and info.bad_spans == []


def test_a_broken_position_costs_this_position(bids: Path) -> None:
    before = items_of(bids)[NAME].info_patch["positions"]
    table = next(folder(bids).glob("*_electrodes.tsv"))
    lines = table.read_text().splitlines()
    cells = lines[1].split("\t")
    table.write_text("\n".join([lines[0], "\t".join([cells[0], "left", *cells[2:]]), *lines[2:]]))
    patch = items_of(bids)[NAME].info_patch
    assert patch["positions"] == {name: place for name, place in before.items() if name != cells[0]}
    assert any(f"the position of '{cells[0]}' is not a number" in note for note in patch["notes"])
    next(folder(bids).glob("*_coordsystem.json")).write_text("{")
    assert "positions" not in items_of(bids)[NAME].info_patch


class TestMarksInEventsTables:
    """Rows of events.tsv divide a recording and mark spans as bad, also in a corpus without images."""

    @pytest.mark.parametrize(
        ("row", "segments", "spans"),
        [
            ("1.0\t0.5\tBAD_move\tn/a", [(0, 1)], [(1.0, 1.5)]),
            ("1.0\t0.5\tn/a\tComment/BAD blink", [(0, 1)], [(1.0, 1.5)]),
            ("1.0\t0.5\tbadge\t7", [(0, 1)], []),
            ("1.0\t0\tboundary\tn/a", [(0, 1.0), (1.0, 1)], []),
            ("1.0\t0.5\tBAD_ACQ_SKIP\tn/a", [(0, 1.0), (1.5, 1)], []),
            ("0.9984\tn/a\tNew Segment/\tn/a", [(0, 1.0), (1.0, 1)], []),
        ],
    )
    def test_rows_are_used(self, bids: Path, row: str, segments: list, spans: list) -> None:
        table = folder(bids) / "sub-01_ses-a_task-see_events.tsv"
        table.write_text(f"onset\tduration\ttrial_type\tvalue\n0.25\t0.1\tface\t3\n{row}\n")
        info = open_item(items_of(bids)[NAME]).info
        n, hertz = info.n_samples, info.sfreq
        ends = [
            (round(a * hertz), n if b == 1 and i == len(segments) - 1 else round(b * hertz))
            for i, (a, b) in enumerate(segments)
        ]
        assert [(s.start, s.stop) for s in info.segments] == ends
        assert [(round(a, 3), round(b, 3)) for a, b, _ in info.bad_spans] == spans

    def test_windows_over_a_bad_row_are_left_out(self, bids: Path, tmp_path: Path) -> None:
        table = folder(bids) / "sub-01_ses-a_task-see_events.tsv"
        table.write_text("onset\tduration\ttrial_type\n1.2\t0.3\tBAD_move\n")
        split = SplitConfig(val_fraction=0, test_fraction=0)
        spec = PreprocessSpec(window=256, stride=256)
        task = Task(item=items_of(bids)[NAME], spec=spec, split=split, labels=(), work=tmp_path, timeout_s=60)
        row = process_recording(task).row
        assert row.windows and row.windows_left_out["overlaps a span marked as bad"] == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["n/a", "CapTrak", "m", 60, 1e400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("PowerLineFrequency", "EEGReference", "EEGCoordinateSystem", "EEGCoordinateUnits")
WORDS = [
    "onset",
    "duration",
    "trial_type",
    "BAD",
    "name",
    "type",
    "units",
    "status",
    "x",
    "y",
    "z",
    "Fp1",
    "EEG",
    "uV",
    "1",
    "nan",
    "n/a",
    "",
    "\t",
]
CELLS = st.sampled_from(WORDS)
TABLES = st.lists(st.lists(CELLS, max_size=5).map("\t".join), max_size=4).map("\n".join).map(str.encode)
MAPPINGS = st.dictionaries(st.sampled_from(KEYS), JSON).map(json.dumps).map(str.encode)
SUFFIXES = ("eeg.json", "channels.tsv", "electrodes.tsv", "coordsystem.json", "events.tsv")
SIDECARS = TABLES | st.binary(max_size=40) | MAPPINGS


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("*_eeg.json", b"<NEDFversion>")
@example("*_eeg.json", b"<a><NEDFversion>1.3</NEDFversion></a>")
@example("*_eeg.json", b"XDF:")
@example("*_eeg.json", b"Brain Vision Data Exchange Header File Version 1.0")
@example("*_events.tsv", b"GDF 2.20")
@given(st.sampled_from([f"*_{name}" for name in SUFFIXES]), SIDECARS)
def test_any_content_of_a_sidecar_leaves_other_recordings_readable(bids: Path, pattern: str, content: bytes) -> None:
    path = next(folder(bids).glob(pattern))
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        items = items_of(bids)
        others = ("sub-01_ses-b_task-see_eeg.vhdr", "sub-02_ses-a_task-see_eeg.vhdr")
        assert set(items) == {NAME, *others}
        assert all(items[name].recording.problem is None for name in others)
        if items[NAME].recording.problem is None:
            info = open_item(items[NAME]).info
            assert len(info.ch_types) == len(info.positions) == len(info.ch_names)
            json.dumps(items[NAME].info_patch, allow_nan=False)
        else:
            assert "\n" not in (items[NAME].recording.problem or "")
    finally:
        path.write_bytes(before)


def test_json_that_is_nested_too_deeply(bids: Path) -> None:
    (folder(bids) / "sub-01_ses-a_task-see_eeg.json").write_text("[" * 100_000)
    assert any("not valid JSON" in note for note in items_of(bids)[NAME].info_patch["notes"])


def test_types_and_units_of_channels_tsv(bids: Path) -> None:
    (folder(bids) / "sub-01_ses-a_task-see_channels.tsv").write_text(
        "name\ttype\tunits\tstatus\nFp1\tEEG\tµV\tgood\nFp2\tTRIG\tn/a\tgood\nF3\tEEG\tg\tgood\n"
        "F4\tEEG\tuV\tgood\nC3\teeg\tV\tbad\nC4\tWHAT\tuV\tn/a\nO1\tn/a\tn/a\tn/a\nblink\tVEOG\tuV\tgood\n"
        "Pz\tEEG\tuV\tgood\n"
    )
    info = open_item(items_of(bids)[NAME]).info
    assert dict(zip(info.ch_names, info.ch_types, strict=True)) == {
        "Fp1": "eeg",
        "Fp2": "stim",
        "F3": "eeg",
        "F4": "eeg",
        "C3": "eeg",
        "C4": "misc",
        "O1": "eeg",
        "blink": "eog",
    }
    assert info.bads == ["C3"] and info.unknown_units == {"F3": "g"}
    assert any("Pz" in note for note in info.notes)
    assert any("sidecar has the unit V" in note and "C3" in note for note in info.notes)


@pytest.mark.parametrize(("unit", "system", "words"), [("km", "CapTrak", "'km'"), ("m", "Talairach", "'talairach'")])
def test_positions_of_another_kind_are_not_guessed(bids: Path, unit: str, system: str, words: str) -> None:
    for path in folder(bids).glob("*_coordsystem.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"EEGCoordinateUnits": unit, "EEGCoordinateSystem": system}))
    item = items_of(bids)[NAME]
    assert "positions" not in item.info_patch and words in item.info_patch["notes"][0]


def test_positions_in_millimetres_and_in_eeglabs_frame(bids: Path) -> None:
    before = items_of(bids)[NAME].info_patch["positions"]["Fp1"]
    table = next(folder(bids).glob("*_electrodes.tsv"))
    table.write_text(
        f"name\tx\ty\tz\nFp1\t{1e3 * before[1]}\t{-1e3 * before[0]}\t{1e3 * before[2]}\nFp2\tn/a\tn/a\tn/a\n"
    )
    frame = next(folder(bids).glob("*_coordsystem.json"))
    frame.write_text(json.dumps({"EEGCoordinateUnits": "mm", "EEGCoordinateSystem": "EEGLAB"}))
    after = items_of(bids)[NAME].info_patch["positions"]
    assert list(after) == ["Fp1"] and np.allclose(after["Fp1"], before)


def test_events_with_images_make_trials(bids: Path, tmp_path: Path) -> None:
    (tmp_path / "stimuli" / "cat").mkdir(parents=True)
    (tmp_path / "stimuli" / "cat" / "1.png").write_bytes(b"x")
    (folder(bids) / "sub-01_ses-a_task-see_events.tsv").write_text(
        "onset\tduration\ttrial_type\tstim_file\n0.5\t0.5\tkitten\tcat/1.png\n1.0\t0\tn/a\tn/a\n"
    )
    (folder(bids, "01", "b") / "sub-01_ses-b_task-see_events.tsv").unlink()
    (folder(bids, "02") / "sub-02_ses-a_task-see_events.tsv").write_text("onset\tstim_file\nsoon\tcat/1.png\n")
    items = items_of(bids, images=str(tmp_path / "stimuli"), tmin=-0.1, stimulus_delay_ms=20)
    trials = items[NAME].trials
    assert trials is not None
    assert [(t.onset, t.label_name, t.image_id) for t in trials] == [(0.5, "cat", "cat/1")]
    assert (items[NAME].tmin, items[NAME].tmax, items[NAME].stimulus_delay_ms) == (-0.1, None, 20)
    assert "no events" in (items["sub-01_ses-b_task-see_eeg.vhdr"].reason or "")
    item = items["sub-02_ses-a_task-see_eeg.vhdr"]
    assert item.recording.problem is None and item.trials == () and item.left_out == {"wrong row in events.tsv": 1}
    assert any("'soon' is not a number" in note for note in item.info_patch["notes"])
    other = items_of(bids, images=str(tmp_path / "stimuli"), options={"label_column": "trial_type"})
    assert [t.label_name for t in other[NAME].trials or ()] == ["kitten"]


def test_files_that_are_not_raw_eeg_are_excluded(bids: Path) -> None:
    for name in ("derivatives/clean/sub-01/eeg", "sub-02/ses-a/meg", "sub-02/ses-a/ieeg", "sub-02/ses-a/eeg"):
        (bids / name).mkdir(parents=True, exist_ok=True)
    header = folder(bids) / NAME
    for target in (
        bids / "derivatives" / "clean" / "sub-01" / "eeg" / "sub-01_desc-x_eeg.edf",
        bids / "sub-02" / "ses-a" / "meg" / "sub-02_ses-a_meg.vhdr",
        bids / "sub-02" / "ses-a" / "ieeg" / "sub-02_ses-a_ieeg.vhdr",
        bids / "sub-02" / "ses-a" / "eeg" / "backup.vhdr",
    ):
        target.write_text(header.read_text())
        for suffix in (".eeg", ".vmrk"):
            shutil.copy(header.with_suffix(suffix), target.parent / header.with_suffix(suffix).name)
    items = items_of(bids)
    assert not any("derivatives" in i.path for i in items.values())
    assert "not named as BIDS" in (items["sub-02_ses-a_meg.vhdr"].reason or "")
    assert "intracranial" in (items["sub-02_ses-a_ieeg.vhdr"].reason or "")
    assert "not named as BIDS" in (items["backup.vhdr"].reason or "")


def test_participants(bids: Path) -> None:
    (bids / "participants.tsv").write_text("participant_id\tgroup\nsub-01\tpatient\nsub-02\tcontrol\n")
    items = items_of(bids, options={"participants": {"group": ["control"]}})
    assert "group is patient" in (items[NAME].reason or "")
    assert items["sub-02_ses-a_task-see_eeg.vhdr"].reason is None
    with pytest.raises(RequestError, match=r"no participant has 'adults' in the column 'group'; .* control, patient"):
        items_of(bids, options={"participants": {"group": ["adults"]}})


def test_a_folder_that_is_not_bids(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"dataset_description\.json is missing"):
        items_of(tmp_path)
    with pytest.raises(ValueError, match="unknown option 'participant' for kind bids; did you mean 'participants'"):
        CorpusConfig(kind="bids", root="x", options={"participant": {}})
    with pytest.raises(ValueError, match="options"):
        CorpusConfig(kind="bids", root="x", options={"label_column": 3.5, "participants": "all"})
    with pytest.raises(ValueError, match="the key 'subject_pattern' does not belong to kind bids"):
        CorpusConfig(kind="bids", root="x", subject_pattern="(?P<subject>x)")


def test_on_an_object_store(clean: Path) -> None:
    from upath import UPath

    remote = UPath("memory://bids-study")
    for path in clean.rglob("*"):
        if path.is_file():
            target = remote / path.relative_to(clean).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    here = items_of(clean)
    there = {
        Path(i.path).name: i for i in list_items(CorpusConfig(kind="bids", root="memory://bids-study", name="study"))
    }
    assert {k: (i.key, i.subject, i.info_patch) for k, i in here.items()} == {
        k: (i.key, i.subject, i.info_patch) for k, i in there.items()
    }
