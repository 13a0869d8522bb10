"""A recording consists of its main file and of the files whose names are in the main file. A reader opens no other
files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mne
import numpy as np
import pytest
from scipy.io import savemat

from data_sharding.audit.duplicates import RecordingFingerprint, find_duplicates
from data_sharding.common.files import read_json
from data_sharding.common.storage import as_path
from data_sharding.corpora import CorpusConfig, Item, list_items
from data_sharding.dataset.splits import SplitConfig
from data_sharding.formats.sniffing import find_recordings
from data_sharding.job.process_recording import process_recording
from data_sharding.job.task import Task
from data_sharding.processing.preprocess import PreprocessSpec

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
RATE, SECONDS = 250, 20


def make_uv(true_uv, seed: int, seconds: int = SECONDS) -> np.ndarray:
    return true_uv(seed, 8, np.arange(seconds * RATE) / RATE)


def write_fif(path: Path, uv: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES, RATE, "eeg"), verbose="ERROR")
    raw.save(path, verbose="ERROR", **options)


def write_set(path: Path, uv: np.ndarray, named: str, fdt: str | None = None, *, compress: bool = False) -> None:
    """Write an EEGLAB .set file that contains the file name `named`. Write the signal to the file `fdt` (default:
    `named`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    locations = np.array([(name,) for name in NAMES], dtype=[("labels", object)])
    eeg = {"setname": "a", "nbchan": 8, "pnts": uv.shape[1], "trials": 1, "srate": float(RATE), "xmin": 0.0}
    eeg |= {"xmax": (uv.shape[1] - 1) / RATE, "data": named, "datfile": named, "event": [], "chanlocs": locations}
    eeg |= {"icawinv": [], "icasphere": [], "icaweights": [], "icaact": [], "epoch": [], "ref": "common"}
    savemat(path, {"EEG": eeg}, appendmat=False, do_compression=compress)
    (path.parent / (fdt or named)).write_bytes(uv.T.astype("<f4").tobytes())


def write_vhdr(path: Path, uv: np.ndarray, stem: str) -> None:
    """Write a BrainVision recording. The header is written to `path`. Its data and marker files have the base name
    `stem`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"Ch{i}={name},,0.01,µV\n" for i, name in enumerate(NAMES, start=1))
    path.write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={stem}.eeg\nMarkerFile={stem}.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\n"
        f"NumberOfChannels=8\nSamplingInterval={1e6 / RATE:g}\n[Binary Infos]\nBinaryFormat=INT_16\n"
        f"[Channel Infos]\n{lines}",
        encoding="utf-8",
    )
    (path.parent / f"{stem}.eeg").write_bytes(np.round(uv / 0.01).T.astype("<i2").tobytes())
    (path.parent / f"{stem}.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile={stem}.eeg\n[Marker Infos]\nMk1=New Segment,,1,1,0\n"
    )


class TestFif:
    def test_case_of_three_recordings_that_look_like_parts(self, cases: Path, shard_all, assert_true) -> None:
        sharded = shard_all(cases / "fif")
        assert sorted(sharded) == ["rest-1.fif", "rest-2.fif", "rest.fif"]
        for name, seed in (("rest.fif", 701), ("rest-1.fif", 702), ("rest-2.fif", 703)):
            assert sharded[name].row.seconds == 60 and sharded[name].row.files == [name]
            assert_true(sharded[name], seed)

    @pytest.mark.parametrize("naming", ["neuromag", "bids"])
    def test_parts_are_what_the_file_says(self, tmp_path: Path, shard_all, assert_true, true_uv, naming: str) -> None:
        """A file next to a split recording is named like a further part, but is another recording."""
        uv = make_uv(true_uv, 70, 330)
        name = "sub-1_task-x_eeg.fif" if naming == "bids" else "a_raw.fif"
        write_fif(tmp_path / "f" / name, uv, split_size="2MB", split_naming=naming)
        parts = sorted(path.name for path in (tmp_path / "f").iterdir())
        assert len(parts) == 3
        following = parts[-1].replace("-03_", "-04_") if naming == "bids" else "a_raw-3.fif"
        write_fif(tmp_path / "f" / following, make_uv(true_uv, 71))
        sharded = shard_all(tmp_path / "f")
        first = parts[0] if naming == "bids" else "a_raw.fif"
        assert sorted(sharded) == sorted([first, following])
        assert sorted(sharded[first].row.files) == parts and sharded[first].row.seconds == 330
        assert sharded[following].row.files == [following]
        assert_true(sharded[first], 70)
        assert_true(sharded[following], 71)

    def test_missing_or_renamed_part_is_named(self, tmp_path: Path, shard_all, true_uv) -> None:
        write_fif(tmp_path / "f" / "a_raw.fif", make_uv(true_uv, 72, 330), split_size="2MB")
        (tmp_path / "f" / "a_raw-1.fif").rename(tmp_path / "f" / "renamed_raw.fif")
        sharded = shard_all(tmp_path / "f")
        row = sharded["a_raw.fif"].row
        assert (row.status, row.category) == ("quarantined", "sidecar missing")
        assert "a_raw.fif names its next part 'a_raw-1.fif', which does not exist" in row.reason
        # The renamed part and the part after it are a valid separate recording.
        assert sharded["renamed_raw.fif"].row.files == ["a_raw-2.fif", "renamed_raw.fif"]
        assert sorted(sharded) == ["a_raw.fif", "renamed_raw.fif"]
        (tmp_path / "f" / "a_raw-2.fif").unlink()
        assert shard_all(tmp_path / "f")["renamed_raw.fif"].row.category == "sidecar missing"

    def test_part_of_another_recording_is_refused(self, tmp_path: Path, shard_all, true_uv) -> None:
        """Another recording has overwritten a part of a split recording."""
        write_fif(tmp_path / "f" / "a_raw.fif", make_uv(true_uv, 76, 330), split_size="2MB")
        write_fif(tmp_path / "f" / "a_raw-1.fif", make_uv(true_uv, 77), overwrite=True)
        row = shard_all(tmp_path / "f")["a_raw.fif"].row
        assert (row.status, row.category) == ("quarantined", "sidecar of another recording")
        assert "a_raw-1.fif begins with sample 0, but a_raw.fif ends with sample" in row.reason

    def test_zipped_parts(self, tmp_path: Path, shard_all, true_uv) -> None:
        write_fif(tmp_path / "f" / "a_raw.fif.gz", make_uv(true_uv, 73, 330), split_size="2MB")
        write_fif(tmp_path / "f" / "b_raw.fif.gz", make_uv(true_uv, 74))
        write_fif(tmp_path / "f" / "b_raw-1.fif.gz", make_uv(true_uv, 75))
        sharded = shard_all(tmp_path / "f")
        assert {name: (one.row.status, one.row.seconds) for name, one in sharded.items()} == {
            "a_raw.fif.gz": ("sharded", 330.0),
            "b_raw.fif.gz": ("sharded", 20.0),
            "b_raw-1.fif.gz": ("sharded", 20.0),
        }


class TestEeglab:
    def test_case_of_a_renamed_pair(self, cases: Path, shard_all, assert_true) -> None:
        sharded = shard_all(cases / "eeglab_pair")
        assert sharded["s13_S07.set"].row.files == ["s13_S07.fdt", "s13_S07.set"]
        assert_true(sharded["s13_S07.set"], 905)
        assert sharded["raw.fdt"].row.status == "quarantined"

    @pytest.mark.parametrize("compress", [False, True])
    def test_the_file_with_the_name_of_the_set_wins(
        self, tmp_path: Path, shard_all, assert_true, true_uv, compress: bool
    ) -> None:
        write_set(tmp_path / "e" / "raw.set", make_uv(true_uv, 60), "raw.fdt")
        write_set(tmp_path / "e" / "S01.set", make_uv(true_uv, 61), "C:\\data\\raw.fdt", "S01.fdt", compress=compress)
        write_set(tmp_path / "e" / "S02.SET", make_uv(true_uv, 62), "raw.fdt", "S02.FDT", compress=compress)
        sharded = shard_all(tmp_path / "e")
        for name, seed in (("raw.set", 60), ("S01.set", 61), ("S02.SET", 62)):
            assert_true(sharded[name], seed)
        assert len({one.row.sha256 for one in sharded.values()}) == 3

    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("named", ["raw.fdt", "C:\\data\\raw.fdt", "RAW.fdt"])
    def test_the_named_file_is_used_if_it_is_the_only_one(
        self, tmp_path: Path, shard_all, assert_true, true_uv, named: str, compress: bool
    ) -> None:
        write_set(tmp_path / "e" / "S01.set", make_uv(true_uv, 63), named, "raw.fdt", compress=compress)
        (tmp_path / "e" / "other.fdt").write_bytes(bytes(1000))
        sharded = shard_all(tmp_path / "e")
        assert sharded["S01.set"].row.files == ["S01.set", "raw.fdt"]
        assert_true(sharded["S01.set"], 63)

    def test_equal_sets_of_two_people_are_two_recordings(self, tmp_path: Path, shard_all, true_uv) -> None:
        for person, seed in (("S01", 64), ("S02", 65)):
            write_set(tmp_path / "e" / person / "raw.set", make_uv(true_uv, seed), "raw.fdt")
        sharded = shard_all(tmp_path / "e")
        assert (tmp_path / "e" / "S01" / "raw.set").read_bytes()[128:] == (
            tmp_path / "e" / "S02" / "raw.set"
        ).read_bytes()[128:]
        assert len({one.row.sha256 for one in sharded.values()}) == 2
        assert len({one.row.fingerprint for one in sharded.values()}) == 2

    @pytest.mark.parametrize(("samples", "category"), [(-10, "truncated"), (10, "sidecar of another recording")])
    def test_signal_of_another_length_is_refused(
        self, tmp_path: Path, shard_all, true_uv, samples: int, category: str
    ) -> None:
        uv = make_uv(true_uv, 66)
        write_set(tmp_path / "e" / "a.set", uv, "a.fdt")
        (tmp_path / "e" / "a.fdt").write_bytes(np.resize(uv.T, (uv.shape[1] + samples, 8)).astype("<f4").tobytes())
        row = shard_all(tmp_path / "e")["a.set"].row
        assert (row.status, row.category) == ("quarantined", category)


class TestBrainVision:
    def test_renamed_triple_beside_the_one_that_it_names_is_refused(
        self, tmp_path: Path, shard_all, assert_true, true_uv
    ) -> None:
        """S01.vhdr and S02.vhdr were renamed by hand, and still contain the names of the data and marker files of
        'raw'."""
        write_vhdr(tmp_path / "b" / "S01.vhdr", make_uv(true_uv, 80), "S01")
        for name in ("S01", "S02", "raw"):
            write_vhdr(tmp_path / "b" / f"{name}.vhdr", make_uv(true_uv, 81), "raw")
        sharded = shard_all(tmp_path / "b")
        assert_true(sharded["raw.vhdr"], 81)
        for name in ("S01.vhdr", "S02.vhdr"):
            row = sharded[name].row
            assert (row.status, row.category) == ("quarantined", "sidecar of another recording"), name
            assert "raw.eeg" in row.reason

    def test_other_names_and_other_case_are_read(self, tmp_path: Path, shard_all, assert_true, true_uv) -> None:
        write_vhdr(tmp_path / "b" / "a.vhdr", make_uv(true_uv, 82), "data of a")
        write_vhdr(tmp_path / "b" / "B.vhdr", make_uv(true_uv, 83), "b")
        sharded = shard_all(tmp_path / "b")
        assert_true(sharded["a.vhdr"], 82)
        assert_true(sharded["B.vhdr"], 83)


TRACE = """
import json, os, sys
from pathlib import Path
opened = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.path.realpath(os.fsdecode(arguments[0])))
from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.mne_signal import ReadError
from data_sharding.formats.sniffing import find_recordings
import h5py, mne, mne.io, scipy.io
plain = h5py.File.__init__
def traced(self, name, *args, **kwargs):
    note("open", [name])
    return plain(self, name, *args, **kwargs)
h5py.File.__init__ = traced
root = Path(os.path.realpath(sys.argv[1]))
out = {}
recordings = find_recordings(root)
sys.addaudithook(note)
for recording in recordings:
    opened.clear()
    try:
        signal = open_signal(recording)
        signal.read(0, min(100, signal.info.n_samples), [0])
        signal.close()
        status = "read"
    except ReadError as error:
        status = str(error)
    listed = {os.path.realpath(file) for file in recording.files}
    extra = sorted({o for o in opened if Path(o).is_relative_to(root) and not os.path.isdir(o)} - listed)
    out[str(recording.path.relative_to(root))] = [recording.format, status, extra]
print(json.dumps(out))
"""


def trace(root: Path) -> dict[str, list]:
    """Read every recording below a folder in a child process. Return for each recording: its format, its status, and
    those opened files that do not belong to the recording."""
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(root)], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return json.loads(done.stdout.splitlines()[-1])


class TestOpenedFiles:
    def test_readers_open_only_the_files_of_the_recording(self, tmp_path: Path, true_uv) -> None:
        folder = tmp_path / "all"
        uv = make_uv(true_uv, 90, 330)
        write_fif(folder / "a_raw.fif", uv, split_size="2MB")
        write_fif(folder / "a_raw-3.fif", uv[:, :5000])
        write_set(folder / "s.set", uv, "raw.fdt", "s.fdt")
        write_set(folder / "raw.set", uv[:, :5000], "raw.fdt")
        write_vhdr(folder / "v.vhdr", uv, "v")
        raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES, RATE, "eeg"), verbose="ERROR")
        for suffix in ("edf", "bdf"):
            mne.export.export_raw(folder / f"e-{suffix}.{suffix}", raw, verbose="ERROR")
        found = trace(folder)
        assert {name: row[1:] for name, row in found.items()} == {name: ["read", []] for name in found}
        assert {row[0] for row in found.values()} == {"fif", "eeglab", "brainvision", "edf", "bdf"}

    def test_readers_open_only_the_files_of_real_recordings(self, tmp_path: Path) -> None:
        corpus = os.environ.get("DREAMSCALE_EEG_CORPUS")
        if not corpus:
            pytest.skip("DREAMSCALE_EEG_CORPUS does not name a folder")
        found = trace(Path(corpus))
        assert {name: row[2] for name, row in found.items() if row[2]} == {}
        assert {row[0] for row in found.values() if row[1] == "read"} >= {"ant", "curry", "mff", "nihon", "persyst"}

    def test_files_beside_a_recording_do_not_matter(self, tmp_path: Path, true_uv) -> None:
        """A marker file or signal file is not opened if its name is in no header and in no .set file."""
        folder = tmp_path / "all"
        write_vhdr(folder / "v.vhdr", make_uv(true_uv, 91), "v")
        shutil.copy(folder / "v.vmrk", folder / "w.vmrk")
        write_set(folder / "s.set", make_uv(true_uv, 92), "s.fdt")
        (folder / "t.fdt").write_bytes(bytes(160))
        recordings = {recording.path.name: recording for recording in find_recordings(folder)}
        assert [file.name for file in recordings["v.vhdr"].files] == ["v.eeg", "v.vhdr", "v.vmrk"]
        assert [file.name for file in recordings["s.set"].files] == ["s.fdt", "s.set"]
        assert recordings["t.fdt"].problem is not None


class TestChecksum:
    def test_files_and_checksums_are_the_same_on_a_store(self, tmp_path: Path, true_uv) -> None:
        folder = tmp_path / "disk"
        write_fif(folder / "a_raw.fif", make_uv(true_uv, 93, 330), split_size="2MB")
        write_fif(folder / "a_raw-3.fif", make_uv(true_uv, 94))
        write_set(folder / "S01.set", make_uv(true_uv, 95), "raw.fdt", "S01.fdt")
        write_set(folder / "S02.set", make_uv(true_uv, 96), "raw.fdt")
        write_vhdr(folder / "S03.vhdr", make_uv(true_uv, 97), "data of S03")
        store = as_path("memory://identity/eeg")
        store.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            (store / file.name).write_bytes(file.read_bytes())
        out = []
        for root in (folder, store):
            rows = []
            for item in list_items(CorpusConfig(root=str(root), name="c")):
                row = process_recording(self._task(item, tmp_path / "work" / str(len(out)))).row
                rows.append((row.path, row.files, row.sha256, row.status, row.windows))
            out.append(rows)
        assert out[0] == out[1] and {row[3] for row in out[0]} == {"sharded"}
        assert [row[1] for row in out[0]] == [
            ["S01.fdt", "S01.set"],
            ["S02.set", "raw.fdt"],
            ["S03.vhdr", "data of S03.eeg", "data of S03.vmrk"],
            ["a_raw-3.fif"],
            ["a_raw-1.fif", "a_raw-2.fif", "a_raw.fif"],
        ]

    @pytest.mark.parametrize("suffix", ["eeg", "vmrk"])
    def test_every_sidecar_changes_the_checksum(self, tmp_path: Path, shard_all, true_uv, suffix: str) -> None:
        write_vhdr(tmp_path / "b" / "a.vhdr", make_uv(true_uv, 98), "a")
        before = shard_all(tmp_path / "b")["a.vhdr"].row.sha256
        with (tmp_path / "b" / f"a.{suffix}").open("ab") as stream:
            stream.write(bytes(16) if suffix == "eeg" else b"Mk2=Comment,BAD_move,1000,500,0\n")
        assert shard_all(tmp_path / "b")["a.vhdr"].row.sha256 != before

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("sub-1/eeg/sub-1_task-x_channels.tsv", "name\ttype\tunits\tstatus\nC3\tEEG\tuV\tbad\n"),
            ("sub-1/eeg/sub-1_task-x_eeg.json", '{"PowerLineFrequency": 60}'),
            ("task-x_eeg.json", '{"EEGReference": "Cz"}'),
            ("sub-1/eeg/sub-1_electrodes.tsv", "name\tx\ty\tz\nC3\t-60\t0\t90\n"),
        ],
    )
    def test_every_sidecar_of_bids_makes_another_part(self, tmp_path: Path, true_uv, name: str, text: str) -> None:
        root = tmp_path / "bids"
        write_vhdr(root / "sub-1" / "eeg" / "sub-1_task-x_eeg.vhdr", make_uv(true_uv, 99), "sub-1_task-x_eeg")
        (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
        (root / "sub-1" / "eeg" / "sub-1_coordsystem.json").write_text(
            '{"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "mm"}'
        )
        parts = []
        for _ in range(2):
            (item,) = list_items(CorpusConfig(root=str(root), name="c", kind="bids"))
            parts.append(process_recording(self._task(item, tmp_path / "work")).part)
            (root / name).write_text(text)
        assert parts[0] and parts[1] and parts[0] != parts[1]

    @staticmethod
    def _task(item: Item, work: Path) -> Task:
        spec, split = PreprocessSpec(window=256, stride=256), SplitConfig(val_fraction=0, test_fraction=0)
        return Task(item=item, spec=spec, split=split, labels=(), work=work, timeout_s=60)


def load_prints(work: Path) -> list[RecordingFingerprint]:
    """Load the fingerprints that the job wrote to the folders of the recordings."""
    out = []
    for file in work.rglob("result.json"):
        row = read_json(file)["row"]
        points = np.load(file.with_name("fingerprint.npy"))
        out.append(RecordingFingerprint(key=row["key"], sha256=row["sha256"], seconds=row["seconds"], points=points))
    return out


def test_case_of_the_same_calibration(cases: Path, tmp_path: Path, shard_all, assert_true) -> None:
    """Recordings of two people are not duplicates, even if both begin with the same calibration signal."""
    (tmp_path / "e").mkdir()
    for name in "ab":
        (tmp_path / "e" / f"e18_calib_{name}.edf").symlink_to(cases / "edf" / f"e18_calib_{name}.edf")
    sharded = shard_all(tmp_path / "e")
    prints = load_prints(tmp_path / "work")
    assert len(prints) == 2 and find_duplicates(prints) == {}
    for name, seed in (("a", 180), ("b", 181)):
        one = sharded[f"e18_calib_{name}.edf"]
        one.samples = [sample for sample in one.samples if sample[0]["start"] >= 11]
        assert_true(one, seed)
