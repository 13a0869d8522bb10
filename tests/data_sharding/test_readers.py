"""Files are known by their content, and everything that claims to be a recording is accounted for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_sharding.readers import NotContinuous, ReadError, find_recordings, neuroscan_data_format, read, sniff


def cnt_header(n_channels: int, n_samples: int, events: int) -> bytearray:
    head = bytearray(900 + 75 * n_channels)
    head[:11] = b"Version 3.0"
    head[370:372] = n_channels.to_bytes(2, "little")
    head[864:868] = n_samples.to_bytes(4, "little")
    head[886:890] = events.to_bytes(4, "little")
    return head


class TestSniff:
    @pytest.mark.parametrize("suffix", [".edf", ".bdf", ".vhdr", ".set", "_raw.fif"])
    def test_written_formats(self, tmp_path: Path, make_raw, write_raw, suffix: str) -> None:
        raw = make_raw(4, 200, 3)
        path = write_raw(raw, tmp_path / f"a{suffix}")
        found = find_recordings(tmp_path)
        assert [r.path for r in found] == [path] and found[0].problem is None
        assert set(found[0].files) == set(tmp_path.iterdir())
        back = read(found[0])
        assert back.ch_names[:4] == raw.ch_names and back.info["sfreq"] == 200
        np.testing.assert_allclose(back.get_data()[:4, :600], raw.get_data(), atol=0.05e-6)

    def test_the_name_does_not_decide(self, tmp_path: Path, make_raw, write_raw) -> None:
        path = write_raw(make_raw(3, 100, 3), tmp_path / "a.edf")
        renamed = path.rename(tmp_path / "a.bdf")
        recording = sniff(renamed)
        assert recording is not None and recording.format == "edf"

    def test_cnt_of_two_makers(self, tmp_path: Path) -> None:
        (tmp_path / "neuroscan.cnt").write_bytes(cnt_header(2, 10, 0) + bytes(40))
        (tmp_path / "ant.cnt").write_bytes(b"RIFF\x00\x01\x00\x00CNT LIST" + bytes(100))
        (tmp_path / "ant64.cnt").write_bytes(b"RF64\x00\x01\x00\x00\x00\x00\x00\x00CNT LIST" + bytes(100))
        (tmp_path / "other.cnt").write_bytes(b"something else")
        got = {r.path.stem: (r.format, r.problem) for r in find_recordings(tmp_path)}
        assert got["neuroscan"] == ("neuroscan", None) and got["ant"] == got["ant64"] == ("ant", None)
        assert got["other"][1] is not None

    def test_sidecars_are_no_recordings(self, tmp_path: Path) -> None:
        for name in ("x.EEG", "x.PNT", "x.LOG", "x.21E"):
            (tmp_path / name).write_bytes(b"EEG-1100C V01.00" + bytes(200))
        (tmp_path / "y.cdt").write_bytes(bytes(100))
        (tmp_path / "y.cdt.dpa").write_text("DATA_PARAMETERS START")
        (tmp_path / "z.lay").write_text("[FileInfo]\nFile=C:\\data\\z.dat\n")
        (tmp_path / "z.dat").write_bytes(bytes(10))
        got = {r.path.name: (r.format, len(r.files), r.problem) for r in find_recordings(tmp_path)}
        assert got == {"x.EEG": ("nihon", 4, None), "y.cdt": ("curry", 2, None), "z.lay": ("persyst", 2, None)}

    def test_missing_sidecars_are_named(self, tmp_path: Path, make_raw, write_raw) -> None:
        write_raw(make_raw(2, 100, 2), tmp_path / "a.vhdr").with_suffix(".eeg").unlink()
        (tmp_path / "y.cdt").write_bytes(bytes(100))
        (tmp_path / "z.lay").write_text("[FileInfo]\nFile=z.dat\n")
        (tmp_path / "f.mff").mkdir()
        (tmp_path / "f.mff" / "info.xml").write_text("<x/>")
        (tmp_path / "alone.eeg").write_bytes(bytes(100))
        found = find_recordings(tmp_path)
        assert len(found) == 5
        assert all("missing" in r.problem or "without its header" in r.problem for r in found if r.problem) and all(
            r.problem for r in found
        )
        with pytest.raises(ReadError, match="sidecar missing"):
            read(found[0] if found[0].format == "brainvision" else found[1])

    def test_truncated_and_empty(self, tmp_path: Path, make_raw, write_raw) -> None:
        path = write_raw(make_raw(4, 200, 10), tmp_path / "cut.edf")
        path.write_bytes(path.read_bytes()[:-3000])
        (tmp_path / "empty.bdf").write_bytes(b"")
        (tmp_path / "garbage.edf").write_bytes(b"not an EEG file at all")
        (tmp_path / "notes.txt").write_text("nothing")
        (tmp_path / "._cut.edf").write_bytes(b"\x00\x05\x16\x07")
        got = {r.path.name: r.problem or "" for r in find_recordings(tmp_path)}
        assert set(got) == {"cut.edf", "empty.bdf", "garbage.edf"}
        assert got["cut.edf"].startswith("truncated: the header promises 10 records")
        assert "empty" in got["empty.bdf"] and "unreadable" in got["garbage.edf"]

    def test_gaps_in_edf_plus_are_found(self, tmp_path: Path, make_raw, write_raw) -> None:
        import mne

        raw = make_raw(2, 100, 4)
        raw.set_annotations(mne.Annotations([1.0], [0.1], ["x"]))
        path = write_raw(raw, tmp_path / "a.edf")
        data = bytearray(path.read_bytes())
        assert data[192:197] == b"EDF+C"
        data[192:197] = b"EDF+D"
        path.write_bytes(data)
        assert sniff(path).problem is None
        path.write_bytes(bytes(data).replace(b"+2\x14\x14", b"+9\x14\x14", 1))
        assert "discontinuous" in (sniff(path).problem or "")

    def test_epochs_are_not_continuous(self, tmp_path: Path, make_raw) -> None:
        import mne

        epochs = mne.make_fixed_length_epochs(make_raw(3, 100, 4), 1.0, verbose="ERROR")
        epochs.save(tmp_path / "a-epo.fif", verbose="ERROR")
        epochs.export(tmp_path / "b.set", verbose="ERROR")
        for recording in find_recordings(tmp_path):
            with pytest.raises(NotContinuous):
                read(recording)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("counted", [True, False])
def test_neuroscan_bits(tmp_path: Path, bits: int, counted: bool) -> None:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, 20, (500, 6)), axis=0).astype(f"<i{bits // 8}")
    size = 900 + 75 * 6 + x.nbytes
    path = tmp_path / "a.cnt"
    path.write_bytes(bytes(cnt_header(6, 500 if counted else 7, size)) + x.tobytes() + bytes(60))
    assert neuroscan_data_format(path) == f"int{bits}"


def test_fif_parts_belong_together(tmp_path: Path, make_raw) -> None:
    raw = make_raw(8, 1000, 60)
    raw.save(tmp_path / "long_raw.fif", split_size="2MB", buffer_size_sec=1, verbose="ERROR")
    assert len(list(tmp_path.iterdir())) > 1
    found = find_recordings(tmp_path)
    assert len(found) == 1 and set(found[0].files) == set(tmp_path.iterdir())
    assert read(found[0]).n_times == raw.n_times


def test_folders_are_walked_once(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(2, 100, 2), tmp_path / "deep" / "er" / "a.edf")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(path, tmp_path / ".hidden" / "b.edf")
    assert [r.path for r in find_recordings(tmp_path)] == [path]


def test_a_link_in_a_circle_ends(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(2, 100, 2), tmp_path / "sub" / "a.edf")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [r.path for r in find_recordings(tmp_path)] == [path]
