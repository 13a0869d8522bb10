"""Files that are not recordings are excluded. Recordings without a reader, archives and tables have a row in the
ledger."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import mne
import numpy as np
import pytest

from data_sharding.formats.sniffing import Recording, find_recordings

NAMES = ["Fp1", "Cz", "Oz", "Pz"]


def rows(root: Path) -> dict[str, Recording]:
    return {str(Path(str(found.path)).relative_to(root)): found for found in find_recordings(root)}


@pytest.fixture(scope="module")
def fif_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write FIF files of every kind that MNE can write. The names of the files do not show the kind."""
    root, random = tmp_path_factory.mktemp("fif"), np.random.default_rng(0)
    with mne.utils.use_log_level("ERROR"):
        info = mne.create_info(NAMES, 100.0, "eeg")
        raw = mne.io.RawArray(1e-5 * random.normal(size=(4, 1000)), info)
        raw.set_montage("standard_1005")
        raw.set_eeg_reference(projection=True)
        raw.save(root / "raw-raw.fif")
        mne.write_events(root / "events-eve.fif", np.array([[1, 0, 1], [50, 0, 2]]))
        mne.Annotations([1.0], [1.0], ["x"]).save(root / "annotations-annot.fif")
        epochs = mne.make_fixed_length_epochs(raw, 1.0, preload=True)
        epochs.save(root / "epochs-epo.fif")
        epochs.average().save(root / "averages-ave.fif")
        covariance = mne.compute_raw_covariance(raw)
        covariance.save(root / "covariance-cov.fif")
        mne.write_proj(root / "projections-proj.fif", raw.info["projs"])
        mne.preprocessing.ICA(2, max_iter=5).fit(raw).save(root / "independent-ica.fif")
        mne.channels.make_standard_montage("standard_1020").save(root / "digitised-dig.fif")
        mne.io.write_info(root / "information-info.fif", raw.info)
        mne.write_trans(root / "transformation-trans.fif", mne.transforms.Transform("head", "mri"))
        sphere = mne.make_sphere_model("auto", "auto", raw.info)
        source = mne.setup_volume_source_space(pos=60.0, sphere=sphere)
        source.save(root / "source-src.fif")
        forward = mne.make_forward_solution(raw.info, None, source, sphere, meg=False)
        mne.write_forward_solution(root / "forward-fwd.fif", forward)
        inverse = mne.minimum_norm.make_inverse_operator(raw.info, forward, covariance, fixed=False)
        mne.minimum_norm.write_inverse_operator(root / "inverse-inv.fif", inverse)
    for path in list(root.iterdir()):
        path.rename(root / f"{path.name.split('-')[0]}.fif")
    return root


def test_fif_files_without_a_recording_are_named_by_their_content(fif_files: Path) -> None:
    found = rows(fif_files)
    assert len(found) == 14
    for name, recording in found.items():
        if name in ("raw.fif", "epochs.fif"):
            assert recording.problem is None
        else:
            assert recording.problem is not None and recording.problem.category == "no recording"
            assert name.removesuffix(".fif") in recording.problem and not recording.continuous


def test_compressed_fif_files_are_named_by_their_content_as_well(tmp_path: Path, fif_files: Path) -> None:
    for path in fif_files.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "damaged.fif.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    problems = {name: recording.problem for name, recording in rows(tmp_path).items()}
    assert {name.split(".")[0] for name, problem in problems.items() if problem is None} == {"raw", "epochs", "damaged"}


def test_they_do_not_count_as_set_aside(fif_files: Path, shard_all) -> None:
    done = shard_all(fif_files)
    assert {sharded.row.status for path, sharded in done.items() if path not in ("raw.fif", "epochs.fif")} == {
        "excluded"
    }


def test_a_damaged_fif_file_is_not_called_something_else(tmp_path: Path, fif_files: Path) -> None:
    data = (fif_files / "covariance.fif").read_bytes()
    (tmp_path / "a.fif").write_bytes(data[: len(data) // 2])
    # The truncated file is recognised as a recording, and the reader of FIF reports the missing bytes later.
    assert rows(tmp_path)["a.fif"].problem is None


def test_positions_and_eye_movements_are_no_recordings(tmp_path: Path) -> None:
    for suffix in (".elp", ".hsp", ".sfp", ".elc", ".pos", ".bvef"):
        (tmp_path / f"sub-01{suffix}").write_text("Fp1 0.1 0.2 0.3\n")
    (tmp_path / "eyes.edf").write_bytes(b"SR_RESEARCH_COMBFILE\0" + bytes(400))
    found = rows(tmp_path)
    assert len(found) == 7
    assert {recording.problem.category for recording in found.values() if recording.problem} == {"no recording"}
    assert not any(recording.continuous for recording in found.values())


UNREAD = {
    "a.erd": (b"x", "Natus"),
    "b.acq": (b"x", "Biopac"),
    "c.easy": (b"1 2 3", "Neuroelectrics"),
    "d.smr": (b"x", "Spike2"),
    "e.smrx": (b"x", "Spike2"),
    "f.rhd": (b"\x02\x27\x91\xc6" + bytes(40), "Intan"),
    "f2.dat2": (b"\xac\x27\x91\xd6" + bytes(40), "Intan"),
    "g.wdq": (b"x", "WinDaq"),
    "h.lvm": (b"LabVIEW", "LabVIEW"),
    "i.pl2": (b"x", "Plexon"),
    "j.e": (b"x", "Nicolet"),
    "k.tdms": (b"TDSm" + bytes(30), "TDMS"),
    "l.abf": (b"ABF2" + bytes(30), "Axon"),
    "m.oebin": (b"{}", "Open Ephys"),
    "n.hea": (b"n 4 250 1000\nn.dat 16 200 16 0 0 0 0 Fp1\n", "WFDB"),
    "o.vpd": (b"x", "Cadwell"),
    "p.edf.gz": (gzip.compress(b"0"), "compressed .edf"),
    "q.bdf.bz2": (b"BZh", "compressed .bdf"),
    "r.7z": (b"7z", "archive"),
    "s.h5": (b"\x89HDF\r\n\x1a\n" + bytes(1 << 17), "HDF5"),
    "t.dat": (bytes(1 << 21), "binary"),
    "u.bin": (bytes(1 << 21), "binary"),
    "v.Poly5": (b"x", "TMSi"),
    "w.s01": (b"POLY SAMPLE FILEversion 2.03", "TMSi"),
    "x.nex": (b"NEX1", "NeuroExplorer"),
    "y.m00": (b"TimePoints=1000", "Nihon Kohden text"),
}


def test_recordings_without_a_reader_have_a_row(tmp_path: Path) -> None:
    for name, (data, _) in UNREAD.items():
        (tmp_path / name).write_bytes(data)
    found = rows(tmp_path)
    assert set(found) == set(UNREAD)
    for name, (_, words) in UNREAD.items():
        recording = found[name]
        assert recording.problem is not None and words in recording.problem and recording.continuous, name
        assert any(word in recording.problem for word in ("export", "convert", "unpack", "use the")), name


def test_a_large_file_of_an_unknown_kind_has_a_row(tmp_path: Path) -> None:
    large = bytes(range(256)) * 4096
    for name in ("a.amp", "b", "movie.AVI", "brain.nii.gz", "model.pt"):
        (tmp_path / name).write_bytes(large)
    (tmp_path / "small.amp").write_bytes(large[:-1])
    (tmp_path / "text.amp").write_bytes(b"words " * 200_000)
    (tmp_path / "image.dcm").write_bytes(bytes(128) + b"DICM")
    found = rows(tmp_path)
    assert set(found) == {"a.amp", "b", "image.dcm"} and not any(r.continuous for r in found.values())
    assert "a .amp file whose content is not known" in found["a.amp"].problem


def test_all_files_of_a_recording_have_one_row(tmp_path: Path) -> None:
    for name in ("a.erd", "a_001.erd", "a_002.erd", "a.eeg", "a.ent", "a.etc", "a.snc", "a.stc", "a.vtc", "a.epo"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("100_CH1.continuous", "100_CH2.continuous", "100_CH3.continuous"):
        (tmp_path / name).write_bytes(b"header.format = 'Open Ephys Data Format';")
    (tmp_path / "b.tev").write_bytes(b"x")
    for suffix in ("tbk", "tsq", "tdx"):
        (tmp_path / f"b.{suffix}").write_bytes(b"x")
    (tmp_path / "n.hea").write_text("n 4 250 1000\n")
    (tmp_path / "n.mat").write_bytes(b"MATLAB 4")
    (tmp_path / "c.easy").write_text("1 2 3")
    (tmp_path / "c.nedf").write_bytes(b"<NEDFversion>")
    assert set(rows(tmp_path)) == {"a.erd", "100_CH1.continuous", "b.tev", "n.hea", "c.nedf"}


def test_archives_are_reported_if_they_hold_recordings(tmp_path: Path) -> None:
    for name, inside in (("eeg.zip", ["sub-01/a.edf", "b.bdf"]), ("pictures.zip", ["a.jpg"])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry in inside:
                archive.writestr(entry, b"x")
    for name, inside in (("eeg.tar", ["a.vhdr", "a.eeg"]), ("pictures.tar", ["a.png"])):
        with tarfile.open(tmp_path / name, "w") as archive:
            for entry in inside:
                archive.addfile(tarfile.TarInfo(entry), io.BytesIO())
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04broken")
    found = rows(tmp_path)
    assert set(found) == {"eeg.zip", "eeg.tar", "broken.zip"}
    assert "2 recordings such as a.edf" in found["eeg.zip"].problem and "unpack" in found["eeg.tar"].problem


def test_text_tables_are_reported_only_if_they_hold_a_signal(tmp_path: Path) -> None:
    lines = [",".join(f"{value:.2f}" for value in row) for row in np.random.default_rng(0).normal(size=(40, 5))]
    signal = "\n".join(lines)
    (tmp_path / "wide.csv").write_text(f"time,Fp1,Fp2,C3,C4\n{signal}\n")
    (tmp_path / "muse.csv").write_text(f"t,RAW_TP9,RAW_AF7,RAW_AF8,RAW_TP10\n{signal}\n")
    (tmp_path / "emotiv.tsv").write_text(f"EEG.AF3,EEG.F7,EEG.F3,EEG.FC5,EEG.T7\n{signal}\n".replace(",", "\t"))
    (tmp_path / "openbci.txt").write_text("%OpenBCI Raw EXG Data\n%Number of channels = 8\n0, 1.0\n")
    across = ["\t".join([name, *(str(i) for i in range(300))]) for name in NAMES]
    (tmp_path / "across.txt").write_text("\n".join(across))
    (tmp_path / "events.tsv").write_text("onset\tduration\ttrial_type\n" + "1.0\t0.5\tface\n" * 50)
    (tmp_path / "channels.tsv").write_text("name\ttype\tunits\n" + "".join(f"{n}\tEEG\tuV\n" for n in NAMES))
    (tmp_path / "electrodes.tsv").write_text("name\tx\ty\tz\n" + "".join(f"{n}\t0.1\t0.2\t0.3\n" for n in NAMES * 9))
    (tmp_path / "scores.csv").write_text("id,age,sex,score\n" + "1,20,F,3.5\n" * 50)
    (tmp_path / "README.txt").write_text("Electrodes: Fp1 Fp2 C3 C4 were used.\n" + "More words follow.\n" * 30)
    (tmp_path / "about.json").write_text(json.dumps({"Fp1": 1}))
    comma = signal.replace(",", ";").replace(".", ",")
    (tmp_path / "semicolon.csv").write_text(f"t;Fp1;Fp2;C3;C4\n{comma}\n")
    (tmp_path / "numbers.asc").write_text("Rate 250\n" + f"{signal}\n".replace(",", " ") * 1000)
    (tmp_path / "few numbers.asc").write_text(f"{signal}\n".replace(",", " ") * 10)
    (tmp_path / "words.txt").write_text("one 2 3 4 five\n" * 100_000)
    found = rows(tmp_path)
    names = {"wide.csv", "muse.csv", "emotiv.tsv", "openbci.txt", "across.txt", "semicolon.csv", "numbers.asc"}
    assert set(found) == names
    assert all(recording.problem and "kind arrays" in recording.problem for recording in found.values())


def test_arrays_are_reported_if_they_can_be_a_signal(tmp_path: Path) -> None:
    np.save(tmp_path / "signal.npy", np.zeros((8, 5000), np.float32))
    np.save(tmp_path / "epochs.npy", np.zeros((20, 8, 500), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(50_000, int))
    np.save(tmp_path / "small.npy", np.zeros((2, 200)))
    np.savez(tmp_path / "many.npz", eeg=np.zeros((8, 5000)))
    (tmp_path / "small.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    found = rows(tmp_path)
    assert set(found) == {"signal.npy", "epochs.npy", "many.npz"}
    assert not any(recording.continuous for recording in found.values())
